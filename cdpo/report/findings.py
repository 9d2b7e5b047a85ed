"""What a report says first: the gaps that can be trusted, by how far, and what is missing for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cdpo.report.intervals import counted, number
from cdpo.report.labels import is_null
from cdpo.report.marks import (
    ABOUT,
    AT_LEAST,
    AT_MOST,
    CERTIFIED,
    EXPLAINED,
    GAPS,
    HARD,
    NONE,
    NOT_REACHED,
    SEARCHED,
    SLACK,
    marked,
)

if TYPE_CHECKING:
    import pandas as pd

SIGNS = {AT_LEAST: "at least ", ABOUT: "about ", AT_MOST: "at most "}
SHOWN = 5  # cells that a sentence names


def findings(cells: pd.DataFrame) -> list[str]:
    """A few sentences about the gaps, or what is missing for there to be any."""
    if cells.empty:
        return ["No run has finished yet, so there is nothing to compare."]
    if not cells["attained"].notna().any():
        return [
            "No run has objective/attained: J needs data with rewards (dataset=bandit, ultrafeedback, or scored rows)."
        ]
    if not cells["is_ceiling"].any():
        return ["No gap without its ceiling: add loss=rlhf, under the same constraints and seeds, to the sweep."]
    known = cells[cells["gap"].notna()]
    if known.empty:
        return [
            "Nothing to compare with loss=rlhf: add other losses, under the same constraints and seeds, to the sweep."
        ]
    parts = {mark: known[known["mark"] == mark] for mark in (CERTIFIED, SEARCHED, NOT_REACHED, NONE)}
    said = [_extremes(parts[mark], mark) for mark in GAPS if len(parts[mark])]
    hard = known[known["hard"]]
    said += [f"On {EXPLAINED[HARD]}{_listed(hard)}."] * bool(len(hard))
    said += _against_zero(known[known["mark"].isin(GAPS)])
    return [*said, *_below_reference(cells), *_no_gaps(parts[NOT_REACHED], parts[NONE])]


def where(row: Mapping[str, Any]) -> str:
    """The constraint of a cell, and its setting."""
    return f"{row['constraint']} at {row['setting']}" if row["setting"] else str(row["constraint"])


def _extremes(part: pd.DataFrame, mark: str) -> str:
    """The largest and the smallest gap of one mark."""
    said = f"{_count(part, 'gap')} {'are' if len(part) > 1 else 'is'} {mark}: "
    largest, smallest = (_gap(part.loc[at]) for at in (part["gap"].idxmax(), part["gap"].idxmin()))
    return f"{said}the largest is {largest}; the smallest is {smallest}." if len(part) > 1 else f"{said}{largest}."


def _gap(row: Mapping[str, Any]) -> str:
    value = number(row["gap"], row["gap_half"], row["gap_n"])
    return f"{SIGNS.get(row['sign'], '')}{value}, {row['loss']} under {where(row)}"


def _against_zero(known: pd.DataFrame) -> list[str]:
    """Which gaps cannot be told from zero, and which lie below it."""
    repeated = known[known["gap_half"].notna()]
    said = []
    if len(repeated):
        near = repeated[repeated["gap"].abs() <= repeated["gap_half"]]
        said.append(
            f"The 95% interval of the gap holds zero in {len(near)} of {_count(repeated, 'cell')}{_listed(near)}."
        )
    below = known[known["gap"] < -known["gap_half"].fillna(0.0) - SLACK]
    if len(below):
        said.append(
            f"It is negative, by over {SLACK} beside its interval, in {len(below)}{_listed(below)}, though RLHF's run "
            "is certified: J may be that of prompts which training has not seen."
        )
    return said


def _below_reference(cells: pd.DataFrame) -> list[str]:
    """Where a policy is worse than its reference, so than no training; and what RLHF attains there."""
    below = cells[cells["below_reference"] > 0].sort_values("attained")
    if below.empty:
        return []
    parts = [_attained(row) for row in below.head(SHOWN).to_dict("records")]
    more = "; ..." if len(below) > SHOWN else ""
    found = _count(below, "cell")
    return [f"Some runs are worse than the reference, which is attained < 0, in {found}: {'; '.join(parts)}{more}."]


def _attained(row: Mapping[str, Any]) -> str:
    value = marked(number(row["attained"], row["attained_half"], row["attained_n"]), *_own(row))
    ceiling = "" if row["is_ceiling"] or is_null(row["ceiling"]) else f", where RLHF attains {number(row['ceiling'])}"
    return (
        f"{row['below_reference']} of {row['seeds']} seeds, mean {value}, of {row['loss']} under {where(row)}{ceiling}"
    )


def _own(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The marks of what a loss attains, in words."""
    return row["own_mark"], SIGNS.get(row["own_sign"], "").strip(), row["own_word"]


def _no_gaps(unreached: pd.DataFrame, without: pd.DataFrame) -> list[str]:
    """What is no gap, and why."""
    said = []
    if len(unreached):
        said.append(
            f"{_count(unreached, 'cell')} {'are' if len(unreached) > 1 else 'is'} no gap, as a solver stopped too "
            f"early{_listed(unreached)}: shown as trained; the remarks below the table have what mends it."
        )
    if len(without):
        words = " or ".join(dict.fromkeys(without["word"]))
        verb = "have" if len(without) > 1 else "has"
        said.append(f"{_count(without, 'cell')} {verb} no certificate, and instead a word before the number: {words}.")
    return said


def _count(part: pd.DataFrame, word: str) -> str:
    return counted([len(part)], word)


def _listed(part: pd.DataFrame) -> str:
    found = [f"{row['loss']} under {where(row)}" for row in part.to_dict("records")]
    return f" ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})" if found else ""
