"""How far a number is to be trusted: what the certificates of runs say of it, and how a report marks it.

A run is certified (proven to be the optimum), searched (stationary, the best of its starts), not reached (its solver
stopped too early), or has no certificate (none: a path, noise, or a run of before certificates). A gap is as good as
the worse of its two runs, a cell as its worst seed. A mark is a word or a sign first, and a colour only besides.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cdpo.report.labels import CONSTRAINT, LOSS, is_null, names
from cdpo.report.runs import CERTIFICATE, CONFIG, METRIC

if TYPE_CHECKING:
    import pandas as pd

CERTIFIED, SEARCHED, NONE, NOT_REACHED = STATUSES = ("certified", "searched", "none", "not_reached")  # from good to bad
GAPS = (CERTIFIED, SEARCHED)  # what may be called a gap without another word
UNKNOWN = "unknown"
PATHS = ("path", "noise")  # what a certificate may say instead of a proof; else the run is unknown
AS_TRAINED = "as trained"
AT_LEAST, ABOUT, AT_MOST = "≥", "~", "≤"
SUPREMUM, HARD, OVER = "∞", "§", "▲"
# of a certificate
NUMBERS = ("starts", "hits", "bound", "residual", "tolerance", "epsilon", "fall", "attained_low", "attained_high")
SLACK = 1e-3  # of what J can gain: searches of one optimum end that far apart
BEYOND = 1e-3  # relative, of a KL over its budget
EXPLAINED = {  # in a table of gaps  # sign or word -> what it means
    AT_LEAST: "RLHF is stationary, the best of its starts, not proven: it may attain more, so the gap is at least "
    "this; or the loss's own value does not rank its solutions, and of those that were found this is the best by J",
    ABOUT: "the loss's optimum is the best of its starts, not proven, and RLHF's may be so too",
    AS_TRAINED: "not reached: a solver stopped before the optimum, so this is no gap; the remarks have what mends it",
    "path": "no certificate: the run depends on the path of training, there is no optimum of a set to compare",
    "noise": "no certificate: the run is one draw of noise, there is no optimum of a set to compare",
    UNKNOWN: "no certificate: nobody knows how near the optimum this is",
    SUPREMUM: "supremum: the best seems to lie at infinity; the norm stands in the table of certificates",
    HARD: "hard labels: DPO has no finite optimum",
    OVER: "above its budget",
}
ATTAINED = EXPLAINED | {  # in a table of what is attained
    AT_LEAST: "RLHF is stationary, the best of its starts, not proven: it may attain more",
    ABOUT: "the loss's optimum is the best of its starts, not proven",
    AT_MOST: "the best by J of the loss's solutions that were found, as its own value does not rank them",
    AS_TRAINED: "not reached: a solver stopped before the optimum",
}


def with_certificates(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with what their certificates say, NaN where there is no such number.

    status, one of STATUSES; word, where it is "none"; by_J: the loss's value ranks no solutions, J has chosen;
    supremum: the norm, where the best seems to lie at infinity; hard: its labels are; over: its KL is above the
    budget; trouble: what keeps it from being reached and the command that mends it, "" where nothing does.
    """
    rows, columns = runs.to_dict("records"), dict[str, list[Any]]()
    for name in NUMBERS:
        columns[name] = [_number(row, f"certificate/{name}") for row in rows]
    columns |= {"status": [_status(row) for row in rows], "word": [_word(row) for row in rows]}
    columns |= {"says": [_text(row, "says") for row in rows], "by_J": [_text(row, "ranked_by") == "J" for row in rows]}
    at_infinity = [_number(row, "certificate/supremum") == 1 for row in rows]
    columns["supremum"] = [_number(row, "certificate/norm") if far else math.nan for row, far in zip(rows, at_infinity)]
    columns |= {"hard": [row.get("labels") == "hard" for row in rows], "over": [is_over(row) for row in rows]}
    return runs.assign(**columns, trouble=[_trouble(row) for row in rows])


def of_ceiling(runs: pd.DataFrame) -> dict[str, Any]:
    """What certificates say of the runs of RLHF that a run is compared with: the worst of them."""
    said = {"status": worst(runs["status"]), "word": _first(runs["word"]), "trouble": _first(runs["trouble"])}
    numbers = {**hardest([runs]), "supremum": runs["supremum"].max()}
    return {f"ceiling_{name}": value for name, value in (said | numbers).items()}


def with_marks(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of `gap.with_gaps`, with the `mark` and `sign` of the gap; of RLHF's own, of what it attains.

    A loss that attains more than a searched RLHF has shown that RLHF was not reached, for any loss under this
    constraint; at equal norm, for itself.
    """
    solved = found["status"].isin(GAPS) & (found["ceiling_status"] == SEARCHED) & ~found["is_ceiling"]
    beaten = found[solved & (found["gap"] < -SLACK)]
    better = beaten[~beaten["at_norm"]].sort_values("gap").drop_duplicates("problem").set_index("problem")
    ceilings = found[found["is_ceiling"]].drop_duplicates("pool").set_index("pool")
    rows = found.to_dict("records")
    for index, row in zip(found.index, rows):
        row["mark"], row["sign"] = worst([row["status"], row["ceiling_status"]]), _sign(row)
        if row["problem"] in better.index or index in beaten.index:
            row["mark"], row["sign"] = NOT_REACHED, ""
            row["status"] = NOT_REACHED if row["is_ceiling"] else row["status"]
            winner = row if index in beaten.index else better.loc[row["problem"]]
            row["ceiling_trouble"] = _beaten(ceilings.loc[row["pool"]], winner)
    kept = ("mark", "sign", "status", "ceiling_trouble")
    return found.assign(**{name: [row[name] for row in rows] for name in kept})


def of_cell(group: pd.DataFrame) -> dict[str, Any]:
    """The marks of a cell: of its gap (the worst of its seeds), and `own_` of what its loss attains."""
    gaps = group if group["is_ceiling"].all() else group[group["gap"].notna()]
    row: dict[str, Any] = {"mark": worst(gaps["mark"]), "own_mark": worst(group["status"])}
    row |= {
        "sign": next((one for one in (ABOUT, AT_LEAST) if one in set(gaps["sign"])), ""),
        "word": _first([*gaps["word"], *gaps["ceiling_word"]]),
    }
    row |= {"own_sign": _own_sign(group), "own_word": _first(group["word"]), "says": _first(group["says"])}
    row |= {"supremum": group[["supremum", "ceiling_supremum"]].max(axis=None), "own_supremum": group["supremum"].max()}
    ceilings = group[["ceiling_starts", "ceiling_hits"]].set_axis(["starts", "hits"], axis=1)
    row |= hardest([group, ceilings]) | {f"own_{name}": value for name, value in hardest([group]).items()}
    for name in ("attained_low", "attained_high"):
        row[name] = group[name].mean()
    row |= {"gap_low": (gaps["ceiling"] - gaps["attained_high"]).mean()}
    row |= {"gap_high": (gaps["ceiling"] - gaps["attained_low"]).mean()}
    row |= {name: group[name].max() for name in ("residual", "tolerance", "bound")}
    troubles = [_first(group[name]) for name in ("trouble", "ceiling_trouble")]
    row["trouble"] = "\n".join(dict.fromkeys(one for one in troubles if one))
    return row | {"over": int(group["over"].sum()), "hard": bool(group["hard"].any())}


def hardest(tables: Sequence[pd.DataFrame]) -> dict[str, float]:
    """starts and hits of the run of which the least share of starts found the best; NaN if none was searched for."""
    pairs = [pair for table in tables for pair in zip(table["hits"], -table["starts"]) if not is_null(pair[0])]
    hits, starts = min(pairs, default=(math.nan, math.nan))
    return {"starts": -starts, "hits": hits}


def worst(statuses: Iterable[str]) -> str:
    """The worst of some statuses; "" for none."""
    return max((one for one in statuses if one), key=STATUSES.index, default="")


def is_over(row: Mapping[str, Any]) -> bool:
    """Whether the KL of a run is above the budget of one of its constraints; an estimate by two standard errors."""
    listed = [name for name in names(row["constraint"]) if name.startswith("kl_budget")]
    budgets = [row.get(f"{CONFIG}constraint.{name}.budget") for name in listed]
    least = min((float(budget) for budget in budgets if budget is not None and not is_null(budget)), default=math.inf)
    low = _number(row, "kl_budget/kl_sampled") - 2 * _number(row, "kl_budget/kl_sampled_stderr")
    return low > least or _number(row, "eval/kl/candidates") > (1 + BEYOND) * least


def mended(command: str, words: str) -> str:
    """A run's command with words that replace those for the same keys, and what lies below them."""
    new = shlex.split(words)
    keys = [word.partition("=")[0] for word in new]
    old = [w for w in shlex.split(command) if not any(w.startswith((f"{key}=", f"{key}.")) for key in keys)]
    return shlex.join([*old, *new])


def marked(number: str, mark: str, sign: str, word: str) -> str:
    """A number as a table writes it: `0.1`, `≥ 0.1`, `as trained 0.1`, `path 0.1`."""
    before = {CERTIFIED: sign, SEARCHED: sign, NOT_REACHED: AS_TRAINED, NONE: word}.get(mark, "")
    return f"{before} {number}".lstrip()


def legend(texts: Iterable[str], meanings: Mapping[str, str] = EXPLAINED) -> list[str]:
    """What the signs and words in some cells mean."""
    joined = " ".join(texts)
    return [f"{sign}: {meaning}." for sign, meaning in meanings.items() if sign in joined]


def _status(row: Mapping[str, Any]) -> str:
    status = _text(row, "status")
    return status if status in STATUSES else NONE


def _word(row: Mapping[str, Any]) -> str:
    says = _text(row, "says").lower()
    return "" if _status(row) != NONE else next((word for word in PATHS if word in says), UNKNOWN)


def _trouble(row: Mapping[str, Any]) -> str:
    """`dpo under l2_ball (seed 0): residual 0.74, held against 1e-06. SAYS Mend it: COMMAND`."""
    if _status(row) != NOT_REACHED:
        return ""
    residual, tolerance, promised, left = (
        _number(row, f"certificate/{name}") for name in ("residual", "tolerance", "promised", "infeasibility")
    )
    outside = f", outside by {left:.2g}" if left > 0 else ""
    said = f"residual {residual:.2g}, held against {tolerance:.2g}{outside}. " if math.isnan(promised) else ""
    return f"{_named(row)}: {said}{_text(row, 'says')}{_mend(row)}"


def _beaten(ceiling: Mapping[str, Any], winner: Mapping[str, Any]) -> str:
    more = f"{winner[LOSS]} attains {-winner['gap']:.3f} more, so its search has failed."
    return f"{_named(ceiling)}: {more}{_mend(ceiling)}"


def _named(row: Mapping[str, Any]) -> str:
    return f"{row[LOSS]} under {row[CONSTRAINT]} (seed {row['seed']})"


def _mend(row: Mapping[str, Any]) -> str:
    command = row.get("command")
    words = _text(row, "mend")
    return "" if is_null(command) or not words else f" Mend it: {mended(str(command), words)}"


def _sign(row: Mapping[str, Any]) -> str:
    """In which direction a gap may be wrong: searched for, or that of the best of a loss's solutions by J."""
    if worst([row["status"], row["ceiling_status"]]) not in GAPS:
        return ""
    if row["is_ceiling"] or row["status"] == CERTIFIED:
        return AT_LEAST * (SEARCHED in (row["status"], row["ceiling_status"]) or row["by_J"])
    return AT_LEAST if row["by_J"] else ABOUT


def _own_sign(group: pd.DataFrame) -> str:
    if group["by_J"].any():
        return AT_MOST
    searched = (group["status"] == SEARCHED).any()
    return (AT_LEAST if group["is_ceiling"].all() else ABOUT) * bool(searched)


def _first(texts: Iterable[str]) -> str:
    return next((text for text in texts if text), "")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(f"{CERTIFICATE}{name}")
    return "" if is_null(value) else str(value)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(f"{METRIC}{name}")
    return math.nan if value is None or is_null(value) else float(value)
