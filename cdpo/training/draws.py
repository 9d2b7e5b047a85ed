"""Draws of the policy while it is trained: what a constraint acts on where pairs without rewards say nothing of its KL.

Every so many steps the policy continues prompts of the training data. Until it does so again these draws are where its
next tokens are compared with the reference's. By the chain rule the sum of these KLs along a draw has the KL of the two
as its mean (over draws of the policy as it is), with less variance than log-ratios; and its gradient, which takes the
draws as given, never vanishes while they differ, as that of log-ratios does once the policy writes one response only.
Draws are part of every checkpoint.
"""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor

from cdpo.batch import Batch, Item
from cdpo.data.packing import Scored, by_tokens
from cdpo.errors import Preempted
from cdpo.model.logps import next_token_kl
from cdpo.model.sampling import Draws, generations
from cdpo.training.run import Run


def draw_if_due(run: Run) -> None:
    """Draw anew, if it is time for it. A signal puts it off until the run goes on."""
    asking, step = run.drawing, run.state.step
    if asking is None or run.ended or (run.draws is not None and step < run.draws.step + asking.draw_every):
        return
    chosen = Random(f"draws {run.plan.seed} {step}").choices(run.train.items, k=asking.draws)
    try:
        run.draws = Draws(step, continued(run, chosen, asking.draw_tokens))
    except Preempted:
        return


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

    Adds the objective and all KLs to `sums`. Returns the mean of what the constraint measures and its error.
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
    count, sizes = len(draws.scored.items), [item.tokens for item in draws.scored.items]
    for indices in by_tokens(sizes, range(run.ranks.rank, count, run.ranks.size), run.trainer.micro_batch):
        batch = draws.scored.batch(tuple(indices))
        kl = kl_along(run, batch)
        logps = batch.logps(torch.zeros_like(batch.reference), next_token_kl=kl)
        penalty = asking.penalty(logps)
        objective = kl.new_zeros(()) if penalty is None else penalty.sum() / count
        if penalty is not None:
            objective.backward()
        sums += torch.stack([objective.detach(), kl.detach().sum()])
        for name, values in asking.measure(logps).items():
            found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def kl_along(run: Run, batch: Batch) -> Tensor:
    """The KL of policy and reference, next token after next token along each draw, nats, differentiable. [S]

    The reference is the policy with its change put aside, without dropout.
    """
    with run.autocast():
        with torch.no_grad(), run.change.at_start():
            reference = run.scorer.eval().logits(batch)
        return next_token_kl(run.scorer.train().logits(batch), reference, batch)
