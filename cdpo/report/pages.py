"""The pages of a report, report.md and report.html: which section holds what, and their templates.

Causes and commands are text that others wrote: it is escaped in both.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cdpo.report.intervals import HOW

if TYPE_CHECKING:
    import pandas as pd

    from cdpo.report.figures import Study

ORDER = (
    "gap",
    "quality",
    "interpolation",
    "preservation",
    "levels",
    "setting",
    "errors",
    "frontier",
    "training",
    "path",
    "tightness",
    "distributions",
    "penalties",
)


@dataclass(frozen=True)
class Picture:
    """A figure of the report: where its file lies, and the element that shows it in a page."""

    name: str
    caption: str
    alt: str
    path: str
    element: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    name: str
    title: str
    text: str = ""
    tables: Sequence[Any] = ()
    figures: Sequence[Picture] = ()


def pages(
    study: Study, table: pd.DataFrame, labelled: pd.DataFrame, pictures: list[Picture], problems: list[str]
) -> dict[str, str]:
    """report.md and report.html, as text."""
    from cdpo.report import desiderata, tables
    from cdpo.report.findings import findings

    verdicts = desiderata.tables(study)
    texts = {
        "title": study.folder.resolve().name,
        "summary": tables.summary(table, study.cells, study.settings),
        "findings": findings(study.cells) + desiderata.said(verdicts) + problems if len(labelled) else problems,
        "sections": _sections(study, table, labelled, pictures, verdicts),
    }
    return {f"report.{extension}": _rendered(f"report.{extension}.j2", texts) for extension in ("md", "html")}


def _sections(
    study: Study, table: pd.DataFrame, labelled: pd.DataFrame, pictures: list[Picture], verdicts: Sequence[Any]
) -> list[Section]:
    from cdpo.report import tables

    cells, known = study.cells, len(study.cells) > 0
    rewards = known and bool(cells["attained"].notna().any())
    comparable = rewards and bool(cells["is_ceiling"].any()) and not cells["is_ceiling"].all()
    of = {name: [p for p in pictures if p.name.split("-")[0] == name] for name in (*ORDER, "recovery")}
    gaps = [tables.gaps(cells), *tables.certificates(cells)] if comparable else ()
    gap = f"gap = attained by RLHF less attained by the loss, under one constraint: {HOW}."
    share = "(J - J of the reference) / (J of the optimum - J of the reference). 1 is the optimum without a constraint"
    share += f": {HOW}."
    measures = Section(
        "measures", "All measures", "On held-out pairs; every loss has a unit of its own.", tables.quality(cells)
    )
    sections = [
        *([] if rewards else [replace(measures, figures=of["quality"])]),
        Section("gap", "Constraint gap", gap, gaps, of["gap"]),
        Section(
            "attained", "Attained", share, [tables.attained(cells)] if rewards else (), of["quality"] if rewards else ()
        ),
        Section("desiderata", "Desiderata", "", verdicts, of["interpolation"] + of["preservation"]),
        Section("levels", "Levels and settings", "", (), of["levels"] + of["setting"] + of["errors"]),
        Section("frontier", "Reward against KL", "", (), of["frontier"]),
        Section("training", "Training", "", (), of["training"] + of["path"]),
        Section("tightness", "Constraints", "", (), of["tightness"]),
        Section("gaussian", "Gaussian view", "", (), of["distributions"] + of["penalties"]),
        Section("recovery", "Compressive sensing", "", (), of["recovery"]),
        *([measures] if rewards else []),
        Section("unfinished", "Runs that did not go through", "", tables.unfinished(table)),
        Section("runs", "All runs", "Also in runs.csv and runs.parquet.", [tables.everything(table, labelled)]),
    ]
    return [section for section in sections if section.tables or section.figures]


def _rendered(template: str, texts: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _markdown, "code": _code, "urlencode": quote}
    return environment.get_template(template).render(**texts)


def _markdown(text: str) -> str:
    """Text that stays text in Markdown, within a table too."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*[]|" else letter for letter in escaped)


def _code(text: str) -> str:
    """Text as code in a cell of a table."""
    line = " ".join(str(text).split())
    return f"<code>{html.escape(line, quote=False).replace('|', '&#124;')}</code>" if line else ""
