"""EXPO and its regression: written out by hand, and where they go as the pull to the reference fades or rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from candidates import logps_of
from pair_losses import all_pairs, random_logps

from cdpo.losses import DPO, EXPO, EXPORegression
from cdpo.losses.loss import per_unit

BEST, REFERENCE = (torch.tensor(p, dtype=torch.float64) for p in ((0.6, 0.3, 0.1), (0.4, 0.4, 0.2)))  # theory.md 9


def test_the_mean_over_pairs_is_bradley_terry_plus_the_kl_of_every_prompt_as_its_pairs_weigh():
    logps = logps_of()  # three Items of 2, 5 and 3 responses
    pairs = [(0, 1, 0.9, 2.0), (2, 3, 1.0, 1.0), (6, 4, 0.6, 0.5), (7, 9, 0.0, 1.5), (8, 9, 1.0, 0.25)]
    columns = torch.tensor(pairs, dtype=torch.float64)
    logps = replace(logps, pairs=columns[:, :2].long(), preference=columns[:, 2], weight=columns[:, 3])
    total, pi, ref = 0.0, logps.policy.tolist(), logps.reference.tolist()
    for winner, loser, p, weight in pairs:
        item = next(one for one in ((0, 2), (2, 7), (7, 10)) if one[0] <= winner < one[1])
        z_pi, z_ref = (sum(math.exp(values[k]) for k in range(*item)) for values in (pi, ref))
        kl = sum(math.exp(ref[k]) / z_ref * (ref[k] - math.log(z_ref) - pi[k] + math.log(z_pi)) for k in range(*item))
        right = 1 / (1 + math.exp(pi[loser] - pi[winner]))
        total += weight * (-p * math.log(right) - (1 - p) * math.log(1 - right) + 0.3 * kl)
    found = (per_unit(EXPO(beta=0.3), logps) * logps.weight).sum()
    assert float(found) == pytest.approx(total, rel=1e-12)


def test_the_weight_of_the_authors_code_is_k_times_ours():
    """Their mean over entries, as torch's kl_div has it."""
    policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logps = all_pairs(policy, REFERENCE.log())
    kl = torch.nn.functional.kl_div(policy, REFERENCE.log(), reduction="none", log_target=True).mean()
    chosen, rejected = policy[logps.pairs].unbind(1)
    theirs = torch.log1p(torch.exp(rejected - chosen)) + 0.6 * kl
    torch.testing.assert_close(EXPO(beta=0.2)(logps), theirs)


def test_on_two_responses_the_kl_is_a_label_of_the_reference():
    logps, beta = random_logps(), 0.7
    q = torch.sub(*logps.of_pairs(logps.reference)).sigmoid()
    free = replace(logps, reference=0 * logps.reference, preference=(1 + beta * q) / (1 + beta))
    entropy = torch.special.entr(q) + torch.special.entr(1 - q)
    expected = (1 + beta) * per_unit(DPO(beta=1.0), free) - beta * entropy
    torch.testing.assert_close(EXPO(beta=beta)(logps), expected)


def test_the_estimate_is_the_exact_kl_when_the_reference_wrote_the_pairs():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=g, dtype=torch.float64).log_softmax(-1)
    logps = all_pairs(policy, reference)
    mass = reference.exp()[logps.pairs].prod(1)
    torch.testing.assert_close(mass @ EXPO(0.3, "pair")(logps), mass @ EXPO(0.3)(logps))


def minimiser(loss) -> torch.Tensor:
    """The policy with the least mean over all pairs of different responses, with the labels of BEST. [3]"""
    logits = REFERENCE.log().clone().requires_grad_()
    logps = all_pairs(logits, REFERENCE.log())
    winner, loser = BEST[logps.pairs].unbind(1)
    logps = replace(logps, preference=winner / (winner + loser), weight=(winner != loser).double())
    search = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        search.zero_grad()
        moved = replace(logps, policy=logits.log_softmax(0))
        value = (per_unit(loss, moved) * logps.weight).mean() / max(1.0, loss.beta)  # a large weight alone is no slope
        value.backward()
        return value

    search.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("kind", [EXPO, EXPORegression])
def test_from_the_bradley_terry_policy_to_the_reference(kind):
    found = [minimiser(kind(beta=beta)) for beta in (1e-7, 0.3, 3.0, 1e7)]
    torch.testing.assert_close(found[0], BEST, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[-1], REFERENCE, rtol=0, atol=1e-6)
    distances = [float((policy - BEST).abs().sum() / 2) for policy in found]
    assert distances == sorted(distances)


def test_dpo_goes_beyond_the_bradley_terry_policy():
    """pi_ref exp(r / beta), which forgets all but the best response."""
    expected = (REFERENCE.log() + BEST.log() / 0.2).softmax(0)
    torch.testing.assert_close(minimiser(DPO(beta=0.2)), expected, rtol=0, atol=1e-5)
    assert expected[0] > 0.95
    torch.testing.assert_close(minimiser(DPO(beta=1e4)), REFERENCE, rtol=0, atol=1e-3)


def test_where_the_reference_is_right_nothing_moves():
    """Preservation: pi_ref = pi*."""
    logits = BEST.log().clone().requires_grad_()
    logps = all_pairs(logits, BEST.log())
    winner, loser = BEST[logps.pairs].unbind(1)
    logps = replace(logps, policy=logits.log_softmax(0), preference=winner / (winner + loser))
    for loss in (EXPO(beta=0.3), EXPORegression(beta=0.3)):
        (slope,) = torch.autograd.grad(per_unit(loss, logps).mean(), logits, retain_graph=True)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-15)
