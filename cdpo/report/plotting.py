"""How the figures of a report look: one style, panels with one legend; and their forms: PNG, SVG, SVG within a page.

The same figures give the same bytes. Within a page, ink and paper take the colours of the page, light or dark.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK, PAPER, FAINT = "#24292f", "#fffffe", "#d0d6dd"  # colours that a page replaces by its own, see `inline`
THEMED = {INK: "currentColor", PAPER: "var(--paper)", FAINT: "var(--faint)"}
COLOURS = ("#0a7bc2", "#d9640d", "#0a9a73", "#c46bb5", "#b8860b", "#8a6fd1", "#d03b4b", "#3aa6b9", "#7a8a2a", "#9a6a4f")
MARKERS = "osD^vPX<>*pd"
READABLE = 420  # pt; a page that is narrower scrolls a figure rather than shrink it further
DASHES = ("-", "--", ":", "-.")
PANELS = 15  # in one figure; more are not read
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the font of the page
    "svg.hashsalt": "cdpo",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
}


@dataclass(frozen=True)
class Drawing:
    """A figure with the name of its file, what it shows, and what one would see, for those who cannot."""

    name: str
    caption: str
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Look:
    """How a loss or a constraint is drawn, in every figure of a report."""

    color: str
    marker: str
    dashes: str
    width: float = 1.5

    def line(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker, "linestyle": self.dashes, "linewidth": self.width}


def looks(names: Sequence[str], ceilings: Sequence[str] = ()) -> dict[str, Look]:
    """A look for each name: thick ink for RLHF, then colours with dashes, which let lines that coincide be seen."""
    found, n = {name: Look(INK, "o", "-", 2.2) for name in ceilings}, len(COLOURS)
    for i, name in enumerate(name for name in names if name not in found):
        found[name] = Look(COLOURS[i % n], MARKERS[(i + 1) % len(MARKERS)], DASHES[i % len(DASHES)])
    return found


def style() -> Any:
    """The context in which figures are made and saved."""
    return matplotlib.rc_context(STYLE)


def panels(
    titles: Sequence[str], columns: int = 3, size: tuple[float, float] = (2.9, 2.3), left_out: int = 0, **axes: Any
) -> Panels:
    """One figure with an empty panel of `size` inches for each of the first PANELS titles."""
    shown = list(titles)[:PANELS]
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(columns * size[0] + 0.3, rows * size[1] + 0.5), layout="constrained")
    FigureCanvasAgg(figure)  # seaborn draws on it; without a canvas it would ask pyplot for one
    grid = list(figure.subplots(rows, columns, squeeze=False, **axes).flat)
    for unused in grid[len(shown) :]:
        unused.remove()
    for one, title in zip(grid, shown):
        one.set_title(title, wrap=True)
    return Panels(figure, dict(zip(shown, grid)), left_out + len(titles) - len(shown))


@dataclass(frozen=True)
class Panels:
    """A figure, its axes by title, and how many panels (or rows) were left out."""

    figure: Figure
    axes: dict[str, Axes]
    left_out: int

    @property
    def first(self) -> Axes:
        return next(iter(self.axes.values()))

    def items(self) -> list[tuple[str, Axes]]:
        return list(self.axes.items())

    def labels(self, x: str, y: str) -> None:
        """Names of the axes, on the lowest panel of each column and on the first of each row."""
        for axes in self.axes.values():
            place = axes.get_subplotspec()
            assert place is not None
            below = [other for other in self.axes.values() if other is not axes and _is_below(other, axes)]
            axes.set(xlabel="" if below else x, ylabel=y if place.is_first_col() else "")

    def legend(self, beside: bool = False) -> None:
        """One legend, with each label once, below the panels (which keep their height) or beside them."""
        found: dict[str, Any] = {}
        for axes in self.axes.values():
            handles, labels = axes.get_legend_handles_labels()
            found |= {label: handle for handle, label in zip(handles, labels) if label not in found}
        width, height = self.figure.get_size_inches()
        entry = 0.07 * max(map(len, found), default=1) + 0.5  # inches
        columns = 1 if beside else max(1, min(len(found), int(width / entry)))
        extra = (entry, 0.0) if beside else (0.0, 0.17 * -(-len(found) // columns))
        self.figure.set_size_inches(width + extra[0], height + extra[1])
        if found:
            place: Any = "outside right upper" if beside else "outside lower center"
            self.figure.legend(list(found.values()), list(found), loc=place, ncols=columns)

    def drawing(self, name: str, caption: str, alt: str) -> Drawing:
        """The finished figure; the caption says what was left out."""
        cut = f" {self.left_out} more are left out; gap.csv and the run directories have them." if self.left_out else ""
        return Drawing(name, caption + cut, alt, self.figure)


def _is_below(one: Axes, other: Axes) -> bool:
    low, high = one.get_subplotspec(), other.get_subplotspec()
    assert low is not None
    assert high is not None
    return low.colspan.start == high.colspan.start and low.rowspan.start > high.rowspan.start


def line(axes: Axes, points: Sequence[tuple[float, float, float]], look: Look, label: str, band: bool = False) -> None:
    """Means over x with intervals, as bars or as a band; (x, mean, half an interval or NaN)."""
    x, mean, half = zip(*sorted(points))
    spread = [value if value == value else 0.0 for value in half]
    marks = {} if len(x) <= 12 else {"marker": None}
    if band:
        axes.plot(x, mean, label=label, **look.line() | {"marker": None})
        low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread)))
        axes.fill_between(x, low, high, color=look.color, alpha=0.18, linewidth=0)
    else:
        axes.errorbar(x, mean, yerr=spread, label=label, capsize=2, elinewidth=0.8, **look.line() | marks)


def focus(limit: Callable[..., Any], means: Iterable[float], drawn: tuple[float, float]) -> None:
    """Limits of an axis, now `drawn`, that show all means; of their intervals as much again, wide as they may be."""
    known = [mean for mean in means if mean == mean]
    room = (max(known) - min(known) or 1.0) / 2 if known else math.inf
    limit(max(drawn[0], min(known, default=0.0) - room), min(drawn[1], max(known, default=0.0) + room))


def hollow(axes: Axes, points: Sequence[tuple[float, float]], look: Look) -> None:
    """Markers over those that are there: of numbers that are no optimum, or not known to be."""
    marks = look.line() | {"linestyle": "none", "markerfacecolor": PAPER}
    axes.plot(*np.reshape(points, (-1, 2)).T, zorder=5, **marks)


def hatch(axes: Axes, cells: pd.DataFrame) -> None:
    """Hatch those cells of a `heat` that are true."""
    for row, column in np.argwhere(cells.to_numpy(bool)):
        marks: dict[str, Any] = {"facecolor": "none", "edgecolor": FAINT, "linewidth": 0.0, "hatch": "////"}
        axes.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, zorder=0.5, **marks))


def heat(axes: Axes, values: pd.DataFrame, texts: pd.DataFrame, low: float, high: float) -> None:
    """A table as colours between `low` and `high`, with texts of the same shape written in; – for none."""
    palette = seaborn.color_palette("flare", as_cmap=True)
    options = {"cbar": False, "linewidths": 1, "linecolor": PAPER, "xticklabels": 1, "yticklabels": 1}  # a tick each
    seaborn.heatmap(values, ax=axes, cmap=palette, vmin=low, vmax=high, **options)
    for row, column in np.ndindex(values.shape):
        value = values.iloc[row, column]
        ink = INK if value != value else _readable(palette((value - low) / (high - low)))
        words = texts.iloc[row, column] or "–"
        axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlabel=None, ylabel=None)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xticks(axes.get_xticks(), values.columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(axes.get_yticks(), values.index, rotation=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _readable(color: tuple[float, ...]) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG 2, relative luminance)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def forms(figure: Figure) -> dict[str, bytes]:
    """The files of a figure: extension -> content, without dates."""
    figure.draw_without_rendering()  # which lays it out, once
    figure.set_layout_engine(None)
    found = {}
    for extension, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        image = io.BytesIO()
        figure.savefig(image, format=extension, dpi=160, metadata=metadata)
        found[extension] = image.getvalue()
    return found


def inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: without head, its ids with a prefix, ink and paper those of the page."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = body.replace("*{stroke", f"#{name}-figure_1 *{{stroke")  # its style sheet is for itself only
    for colour, themed in THEMED.items():
        body = body.replace(colour, themed)
    width = float(re.search(r'width="([\d.]+)pt"', body)[1])  # type: ignore[index]
    head = f'<svg role="img" aria-label="{html.escape(alt)}" style="min-width:{min(width, READABLE):g}pt" '
    return body.replace("<svg ", head, 1)
