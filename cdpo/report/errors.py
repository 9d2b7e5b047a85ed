"""The three errors of a trained policy, apart: of the constraint and the loss, of n sampled pairs, and of training.

All in shares of what J can gain, the unit of attained. Under one constraint, of one loss, on one world:

    constraint    1 - RLHF's optimum under the constraint
    gap           RLHF's optimum - the loss's optimum on all preferences
    estimation    the loss's optimum on all preferences - its optimum on n pairs
    optimisation  its optimum on n pairs - what training reached on them

They add up to 1 - attained. Of true optima only gap and constraint are 0 or more: an optimum on n pairs may do better
by J than one on all, and training that stops early better than the optimum. Penalties have no place here, as one
strength is not one set.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pandas as pd

from cdpo.report.figures import Study
from cdpo.report.intervals import counted, interval
from cdpo.report.labels import CONSTRAINT, LOSS, PENALTIES, is_null, names, text, titled
from cdpo.report.marks import NOT_REACHED, SLACK
from cdpo.report.plotting import Drawing, line, looks, panels
from cdpo.report.runs import CERTIFICATE, CONFIG, DONE, METRIC

ATTAINED = f"{METRIC}objective/attained"
PAIRS, WORLD, STATUS = f"{CONFIG}dataset.pairs", f"{CONFIG}dataset.world_seed", f"{CERTIFICATE}status"
ERRORS = ("constraint", "gap", "estimation", "optimisation")
VARIES = ("dataset.pairs", "dataset.preferences", "optimizer", "trainer.")  # settings that tell the errors apart


def errors(study: Study) -> Drawing | None:
    """Each error against n, a panel per loss and constraint: means over worlds with their t intervals."""
    parts = {title: part for title, part in apart(study).items() if len(part) > 1}
    if not parts:
        return None
    figure, styles, found = panels(list(parts), columns=2, size=(4.2, 2.8), sharey=True), looks(ERRORS), set()
    for title, axes in figure.items():
        for name in [name for name in ERRORS if any(name in one for one in parts[title].values())]:
            at = {n: interval(worlds[name]) for n, worlds in sorted(parts[title].items()) if name in worlds}
            found |= {one["_n"] for one in at.values()}
            line(axes, [(n, one[""], one["_half"]) for n, one in at.items()], styles[name], name)
        axes.set(xscale="log", xlabel="sampled pairs, n", ylabel="share of what J can gain")
    figure.legend()
    caption = (
        "What is not attained, apart: constraint (1 less RLHF's optimum under it), gap (RLHF's optimum less the loss's "
        "on all preferences), estimation (that less its optimum on n pairs), optimisation (that less what training "
        "reached, where it went one way). They add up to 1 - attained. Means, bars are 95% t intervals over "
        f"{counted(found, 'world')}; "
        "without optima that were not reached."
    )
    return figure.drawing("errors", caption, f"Four lines over n in {len(parts)} panels.")


def apart(study: Study) -> dict[str, dict[float, dict[str, list[float]]]]:
    """`dpo, l2_ball` -> n -> error -> its value on every world where all it needs has run."""
    found: dict[str, dict[float, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    if not {ATTAINED, PAIRS, WORLD, STATUS, "optimizer"} <= set(study.every.columns):
        return {}
    runs, settings = study.every, [name for name in study.settings if not name.startswith(VARIES)]
    others = {name: name if name in runs else f"{CONFIG}{name}" for name in settings}
    known = runs[runs["state"].isin(DONE) & runs[ATTAINED].notna() & ~(_exact(runs) & _not_reached(runs))]
    known = known[[not set(names(one)) & set(PENALTIES) for one in known[CONSTRAINT]]]
    known = known.assign(exact=_exact(known))
    for _, part in known.groupby([CONSTRAINT, WORLD, *others.values()], sort=False, dropna=False):
        rows = part.to_dict("records")
        said = ", ".join(f"{name} {text(rows[0][column])}" for name, column in others.items())
        ceiling = _ceiling([row for row in rows if row["exact"]])
        for (loss, n), steps in _steps([row for row in rows if not row["is_ceiling"]]).items():
            levels = [1.0, ceiling, *steps]
            for name, before, after in zip(ERRORS, levels, levels[1:]):
                if before is not None and after is not None:
                    found[f"{loss}, {titled(rows[0][CONSTRAINT], said)}"][n][name].append(before - after)
    return found


def _ceiling(exact: list[dict[Any, Any]]) -> float | None:
    """What RLHF attains at its optimum; None without it, or where another search has found more."""
    ceiling = max((row[ATTAINED] for row in exact if row["is_ceiling"]), default=None)
    beaten = ceiling is not None and max(row[ATTAINED] for row in exact) > ceiling + SLACK
    return None if beaten else ceiling


def _steps(rows: list[dict[Any, Any]]) -> dict[tuple[str, float], tuple[float | None, float | None, float | None]]:
    """What a loss attains at its optimum on all preferences, at that on n pairs, and as trained on them.

    Nothing as trained where training went several ways.
    """
    everything = {row[LOSS]: row[ATTAINED] for row in rows if is_null(row[PAIRS]) and row["exact"]}
    sampled = [((row[LOSS], float(row[PAIRS])), row) for row in rows if not is_null(row[PAIRS])]
    optimum = {key: row[ATTAINED] for key, row in sampled if row["exact"]}
    ways = Counter(key for key, row in sampled if not row["exact"])
    trained = {key: row[ATTAINED] for key, row in sampled if not row["exact"] and ways[key] == 1}
    return {key: (everything.get(key[0]), one, trained.get(key)) for key, one in optimum.items()}


def _exact(runs: pd.DataFrame) -> pd.Series:
    return (runs["optimizer"] == "exact").fillna(False).astype(bool)


def _not_reached(runs: pd.DataFrame) -> pd.Series:
    return (runs[STATUS] == NOT_REACHED).fillna(False).astype(bool)
