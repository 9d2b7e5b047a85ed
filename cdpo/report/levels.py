"""The figures of a report that show numbers over what varies: levels of a constraint, and other settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from cdpo.report.figures import Study
from cdpo.report.intervals import counted
from cdpo.report.labels import text, titled
from cdpo.report.marks import GAPS
from cdpo.report.plotting import Drawing, focus, hollow, line, panels


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
    caption = f"Attained against the level of a constraint. {study.bars()}"
    alt = f"Lines for {counted([known['loss'].nunique()], 'loss')} in {counted([len(parts)], 'panel')}."
    return figure.drawing("levels", caption, alt)


def by_setting(study: Study) -> list[Drawing]:
    """Attained and gap against every setting with two values or more, such as beta or the number of pairs."""
    return [drawing for name in study.settings if (drawing := _against(study, name)) is not None]


def _lines(axes: Axes, study: Study, part: pd.DataFrame, x: str, y: str) -> None:
    styles, levels = study.looks(), sorted(set(part[x]))
    for loss in [name for name in study.losses() if name in set(part["loss"])]:
        one = part[(part["loss"] == loss) & part[y].notna()]
        if len(one):
            line(axes, list(zip(one[x], one[y], one[f"{y}_half"])), styles[loss], loss)
            missed = one[~one["mark" if y == "gap" else "own_mark"].isin(GAPS)]
            hollow(axes, list(zip(missed[x], missed[y])), styles[loss])
    focus(axes.set_ylim, part[y], axes.get_ylim())
    if levels[0] > 0 and levels[-1] >= 5 * levels[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(levels) <= 8:
        axes.set_xticks(levels, [f"{level:g}" for level in levels])


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
    caption = f"{' and '.join(shown).capitalize()} against {name}. {study.bars()}"
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


def _set_to(row: Mapping[str, object], settings: Sequence[str]) -> str:
    return ", ".join(f"{name} {text(row[name])}" for name in settings if text(row[name]))
