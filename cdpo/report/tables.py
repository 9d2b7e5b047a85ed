"""What a report says in words and tables: only what the numbers say, and where a number is missing, why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdpo.report.gap import MEASURES, SLACK
from cdpo.report.intervals import counted, number, short
from cdpo.report.labels import text
from cdpo.report.runs import DONE, METRIC

if TYPE_CHECKING:
    import pandas as pd

AT_NORM = "†"  # compared at equal norm
WORDS = ("constraint", "loss", "setting", "directory", "state", "cause", "command")  # columns set flush left
LITERAL = ("directory", "command")  # columns set as code
EQUAL_NORM = (
    f"{AT_NORM} a penalty, compared at equal norm: RLHF's runs of all its strengths make a curve of attained over the "
    "norm, read off at the norm of the loss's run. Norm is that of the change, and for l2_to_start the reference (0, "
    "0) is a point of the curve, its limit for large strengths; for weight_decay it is that of the weights."
)
ONE = "‡"  # one number, however many seeds
SAME = f"{ONE} the seeds changed nothing: all runs have the same numbers, and count as one."
MANY = 30  # rows; a longer table is folded


@dataclass(frozen=True)
class Table:
    """Cells as text, row by row; below it stand `notes`, and numbered `remarks` on cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    remarks: Sequence[str] = ()
    folded: bool = False
    words: Sequence[str] = WORDS
    literal: Sequence[str] = LITERAL


def summary(runs: pd.DataFrame, cells: pd.DataFrame, settings: Sequence[str]) -> str:
    """How many runs there are, in which states, of what."""
    states = runs["state"].value_counts()
    ended = ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in sorted(states.items(), key=lambda s: str(s[0])))
    kinds = [
        f"{cells[kind].nunique()} {_plural(kind, cells[kind].nunique())}"
        for kind in ("loss", "constraint")
        if len(cells)
    ]
    seeds = f", {counted(cells['seeds'])} per cell" if len(cells) else ""
    groups = {kind: sorted(set(runs[kind].dropna())) for kind in ("model", "dataset")}
    of = "; ".join(f"{kind} {', '.join(found)}" for kind, found in groups.items() if found)
    what = [f"{' and '.join(kinds)}{seeds}"] * bool(kinds) + [of] * bool(of)
    said = f"{len(runs)} {_plural('run', len(runs))}: {ended}." + f" {'; '.join(what)}." * bool(what)
    return said + (f" Means are never taken over different {', '.join(settings)}." if settings else "")


def findings(cells: pd.DataFrame) -> list[str]:
    """Two or three sentences about the gaps, or what is missing for there to be any."""
    if cells.empty:
        return ["No run has finished yet, so there is nothing to compare."]
    if not cells["attained"].notna().any():
        return [
            "No run has objective/attained: J needs data with rewards (dataset=bandit, ultrafeedback, or scored rows)."
        ]
    known = cells[cells["gap"].notna()]
    if not cells["is_ceiling"].any():
        return ["No gap without its ceiling: add loss=rlhf, under the same constraints and seeds, to the sweep."]
    if known.empty:
        return [
            "Nothing to compare with loss=rlhf: add other losses, under the same constraints and seeds, to the sweep."
        ]
    said = f"The largest gap is {_gap(known.loc[known['gap'].idxmax()])}"
    said += f"; the smallest is {_gap(known.loc[known['gap'].idxmin()])}." if len(known) > 1 else "."
    return [said, *_against_zero(known)]


def gaps(cells: pd.DataFrame) -> Table:
    """The gap of every loss under every constraint."""
    others, remarks = cells[~cells["is_ceiling"]], dict[str, int]()
    shown = {}
    for i, row in others.iterrows():
        mark = AT_NORM * bool(row["at_norm"] and row["gap_n"]) + ONE * bool(row["identical"] and row["gap_n"] == 1)
        n = row["gap_n"] if row["identical"] or row["gap_n"] == row["seeds"] else f"{row['gap_n']} of {row['seeds']}"
        remark = f"{row['loss']}, {_where(row)}: {row['note']}" if row["note"] else ""
        place = f" [{remarks.setdefault(remark, len(remarks) + 1)}]" if remark else ""
        shown[i] = f"{number(row['gap'], row['gap_half'], n)}{mark}{place}"
    notes = [EQUAL_NORM] if others["at_norm"].any() else []
    notes += [SAME] if any(ONE in cell for cell in shown.values()) else []
    return Table("", *_pivot(others, shown), notes, list(remarks))


def attained(cells: pd.DataFrame) -> Table:
    """What every loss attains under every constraint, RLHF among them."""
    shown = {i: number(*written(r, "attained")) + ONE * r["identical"] for i, r in cells.iterrows()}
    return Table("", *_pivot(cells, shown), [SAME] if cells["identical"].any() else [])


def quality(cells: pd.DataFrame) -> list[Table]:
    """Every cell with all it reaches; a row per constraint and loss."""
    known = [name for name in MEASURES if cells[name].notna().any()] if len(cells) else []
    if not known:
        return []
    fixed = ["constraint", "loss", *(["setting"] if (cells["setting"] != "").any() else [])]
    several = ["searches", "spread"] if (cells["searches"] > 1).any() else []
    columns = [*fixed, *known, *several]
    rows = []
    for row in cells.to_dict("records"):
        numbers = [short(*written(row, name)) + ONE * row["identical"] for name in known]
        rows.append([*(row[name] for name in fixed), *numbers, *(short(row[name]) for name in several)])
    notes = [SAME] * bool(cells["identical"].any())
    notes += [
        "searches: runs that differ in restart or optimizer; the lowest training objective counts. "
        "spread: the largest difference between what searches of one seed attained."
    ] * bool(several)
    return [Table("", [c.replace("_", " ") for c in columns], rows, notes, folded=len(rows) > MANY)]


def unfinished(runs: pd.DataFrame) -> list[Table]:
    """Runs that did not go through, with the cause."""
    columns = ["directory", "state", "step", "cause", "command"]
    rows = [[text(row[name]) for name in columns] for row in runs[~runs["state"].isin(DONE)].to_dict("records")]
    return [Table("", columns, rows, folded=len(rows) > MANY)] if rows else []


def everything(runs: pd.DataFrame, labelled: pd.DataFrame) -> Table:
    """Every run with its key numbers and the command that makes it again."""
    metrics = {name: f"{METRIC}{metric}" for name, metric in MEASURES.items()}
    shown = {name: column for name, column in metrics.items() if column in runs and runs[column].notna().any()}
    whole = runs.join(labelled[["loss_label", "constraint_label", "setting"]])
    whole["loss"] = whole["loss_label"].fillna(whole["loss"])
    whole["constraint"] = whole["constraint_label"].fillna(whole["constraint"])
    fixed = ["directory", "state", "step", "loss", "constraint", "setting", "seed", "restart"]
    fixed = [name for name in fixed if any(map(text, whole[name]))]
    rows = [
        [*(text(row[name]) for name in fixed), *(short(row[column]) for column in shown.values()), text(row["command"])]
        for row in whole.to_dict("records")
    ]
    return Table("", [*fixed, *(name.replace("_", " ") for name in shown), "command"], rows, folded=len(rows) > MANY)


def written(row: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    """Mean, half an interval and n of a column of the cells."""
    return row[name], row[f"{name}_half"], row[f"{name}_n"]


def _pivot(part: pd.DataFrame, cells: Mapping[Any, str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, constraint (and setting, where one varies) by loss."""
    losses, keys = list(dict.fromkeys(part["loss"])), ["constraint", "setting"]
    keys = keys if (part["setting"] != "").any() else keys[:1]
    found = {(*(row[key] for key in keys), row["loss"]): cells[i] for i, row in part.iterrows()}
    rows = dict.fromkeys(key[:-1] for key in found)
    return [*keys, *losses], [[*row, *(found.get((*row, loss), "") for loss in losses)] for row in rows]


def _where(row: Mapping[str, Any]) -> str:
    return f"{row['constraint']} at {row['setting']}" if row["setting"] else str(row["constraint"])


def _gap(row: Mapping[str, Any]) -> str:
    return f"{number(*written(row, 'gap'))}, {row['loss']} under {_where(row)}"


def _against_zero(known: pd.DataFrame) -> list[str]:
    """Which gaps cannot be told from zero, and which lie below it."""
    repeated = known[known["gap_half"].notna()]
    said = []
    if len(repeated):
        near = repeated[repeated["gap"].abs() <= repeated["gap_half"]]
        listed = _listed(f"{r['loss']} under {_where(r)}" for r in near.to_dict("records"))
        said.append(f"The 95% interval of the gap holds zero in {len(near)} of {len(repeated)} cells{listed}.")
    below = known[known["gap"] < -known["gap_half"].fillna(0.0) - SLACK]
    if len(below):
        listed = _listed(f"{r['loss']} under {_where(r)}" for r in below.to_dict("records"))
        said.append(
            f"It is negative, by over {SLACK} beside its interval, in {len(below)}{listed}: there RLHF's run is "
            "no ceiling. Its search ended too early or in a local optimum (give it restarts, steps, learning rates), "
            "or the constraint is no set of policies (dropout), or J is that of prompts which training has not seen."
        )
    return said


def _listed(items: Iterable[str]) -> str:
    found = list(items)
    return f" ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})" if found else ""


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}es" if word.endswith("s") else f"{word}s"
