"""The figures of a report that show how runs went: curves over training, paths, the Gaussian view, penalties.

Made from the histories of the runs that a report keeps; where none went through, of all that have one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cdpo.report.figures import Study
from cdpo.report.intervals import counted, interval
from cdpo.report.labels import CONSTRAINT, LOSS, text, titled
from cdpo.report.plotting import FAINT, Drawing, Panels, line, looks, panels
from cdpo.report.runs import CONFIG, histograms, history

METRICS = ("objective/attained", "objective/kl", "eval/loss", "loss")
POINTS = 200  # points; longer curves are thinned
VIEWS = {"log_gamma": "log γ (filled: log λ)", "effective_weight": "effective weight"}
EVALUATIONS = 5
MARKED = 25  # points of a path; more hide one another
TAIL = 0.003  # share of the pairs at either end that a density leaves out
NOISES = (0.01, 0.1, 1.0, 10.0)


def training(study: Study) -> list[Drawing]:
    """Attained (else the held-out loss) and the training loss over steps; a panel per constraint, bands over seeds.

    A search takes one step, and a line from the reference to its optimum would be no path that it went.
    """
    found = _histories(study)
    table = [run for run in found if any(step > 1 for points in run["history"].values() for step, _ in points)]
    known = {metric for run in table for metric, points in run["history"].items() if len(points) > 1}
    wanted = {
        "objective/attained": ("attained", "Attained over training, at each evaluation"),
        "eval/loss": ("held-out loss", "Held-out loss over training"),
        "loss": ("training loss", "Training loss"),
    }
    first = [name for name in ("objective/attained", "eval/loss") if name in known][:1]
    shown = [name for name in (*first, "loss") if name in known]
    note = " Searches, which take one step, are left out." if len(table) < len(found) else ""
    return [_over_steps(study, table, name, *wanted[name], note) for name in shown]


def path(study: Study) -> Drawing | None:
    """Attained against KL along training, of runs with EVALUATIONS or more: fewer would be joined by chords."""
    table = [run for run in _histories(study) if len(run["history"]["objective/kl"]) >= EVALUATIONS]
    if not table:
        return None
    figure = panels(_titles(study, table), sharey=True)
    for loss, title, runs in _grouped(study, table, figure):
        x, y = (_mean_by_step(runs, name) for name in ("objective/kl", "objective/attained"))
        steps = [step for step in x if step in y]
        style = study.looks()[loss].line() | ({} if len(steps) <= MARKED else {"marker": None})
        figure.axes[title].plot([x[s][0] for s in steps], [y[s][0] for s in steps], label=loss, **style | {"ms": 3})
    figure.labels("KL to the reference (nats per prompt)", "attained")
    figure.legend()
    caption = (
        f"The path of training: attained against KL, from the reference (0, 0) on; means over {study.seeds()} at each "
        "evaluation."
    )
    return figure.drawing(
        "path", caption, f"A line per loss in {counted([len(figure.axes)], 'panel')}, one per constraint."
    )


def distributions(study: Study) -> Drawing | None:
    """Signal variance, noise variance and effective weight of the held-out pairs at the end of training."""
    tables: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in _kept(study):
        if found := histograms(study.folder / row["directory"]):
            tables[titled(row[CONSTRAINT], row["setting"]), row[LOSS]].append(found)
    groups = [title for title in _ordered(study) if any(key[0] == title for key in tables)]
    shown = [view for view in VIEWS if any(view in found for runs in tables.values() for found in runs)]
    if not groups or not shown:
        return None
    figure = panels([f"{group}: {VIEWS[view]}" for group in groups for view in shown], columns=len(shown))
    for group in groups:
        for view in shown:
            if axes := figure.axes.get(f"{group}: {VIEWS[view]}"):
                _densities(axes, study, {loss: runs for (title, loss), runs in tables.items() if title == group}, view)
    figure.legend()
    caption = (
        f"Densities over held-out pairs at the end, means over {study.seeds()}. γ: signal variance, λ: noise variance "
        "of the reference; γ < λ where the policy prefers the chosen response more than the reference does."
    )
    alt = f"Histograms of {' and '.join(VIEWS[view] for view in shown)} for {counted([len(groups)], 'constraint')}."
    return figure.drawing("distributions", caption, alt)


def penalties(study: Study) -> Drawing | None:
    """What the Gaussian losses make of γ: the log penalty for several λ, and the other penalties among the runs."""
    rows = [row for row in _kept(study) if text(row.get(f"{CONFIG}loss._target_")).endswith(".Gaussian")]
    shapes = dict(map(_shape, rows))
    if not rows:
        return None
    figure = panels(
        ["log(γ + λ) − log λ, over its value at γ = 1", "penalties at λ = 1"][: 1 + (set(shapes) != {"log"})]
    )
    gamma, axes = np.linspace(1e-4, 3, 150), list(figure.axes.values())
    for noise, look in zip(NOISES, looks([str(noise) for noise in NOISES]).values()):
        values = _penalty("log", None, gamma / noise) / _penalty("log", None, np.array([1 / noise]))
        axes[0].plot(gamma, values, color=look.color, linestyle=look.dashes, label=f"λ = {noise:g}")
    for name, look in looks(sorted({"log", *shapes})).items() if len(axes) > 1 else ():
        values = _penalty(*shapes.get(name, ("log", None)), gamma)
        axes[1].plot(gamma, values, color=look.color, linestyle="--", label=name)
    for one in axes:
        one.set(xlabel="γ", ylim=(0, 3))
    figure.legend()
    caption = "The penalty on the signal variance: close to linear (ℓ1) for large λ, a step (ℓ0) for small λ."
    return figure.drawing("penalties", caption, "Curves of the penalty against γ, more concave for smaller λ.")


def _kept(study: Study) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in study.runs.to_dict("records")]


def _histories(study: Study) -> list[dict[str, Any]]:
    """Label, panel and history of every kept run."""
    return [
        {
            "loss": row[LOSS],
            "title": titled(row[CONSTRAINT], row["setting"]),
            "history": history(study.folder / row["directory"], list(METRICS)),
        }
        for row in _kept(study)
    ]


def _ordered(study: Study) -> list[str]:
    """Titles of panels, in the order of the cells; those of no finished run last."""
    cells = [{CONSTRAINT: row["constraint"], "setting": row["setting"]} for row in study.cells.to_dict("records")]
    return list(dict.fromkeys(titled(row[CONSTRAINT], row["setting"]) for row in [*cells, *_kept(study)]))


def _titles(study: Study, table: list[dict[str, Any]]) -> list[str]:
    return [title for title in _ordered(study) if any(run["title"] == title for run in table)]


def _grouped(study: Study, table: list[dict[str, Any]], figure: Panels) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(loss, panel, runs) for every line of a figure, in the order of the legend."""
    groups = ((loss, title) for title in figure.axes for loss in study.losses())
    found = [(loss, title, [r for r in table if r["loss"] == loss and r["title"] == title]) for loss, title in groups]
    return [(loss, title, runs) for loss, title, runs in found if runs]


def _over_steps(study: Study, table: list[dict[str, Any]], metric: str, *texts: str) -> Drawing:
    """A figure of a metric; texts: the name of its axis, the caption, a note below it."""
    label, caption, note = texts
    known = [run for run in table if len(run["history"][metric]) > 1]
    figure = panels(_titles(study, known), sharey=metric == "objective/attained")
    for loss, title, runs in _grouped(study, known, figure):
        points = [(step, *found) for step, found in _mean_by_step(runs, metric).items()]
        thinned = points[:: math.ceil(len(points) / POINTS) or 1]  # none, where seeds were logged at other steps
        if thinned:
            line(figure.axes[title], thinned, study.looks()[loss], loss, band=True)
    figure.labels("step", label)
    figure.legend()
    seeds = Counter((run["loss"], run["title"]) for run in known).values()
    bands = f"means, bands are 95% t intervals over {counted(seeds)}" if max(seeds) > 1 else "of one seed"
    said = f"{caption}: {bands}.{note}"
    return figure.drawing(f"training-{label.replace(' ', '-')}", said, f"{counted([len(known)], 'run')}.")


def _mean_by_step(runs: list[dict[str, Any]], metric: str) -> dict[int, tuple[float, float]]:
    """Mean and half an interval over runs at every step that all of them have reached."""
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step, value in dict(run["history"][metric]).items():
            values[step].append(value)
    whole = {step: interval(found) for step, found in sorted(values.items()) if len(found) == len(runs)}
    return {step: (found[""], found["_half"]) for step, found in whole.items()}


def _densities(axes: Axes, study: Study, runs: Mapping[str, list[dict[str, Any]]], view: str) -> None:
    """A line per loss on one grid; under log γ, log λ as an area, which is the same for all losses."""
    found = [one[name] for part in runs.values() for one in part for name in (view, "log_lambda") if name in one]
    used = [one for one in found if view == "log_gamma" or one in [o.get(view) for part in runs.values() for o in part]]
    low, high = zip(*(_ends(one) for one in used))
    grid = np.linspace(min(low), max(high), 90)
    if view == "log_gamma":
        noise = [_density(one["log_lambda"], grid) for part in runs.values() for one in part if "log_lambda" in one]
        axes.fill_between(grid, np.mean(noise, axis=0), color=FAINT, linewidth=0)
    for loss in [name for name in study.losses() if name in runs]:
        values = [_density(one[view], grid) for one in runs[loss] if view in one]
        look = study.looks()[loss]
        axes.plot(grid, np.mean(values, axis=0), label=loss, **look.line() | {"marker": None})
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)  # at an optimum at infinity they have many digits


def _ends(table: Mapping[str, Any]) -> tuple[float, float]:
    """The edges of the bins between which all but the tails lie."""
    edges, share = table["edges"], np.cumsum(table["shares"])
    last = min(int(np.searchsorted(share, share[-1] * (1 - TAIL))), len(share) - 1)
    return edges[int(np.searchsorted(share, share[-1] * TAIL))], edges[last + 1]


def _density(table: Mapping[str, Any], grid: np.ndarray) -> np.ndarray:
    """Share of weight per unit, on a grid, smoothed over three bins of the grid so that bins of seeds do not comb."""
    edges, shares = np.asarray(table["edges"], float), np.asarray(table["shares"], float)
    total = np.interp(grid, edges, np.concatenate([[0.0], shares.cumsum()]))
    rough = np.gradient(total, grid)
    return np.convolve(rough, np.ones(3) / 3, mode="same")


def _shape(row: Mapping[str, Any]) -> tuple[str, tuple[str, Any]]:
    """What a run's penalty is called, and its name and power as the loss knows them."""
    name, power = text(row.get(f"{CONFIG}loss.penalty")) or "log", row.get(f"{CONFIG}loss.power")
    return (f"{name} {text(power)}" if name == "power" else name), (name, power)


def _penalty(name: str, power: Any, snr: np.ndarray) -> np.ndarray:
    """penalty(γ) from γ / λ, by the loss itself."""
    import torch

    from cdpo.losses.gaussian import Gaussian

    exponent = None if name != "power" else float(power)
    loss = Gaussian(penalty=name, power=exponent)  # type: ignore[arg-type]
    return loss.penalty_of(torch.from_numpy(np.log(snr))).numpy()
