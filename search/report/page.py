"""The page itself: parts of HTML, put together with the style, the script and plotly.js.

    page.document("cnn", "Which network is best?", [page.section("answer", "The answer", parts)])

One file that loads nothing: a content security policy forbids it. Whatever comes from the user
goes through `text`, or through `label` where plotly.js shows it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from search.report import theme

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)
_LABEL = 80  # characters


class Html(str):
    """Text that is HTML already."""


def text(value: Any) -> Html:
    """Any value as it can stand in HTML; what is HTML stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def label(value: Any) -> str:
    """Any value as plotly.js, which reads some HTML, shows it literally."""
    shown = str(value)
    shown = shown if len(shown) <= _LABEL else f"{shown[: _LABEL - 1]}…"
    return html.escape(shown, quote=False)


def plot(
    title: str, figure: go.Figure, caption: str = "", *, height: int = 340, least_width: int = 0
) -> Html:
    """A figure with what it is and what it shows.

    Args:
        height: in CSS pixels.
        least_width: in CSS pixels; on a narrower screen the figure is scrolled sideways.
    """
    spec = json.loads(figure.to_json())
    for name in ("template", "title", "width", "height"):
        spec["layout"].pop(name, None)
    # In a script element only "<" could end it or open a comment.
    content = json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c")
    return Html(
        f'<figure class="plot"><h3>{text(title)}</h3><div class="scroll">'
        f'<div class="chart" style="height:{height}px;min-width:{least_width}px" role="img" '
        f'aria-label="{text(title)}"><script type="application/json">{content}</script></div>'
        f"</div>{_caption(caption)}</figure>"
    )


def columns(parts: Sequence[Html], *, narrow: bool = False) -> Html:
    """Parts side by side where there is room."""
    return Html(f'<div class="columns{" narrow" if narrow else ""}">{"".join(parts)}</div>')


def note(words: Any, *, warns: bool = False) -> Html:
    return Html(f'<p class="note{" warns" if warns else ""}">{text(words)}</p>')


def paragraph(words: Any) -> Html:
    return Html(f"<p>{text(words)}</p>")


def heading(words: str, caption: str = "") -> Html:
    return Html(f"<h3>{text(words)}</h3>{_caption(caption, 'p')}")


def code(words: str) -> Html:
    return Html(f"<pre>{text(words)}</pre>")


def folded(summary: str, parts: Iterable[Html]) -> Html:
    """Parts that are shown on a click, and in print."""
    return Html(f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>")


def tiles(pairs: Iterable[tuple[str, Any, Any]]) -> Html:
    """Figures with a name above and a remark below."""
    shown = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(remark)}</small></dd></div>"
        for name, value, remark in pairs
    )
    return Html(f'<dl class="tiles">{shown}</dl>')


def pairs(values: Iterable[tuple[Any, Any]], *, wide: bool = False) -> Html:
    """Names with their values; `wide` for long ones."""
    shown = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in values
    )
    return Html(f'<dl class="pairs{" wide" if wide else ""}">{shown}</dl>')


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """The first column names the row."""
    head = "".join(f"<th scope=col>{text(name)}</th>" for name in headings)
    body = "".join(
        f"<tr><th scope=row>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}"
        for first, *rest in rows
    )
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</thead><tbody>{body}</tbody></table></div>'
    )


def section(anchor: str, title: str, parts: Iterable[Html]) -> Html:
    return Html(f'<section id="{text(anchor)}"><h2>{text(title)}</h2>{"".join(parts)}</section>')


def document(
    title: str, question: str, sections: Sequence[tuple[str, str, list[Html]]], mark: str
) -> str:
    """The whole file.

    Args:
        sections: anchor, title and parts of each.
        mark: of what it shows (search/report/source.py).
    """
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name, _ in sections)
    body = "".join(section(*one) for one in sections)
    files = resources.files("search.report")
    style, script = ((files / f"page.{kind}").read_text() for kind in ("css", "js"))
    colors = json.dumps({"dark": theme.COLORS, "categories": theme.CATEGORIES})
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="made-from" content="{text(mark)}">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}: report</title><style>{style}</style></head><body>"
        f"<header><h1>{text(title)}</h1><p>{text(question)}</p><nav>{links}</nav></header>"
        f"<main>{body}</main>"
        f"<script>{get_plotlyjs()}</script>"
        f"<script>const COLORS = {colors};\n{script}</script></body></html>\n"
    )


def _caption(words: str, tag: str = "figcaption") -> str:
    return f'<{tag} class="caption">{text(words)}</{tag}>' if words else ""
