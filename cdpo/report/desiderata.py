"""Two desiderata of a loss, over the weight of its regulariser, decided from what runs made of their candidates.

Interpolation: from the Bradley-Terry policy pi*, exp(r), at weight 0 to the reference at infinity. Preservation:
prompts on which the reference is pi* already stay, while others come nearer to pi*. After Hu et al. 2024, 2025 (arXiv
2407.09072, 2506.07492), with tolerances of our own. No verdict knows a loss by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from cdpo.report.figures import Study
from cdpo.report.intervals import short
from cdpo.report.labels import CONSTRAINT, LOSS, text, titled
from cdpo.report.marks import AS_TRAINED, GAPS
from cdpo.report.plotting import INK, Drawing, looks, panels
from cdpo.report.runs import CONFIG, METRIC
from cdpo.report.tables import WORDS, Table
from cdpo.training.directory import RunDirectory

TOLERANCE = 0.01  # total variation within which one policy stays for another
LEAST = 0.1  # share of the way from reference to pi* that counts as an improvement; a constraint may allow no more
ENDS = 0.01, 100.0  # weights that stand for 0 and for infinity
WEIGHTS = 3  # at least, of a loss, for it to be asked
ROUNDING = 1e-12  # nats
FLOOR = 1e-6  # nats; less is drawn there
KEYS = ["loss", "constraint", "setting"]
NEEDED = ["source", "candidate", "reward", "log_reference", "log_policy"]  # of candidates.csv
VERDICTS = ("interpolates", "preserves")
INTERPOLATION = (
    "As the weight of the regulariser goes to 0 a policy should go to π*, the Bradley-Terry policy exp(r), as it goes "
    f"to infinity to π_ref. Pass: within {TOLERANCE:g} total variation of π* at the smallest weight, of π_ref at the "
    "largest. to the best response: how far it is from giving all to that, at the smallest. The worst prompt counts."
)
PRESERVATION = (
    "Prompts are good where π_ref = π*, the Bradley-Terry policy exp(r). Pass: at all weights the good prompts stay "
    f"within {TOLERANCE:g} total variation of π*, and at some weight the others go at least {LEAST:g} of the way from "
    "π_ref to π*. best compromise: the best improvement at those weights at which the good ones stay."
)


def tables(study: Study) -> list[Table]:
    """Pass or fail of every loss, where its runs can tell."""
    found = measured(study)
    return [*_interpolation(found), *_preservation(found)] if len(found) else []


def said(found: Sequence[Table]) -> list[str]:
    """`Interpolation: 2 of 10 pass (expo, expo_regression).` Of every table with verdicts a sentence."""
    sentences = []
    for table in found:
        at = next((table.columns.index(name) for name in VERDICTS if name in table.columns), None)
        if at is not None:
            passed = [" ".join(row[:at]) for row in table.rows if row[at] == "pass"]
            listed = f" ({', '.join(passed[:5])}{', ...' if len(passed) > 5 else ''})" if passed else ""
            sentences.append(f"{table.title}: {len(passed)} of {len(table.rows)} pass{listed}.")
    return sentences


def measured(study: Study) -> pd.DataFrame:
    """A row per prompt of each run of a loss with WEIGHTS weights or more: distances of its policy, as `distances`."""
    rows = []
    for run in _asked(study):
        candidates = _candidates(study.folder / run["directory"])
        for source, one in candidates.groupby("source", sort=False):
            known = {key: run[key] for key in (*KEYS, "weight", "solid")}
            rows.append(known | {"source": source, **distances(one)})
    return pd.DataFrame(rows)


def distances(candidates: pd.DataFrame) -> dict[str, Any]:
    """Of one prompt. good: the reference is pi*; start, missed, moved: total variation from pi* to reference and to
    policy, from reference to policy; greedy: from the best response to policy; kl: KL(pi* || policy), nats."""
    reward, log_policy = (candidates[name].to_numpy(float) for name in ("reward", "log_policy"))
    reference, policy = np.exp(candidates["log_reference"].to_numpy(float)), np.exp(log_policy)
    log_right = reward - np.logaddexp.reduce(reward)
    right = np.exp(log_right)
    found = {"start": (reference, right), "missed": (policy, right), "moved": (policy, reference)}
    far = {name: float(np.abs(one - other).sum() / 2) for name, (one, other) in found.items()}
    kl = float((right * (log_right - log_policy)).sum())
    kl = kl if kl > ROUNDING else 0.0
    return {"good": far["start"] < 1e-9, **far, "greedy": 1 - float(policy[reward.argmax()]), "kl": kl}


def probabilities(study: Study) -> Drawing | None:
    """The policy over the weight, candidate by candidate, where runs have one prompt: a panel per loss."""
    read = [(run, _candidates(study.folder / run["directory"])) for run in _asked(study)]
    found = [(run, one) for run, one in read if one["source"].nunique() == 1]
    if not found or len({tuple(one["reward"]) for _, one in found}) > 1:  # of several worlds there is no one line
        return None
    titles = {_title(run, run["loss"]): None for run, _ in found}
    figure = panels(list(titles), sharey=True)
    for title, axes in figure.items():
        _path(axes, [(run["weight"], one) for run, one in found if _title(run, run["loss"]) == title])
    figure.labels("weight of the regulariser", "probability")
    figure.legend()
    caption = "The policy as the weight of the regulariser grows. Dotted: π*, the Bradley-Terry policy; dashed: π_ref."
    return figure.drawing("interpolation", caption, f"A line per response in {len(titles)} panels, one per loss.")


def preserved(study: Study) -> Drawing | None:
    """KL on the good prompts against what the others improve, a line over the weights per loss."""
    found = measured(study)
    if found.empty or not (found["good"].any() and not found["good"].all()):
        return None
    points = both_kinds(found)
    points["title"] = [titled(row["constraint"], row["setting"]) for row in _rows(points)]
    figure = panels(list(dict.fromkeys(points["title"])), sharey=True)
    shown = points[points["title"].isin(figure.axes)]
    for (title, loss), line in shown.groupby(["title", "loss"], sort=False):
        style = study.looks()[loss].line() | {"ms": 3}
        figure.axes[title].plot(line["improved"], line["kl"].clip(lower=FLOOR), label=loss, **style)
    for axes in figure.axes.values():
        axes.set(yscale="log", xlim=(max(-1.1, points["improved"].min() - 0.05), 1.05))
        axes.axvline(0, color=INK, linewidth=0.6, linestyle=":")
    figure.labels("improvement of the others", "KL on the good prompts (nats)")
    figure.legend()
    caption = (
        "KL(π* ‖ π) on the prompts on which the reference is π* already, against the share of the way to π* that the "
        f"others go (left of 0 they get worse); a point per weight. Below {FLOOR:g} nats points lie at {FLOOR:g}."
    )
    return figure.drawing("preservation", caption, f"Lines for {points['loss'].nunique()} losses.")


def both_kinds(found: pd.DataFrame) -> pd.DataFrame:
    """A row per run, by weight: on good prompts the largest kl and missed, on the others the least share `improved`."""
    shares = found.assign(improved=(1 - found["missed"] / found["start"]).where(~found["good"]))
    keys = [*KEYS, "weight"]
    good = shares[shares["good"]].groupby(keys, sort=False)[["kl", "missed"]].max()
    rest = shares[~shares["good"]].groupby(keys, sort=False).agg({"improved": "min", "solid": "all"})
    return good.join(rest, how="inner").reset_index()


# ------------------------------------------------------------------------------------------------------------ verdicts


def _interpolation(found: pd.DataFrame) -> list[Table]:
    """Of losses whose weights reach both ENDS, on prompts where the reference is not pi*."""
    rows = []
    for keys, part in found[~found["good"]].groupby(KEYS, sort=False):
        low, high = (part[part["weight"] == end] for end in (part["weight"].min(), part["weight"].max()))
        if low["weight"].iloc[0] > ENDS[0] or high["weight"].iloc[0] < ENDS[1]:
            continue
        ends = low["missed"].max(), high["moved"].max()
        verdict = _verdict(max(ends) <= TOLERANCE, bool(low["solid"].all() and high["solid"].all()))
        at = [low["weight"].iloc[0], ends[0], low["greedy"].max(), high["weight"].iloc[0], ends[1]]
        rows.append([*keys, verdict, *map(short, at)])
    columns = ["interpolates", "smallest weight", "to π*", "to the best response", "largest weight", "to π_ref"]
    return _table("Interpolation", columns, rows, INTERPOLATION)


def _preservation(found: pd.DataFrame) -> list[Table]:
    """Of losses on prompts of both kinds; and the KL on the good ones at every weight."""
    points, rows, grid = both_kinds(found), [], []
    for keys, part in points.groupby(KEYS, sort=False):
        stays = part[part["missed"] <= TOLERANCE]
        best, compromise = part.loc[part["improved"].idxmax()], stays["improved"].max() if len(stays) else math.nan
        passed = len(stays) == len(part) and best["improved"] >= LEAST
        at = [part["missed"].max(), part["kl"].max(), best["improved"], best["weight"], best["kl"], compromise]
        rows.append([*keys, _verdict(passed, bool(part["solid"].all())), *map(short, at)])
        known = dict(zip(part["weight"], part["kl"]))
        grid.append([*keys, *(short(known.get(weight)) for weight in sorted(set(points["weight"])))])
    columns = ["preserves", "good: farthest", "good: largest KL", "others: best improvement", "at weight"]
    columns += ["good: KL there", "best compromise"]
    weights = [f"weight {short(weight)}" for weight in sorted(set(points["weight"]))] if len(points) else []
    return [
        *_table("Preservation", columns, rows, PRESERVATION),
        *_table("KL(π* ‖ π) on the good prompts, nats", weights, grid, ""),
    ]


def _verdict(passed: bool, solid: bool) -> str:
    """A verdict is of optima: none is given of runs that stopped before theirs, or have no certificate."""
    return AS_TRAINED if not solid else "pass" if passed else "fail"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> list[Table]:
    """A table whose rows begin with KEYS, without those of the keys that say nothing."""
    kept = [i for i, _ in enumerate(KEYS) if i == 0 or len({row[i] for row in rows}) > 1]
    cut = [[*(row[i] for i in kept), *row[len(KEYS) :]] for row in rows]
    columns = [*(KEYS[i] for i in kept), *columns]
    words = (*WORDS, *VERDICTS)
    return [Table(title, columns, cut, [note] * bool(note), words=words)] if rows else []


# ------------------------------------------------------------------------------------------------------- what is read


def _asked(study: Study) -> list[dict[str, Any]]:
    """Runs of losses with WEIGHTS weights or more whose candidates have a Bradley-Terry policy; by weight."""
    runs, weight = study.runs, f"{CONFIG}beta"
    if not {weight, f"{METRIC}objective/tv_to_bradley_terry", "status"} <= set(runs):
        return []
    known = runs[runs[f"{METRIC}objective/tv_to_bradley_terry"].notna() & runs[weight].notna()]
    others = [name for name in study.settings if name != "beta"]
    named = known.assign(
        loss=known[LOSS],
        constraint=known[CONSTRAINT],
        setting=[_set_to(row, others) for row in _rows(known)],
        weight=known[weight].astype(float),
        solid=known["status"].isin(GAPS),
    )
    several = named[named.groupby(KEYS)["weight"].transform("nunique") >= WEIGHTS]
    places = [{name: i for i, name in enumerate(names)} for names in (study.losses(), study.constraints())]
    rows = _rows(several.sort_values(["setting", "weight"]))
    return sorted(rows, key=lambda row: (places[0][row["loss"]], places[1][row["constraint"]]))


def _set_to(row: Mapping[str, Any], settings: Sequence[str]) -> str:
    """`model.sharing 1`: the settings of a run, without its weight."""
    found = {name: text(row.get(f"{CONFIG}{name}", row.get(name))) for name in settings}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value)


def _candidates(folder: Path) -> pd.DataFrame:
    """candidates.csv of a run, not to be changed; no rows where it is not there, or is not that."""
    path = RunDirectory(folder).candidates
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return pd.DataFrame(columns=NEEDED)


@cache
def _read(path: Path, changed_at: int) -> pd.DataFrame:
    """A file once for all tables and figures, until it has changed."""
    return pd.read_csv(path, usecols=NEEDED)


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _title(run: Mapping[str, Any], loss: str) -> str:
    constraint = "" if run["constraint"] == "none" else run["constraint"]
    return titled(titled(loss, constraint), run["setting"])


def _path(axes: Axes, points: Sequence[tuple[float, pd.DataFrame]]) -> None:
    """A line per response, with pi* and the reference as lines across."""
    first = points[0][1]
    right = np.exp(first["reward"] - np.logaddexp.reduce(first["reward"]))
    for i, (name, look) in enumerate(looks([f"response {n}" for n in first["candidate"]]).items()):
        y = [float(np.exp(one["log_policy"].iloc[i])) for _, one in points]
        axes.plot([weight for weight, _ in points], y, label=name, **look.line() | {"linestyle": "-", "ms": 3})
        for value, dashes in ((right[i], ":"), (np.exp(first["log_reference"].iloc[i]), "--")):
            axes.axhline(float(value), color=look.color, linestyle=dashes, linewidth=0.8)
    axes.set(xscale="log", ylim=(-0.03, 1.03))
    axes.minorticks_off()
