"""The training loop, in the order in which things happen: score, loss, penalties, backward, hooks, step, hooks, log,
evaluate, save, move the reference.

It knows losses, constraints and optimizers by their interfaces only. n steps equal k steps, resume, n - k, bit for bit.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cdpo.batch import Batch, Logps
from cdpo.data.packing import KEPT
from cdpo.errors import Preempted
from cdpo.losses.loss import per_unit, unit_weight
from cdpo.measure.pairs import add_kl, add_log_ratio, add_pair_metrics
from cdpo.model.gradient import Gradient
from cdpo.model.logps import Statistics
from cdpo.system import checkpoint
from cdpo.system.metrics import Means
from cdpo.system.ranks import full_tensor
from cdpo.training.certificate import certify, numbers_of
from cdpo.training.draws import draw_if_due, pull
from cdpo.training.evaluation import evaluate, sample
from cdpo.training.finite import check_weights, nonfinite_error
from cdpo.training.journal import Journal
from cdpo.training.run import Run, State, restore, snapshot
from cdpo.training.solve import solve
from cdpo.training.sync import sync_if_due, warn_if_never


def fit(run: Run) -> State:
    """Train to the end, or until a constraint or a signal stops it; go on from the newest checkpoint if there is one.

    Raises NumericsError before a step with NaN or infinity is taken, Preempted after a signal, once the run is saved.
    """
    state, saved = run.state, restore(run)
    run.policy.train()  # all of it: peft leaves the root of a model in eval mode in training mode
    with Journal(run, saved) as journal:
        while True:
            if state.evaluated < state.step:
                evaluate_if_due(run, journal)
            draw_if_due(run)
            stop = run.session.stop_requested()
            due = state.step > 0 and state.step % run.trainer.checkpoint_every == 0
            if state.step > saved and (due or stop or run.ended):
                save(run, journal)
                saved = state.step
            if stop:
                raise Preempted(f"{stop} after step {state.step}; the same command goes on from there", stop)
            if run.ended:
                warn_if_never(run)
                return state
            if not sync_if_due(run, journal):
                continue
            search_step(run) if run.searches else take_step(run)
            journal.step()


# -------------------------------------------------------------------------------------------------------- one step


def take_step(run: Run) -> None:
    """One optimizer step on the exact gradient over all micro-batches, with the constraints' hooks around it."""
    began, rate = time.perf_counter(), run.optimizer_config.learning_rate_at(run.state.step, run.plan.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    if not run.policy.training:
        run.policy.train()
    rows: list[dict[str, float]] = []  # L-BFGS evaluates several times; the first is the point where the step began

    def closure() -> float:
        rows.append(gradient(run, first=not rows))
        with torch.no_grad():
            if run.frank_wolfe:
                rows[-1]["frank_wolfe/gap"] = turn_to_vertex(run)
            for constraint in run.constraints.values():
                constraint.before_step(run.policy, rate)
        return rows[-1]["objective"]

    run.optimizer.step(closure)
    row = {**rows[0], "learning_rate": rate}
    with torch.no_grad():
        for constraint in run.constraints.values():
            constraint.after_step(run.policy, row)
    finish_step(run, row, began)


def turn_to_vertex(run: Run) -> float:
    """Put what leads away from the vertex in the gradient's place. Returns the Frank-Wolfe gap of before the step."""
    (ball,) = (constraint for constraint in run.constraints.values() if constraint.has_vertex)
    found = Gradient(run.change)
    gap = ball.bound(found)
    ball.vertex(found)
    return gap  # type: ignore[return-value]


def search_step(run: Run) -> None:
    """The only step of optimizer=exact. Its metrics are the optimum's; the certificate's scale stays the start's."""
    began = time.perf_counter()
    gradient(run)
    scale = run.state.first_gradient
    solve(run)
    row = {**gradient(run), "learning_rate": 0.0}  # so nothing shrinks
    run.state.first_gradient = scale
    with torch.no_grad():
        for constraint in run.constraints.values():
            constraint.after_step(run.policy, row)
    finish_step(run, row, began)


def gradient(run: Run, first: bool = True) -> dict[str, float]:
    """Gradient of the mean over all pairs (or Items) of a step, however it is split. Returns the step's metrics.

    These are collected at the `first` evaluation of a step (L-BFGS makes several): what constraints and losses need in
    every step, the metrics of pairs in steps that are logged.

    Raises NumericsError, with the rows written to nonfinite.json, if the objective or the gradient norm is not finite.
    """
    for parameter in run.parameters:
        parameter.grad = None
    means, ranks = Means(), run.ranks
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # of the objective; of all log-probs
    ranks.on_all(lambda: accumulate(run, first, means, sums), through_model=True)
    drawn = pull(run, sums) if run.draws else {}
    ranks.add_gradients(run.parameters)
    if run.state.step == 0 and first:
        run.state.first_gradient = Gradient(run.change).norm()
    norm = full_tensor(get_total_norm([p.grad for p in run.parameters if p.grad is not None]))
    prefetch_next(run)  # while a GPU is still at work: the next line waits for it
    objective, log_probs, grad_norm = torch.cat([ranks.all_sum(sums), norm.double()[None]]).tolist()
    if not all(map(math.isfinite, (objective, log_probs, grad_norm))):  # one log-prob of NaN makes their sum NaN
        raise nonfinite_error(run, objective, grad_norm)
    if run.trainer.max_grad_norm is not None and grad_norm > run.trainer.max_grad_norm:
        clip_grads_with_norm_(run.parameters, run.trainer.max_grad_norm, norm)
    return means.reduce(ranks.all_gather) | drawn | {"objective": objective, "grad_norm": grad_norm}


def accumulate(run: Run, first: bool, means: Means, sums: Tensor) -> None:
    """This rank's part of the gradient, of the metrics and of the sums, micro-batch by micro-batch."""
    items, shares = run.plan.step_items(run.state.step), run.plan.shares(run.state.step, run.ranks.size)
    own, total = shares[run.ranks.rank], sum(run.item_weights[i] for i in items)
    for indices in own:
        batch = run.train.batch(tuple(indices))
        policy, statistics = score_batch(run, batch, first)
        logps = batch.logps(policy, **run.context())
        read = run.moving.read(logps, indices, run.state.moved_baseline)
        values, weight = per_unit(run.loss, read), unit_weight(run.loss, read)
        objective = (values * weight).sum() / total
        for constraint in run.constraints.values():
            penalty = constraint.penalty(logps)
            objective = objective if penalty is None else objective + penalty.sum() / len(items)
        objective.backward()
        sums += torch.stack([objective.detach(), policy.detach().sum()])
        if first:
            measure(run, means, logps, read)
        if statistics is not None:
            means.add("loss", values, weight)
            add_pair_metrics(means, read, statistics, run.reward_beta)
            add_kl(means, logps)
    if run.ranks.sharded:
        pad_passes(run, max(map(len, shares)) - len(own), tuple(items[:1]))


def score_batch(run: Run, batch: Batch, first: bool = True) -> tuple[Tensor, Statistics | None]:
    """Log-probs [S], and statistics of the logits where this step will be logged."""
    with run.autocast():
        return run.scorer(batch, statistics=first and (run.state.step + 1) % run.trainer.log_every == 0)  # type: ignore[no-any-return]


def measure(run: Run, means: Means, logps: Logps, read: Logps) -> None:
    """What the constraints ask for after every step, and what the baselines of `Logps` are made of."""
    if run.reads_baseline:
        add_log_ratio(means, logps, "log_ratio")
        if run.state.synced:
            add_log_ratio(means, read, "moved_log_ratio")
    for constraint in run.constraints.values():
        for name, measured in constraint.measure(logps).items():
            means.add(name, measured)


def pad_passes(run: Run, times: int, indices: tuple[int, ...]) -> None:
    """Through a sharded model all ranks go equally often: a rank with nothing left repeats an Item with weight zero."""
    for _ in range(times):
        policy, _ = score_batch(run, run.train.batch(indices), first=False)
        (0 * policy.sum()).backward()


def prefetch_next(run: Run) -> None:
    """This rank's batches of the next step, which `run.train` keeps."""
    if run.state.step + 1 < run.plan.steps:
        own = run.plan.shares(run.state.step + 1, run.ranks.size)[run.ranks.rank]
        for indices in own if 2 * len(own) <= KEPT else ():
            run.train.batch(tuple(indices))


def finish_step(run: Run, row: dict[str, float], began: float) -> None:
    """A step is done, which `began` at that time: count it, and keep its metrics."""
    state, plan = run.state, run.plan
    items = plan.step_items(state.step)
    tokens, pairs = sum(plan.sizes[i] for i in items), sum(len(run.train.items[i].pairs) for i in items)
    state.step += 1
    state.tokens += tokens
    state.ratio_sum += row.pop("log_ratio", 0.0)
    state.moved_ratio_sum += row.pop("moved_log_ratio", 0.0)
    seconds = time.perf_counter() - began
    state.step_metrics = row | {
        "epoch": state.step / plan.steps_per_epoch,
        "num_tokens": state.tokens,
        "tokens_per_second": tokens / seconds,
        "pairs_per_second": pairs / seconds,
    }


# ---------------------------------------------------------------------------------------------------- between steps


def evaluate_if_due(run: Run, journal: Journal) -> None:
    """Evaluate if it is time, and ask the constraints whether to stop. A signal puts it off until the run goes on."""
    state = run.state
    row = state.step_metrics | {"step": state.step}
    due = state.step % run.trainer.eval_every == 0 or state.step == run.plan.steps
    found, samples = None, None
    try:
        if due:
            found = evaluate(run)
            row |= found.metrics
            samples = sample(run)
            row |= samples.metrics() if samples else {}
        reasons = [constraint.stop_reason(row) for constraint in run.constraints.values()]
        state.stopped = next((reason for reason in reasons if reason), None)
        if state.stopped and not due:
            found = evaluate(run)
        if run.ended and found is not None:
            state.certificate = certify(run, found.metrics)
            found.metrics.update(numbers_of(state.certificate))
    except Preempted:
        return
    state.evaluated = state.step
    if found is not None:
        journal.evaluated(found)
    if samples is not None:
        journal.sampled(samples)


def save(run: Run, journal: Journal) -> None:
    """A checkpoint: made by all ranks, written by the first, once its rows of metrics are on the disk."""
    check_weights(run)
    state = snapshot(run)

    def write() -> None:
        journal.metrics.sync()
        checkpoint.save(run.directory.checkpoints, run.state.step, state, run.trainer.keep_checkpoints)

    run.ranks.from_first(write)
