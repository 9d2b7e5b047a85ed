"""The loop, from top to bottom: score -> loss + penalties -> step -> constraint hooks, with evaluation and checkpoints.

It knows losses, constraints and optimizers by their interfaces only. n steps equal k steps, resume, n - k, bit for bit.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cdpo.batch import Batch, Item, Logps
from cdpo.errors import NumericsError, Preempted
from cdpo.losses.loss import check_finite, per_unit
from cdpo.model.logps import Statistics, score, score_with_statistics
from cdpo.model.reference import KEPT, Scored, with_constants
from cdpo.system import checkpoint
from cdpo.system.files import write_csv, write_json
from cdpo.system.metrics import Means, MetricsFile
from cdpo.system.progress import Heartbeat, Progress
from cdpo.system.ranks import whole
from cdpo.training.evaluation import (
    Evaluation,
    add_log_ratio,
    add_pair_metrics,
    evaluate,
    generations,
    sampled_kl,
    unit_weight,
)
from cdpo.training.run import Run, State, restore, snapshot

SAMPLES, HISTOGRAMS, CHECKPOINTS = "samples.jsonl", "histograms.jsonl", "checkpoints"


def fit(run: Run) -> State:
    """Train to the end, or until a constraint or a signal stops it; go on from the newest checkpoint if there is one.

    Raises NumericsError before a step with NaN or infinity is taken, Preempted after a signal, once the run is saved.
    """
    state = run.state
    saved = restore(run, run.folder / CHECKPOINTS)
    run.policy.train()  # all of it: peft leaves the root of a model in eval mode in training mode
    metrics = _files(run, saved) if run.ranks.first else None
    heartbeat = Heartbeat(run.folder / "progress.json", run.plan.steps, state.step)
    with Progress(run.plan.steps, state.step, run.folder.name, quiet=metrics is None) as bar:
        while True:
            if state.looked < state.step:
                _look(run, metrics)
            stop = run.ranks.agreed(run.signals.poll())
            due = state.step > 0 and state.step % run.trainer.checkpoint_every == 0
            if state.step > saved and (due or stop or run.ended):
                _save(run, metrics)
                saved = state.step
            if stop:
                raise Preempted(f"{stop} after step {state.step}; the same command goes on from there", stop)
            if run.ended:
                return state
            _step(run)
            _record(run, metrics, state.fresh, every=run.trainer.log_every)
            if metrics is not None:
                heartbeat.beat(state.step)
            bar.update(state.step, **_shown(state.fresh))


def _files(run: Run, saved: int) -> MetricsFile:
    """metrics.jsonl as it was at step `saved`; the other files, and the logger's copy, likewise. On rank 0 only."""
    metrics = MetricsFile(run.folder / "metrics.jsonl")
    run.logger.start(run.folder, run.composed, run.group, after=metrics.truncate(saved))
    for extra in (SAMPLES, HISTOGRAMS):
        if (run.folder / extra).is_file():
            MetricsFile(run.folder / extra).truncate(saved)
    return metrics


def _save(run: Run, metrics: MetricsFile | None) -> None:
    """A checkpoint: made by all ranks, written by the one that has the metrics."""
    _check_weights(run)
    state = snapshot(run)

    def write() -> None:
        if metrics is not None:
            metrics.sync()
            checkpoint.save(run.folder / CHECKPOINTS, run.state.step, state, run.trainer.keep_checkpoints)

    run.ranks.each(write)


def _step(run: Run) -> None:
    """One optimizer step: the exact gradient over all micro-batches, then the constraints' hooks."""
    state, plan = run.state, run.plan
    began, rate = time.perf_counter(), run.optimizer.at(state.step, plan.steps)
    for group in run.optim.param_groups:
        group["lr"] = rate
    chosen = plan.chosen(state.step)
    rows: list[dict[str, float]] = []  # L-BFGS evaluates several times; the first is the point where the step began
    if not run.policy.training:
        run.policy.train()

    def closure() -> float:
        rows.append(_gradient(run, chosen, first=not rows))
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
    tokens = sum(plan.sizes[i] for i in chosen)
    state.tokens += tokens
    state.ratio_sum += row.pop("log_ratio", 0.0)
    pairs = sum(len(run.train.items[i].pairs) for i in chosen)
    seconds = time.perf_counter() - began
    state.fresh = row | {
        "epoch": state.step / plan.steps_per_epoch,
        "num_tokens": state.tokens,
        "tokens_per_second": tokens / seconds,
        "pairs_per_second": pairs / seconds,
    }


def _gradient(run: Run, chosen: list[int], first: bool) -> dict[str, float]:
    """Gradient of the mean over all pairs (or Items) of a step, however it is split. Returns the step's metrics.

    What needs them is measured at the `first` evaluation of a step, the rest of it only where the step is logged.

    Raises NumericsError, with the rows written to nonfinite.json, if the objective or the gradient norm is not finite.
    """
    for parameter in run.parameters:
        parameter.grad = None
    means, ranks = Means(), run.ranks
    sums = torch.zeros(2, dtype=torch.float64, device=run.accelerator.device)  # objective; log-probs, to be watched
    ranks.each(lambda: _add_up(run, chosen, first, means, sums), through_model=True)
    ranks.add_gradients(run.parameters)
    norm = whole(get_total_norm([p.grad for p in run.parameters if p.grad is not None]))
    _make_next(run)  # while a GPU is still at work: the next line waits for it
    objective, log_probs, length = torch.cat([ranks.add(sums), norm.double()[None]]).tolist()
    if not all(map(math.isfinite, (objective, log_probs, length))):
        if not ranks.sharded:
            ranks.each(lambda: _check_log_probs(run))
        raise _not_finite(run, [run.train.items[i] for i in chosen], objective, length)
    if run.trainer.max_grad_norm is not None and length > run.trainer.max_grad_norm:
        clip_grads_with_norm_(run.parameters, run.trainer.max_grad_norm, norm)
    return means.reduce(ranks.gather) | {"objective": objective, "grad_norm": length}


def _make_next(run: Run) -> None:
    """This rank's batches of the next step, which `run.train` keeps."""
    if run.state.step + 1 < run.plan.steps:
        own = run.plan.shares(run.state.step + 1, run.ranks.size)[run.ranks.rank]
        for indices in own if 2 * len(own) <= KEPT else ():
            run.train.batch(tuple(indices))


@torch.no_grad()
def _check_log_probs(run: Run) -> None:
    """NumericsError with the responses whose log-probs are not finite, if that is what is wrong; once it is."""
    for indices in run.plan.shares(run.state.step, run.ranks.size)[run.ranks.rank]:
        batch = run.train.batch(tuple(indices))
        with run.autocast():
            check_finite(with_constants(score(run.policy, batch), batch))


def _add_up(run: Run, chosen: list[int], first: bool, means: Means, totals: Tensor) -> None:
    """This rank's part of the gradient, of the metrics and of the objective, micro-batch by micro-batch."""
    shares = run.plan.shares(run.state.step, run.ranks.size)
    own = [tuple(indices) for indices in shares[run.ranks.rank]]
    total = sum(run.weights[i] for i in chosen)
    for indices in own:
        batch = run.train.batch(indices)
        with run.autocast():
            sums, statistics = _score(run, batch, first)
        logps = with_constants(sums, batch, **run.context())
        values = per_unit(run.loss, logps)
        part = (values * unit_weight(run.loss, logps)).sum() / total
        for constraint in run.constraints.values():
            penalty = constraint.penalty(logps)
            part = part if penalty is None else part + penalty.sum() / len(chosen)
        part.backward()
        totals += torch.stack([part.detach(), sums.detach().sum()])
        if first:
            _measure(run, means, logps)
        if statistics is not None:
            means.add("loss", values, unit_weight(run.loss, logps))
            add_pair_metrics(means, logps, statistics, run.betas[0])
    if run.ranks.sharded:
        _keep_step(run, max(map(len, shares)) - len(own), tuple(chosen[:1]))


def _keep_step(run: Run, times: int, indices: tuple[int, ...]) -> None:
    """Through a sharded model all ranks go equally often: who has nothing left goes with weight zero."""
    for _ in range(times):
        with run.autocast():
            sums = score(run.policy, run.train.batch(indices))
        (0 * sums.sum()).backward()


def _measure(run: Run, means: Means, logps: Logps) -> None:
    """What the constraints ask for after every step, and what the baseline is made of."""
    if run.reads_baseline:
        add_log_ratio(means, logps)
    for constraint in run.constraints.values():
        for name, measured in constraint.measure(logps).items():
            means.add(name, measured)


def _score(run: Run, batch: Batch, first: bool) -> tuple[Tensor, Statistics | None]:
    """Log-probs, and statistics of the logits where this step will be logged."""
    if first and (run.state.step + 1) % run.trainer.log_every == 0:
        return score_with_statistics(run.policy, batch)
    return score(run.policy, batch), None


def _not_finite(run: Run, items: list[Item], objective: float, norm: float) -> NumericsError:
    sources = [item.source for item in items]
    path = run.folder / "nonfinite.json"
    if run.ranks.first:
        write_json(path, {"step": run.state.step, "objective": str(objective), "grad_norm": str(norm), "rows": sources})
    return NumericsError(
        f"step {run.state.step}: objective {objective}, gradient norm {norm}, on rows {', '.join(sources[:5])}"
        f"{' ...' if len(sources) > 5 else ''} (all in {path.name}). The optimizer did not step; an "
        "earlier checkpoint is kept. Lower optimizer.learning_rate, or look at these rows"
    )


def _look(run: Run, metrics: MetricsFile | None) -> None:
    """After a step: evaluate if it is time, and ask the constraints whether to stop. A signal puts it off."""
    state = run.state
    row = state.fresh | {"step": state.step}
    due = state.step % run.trainer.eval_every == 0 or state.step == run.plan.steps
    found, samples = None, None
    try:
        if due:
            found = _evaluate(run)
            row |= found.metrics
            samples = _samples(run)
        reasons = [c.stop_reason(row) for c in run.constraints.values()]
        state.stopped = next((reason for reason in reasons if reason), None)
        if state.stopped and not due:
            found = _evaluate(run)
    except Interrupted:
        return
    state.looked = state.step
    if found is not None:
        _keep(run, metrics, found)
    if samples is not None:
        _keep_samples(run, metrics, *samples)


def _keep(run: Run, metrics: MetricsFile | None, found: Evaluation) -> None:
    """Write an evaluation down: its numbers, its histograms, and at the end the table of prompts."""
    _record(run, metrics, found.metrics | _reports(run))
    if metrics is None:
        return
    if found.histograms:
        file = MetricsFile(run.folder / HISTOGRAMS)
        file.log({"step": run.state.step, **found.histograms})
        file.close()
    if run.ended and found.prompts:
        write_csv(run.folder / "objective.csv", found.prompts)


class Interrupted(Exception):
    """A signal came during an evaluation; stays within this module."""


def _go_on(run: Run) -> None:
    if run.ranks.agreed(run.signals.poll()):
        raise Interrupted


def _evaluate(run: Run) -> Evaluation:
    if not run.held_out.items:
        return Evaluation({}, [], {})

    def score_batch(batch: Batch) -> tuple[Tensor, Statistics]:
        with run.autocast():
            return score_with_statistics(run.policy, batch)

    return evaluate(
        run.policy, run.held_out, run.loss, run.betas, score_batch, run.trainer.budget, run.ranks,
        lambda: _go_on(run), run.context(),
    )  # fmt: skip


def _reports(run: Run) -> dict[str, float]:
    reports = {name: constraint.report() for name, constraint in run.constraints.items()}
    reports |= {"all": {"trainable": run.change.trainable(), "distance": run.change.norm()}} if reports else {}
    return {f"constraint/{name}/{key}": value for name, found in reports.items() for key, value in found.items()}


def _samples(run: Run) -> tuple[list[Item], Tensor] | None:
    """Responses of the policy with their log-ratios, nats; None where none are wanted. All ranks draw the same."""
    if not run.trainer.samples or not run.held_out.items:
        return None
    seed, items = run.seed * 1_000_003 + run.state.step, []
    for item in generations(run.policy, run.held_out, run.trainer.samples, run.trainer.sample_tokens, seed):
        items.append(item)
        _go_on(run)
    samples = Scored(items, run.held_out.padded, run.held_out.device)
    with run.autocast():
        return items, sampled_kl(run.policy, run.change, samples, run.trainer.budget)


def _keep_samples(run: Run, metrics: MetricsFile | None, items: list[Item], ratio: Tensor) -> None:
    """Write the samples down, and what they say of the policy's KL to the reference."""
    if metrics is not None:
        _write_samples(run, items, ratio.tolist())
    stderr = float(ratio.std() / math.sqrt(len(ratio))) if len(ratio) > 1 else math.nan
    _record(run, metrics, {"eval/kl/sampled": float(ratio.mean()), "eval/kl/sampled_stderr": stderr})


def _write_samples(run: Run, items: list[Item], ratio: list[float]) -> None:
    file = MetricsFile(run.folder / SAMPLES)
    for item, value in zip(items, ratio):
        texts = {"prompt": run.tokenizer.decode(item.prompt), "response": run.tokenizer.decode(item.responses[0])}
        file.log({"step": run.state.step, "source": item.source, **texts, "log_ratio": value})
    file.close()


def _record(run: Run, metrics: MetricsFile | None, row: dict[str, float], every: int = 1) -> None:
    """Remember the newest values, write them to metrics.jsonl, and hand a copy to the logger."""
    if not row or run.state.step % every:
        return
    if "grad_norm" in row:
        row |= run.data_rates | {"change/norm": run.change.norm()}
    run.state.last |= row
    if metrics is not None:
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
    names = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    return {shown: row[name] for shown, name in names.items() if name in row}
