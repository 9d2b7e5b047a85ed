"""What a report says in words and tables: only what the numbers say, and where a number is missing, why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdpo.report.findings import where
from cdpo.report.gap import MEASURES
from cdpo.report.intervals import NO_NUMBER, counted, number, short
from cdpo.report.labels import is_null, text
from cdpo.report.marks import ATTAINED, EXPLAINED, HARD, NONE, OVER, SEARCHED, SUPREMUM, is_over, legend, marked
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
OVER_BUDGET = f"{OVER}: {EXPLAINED[OVER]}."
KLS = ("kl", "kl_sampled")
ESTIMATE = (
    "kl sampled: an estimate, on the last draws of the policy, of its KL up to their cut. It counts as above its "
    "budget where it is so by two standard errors."
)
CERTIFICATES = (
    "The solver's error, apart from the spread over seeds: that of the worst seed. residual: relative, 0 is "
    "stationary; with a supremum what a Newton step would gain counts instead, which the mouse shows. bound: proven, "
    "of the objective. starts, hits: searches made, and the share that found the best. within ε: what all solutions "
    "attain whose objective is within ε, a share of its fall, of the best. supremum: the norm, where the best lies at "
    "infinity."
)
BELOW = (
    "Below a gap that was searched for: starts; the share of them that found the best, which at 0% another run has "
    "found; the gap's range over solutions whose objective is within ε (optimizer.epsilon, a share of its fall) of it."
)
SEARCHES = "searches: runs that differ in restart or optimizer; one that is certified counts, else the best."
MANY = 30  # rows; a longer table is folded


class Cell(str):
    """Text of a cell with its `kind`, which has a colour, what stands `below` it, and what a pointer on it tells."""

    kind: str
    below: str
    hover: str

    def __new__(cls, text: str, kind: str = "", below: str = "", hover: str = "") -> Cell:
        cell = super().__new__(cls, text)
        cell.kind, cell.below, cell.hover = kind, below, hover
        return cell


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
    kinds = [counted([cells[kind].nunique()], kind) for kind in ("loss", "constraint") if len(cells)]
    seeds = f", {counted(cells['seeds'])} per cell" if len(cells) else ""
    groups = {kind: sorted(set(runs[kind].dropna())) for kind in ("model", "dataset")}
    of = "; ".join(f"{kind} {', '.join(found)}" for kind, found in groups.items() if found)
    what = [f"{' and '.join(kinds)}{seeds}"] * bool(kinds) + [of] * bool(of)
    said = f"{counted([len(runs)], 'run')}: {ended}." + f" {'; '.join(what)}." * bool(what)
    return said + (f" Means are never taken over different {', '.join(settings)}." if settings else "")


def gaps(cells: pd.DataFrame) -> Table:
    """The gap of every loss under every constraint, marked."""
    others, remarks = cells[~cells["is_ceiling"]], dict[str, int]()
    shown = {}
    for i, row in others.iterrows():
        said = [f"{row['loss']}, {where(row)}: {row['note']}"] if row["note"] else []
        places = [remarks.setdefault(one, len(remarks) + 1) for one in [*said, *row["trouble"].splitlines()]]
        text = _gap(row) + "".join(f" [{place}]" for place in places)
        shown[i] = Cell(text, row["mark"], _searches(row), row["says"])
    notes = [EQUAL_NORM] * bool(others["at_norm"].any()) + [SAME] * any(ONE in cell for cell in shown.values())
    notes += [BELOW] * any(cell.below for cell in shown.values())
    return Table("", *_pivot(others, shown), [*notes, *legend(shown.values())], list(remarks))


def certificates(cells: pd.DataFrame) -> list[Table]:
    """How every number was found: what its certificate says, and the solver's error, apart from the spread of seeds."""
    if not (cells["own_mark"] != NONE).any():
        return []
    fixed = ["constraint", "loss", *(["setting"] if (cells["setting"] != "").any() else [])]
    columns = ["residual", "tolerance", "bound", "own_starts", "own_hits", "attained", "within ε", "own_supremum"]
    rows = []
    for row in cells.to_dict("records"):
        status = Cell(row["own_word"] or row["own_mark"].replace("_", " "), row["own_mark"], hover=row["says"])
        found = {name: short(row.get(name)) for name in columns} | {"attained": number(row["attained"])}
        found |= {name: _rough(row[name]) for name in ("residual", "bound", "own_supremum")}
        found |= {"own_hits": _share(row["own_hits"]), "within ε": _range(row, "attained")}
        rows.append([*(row[name] for name in fixed), status, *found.values()])
    columns = [name.removeprefix("own_") for name in columns]
    return [Table("Certificates", [*fixed, "certificate", *columns], rows, [CERTIFICATES], folded=len(rows) > MANY)]


def attained(cells: pd.DataFrame) -> Table:
    """What every loss attains under every constraint, RLHF among them, marked."""
    shown = {}
    for i, row in cells.iterrows():
        written_as = marked(number(*written(row, "attained")), row["own_mark"], row["own_sign"], row["own_word"])
        shown[i] = Cell(written_as + ONE * row["identical"], row["own_mark"], hover=row["says"])
    notes = [SAME] if cells["identical"].any() else []
    return Table("", *_pivot(cells, shown), [*notes, *legend(shown.values(), ATTAINED)])


def quality(cells: pd.DataFrame) -> list[Table]:
    """Every cell with all it reaches; a row per constraint and loss."""
    known = [name for name in MEASURES if cells[name].notna().any()] if len(cells) else []
    if not known:
        return []
    fixed = ["constraint", "loss", *(["setting"] if (cells["setting"] != "").any() else [])]
    several = ["searches"] if (cells["searches"] > 1).any() else []
    rows = []
    for row in cells.to_dict("records"):
        numbers = [short(*written(row, name)) + ONE * row["identical"] for name in known]
        numbers = [_over(text, name in KLS and row["over"] > 0) for name, text in zip(known, numbers)]
        rows.append([*(row[name] for name in fixed), *numbers, *(short(row[name]) for name in several)])
    notes = [SAME] * bool(cells["identical"].any()) + [OVER_BUDGET] * bool(cells["over"].any())
    notes += [ESTIMATE] * ("kl_sampled" in known) + [SEARCHES] * bool(several)
    columns = [name.replace("_", " ") for name in (*fixed, *known, *several)]
    return [Table("", columns, rows, notes, folded=len(rows) > MANY)]


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
        [
            *(text(row[name]) for name in fixed),
            *(_over(short(row[column]), name in KLS and is_over(row)) for name, column in shown.items()),
            text(row["command"]),
        ]
        for row in whole.to_dict("records")
    ]
    columns = [*fixed, *(name.replace("_", " ") for name in shown), "command"]
    notes = [OVER_BUDGET] if any(OVER in cell for row in rows for cell in row) else []
    notes += [ESTIMATE] * ("kl_sampled" in shown)
    return Table("", columns, rows, notes, folded=len(rows) > MANY)


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
    """A gap as its cell shows it, with all its signs."""
    n = row["gap_n"] if row["identical"] or row["gap_n"] == row["seeds"] else f"{row['gap_n']} of {row['seeds']}"
    text = marked(number(row["gap"], row["gap_half"], n), row["mark"], row["sign"], row["word"])
    if not row["gap_n"]:
        return text
    signs = {AT_NORM: row["at_norm"], ONE: row["identical"] and row["gap_n"] == 1, HARD: row["hard"]}
    signs[SUPREMUM] = row["supremum"] == row["supremum"]
    return text + "".join(sign for sign, holds in signs.items() if holds)


def _over(text: str, over: bool) -> str:
    """A KL, with its mark where it is above a budget."""
    return Cell(f"{text} {OVER}", "over") if over else text


def _searches(row: Mapping[str, Any]) -> str:
    """`64 starts, 5 % hit, 0.120 to 0.210`: how a gap was searched for, and its range; "" for any other."""
    if row["mark"] != SEARCHED:
        return ""
    starts = f"{counted([row['starts']], 'start')}, {_share(row['hits'])} hit" if row["starts"] == row["starts"] else ""
    return ", ".join(part for part in (starts, _range(row, "gap")) if part not in ("", NO_NUMBER))


def _share(value: Any) -> str:
    """`5%`; not 0% where it is more, nor 100% where it is less."""
    if is_null(value):
        return NO_NUMBER
    return "<1%" if 0 < value < 0.01 else ">99%" if 0.99 < value < 1 else f"{value:.0%}"


def _rough(value: Any) -> str:
    """With two digits: how large it is, is all that counts."""
    return NO_NUMBER if is_null(value) else f"{value:.2g}"


def _range(row: Mapping[str, Any], name: str) -> str:
    low, high = number(row[f"{name}_low"]), number(row[f"{name}_high"])
    return NO_NUMBER if NO_NUMBER in (low, high) else f"{low} to {high}"
