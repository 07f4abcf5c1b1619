// Draws the figures one after another, so that the page can be read meanwhile, each in the colours
// of the reader's theme; on paper always in those for light ground.
"use strict";

const darkQuery = matchMedia("(prefers-color-scheme: dark)");
const isTouch = matchMedia("(pointer: coarse)").matches;
const charts = [...document.querySelectorAll(".chart")].map((div) => {
  const script = div.querySelector("script");
  const spec = JSON.parse(script.textContent);
  script.remove();
  return { div, spec };
});

function inDark(value) {
  if (typeof value === "string") return COLORS.dark[value] ?? value;
  if (Array.isArray(value)) return value.map(inDark);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, inDark(inner)]));
}

function template(isDark) {
  const [ink, line, ground] = isDark
    ? ["#c9c7c0", "#3a3936", "#232320"] : ["#55534e", "#e4e2db", "#ffffff"];
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line };
  const colorbar = { thickness: 10, outlinewidth: 0 };
  return {
    layout: {
      font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      colorway: isDark ? inDark(COLORS.categories) : COLORS.categories,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
      legend: { traceorder: "normal" },
      hoverlabel: { bgcolor: ground, bordercolor: line, font: { color: ink, size: 12 }, align: "left" },
      xaxis: axis,
      yaxis: axis,
    },
    data: { heatmap: [{ colorbar }], contour: [{ colorbar }], scatter: [{ marker: { colorbar } }] },
  };
}

function draw({ div, spec }, isDark, isOnPaper = false) {
  const { data, layout } = isDark ? inDark(spec) : structuredClone(spec);
  layout.template = template(isDark);
  layout.autosize = true;
  if (isOnPaper) layout.width = div.clientWidth; // measured at once: nothing waits for a resize
  if (isTouch) layout.dragmode = false; // a finger scrolls the page
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: !isTouch,
    modeBarButtons: [["toImage", "resetScale2d"]], // none that sends anything anywhere
  };
  return Plotly.react(div, data, layout, config);
}

function drawAll(isDark, isOnPaper = false) {
  charts.forEach((chart) => draw(chart, isDark, isOnPaper));
}

function drawFrom(index) {
  if (index === charts.length) {
    document.documentElement.dataset.drawn = String(index);
    return;
  }
  draw(charts[index], darkQuery.matches);
  setTimeout(drawFrom, 0, index + 1);
}

let folded = [];
darkQuery.addEventListener("change", () => drawAll(darkQuery.matches));
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((one) => { one.open = true; });
  document.body.classList.add("paper"); // as wide as a page, while figures are measured
  drawAll(false, true);
});
addEventListener("afterprint", () => {
  document.body.classList.remove("paper");
  folded.forEach((one) => { one.open = false; });
  drawAll(darkQuery.matches);
});
document.querySelectorAll("details").forEach((one) => {
  one.addEventListener("toggle", () => {
    one.querySelectorAll(".chart").forEach((div) => Plotly.Plots.resize(div));
  });
});
drawFrom(0);
