"""Curves in characters, for a terminal.

sparkline([0.1, 0.4, 0.9], width=20)                   # ▁▄█
curves({"val": [0.5, 0.7], "train": [0.4, 0.8]}, ...)  # lines of text with an axis
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from search.results import decimal

_BLOCKS = "▁▂▃▄▅▆▇█"
MARKERS = "●·+x"  # of the first curve, the second ...


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` characters, the last value always among them; lowest ▁, highest █."""
    if not values or width < 1:
        return ""
    if len(values) > width:
        last = len(values) - 1
        values = [values[round(at * last / max(1, width - 1))] for at in range(width - 1)] + [
            values[last]
        ]
    low, high = min(values), max(values)
    if high == low:
        return _BLOCKS[-1] * len(values)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / (high - low) * top)] for value in values)


def curves(
    series: Mapping[str, Sequence[float | None]],
    steps: Sequence[int],
    *,
    width: int,
    height: int = 10,
) -> list[str]:
    """Lines of a plot: one position for each report, from the left; the first curve on top.

    Args:
        series: values by name, the first report first; None or not finite where there is none.
        steps: of the reports.
        width: characters of the whole, the axis included.
        height: lines of the curves, at least 2.

    Returns:
        The lines, the last two an axis and a legend; none where there is nothing to draw.
    """
    points = [value for values in series.values() for value in values if _is_drawn(value)]
    if not points:
        return []
    low, high = min(points), max(points)  # type: ignore[type-var]
    labels = decimal(high), decimal(low)
    margin = max(map(len, labels))
    num_steps = max(len(values) for values in series.values())
    columns = max(1, min(width - margin - 3, max(4 * num_steps - 3, 12)))
    canvas = [[" "] * columns for _ in range(height)]
    for marker, values in reversed(list(zip(MARKERS, series.values(), strict=False))):
        for step, value in enumerate(values):
            if not _is_drawn(value):
                continue
            x = round(step / max(1, num_steps - 1) * (columns - 1))
            share = 0.5 if high == low else (value - low) / (high - low)  # type: ignore[operator]
            canvas[height - 1 - round(share * (height - 1))][x] = marker
    sides = [labels[0], *[""] * (height - 2), labels[1]]
    lines = [
        f"{side:>{margin}} ┤{''.join(row)}".rstrip()
        for side, row in zip(sides, canvas, strict=True)
    ]
    first, last = str(steps[0]), str(steps[-1])
    between = max(1, columns - len(first) - len(last))
    ends = f"{first}{'report' if between >= 8 else '':^{between}}{last}"
    legend = "   ".join(f"{mark} {name}" for mark, name in zip(MARKERS, series, strict=False))
    return [*lines, f"{'':{margin}}  {ends}", f"{'':{margin}}  {legend}"]


def _is_drawn(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
