"""The figures of a report that show final numbers: gaps, what is attained, reward against KL, how constraints bind.

Each takes a `Study` and returns a `Drawing`, or None where its data does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from cdpo.report.intervals import HOW, counted, interval, number, short
from cdpo.report.labels import CONSTRAINT, LOSS, names, titled
from cdpo.report.marks import GAPS, NOT_REACHED, marked
from cdpo.report.plotting import INK, PAPER, Drawing, Look, focus, hatch, heat, hollow, looks, panels
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
HOLLOW = " Hollow: not reached, or without a certificate."
NEAR = 0.01  # nats to the optimum, below which a run is marked as being there


@dataclass(frozen=True)
class Study:
    """What the figures are made of: runs with their gaps, the cells of those, the names of the settings."""

    folder: Path
    runs: pd.DataFrame
    cells: pd.DataFrame
    settings: Sequence[str]
    every: pd.DataFrame  # all runs that trained, also those that another search for the same optimum has beaten

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

    def bars(self) -> str:
        """What bars and hollow markers say."""
        found = len(self.cells) and not self.cells["own_mark"].isin(GAPS).all()
        bars = f"Bars: 95% t intervals over {self.seeds()}; long ones leave the panel."
        repeated = len(self.cells) and self.cells["seeds"].max() > 1
        return f"{bars if repeated else 'Of one seed, so there are no bars.'}{HOLLOW * bool(found)}"

    def constraints(self) -> list[str]:
        return list(dict.fromkeys([*self.cells["constraint"], *self.runs[CONSTRAINT]]))


def gap_map(study: Study) -> Drawing | None:
    """Constraint by loss, annotated with mean, interval and number of seeds; coloured where it may be called a gap."""
    known = study.cells[~study.cells["is_ceiling"]] if len(study.cells) else study.cells
    if not known.get("gap", pd.Series(dtype=float)).notna().any():
        return None
    tables = _pivots(known)
    left_out, (values, texts, missed) = max(len(tables[0]) - ROWS, 0), (table[:ROWS] for table in tables)
    width = 0.075 * max(map(len, values.index)) + 1.1 * len(values.columns)
    figure = panels([""], size=(max(width, 3.2), 0.29 * len(values) + 0.75), left_out=left_out)
    high = values.max(axis=None)
    heat(figure.axes[""], values, texts, low=0.0, high=max(high, 0.05) if high == high else 1.0)
    hatch(figure.axes[""], missed)
    caption = f"Gap to RLHF under the same constraint, as a share of what J can gain: {HOW}."
    caption += " Hatched: a solver stopped before the optimum." if missed.any(axis=None) else ""
    low, high = number(values.min(axis=None)), number(high)
    alt = f"Heat map of {counted([len(values)], 'constraint')} by {counted([len(values.columns)], 'loss')}, "
    alt += f"from {low} to {high}."
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
    caption = study.bars()
    if shown == ["attained"]:
        caption = f"Attained of the optimum: 0 is the reference, 1 the optimum without a constraint. {caption}"
    return figure.drawing("quality", caption, "A dot per loss, a row per constraint.")


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
    caption += "" if known["status"].isin(GAPS).all() else HOLLOW
    return figure.drawing(
        "frontier", caption, f"Scatter plot of {counted([len(known)], 'run')}, reward gained against KL."
    )


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
    return figure.drawing("tightness", caption, f"Heat maps, constraint by loss: {', '.join(ordered)}.")


def _pivots(part: pd.DataFrame) -> list[pd.DataFrame]:
    """Gaps (NaN where it may not be called one), texts, and which were not reached; constraint by loss."""
    rows = [titled(row["constraint"], row["setting"]) for row in part.to_dict("records")]
    gaps = [number(*one).replace(" ±", "\n±") for one in zip(part["gap"], part["gap_half"], part["gap_n"])]
    texts = [marked(gap, *marks) for gap, *marks in zip(gaps, part["mark"], part["sign"], part["word"])]
    columns = {
        "value": part["gap"].where(part["mark"].isin(GAPS)),
        "text": texts,
        "missed": part["mark"] == NOT_REACHED,
    }
    order = {"index": list(dict.fromkeys(rows)), "columns": list(dict.fromkeys(part["loss"]))}
    long = part.assign(row=rows, **columns)
    tables = [long.pivot(index="row", columns="loss", values=name).reindex(**order) for name in columns]
    return [tables[0].astype(float), tables[1].fillna(""), tables[2] == True]  # noqa: E712


def _dots(axes: Axes, study: Study, name: str, groups: list[str]) -> None:
    styles, n = study.looks(), len(study.losses())
    for i, loss in enumerate(study.losses()):
        part = [row for row in study.cells.to_dict("records") if row["loss"] == loss and row[name] == row[name]]
        y = [groups.index(titled(row["constraint"], row["setting"])) + (i - (n - 1) / 2) * 0.6 / n for row in part]
        error = [row[f"{name}_half"] if row[f"{name}_half"] == row[f"{name}_half"] else 0.0 for row in part]
        marks: dict[str, Any] = {"color": styles[loss].color, "marker": styles[loss].marker, "linestyle": "none"}
        axes.errorbar([row[name] for row in part], y, xerr=error, label=loss, elinewidth=0.8, **marks)
        hollow(axes, [(row[name], at) for row, at in zip(part, y) if row["own_mark"] not in GAPS], styles[loss])
    focus(axes.set_xlim, study.cells[name], axes.get_xlim())
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)


def _frontier(axes: Axes, part: pd.DataFrame, styles: Mapping[str, Look], shapes: Mapping[str, Look]) -> None:
    """Reward gained against KL; on several worlds both in units of J's possible gain: then optima share a line."""
    value = {name: part[f"{METRIC}objective/{name}"] for name in OBJECTIVE}
    room, beta = value["J_optimum"] - value["J_reference"], part["config.beta"].astype("float64")
    worlds = room.round(9).nunique() > 1
    unit, scale = (room, beta / room) if worlds else (1.0, 1.0)
    kl, gain = value["kl"] * scale, (value["expected_reward"] - value["J_reference"]) / unit
    solid = part["status"].isin(GAPS)
    for (loss, family, full), i in part.groupby([LOSS, "family", solid], sort=False).groups.items():
        color: dict[str, Any] = {"color": styles[loss].color} if full else {"facecolors": PAPER}
        marks = color | {"edgecolors": styles[loss].color, "marker": shapes[family].marker, "alpha": 0.8}
        axes.scatter(kl[i], gain[i], s=22, linewidths=0.0 if full else 0.9, **marks)
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
