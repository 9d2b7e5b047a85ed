"""The figures of a report that show final numbers: gaps, what is attained, reward against KL, how constraints bind.

Each takes a `Study` and returns a `Drawing`, or None where its data does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from cdpo.report.intervals import HOW, counted, interval, number, short
from cdpo.report.labels import CONSTRAINT, LOSS, names, text, titled
from cdpo.report.plotting import INK, Drawing, Look, focus, heat, line, looks, panels
from cdpo.report.runs import METRIC

QUALITY = {  # column of the cells -> axis; where rewards are known the first, else the others
    "attained": "attained",
    "accuracy": "held-out accuracy",
    "margin": "held-out reward margin",
    "eval_loss": "held-out loss",
    "kl": "KL to the reference (nats per prompt)",
}
TIGHTNESS = {
    "binds": "binds: share of seeds",
    "boundary_distance": "distance to the boundary, in the constraint's unit",
    "multiplier": "multiplier",
    "effective_rank": "effective rank of the change",
}
OBJECTIVE = ("kl", "expected_reward", "J_reference", "J_optimum", "kl_to_optimum")
ROWS = 60  # of the heat map
NEAR = 0.01  # nats to the optimum, below which a run is marked as being there


@dataclass(frozen=True)
class Study:
    """What the figures are made of: runs with their gaps, the cells of those, the names of the settings."""

    folder: Path
    runs: pd.DataFrame
    cells: pd.DataFrame
    settings: Sequence[str]

    def looks(self) -> dict[str, Look]:
        """How every loss is drawn, RLHF in ink."""
        ceilings = self.runs.loc[self.runs["is_ceiling"], LOSS]
        return looks(self.losses(), list(dict.fromkeys(ceilings)))

    def losses(self) -> list[str]:
        """The losses, best first; those of no finished run last."""
        return list(dict.fromkeys([*self.cells["loss"], *self.runs[LOSS]]))

    def seeds(self) -> str:
        """Over how many seeds the means are taken."""
        return counted(self.cells["seeds"] if len(self.cells) else [])

    def constraints(self) -> list[str]:
        return list(dict.fromkeys([*self.cells["constraint"], *self.runs[CONSTRAINT]]))


def gap_map(study: Study) -> Drawing | None:
    """Constraint by loss, annotated with mean, interval and number of seeds."""
    known = study.cells[~study.cells["is_ceiling"]] if len(study.cells) else study.cells
    if not known.get("gap", pd.Series(dtype=float)).notna().any():
        return None
    values, texts = _pivots(
        known.assign(row=[titled(row["constraint"], row["setting"]) for row in known.to_dict("records")]), "gap"
    )
    left_out, values, texts = max(len(values) - ROWS, 0), values[:ROWS], texts[:ROWS]
    width = 0.075 * max(map(len, values.index)) + 0.85 * len(values.columns)
    figure = panels([""], size=(max(width, 3.2), 0.27 * len(values) + 0.75), left_out=left_out)
    heat(figure.axes[""], values, texts, low=0.0, high=max(float(known["gap"].max()), 0.05))
    caption = f"Gap to RLHF under the same constraint, as a share of what J can gain: {HOW}."
    low, high = number(known["gap"].min()), number(known["gap"].max())
    alt = f"Heat map of {len(values)} constraints by {len(values.columns)} losses, from {low} to {high}."
    return figure.drawing("gap", caption + " –: no run, or nothing to compare with.", alt)


def quality(study: Study) -> Drawing | None:
    """What every loss reaches under every constraint: attained, or accuracy, margin and loss."""
    shown = [name for name in QUALITY if name in study.cells and study.cells[name].notna().any()]
    shown = ["attained"] if "attained" in shown else shown
    if not shown:
        return None
    groups = dict.fromkeys(titled(row["constraint"], row["setting"]) for row in study.cells.to_dict("records"))
    size = (5.6 if len(shown) == 1 else 2.6, 0.30 * len(groups) + 0.04 * len(groups) * len(study.losses()) + 0.5)
    figure = panels([QUALITY[name] for name in shown], columns=2, size=size, sharey=True)
    for name, (title, axes) in zip(shown, figure.items()):
        _dots(axes, study, name, list(groups))
        axes.set(xlabel=title, title="")
    figure.legend(beside=len(shown) == 1)
    caption = f"Means, bars are 95% t intervals over {study.seeds()}; long ones leave the panel."
    if shown == ["attained"]:
        caption = f"Attained of the optimum: 0 is the reference, 1 the optimum without a constraint. {caption}"
    return figure.drawing("quality", caption, "A dot per loss, a row per constraint.")


def levels(study: Study) -> Drawing | None:
    """Attained against how tight a constraint is: a panel per family whose level varies, a line per loss."""
    if study.cells.empty:
        return None
    known = study.cells[study.cells["level"].notna() & study.cells["attained"].notna()]
    several = known.groupby("family")["level_name"].transform("nunique") > 1
    kinds = [f"{f} by {n}" if mixed else f for f, n, mixed in zip(known["family"], known["level_name"], several)]
    panelled = known.assign(title=[titled(kind, setting) for kind, setting in zip(kinds, known["setting"])])
    varying = panelled.groupby("title")["level"].transform("nunique") > 1
    parts = {str(title): part for title, part in panelled[varying].groupby("title", sort=False)}
    if not parts:
        return None
    figure = panels(list(parts), sharey=True)
    for title, axes in figure.items():
        _lines(axes, study, parts[title], "level", "attained")
        axes.set(xlabel=parts[title]["level_name"].iloc[0])
        axes.set(ylabel="attained" if axes is figure.first else "")
    figure.legend()
    caption = f"Attained against the level of a constraint; bars are 95% t intervals over {study.seeds()}."
    return figure.drawing("levels", caption, f"Lines for {known['loss'].nunique()} losses in {len(parts)} panels.")


def frontier(study: Study) -> Drawing | None:
    """Expected reward against KL, a point per run; reference, optimum, and the line that no policy lies above."""
    columns = [f"{METRIC}objective/{name}" for name in OBJECTIVE]
    if not {*columns, "config.beta"} <= set(study.runs.columns):
        return None
    known = study.runs[study.runs[[*columns, "config.beta"]].notna().all(axis=1)]
    known = known[
        known[f"{METRIC}objective/J_optimum"] > known[f"{METRIC}objective/J_reference"]
    ]  # else nothing to gain
    parts = {str(setting): part for setting, part in known.groupby("setting")}
    if not parts:
        return None
    figure = panels(list(parts), columns=2, size=(4.4 if len(parts) > 1 else 6.2, 3.6))
    shapes = looks(list(dict.fromkeys(known["family"])))
    for name, look in [(name, study.looks()[name]) for name in study.losses() if name in set(known[LOSS])]:
        figure.first.scatter([], [], color=look.color, marker="s", label=name)
    for name, look in shapes.items():
        figure.first.scatter([], [], color="#8b949e", marker=look.marker, label=name)
    for setting, axes in figure.items():
        _frontier(axes, parts[setting], study.looks(), shapes)
    figure.legend(beside=True)
    caption = (
        f"A point per run. ☆: within {NEAR:g} nats of the optimum. Dotted: J of the optimum; no policy lies above. "
        "Runs on several worlds are in units of J's possible gain, where height above the diagonal is what is attained."
    )
    return figure.drawing("frontier", caption, f"Scatter plot of {len(known)} runs, reward gained against KL.")


def by_setting(study: Study) -> list[Drawing]:
    """Attained and gap against every setting with two values or more, such as beta or the number of pairs."""
    return [drawing for name in study.settings if (drawing := _against(study, name)) is not None]


def tightness(study: Study) -> Drawing | None:
    """Whether and how constraints bind: the newest constraint/<name>/<key>, means over seeds."""
    order = study.constraints()
    rows = [entry for row in study.runs.to_dict("records") for entry in _bindings(row)]
    table = pd.DataFrame(rows, columns=["constraint", "loss", "quantity", "value"])
    grids = {}
    for quantity, part in table.groupby("quantity", sort=False):
        found = part.groupby(["constraint", "loss"], sort=False)["value"].agg(list).unstack()
        lines = sorted(found.index, key=lambda label: next(i for i, one in enumerate(order) if label.startswith(one)))
        grids[TIGHTNESS[str(quantity)]] = found.reindex(lines, columns=[n for n in study.losses() if n in found])
    if not grids:
        return None
    ordered = {title: grids[title] for title in TIGHTNESS.values() if title in grids}
    heights = [len(grid) + 2.6 for grid in ordered.values()]
    width = 0.075 * table["constraint"].str.len().max() + 0.85 * table["loss"].nunique()
    size = (max(width, 3.6), 0.25 * sum(heights) / len(heights))
    figure = panels(list(ordered), columns=1, size=size, height_ratios=heights)
    for title, axes in figure.items():
        found = ordered[title].map(lambda values: interval(values if isinstance(values, list) else []))
        means, texts = found.map(lambda one: one[""]), found.map(lambda one: short(*one.values()).replace(" ±", "\n±"))
        heat(axes, means, texts, low=0.0, high=float(means.max().max()) or 1.0)
    caption = f"How constraints bind at the end of training: {HOW}. Colours within a panel only."
    return figure.drawing("tightness", caption, f"Heat maps of {len(ordered)} quantities, constraint by loss.")


def _pivots(part: pd.DataFrame, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Values and texts of a column of the cells, constraint by loss."""
    rows, columns = list(dict.fromkeys(part["row"])), [str(n) for n in dict.fromkeys(part["loss"])]
    numbers = zip(part[name], part[f"{name}_half"], part[f"{name}_n"])
    texts = [number(*one).replace(" ±", "\n±") for one in numbers]
    tables = [part.assign(_v=v).pivot(index="row", columns="loss", values="_v") for v in (part[name], texts)]
    values, words = (table.reindex(index=rows, columns=columns) for table in tables)
    return values.astype(float), words.fillna("")


def _dots(axes: Axes, study: Study, name: str, groups: list[str]) -> None:
    styles, n = study.looks(), len(study.losses())
    for i, loss in enumerate(study.losses()):
        part = [row for row in study.cells.to_dict("records") if row["loss"] == loss and row[name] == row[name]]
        y = [groups.index(titled(row["constraint"], row["setting"])) + (i - (n - 1) / 2) * 0.6 / n for row in part]
        error = [row[f"{name}_half"] if row[f"{name}_half"] == row[f"{name}_half"] else 0.0 for row in part]
        marks: dict[str, Any] = {"color": styles[loss].color, "marker": styles[loss].marker, "linestyle": "none"}
        axes.errorbar([row[name] for row in part], y, xerr=error, label=loss, elinewidth=0.8, **marks)
    focus(axes.set_xlim, study.cells[name], axes.get_xlim())
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)


def _lines(axes: Axes, study: Study, part: pd.DataFrame, x: str, y: str) -> None:
    styles, levels = study.looks(), sorted(set(part[x]))
    for loss in [name for name in study.losses() if name in set(part["loss"])]:
        one = part[(part["loss"] == loss) & part[y].notna()]
        if len(one):
            line(axes, list(zip(one[x], one[y], one[f"{y}_half"])), styles[loss], loss)
    focus(axes.set_ylim, part[y], axes.get_ylim())
    if levels[0] > 0 and levels[-1] >= 5 * levels[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(levels) <= 8:
        axes.set_xticks(levels, [f"{level:g}" for level in levels])


def _frontier(axes: Axes, part: pd.DataFrame, styles: Mapping[str, Look], shapes: Mapping[str, Look]) -> None:
    """Reward gained against KL; on several worlds both in units of J's possible gain: then optima share a line."""
    value = {name: part[f"{METRIC}objective/{name}"] for name in OBJECTIVE}
    room, beta = value["J_optimum"] - value["J_reference"], part["config.beta"].astype("float64")
    worlds = room.round(9).nunique() > 1
    unit, scale = (room, beta / room) if worlds else (1.0, 1.0)
    kl, gain = value["kl"] * scale, (value["expected_reward"] - value["J_reference"]) / unit
    for (loss, family), i in part.groupby([LOSS, "family"], sort=False).groups.items():
        marks: dict[str, Any] = {"color": styles[loss].color, "marker": shapes[family].marker, "alpha": 0.8}
        axes.scatter(kl[i], gain[i], s=22, linewidths=0, **marks)
    near = value["kl_to_optimum"] < NEAR
    axes.scatter(kl[near], gain[near], marker="*", s=110, facecolors="none", edgecolors=INK, linewidths=0.8)
    axes.scatter([0], [0], s=45, facecolors="none", edgecolors=INK, linewidths=0.8)
    axes.annotate("reference", (0, 0), (7, -3), textcoords="offset points", fontsize=8)
    top, slope = (1.0, 1.0) if worlds else (float(room.iloc[0]), float(beta.iloc[0]))
    axes.axline((0, top), slope=slope, color=INK, linestyle=":", linewidth=1)
    axes.set(xlabel="β KL / possible gain of J" if worlds else "KL to the reference (nats per prompt)")
    axes.set(ylabel="reward gained / possible gain of J" if worlds else "expected reward over the reference's")
    high = max(float(gain.max()), top + slope * float(kl.max()))
    axes.set(xlim=(-0.05 * kl.max() - 1e-9, None), ylim=(min(-0.06 * high, 1.1 * gain.min()), 1.05 * high))


def _against(study: Study, name: str) -> Drawing | None:
    others = [other for other in study.settings if other != name]
    cells = study.cells.copy()
    cells["_panel"] = [titled(row["constraint"], _set_to(row, others)) for row in cells.to_dict("records")]
    cells = cells[cells[name].map(text).groupby(cells["_panel"]).transform("nunique") > 1]
    cells["_x"], ticks = _positions(cells[name])
    shown = [y for y in ("attained", "gap", "accuracy") if cells[y].notna().any()][:2]
    titles = [f"{y}: {panel}" for panel in dict.fromkeys(cells["_panel"]) for y in shown]
    if not titles:
        return None
    figure = panels(titles, columns=2 if len(shown) == 2 else 3)
    for title, axes in figure.items():
        y, _, panel = title.partition(": ")
        _lines(axes, study, cells[cells["_panel"] == panel], "_x", y)
        axes.set(xlabel=name)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
    figure.legend()
    file = re.sub(r"[^A-Za-z0-9]+", "_", name)
    caption = f"{' and '.join(shown).capitalize()} against {name}; bars are 95% t intervals over {study.seeds()}."
    return figure.drawing(f"setting-{file}", caption, f"A line per loss over {cells['_x'].nunique()} values.")


def _positions(values: pd.Series) -> tuple[list[float], list[str]]:
    """Numbers as they are; else positions, with their labels: numbers in order, then words."""
    words = [text(value) or "none" for value in values]
    if all(_numeric(word) for word in words):
        return [float(word) for word in words], []
    ticks = sorted(set(words), key=lambda word: (not _numeric(word), float(word) if _numeric(word) else 0.0, word))
    return [float(ticks.index(word)) for word in words], ticks


def _numeric(word: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", word) is not None


def _bindings(row: Mapping[str, object]) -> list[tuple[str, str, str, float]]:
    """(constraint, loss, quantity, value) for every quantity that a run's constraints report."""
    listed, found = names(row["constraint"]), []
    for name in listed:
        label = str(row[CONSTRAINT]) if len(listed) == 1 else f"{row[CONSTRAINT]}: {name}"
        label = titled(label, str(row["setting"]))
        for quantity in TIGHTNESS:
            value = row.get(f"{METRIC}constraint/{name}/{quantity}")
            if isinstance(value, (int, float)) and value == value:
                found.append((label, str(row[LOSS]), quantity, float(value)))
    return found


def _set_to(row: Mapping[str, object], settings: Sequence[str]) -> str:
    return ", ".join(f"{name} {text(row[name])}" for name in settings if text(row[name]))
