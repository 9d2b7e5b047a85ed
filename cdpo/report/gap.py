"""The constraint gap, from the table of runs: attained by RLHF less attained by another loss, under one constraint.

gap(loss, C) = attained(argmax of J on C) - attained(argmin of the loss on C), in shares of what J can gain without C.
Runs of one problem and loss that differ in restart or optimizer are searches for one optimum: a certified one counts,
else the lowest training objective; where that ranks no solutions, the highest J. Pure functions of the labelled table
(`cdpo.report.labels`). After Kong, Hu, He, Wipf (AISTATS 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cdpo.report.intervals import counted, interval
from cdpo.report.labels import CONSTRAINT, LOSS, PENALTIES, Labelled, is_null, names, shown
from cdpo.report.marks import CERTIFIED, SLACK, of_ceiling, of_cell, with_certificates, with_marks
from cdpo.report.runs import CONFIG, DONE, METRIC

if TYPE_CHECKING:
    import pandas as pd

MOMENTUM = f"{CONFIG}optimizer.momentum"
TOLERANCE = 1e-9  # relative: a norm at the end of a curve is on it
SIZES = {"weight_decay": "constraint/weight_decay/norm"}  # what a penalty makes small; else the norm of the change
MEASURES = {  # column of a cell -> metric
    "attained": "objective/attained",
    "expected_reward": "objective/expected_reward",
    "kl": "eval/kl/candidates",
    "kl_sampled": "kl_budget/kl_sampled",
    "accuracy": "eval/rewards/accuracies",
    "margin": "eval/rewards/margins",
    "eval_loss": "eval/loss",
    "norm": "change/norm",
    "tv_to_optimum": "objective/tv_to_optimum",
    "tv_to_bradley_terry": "objective/tv_to_bradley_terry",
}


def best(labelled: Labelled) -> pd.DataFrame:
    """The best search of every problem and loss; only runs that went through count.

    Adds what its certificate says, `searches`, how many there were, and in attained_low and attained_high the range
    over all solutions within epsilon of its objective's fall of it, those of the other searches among them.
    """
    runs = with_certificates(labelled.runs[labelled.runs["state"].isin(DONE)])
    runs["attained"], runs["norm"] = _numbers(runs, MEASURES["attained"]), _penalised_norm(runs)
    runs["rank"], runs["unproven"] = [_rank(row) for row in runs.to_dict("records")], runs["status"] != CERTIFIED
    runs = runs.sort_values(["unproven", "rank", "directory"])
    groups = runs.groupby(["problem", LOSS], sort=False)
    found = groups.head(1).set_index(["problem", LOSS], drop=False).rename_axis([None, None])
    found["searches"] = groups.size()
    epsilon, fall = (groups[name].transform("first") for name in ("epsilon", "fall"))
    slack = epsilon * fall.fillna(0.0) * ~runs["by_J"]  # it is the objective's
    alike = runs[runs["rank"] <= groups["rank"].transform("first") + slack]
    ranges = alike.groupby(["problem", LOSS])
    found["attained_low"] = ranges[["attained", "attained_low"]].min().min(axis=1)
    found["attained_high"] = ranges[["attained", "attained_high"]].max().max(axis=1)
    return found.sort_values("directory").reset_index(drop=True)


def with_gaps(kept: pd.DataFrame) -> pd.DataFrame:
    """The rows of `best`, with `ceiling`: attained by RLHF on the same problem; `gap`; marks; `at_norm`; and `reason`.

    `at_norm`: the constraint is a penalty, and RLHF is read off where it has the norm of the loss's run: at equal norm
    both are optima on one ball. `reason` is why a gap is NaN, else "". RLHF itself has no gap.
    """
    import pandas as pd

    ceilings = kept[kept["is_ceiling"] & kept["attained"].notna()]
    pairs = [_ceiling(row, ceilings) for row in kept.to_dict("records")]
    columns = ["ceiling", "reason", *of_ceiling(ceilings)]
    rows = [(attained, reason, *of_ceiling(partners).values()) for attained, reason, partners in pairs]
    found = kept.join(pd.DataFrame(rows, kept.index, columns))
    found["at_norm"] = kept["constraint"].map(lambda name: bool(set(names(name)) & set(PENALTIES))).astype(bool)
    found["gap"] = (found["ceiling"] - found["attained"]).where(~found["is_ceiling"])
    return with_marks(found)


def cells(found: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """One row per loss, constraint and setting: gap and MEASURES, each as the `interval` of its values over seeds.

    `identical`: the runs of all seeds have the same numbers, so they count as one. `below_reference`: seeds whose
    attained is below 0 by over SLACK.
    """
    import pandas as pd

    keys = [CONSTRAINT, LOSS, *settings]
    rows = [_cell(dict(zip(keys, key)), group) for key, group in found.groupby(keys, dropna=False, sort=False)]
    table = pd.DataFrame(rows, columns=list(rows[0]) if rows else [*keys, "setting"])
    table = table.rename(columns={LOSS: "loss", CONSTRAINT: "constraint"} | {name: shown(name) for name in settings})
    return _ordered(table, [shown(name) for name in settings])


def at_norm(points: Sequence[tuple[float, float]], norm: float) -> tuple[float, str]:
    """What the monotone cubic through (norm, attained) attains at `norm`; NaN, and why, where it is not bracketed.

    Beyond the largest norm it is known too, if RLHF attains all but SLACK there.
    """
    from scipy.interpolate import PchipInterpolator

    known: dict[float, float] = {}
    for x, y in sorted(points):
        known[x] = max(y, known.get(x, y))
    if len(known) < 2:
        return math.nan, f"RLHF has {counted([len(known)], 'strength')}, a curve needs 2: add strengths"
    low, high = min(known), max(known)
    slack = TOLERANCE * high
    if norm > high and known[high] >= 1 - SLACK:  # RLHF has no use for so large a norm
        return known[high], ""
    if not low - slack <= norm <= high + slack:
        return math.nan, f"norm {norm:.4g} outside RLHF's {low:.4g} to {high:.4g}: add strengths"
    return float(PchipInterpolator(list(known), list(known.values()))(min(max(norm, low), high))), ""


def _numbers(frame: pd.DataFrame, metric: str) -> pd.Series:
    """A metric's column as float64; NaN where a run has none."""
    import pandas as pd

    return frame.get(f"{METRIC}{metric}", pd.Series(math.nan, frame.index)).astype("float64")


def _penalised_norm(runs: pd.DataFrame) -> pd.Series:
    """The norm at which losses under a penalty are compared: of the change, or what SIZES says. float64"""
    norms = _numbers(runs, "change/norm")
    for name, metric in SIZES.items():
        norms = _numbers(runs, metric).where([name in names(c) for c in runs["constraint"]]).fillna(norms)
    return norms


def _rank(row: Mapping[str, Any]) -> float:
    """What the best of several searches has least of: the objective; -J, where that ranks no solutions."""
    return -row.get(f"{METRIC}objective/J", math.nan) if row["by_J"] else _objective(row)


def _objective(row: Mapping[str, Any]) -> float:
    """What the search minimised: the objective on all Items, and what acts beside it; NaN (last) without one.

    Decay by learning rate * strength has the fixed point that minimises (1 - momentum) * strength / 2 * norm^2 beside
    the objective, under SGD; other optimizers have none such. Multiplier times budget makes a Lagrangian of the KL's
    part. All ours. In mini-batches the objective is that of the last one: there the held-out loss stands in.
    """

    def number(name: str) -> float:
        return math.nan if is_null(value := row.get(name)) else float(value)  # type: ignore[arg-type]

    objective = number(f"{METRIC}objective") if is_null(row.get(f"{CONFIG}trainer.batch_size")) else math.nan
    value = number(f"{METRIC}eval/loss") if math.isnan(objective) else objective
    momentum = 1.0 if is_null(row.get(MOMENTUM)) else number(MOMENTUM)  # 1: no penalty that is known
    for name in set(names(row["constraint"])) & set(PENALTIES):
        strength, norm = number(f"{CONFIG}constraint.{name}.strength"), number(f"{METRIC}constraint/{name}/norm")
        value += 0.0 if math.isnan(strength * norm) else (1 - momentum) * strength / 2 * norm**2
    for name in [name for name in names(row["constraint"]) if name.startswith("kl_budget")]:
        slack = number(f"{METRIC}constraint/{name}/multiplier") * number(f"{CONFIG}constraint.{name}.budget")
        value -= 0.0 if math.isnan(slack) or math.isnan(objective) else slack  # the held-out loss has no such part
    return value


def _ceiling(row: Mapping[str, Any], ceilings: pd.DataFrame) -> tuple[float, str, pd.DataFrame]:
    """What RLHF attains on the problem of a run, at its norm where the constraint is a penalty; or why that is NaN.

    And the runs of RLHF that say so: of a curve over norms all.
    """
    none = ceilings.head(0)
    if row["is_ceiling"]:
        return row["attained"], "", none
    if is_null(row["attained"]):
        tied = not is_null(row.get(f"{METRIC}objective/J"))
        why = "all rewards of a prompt tie, so J has nothing to gain" if tied else "its data has no rewards"
        return math.nan, f"it has no objective/attained: {why}", none
    penalties = set(names(row["constraint"])) & set(PENALTIES)
    if len(penalties) > 1:
        return math.nan, "two penalties: equal norms do not tell which of them acts", none
    same = ceilings[ceilings["pool" if penalties else "problem"] == row["pool" if penalties else "problem"]]
    if same.empty:
        return math.nan, _no_partner(row, ceilings), none
    if not penalties:
        return float(same["attained"].max()), "", same
    points = list(zip(same["norm"], same["attained"]))
    start = [(0.0, 0.0)] if names(row["constraint"]) == ["l2_to_start"] else []  # the limit of a strength to infinity
    return *at_norm([*start, *points], row["norm"]), same


def _no_partner(row: Mapping[str, Any], ceilings: pd.DataFrame) -> str:
    """Which key keeps the nearest run of RLHF from being a partner."""
    near = ceilings[(ceilings[CONSTRAINT] == row[CONSTRAINT]) & (ceilings["seeds"] == row["seeds"])]
    if near.empty:
        return "RLHF has no finished run under this constraint and seed"
    own = set(row["problem"].splitlines())
    lines = min((set(problem.splitlines()) ^ own for problem in near["problem"]), key=len)
    return f"no run of RLHF has the same {', '.join(sorted({line.partition('=')[0] for line in lines}))}"


def _cell(key: dict[str, Any], group: pd.DataFrame) -> dict[str, Any]:
    first, identical = group.iloc[0], _identical(group)
    row = key | {name: first[name] for name in ("setting", "family", "level_name", "level", "is_ceiling", "at_norm")}
    below = int((_numbers(group, MEASURES["attained"]) < -SLACK).sum())
    row |= {"seeds": len(group), "identical": identical, "below_reference": below}
    for name, values in [("gap", group["gap"]), *((name, _numbers(group, MEASURES[name])) for name in MEASURES)]:
        known = values.dropna().tolist()
        once = identical and len(set(known)) == 1
        row |= {f"{name}{part}": number for part, number in interval(known[:1] if once else known).items()}
    row |= {"ceiling": group["ceiling"].mean(), "penalised_norm": group["norm"].where(group["at_norm"]).mean()}
    notes = [f"{reason} (seed {seed})" for reason, seed in zip(group["reason"], group["seed"]) if reason]
    return row | of_cell(group) | {"searches": group["searches"].max(), "note": "; ".join(notes)}


def _identical(group: pd.DataFrame) -> bool:
    """Whether several seeds gave the same numbers to the last bit: then the seed changed nothing."""
    counts = [_numbers(group, metric).nunique(dropna=False) for metric in MEASURES.values()]
    return len(group) > 1 and set(counts) == {1} and bool(group["attained"].notna().all())


def _ordered(table: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """RLHF first, then losses by their mean gap; no constraint first, then families by level; settings outermost."""
    if table.empty:
        return table
    means = table.groupby("loss")["gap"].mean().fillna(math.inf)
    ceilings = set(table.loc[table["is_ceiling"], "loss"])
    losses = sorted(means.index, key=lambda name: (name not in ceilings, means[name], name))
    families = table["family"].replace("none", "")
    keys = {"_family": families, "_name": table["level_name"].fillna(""), "_level": table["level"]}
    keys["_loss"] = table["loss"].map(losses.index)
    by = [*settings, "_family", "_name", "_level", "constraint", "_loss"]
    ordered = table.assign(**keys).sort_values(by, na_position="first", kind="stable")
    return ordered.drop(columns=list(keys)).reset_index(drop=True)
