"""The loop, from top to bottom: score -> loss + penalties -> step -> constraint hooks, with evaluation and checkpoints.

It knows losses, constraints and optimizers by their interfaces only. n steps equal k steps, resume, n - k, bit for bit.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from cdpo import checkpoint
from cdpo.batch import Batch, Item
from cdpo.errors import NumericsError, Preempted
from cdpo.evaluate import add_pair_metrics, add_statistics, evaluate, generations, unit_weight
from cdpo.files import write_json
from cdpo.logps import Statistics, score, score_with_statistics
from cdpo.losses import per_unit
from cdpo.metrics import Means, MetricsFile
from cdpo.progress import Progress
from cdpo.reference import with_constants
from cdpo.run import Run, State, restore, snapshot


def fit(run: Run) -> State:
    """Train to the end, or until a constraint or a signal stops it; go on from the newest checkpoint if there is one.

    Raises NumericsError before a step with NaN or infinity is taken, Preempted after a signal, once the run is saved.
    """
    state, checkpoints = run.state, run.folder / "checkpoints"
    saved = restore(run, checkpoints)
    metrics = MetricsFile(run.folder / "metrics.jsonl")
    run.logger.start(run.folder, run.composed, run.group, after=metrics.truncate(saved))
    if run.trainer.samples:
        _samples(run).truncate(saved)
    with Progress(run.plan.steps, state.step, run.folder.name) as bar:
        while True:
            if state.looked < state.step:
                _look(run, metrics)
            stop = run.signals.requested
            due = state.step > 0 and state.step % run.trainer.checkpoint_every == 0
            if state.step > saved and (due or stop or run.ended):
                _check_weights(run)
                metrics.sync()
                checkpoint.save(checkpoints, state.step, snapshot(run), run.trainer.keep_checkpoints)
                saved = state.step
            if stop:
                raise Preempted(f"{run.signals.poll()} after step {state.step}; the same command goes on from there")
            if run.ended:
                metrics.close()
                return state
            _step(run)
            _record(run, metrics, state.fresh, every=run.trainer.log_every)
            bar.update(state.step, **_shown(state.fresh))


def _step(run: Run) -> None:
    """One optimizer step: the exact gradient over all micro-batches, then the constraints' hooks."""
    state, plan = run.state, run.plan
    began, rate = time.perf_counter(), run.optimizer.at(state.step, plan.steps)
    for group in run.optim.param_groups:
        group["lr"] = rate
    batches = [tuple(indices) for indices in plan[state.step]]
    rows: list[dict[str, float]] = []  # L-BFGS evaluates several times; the first is the point where the step began
    run.policy.train()

    def closure() -> float:
        rows.append(_gradient(run, batches))
        with torch.no_grad():
            for constraint in run.constraints.values():
                constraint.before_step(run.policy, rate)
        return rows[-1]["objective"]

    run.optim.step(closure)
    row = {**rows[0], "learning_rate": rate}
    with torch.no_grad():
        for constraint in run.constraints.values():
            constraint.after_step(run.policy, row)
    state.step += 1
    state.tokens += sum(plan.sizes[i] for indices in batches for i in indices)
    state.ratio_sum += row.pop("log_ratio")
    pairs = sum(len(run.train.items[i].pairs) for indices in batches for i in indices)
    seconds = time.perf_counter() - began
    state.fresh = row | {
        "epoch": state.step / plan.steps_per_epoch,
        "num_tokens": state.tokens,
        "tokens_per_second": sum(plan.sizes[i] for indices in batches for i in indices) / seconds,
        "pairs_per_second": pairs / seconds,
    }


def _gradient(run: Run, batches: list[tuple[int, ...]]) -> dict[str, float]:
    """Gradient of the mean over all pairs (or Items) of the step, however it is split. Returns the step's metrics.

    Raises NumericsError, with the rows written to nonfinite.json, if the objective or the gradient norm is not finite.
    """
    run.optim.zero_grad()
    means = Means()
    items = [run.train.items[i] for indices in batches for i in indices]
    total = sum(pair.weight for item in items for pair in item.pairs) if run.loss.unit == "pair" else len(items)
    objective = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
    for indices in batches:
        batch = run.train.batch(indices)
        with run.accelerator.autocast():
            sums, statistics = _score(run, batch)
        logps = with_constants(sums, batch, **run.context())
        values = per_unit(run.loss, logps)
        part = (values * unit_weight(run.loss, logps)).sum() / total
        for constraint in run.constraints.values():
            penalty = constraint.penalty(logps)
            part = part if penalty is None else part + penalty.sum() / len(items)
            for name, measured in constraint.measure(logps).items():
                means.add(name, measured)
        run.accelerator.backward(part)
        objective += part.detach()
        means.add("loss", values, unit_weight(run.loss, logps))
        add_pair_metrics(means, logps, run.beta)
        if statistics is not None:
            add_statistics(means, logps, statistics)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.trainer.max_grad_norm or math.inf)
    numbers = torch.stack([objective, norm.double()]).tolist()
    if not all(map(math.isfinite, numbers)):
        raise _not_finite(run, items, *numbers)
    return means.reduce() | {"objective": numbers[0], "grad_norm": numbers[1]}


def _score(run: Run, batch: Batch) -> tuple[Tensor, Statistics | None]:
    """Log-probs, and statistics of the logits where this step will be logged."""
    if (run.state.step + 1) % run.trainer.log_every == 0:
        return score_with_statistics(run.policy, batch)
    return score(run.policy, batch), None


def _not_finite(run: Run, items: list[Item], objective: float, norm: float) -> NumericsError:
    sources = [item.source for item in items]
    path = run.folder / "nonfinite.json"
    write_json(path, {"step": run.state.step, "objective": str(objective), "grad_norm": str(norm), "rows": sources})
    return NumericsError(
        f"step {run.state.step}: objective {objective}, gradient norm {norm}, on rows {', '.join(sources[:5])}"
        f"{' ...' if len(sources) > 5 else ''} (all in {path.name}). The optimizer did not step; an "
        "earlier checkpoint is kept. Lower optimizer.learning_rate, or look at these rows"
    )


def _look(run: Run, metrics: MetricsFile) -> None:
    """After a step: evaluate if it is time, and ask the constraints whether to stop. A signal puts it off."""
    state = run.state
    row = state.fresh | {"step": state.step}
    due = state.step % run.trainer.eval_every == 0 or state.step == run.plan.steps
    try:
        if due:
            row |= _evaluate(run)
        reasons = [c.stop_reason(row) for c in run.constraints.values()]
        state.stopped = next((reason for reason in reasons if reason), None)
        if state.stopped and not due:
            row |= _evaluate(run)
    except Interrupted:
        return
    found = {k: v for k, v in row.items() if k.startswith(("eval/", "constraint/"))}
    _record(run, metrics, found)
    state.looked = state.step
    if due and run.trainer.samples:
        _sample(run)


class Interrupted(Exception):
    """A signal came during an evaluation; stays within this module."""


def _evaluate(run: Run) -> dict[str, float]:
    if not run.held_out.items:
        return _reports(run)

    def on_batch() -> None:
        if run.signals.requested:
            raise Interrupted

    def score_batch(batch: Batch) -> tuple[Tensor, Statistics]:
        with run.accelerator.autocast():
            return score_with_statistics(run.policy, batch)

    budget = run.trainer.tokens_per_micro_batch
    row = evaluate(
        run.policy, run.held_out, run.loss, run.beta, score_batch, budget, on_batch=on_batch, **run.context()
    )
    return row | _reports(run)


def _reports(run: Run) -> dict[str, float]:
    reports = {name: constraint.report() for name, constraint in run.constraints.items()}
    reports |= {"all": {"trainable": run.change.trainable(), "distance": run.change.norm()}} if reports else {}
    return {f"constraint/{name}/{key}": value for name, found in reports.items() for key, value in found.items()}


def _sample(run: Run) -> None:
    seed = run.seed * 1_000_003 + run.state.step
    options = (run.trainer.samples, run.trainer.sample_tokens, seed)
    file = _samples(run)
    for sample in generations(run.policy, run.tokenizer, run.held_out, *options):
        file.log({"step": run.state.step, **sample})
    file.close()


def _samples(run: Run) -> MetricsFile:
    return MetricsFile(run.folder / "samples.jsonl")


def _record(run: Run, metrics: MetricsFile, row: dict[str, float], every: int = 1) -> None:
    """Remember the newest values, write them to metrics.jsonl, and hand a copy to the logger."""
    if not row or run.state.step % every:
        return
    if "loss" in row:
        row |= run.data_rates | {"change/norm": run.change.norm()}
    run.state.last |= row
    metrics.log({"step": run.state.step, **row})
    run.logger.log({"step": run.state.step, **row})


def _check_weights(run: Run) -> None:
    """Raise NumericsError rather than save weights that are NaN, or too large for their change to have a norm."""
    if not math.isfinite(run.change.norm()):
        raise NumericsError(
            f"after step {run.state.step} the weights are not finite and not saved; an earlier checkpoint is kept. "
            "Lower optimizer.learning_rate"
        )


def _shown(row: dict[str, float]) -> dict[str, float]:
    return {"loss": row["loss"], "margin": row["rewards/margins"], "accuracy": row["rewards/accuracies"]}
