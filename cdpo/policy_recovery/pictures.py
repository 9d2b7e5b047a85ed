"""Phase diagrams as images: a panel per method, the share recovered in colour, and where it crosses one half."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from cdpo.policy_recovery.results import Array, Diagram

COLUMNS = 4  # panels beside each other
COLOURS = "cividis"  # safe for colour-blind eyes


def picture(diagram: Diagram, baseline: str, title: str) -> Figure:
    """All methods of a diagram; dashed, the line of the baseline in every panel."""
    names = diagram.methods
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 2.3 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, squeeze=False, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, names):
        image = _panel(axes, diagram, name)
        _half(axes, diagram.rates(baseline), "--")
        _half(axes, diagram.rates(name), "-")
    for unused in list(panels.flat)[len(names) :]:
        unused.remove()
    figure.supxlabel(diagram.columns.label)
    figure.supylabel(diagram.rows.label)
    figure.suptitle(f"{title}; solid: one half, dashed: that of {baseline}")
    figure.colorbar(image, ax=panels, label="share recovered")
    return figure


def forms(figure: Figure) -> dict[str, bytes]:
    """The files of a figure: extension -> content."""
    found = {}
    for extension in ("png", "svg"):
        image = io.BytesIO()
        figure.savefig(image, format=extension, dpi=150)
        found[extension] = image.getvalue()
    return found


def _panel(axes: Axes, diagram: Diagram, method: str) -> AxesImage:
    """Cells of equal size, whatever the values, which are written at the ticks."""
    image = axes.imshow(diagram.rates(method), origin="lower", aspect="auto", cmap=COLOURS, vmin=0, vmax=1)
    for axis, ticks in ((axes.xaxis, diagram.columns.values), (axes.yaxis, diagram.rows.values)):
        axis.set_ticks(range(len(ticks)), [f"{value:.3g}" for value in ticks], fontsize=7)
    axes.tick_params(axis="x", rotation=60)
    axes.set_title(method, fontsize=9)
    return image


def _half(axes: Axes, rates: Array, dashes: str) -> None:
    """The line where the share is one half, if there is one."""
    if min(rates.shape) > 1 and rates.min() < 0.5 < rates.max():
        axes.contour(np.asarray(rates), colors="white", levels=[0.5], linestyles=dashes, linewidths=1.5)
