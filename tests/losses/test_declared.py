"""What losses say of themselves: convex in a table's logits or not, and a gradient that is the value's slope or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pair_losses import PRESETS, VARIANTS, preset

from cdpo.batch import Logps
from cdpo.losses.loss import per_unit

LOSSES = {name: preset(name) for name in PRESETS} | VARIANTS
SIZES = (2, 3, 4, 2, 5)  # responses that a prompt has; each prompt has one more that is no candidate
ITEM = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
FIRST = torch.tensor([0, 2, 5, 9, 11])


def logps_of(logits: torch.Tensor, g: torch.Generator) -> Logps:
    """A table's prompts, with everything else drawn anew: two pairs a prompt, soft and hard. Logits: [Items, 6]"""
    inside = torch.cat([torch.arange(size) for size in SIZES])
    draw = lambda *size: torch.rand(*size, generator=g, dtype=torch.float64)  # noqa: E731
    pairs = torch.stack([FIRST, FIRST + 1], 1).repeat(2, 1)
    reference = (3 * draw(len(SIZES), 6)).log_softmax(-1)[ITEM, inside]
    return Logps(
        policy=logits.log_softmax(-1)[ITEM, inside],
        reference=reference,
        base=reference,
        length=(1 + 5 * draw(len(ITEM))).floor(),
        item=ITEM,
        pairs=pairs,
        preference=torch.cat([torch.ones(len(SIZES)), draw(len(SIZES))]),
        weight=torch.ones(len(pairs)),
        rewards=2 * draw(len(ITEM)),
        fitted_rewards=2 * draw(len(ITEM)),
        progress=0.3,
        baseline=0.4,
        sources=tuple("abcde"),
    )


def worst_midpoint(loss) -> float:
    """How far the value of a midpoint was above the mean of its ends, relative to these; at most 0 if convex."""
    g, worst = torch.Generator().manual_seed(0), -float("inf")
    for scale in (0.5, 3.0, 20.0) * 60:
        ends = scale * torch.randn(2, len(SIZES), 6, generator=g, dtype=torch.float64)
        logps = logps_of(ends[0], g)
        inside = torch.cat([torch.arange(size) for size in SIZES])
        at = lambda logits: per_unit(loss, replace(logps, policy=logits.log_softmax(-1)[ITEM, inside]))  # noqa: E731, B023
        first, last, middle = at(ends[0]), at(ends[1]), at(ends.mean(0))
        size = 1 + first.abs() + last.abs()
        worst = max(worst, float(((middle - (first + last) / 2) / size).max()))
    return worst


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_convex_in_the_logits_if_it_says_so(name):
    worst = worst_midpoint(LOSSES[name])
    if LOSSES[name].convex:
        assert worst < 1e-12
    elif name != "discopop wide":  # at tau = 3 none is known, and nothing is claimed
        assert worst > 1e-4, "no counterexample"


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_slope_of_the_value_unless_weights_move(name):
    """By central differences; the baseline moves as in training, where it is made of the policy's log-ratios."""
    loss, g = LOSSES[name], torch.Generator().manual_seed(1)
    logits, way = torch.randn(2, len(SIZES), 6, generator=g, dtype=torch.float64)
    logps = logps_of(logits, g)
    logps = replace(logps, reference=logps.reference - 1)  # so that the mean log-ratio is above 0, as a KL is

    def value(policy: torch.Tensor) -> torch.Tensor:
        moved = replace(logps, policy=policy)
        return per_unit(loss, replace(moved, baseline=float(moved.log_ratio().detach().mean()))).sum()

    policy = logps.policy.clone().requires_grad_()
    direction = way.flatten()[: len(policy)]
    slope = float(torch.autograd.grad(value(policy), policy)[0] @ direction)
    h = 1e-6
    with torch.no_grad():
        difference = float(value(policy + h * direction) - value(policy - h * direction)) / (2 * h)
    if loss.weights_move:
        assert abs(slope - difference) > 1e-3 * abs(difference), "nothing moves, or the gradient goes through it"
    else:
        assert slope == pytest.approx(difference, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_the_reference_unless_it_says_that_it_does_not(name):
    loss, g = LOSSES[name], torch.Generator().manual_seed(2)
    logps = logps_of(torch.randn(len(SIZES), 6, generator=g, dtype=torch.float64), g)
    other = logps.reference + torch.randn(len(ITEM), generator=g, dtype=torch.float64)
    values, moved = per_unit(loss, logps), per_unit(loss, logps.with_reference(other, baseline=0.4))
    if getattr(loss, "reference_free", False):
        assert torch.equal(values, moved)
    else:
        assert bool((values != moved).all())


def test_losses_whose_reference_is_the_problem_s_or_drew_the_pairs():
    fixed = {name for name, loss in LOSSES.items() if getattr(loss, "fixed_reference", False)}
    assert fixed == {"rlhf", "rlhf_learned", "onpolicy_regression", "wpo_candidates", "wpo importance"}
