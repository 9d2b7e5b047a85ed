"""Draws of the policy while it is trained: what a constraint acts on where pairs without rewards say nothing of its KL.

Every so many steps the policy continues prompts of the training data. Until it does so again these draws stand for its
responses, weighted by how much more likely it has made them since, and they are part of every checkpoint.
"""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor

from cdpo.batch import Item
from cdpo.data.packing import Scored, by_tokens
from cdpo.errors import Preempted
from cdpo.model.sampling import Draws, generations, policy_and_reference
from cdpo.training.run import Run


def draw_if_due(run: Run) -> None:
    """Draw anew, if it is time for it. A signal puts it off until the run goes on."""
    asking, step = run.drawing, run.state.step
    if asking is None or run.ended or (run.draws is not None and step < run.draws.step + asking.draw_every):
        return
    chosen = Random(f"draws {run.plan.seed} {step}").choices(run.train.items, k=asking.draws)
    try:
        scored = continued(run, chosen, asking.draw_tokens)
        with run.autocast():
            ours, theirs = policy_and_reference(run.scorer, run.change, scored, run.trainer.micro_batch)
    except Preempted:
        return
    reference = list(theirs.cpu().split(1))
    run.draws = Draws(step, Scored(scored.items, scored.padded, scored.device, reference), ours)


def continued(run: Run, prompts: list[Item], tokens: int) -> Scored:
    """What the policy writes after each of some prompts, at most so many tokens; all ranks draw the same. Preempted."""
    seed = run.plan.seed * 1_000_003 + run.state.step
    asked, items = Scored(prompts, run.train.padded, run.device), []
    with run.autocast():
        for item in generations(run.scorer, asked, len(prompts), tokens, seed):
            items.append(item)
            run.session.pause()
    return Scored(items, asked.padded, asked.device)


def pull(run: Run, sums: Tensor) -> dict[str, float]:
    """Add the gradient of the constraint's term, a mean over the draws, to that of the loss; the ranks share the draws.

    Adds the objective and all log-probs to `sums`. Returns the mean of what the constraint measures and its error.
    """
    parts = run.ranks.on_all(lambda: _own_part(run, sums))
    metrics = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts if part])
        metrics[name] = float(values.mean())
        metrics[f"{name}_stderr"] = float(values.std()) / math.sqrt(len(values))
    return metrics


def _own_part(run: Run, sums: Tensor) -> dict[str, Tensor]:
    """What the constraint measures on this rank's draws, micro-batch by micro-batch; none where there is none."""
    draws, asking, found = run.draws, run.drawing, dict[str, list[Tensor]]()
    assert draws is not None
    assert asking is not None
    count, sizes = len(draws.policy), [item.tokens for item in draws.scored.items]
    for indices in by_tokens(sizes, range(run.ranks.rank, count, run.ranks.size), run.trainer.micro_batch):
        batch = draws.scored.batch(tuple(indices))
        with run.autocast():
            policy, _ = run.scorer(batch)
        logps = batch.logps(policy, **draws.then(indices))
        penalty = asking.penalty(logps)
        objective = policy.new_zeros(()) if penalty is None else penalty.sum() / count
        if penalty is not None:
            objective.backward()
        sums += torch.stack([objective.detach(), policy.detach().sum()])
        for name, values in asking.measure(logps).items():
            found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in found.items()}
