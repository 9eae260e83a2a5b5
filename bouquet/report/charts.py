"""Line, bar and dot charts by matplotlib as inline SVG, whose colours and font are the page's own (light, dark, print).

Enters: numbers. Leaves: SVG text. No text of a site's enters a chart: names stand in the page's legends, by series
number. Colours are drawn as placeholders (#0000NN; never black, which matplotlib leaves out) and become CSS variables:
--ink, --soft, --line, --c0 to --c7.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, SOFT, LINE = "#0000f0", "#0000f1", "#0000f2"
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line"} | {f"#00001{i}": f"--c{i}" for i in range(8)}
COLOURS, MARKERS = [f"#00001{i}" for i in range(8)], "os^DvPX*"
MARKS = "●■▲◆▼✚✖★"  # the legend's signs for MARKERS
STYLE = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}
Series = Sequence[tuple[float, float]]


def lines(series: Iterable[Series], mean: Series, x: str, title: str) -> str:
    """A line for each series, in the order of the legend; past the eighth they are grey. `mean` is dashed, in ink."""

    def draw(axes: Axes) -> None:
        for i, points in enumerate(series):
            if not points:
                continue
            colour, marker, width = (COLOURS[i], MARKERS[i], 2) if i < 8 else (LINE, "", 1)
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, linewidth=width, zorder=2 if i < 8 else 1
            )
        if mean:
            axes.plot(*zip(*mean, strict=True), color=INK, linestyle=(0, (4, 3)), linewidth=1.5, zorder=3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x)

    return _svg(draw, title)


def stacks(parts: Sequence[Sequence[float]], rounds: Sequence[int], title: str) -> str:
    """A bar a round, parts[i][round] on top of each other in the order of the legend."""

    def draw(axes: Axes) -> None:
        below = [0.0] * len(rounds)
        for i, part in enumerate(parts):
            colour = COLOURS[i] if i < len(parts) - 1 else LINE
            axes.bar(rounds, part, bottom=below, color=colour, width=0.7)
            below = [a + b for a, b in zip(below, part, strict=True)]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        axes.set_ylabel("seconds")

    return _svg(draw, title)


def dots(values: Mapping[str, Sequence[float]], title: str) -> str:
    """A column of dots for each name, one a seed, and a bar at their mean. The names are the report's own words."""

    def draw(axes: Axes) -> None:
        for x, shown in enumerate(values.values()):
            spread = [x + 0.12 * (i - (len(shown) - 1) / 2) for i in range(len(shown))]
            axes.plot(spread, shown, "o", color=COLOURS[0])
            axes.hlines(sum(shown) / len(shown), x - 0.3, x + 0.3, color=INK, linewidth=1.5)
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlim(-0.6, len(values) - 0.4)

    return _svg(draw, title, height=2.4)


def gains(rows: Mapping[str, Sequence[tuple[int, float, float | None]]], title: str) -> str:
    """Rows for each letter that stands for a site: of each (series, %, half of its interval) a dot with its interval,
    before a grey band of the same width around 0, where seeds alone may put it. A dot without an interval is hollow.
    """
    every = [(abs(gain), band or 0) for row in rows.values() for _, gain, band in row]
    whole, most = max(gain + band for gain, band in every), max(gain for gain, _ in every)
    far = min(whole, 4 * most) or whole or 1  # of two seeds an interval may be so long that nothing else is seen

    def draw(axes: Axes) -> None:
        ticks, y = [], 0.0
        for row in rows.values():
            ticks.append(y + 0.5 * (len(row) - 1))
            for series, gain, band in row:
                if band is not None:
                    axes.barh(y, 2 * band, 0.7, -band, color=LINE)
                    axes.hlines(y, gain - band, gain + band, color=COLOURS[series], linewidth=1.5, zorder=3)
                face = COLOURS[series] if band is not None else "none"
                axes.plot(gain, y, MARKERS[series], color=COLOURS[series], markerfacecolor=face, zorder=4, markersize=7)
                y += 1
            y += 0.7
        axes.axvline(0, color=INK, linewidth=1, zorder=2)
        axes.set_yticks(ticks, list(rows))
        axes.set_ylim(y - 0.7 + 0.2, -1.2)
        axes.set_xlim(-1.1 * far, 1.1 * far)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_xlabel("% of the loss that joining takes away; left of 0 it adds")

    return _svg(draw, title, height=1.1 + 0.24 * sum(map(len, rows.values())) + 0.17 * len(rows))


def strip(rows: dict[str, Sequence[float]], limit: float, title: str) -> str:
    """A row of dots for each name; dots of the last row below `limit` are rings of another colour. The names are the
    report's own words.
    """

    def draw(axes: Axes) -> None:
        for y, values in enumerate(rows.values()):
            last = y == len(rows) - 1
            for i, value in enumerate(values):
                marked = last and value < limit
                at = y + 0.12 * (i % 3 - 1)
                axes.plot(
                    value,
                    at,
                    "o",
                    color=COLOURS[1 if marked else 0],
                    markerfacecolor="none" if marked else COLOURS[0],
                    markeredgewidth=1.5,
                )
        axes.axvline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel("0 is a copy of one photo, 1 is near to all alike")

    return _svg(draw, title, height=1.8)


def _svg(draw: Callable[[Axes], object], title: str, height: float = 3.0) -> str:
    """The drawing as an <svg> that may stand in HTML: no clashing ids, no metadata; the page gives colours, fonts."""
    style: Any = STYLE | {"svg.hashsalt": title, "svg.id": None}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"#0000[0-9a-f]{2}", lambda found: f"var({VARIABLES[found[0]]})", text)
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1system-ui, sans-serif", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # matplotlib numbers them alike in every chart
    size = re.search(r'viewBox="[^"]+"', text)
    assert size is not None  # every figure has one
    return re.sub(
        r"<svg\b[^>]*>",
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {size[0]} role="img" aria-label="{title}">',
        text,
        count=1,
    )
