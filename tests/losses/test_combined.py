"""WPO and sums of losses: what their weights do, in expectations that are exact."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from pair_losses import all_pairs, composed, gradient, random_logps

from cdpo.losses.combined import WPO, Sum
from cdpo.losses.loss import per_unit
from cdpo.losses.pairwise import BCO, DPO, IPO, SFT


def test_wpo_takes_any_loss():
    config = composed("+loss=wpo", "loss@loss.loss=ipo", "loss.loss.tau=0.3")
    assert instantiate(config) == WPO(IPO(tau=0.3))


def test_a_part_of_a_sum_can_be_set():
    config = composed("+loss=dpo_sft", "loss.losses.dpo.beta=0.2", "loss.weights.sft=0.5")
    expected = Sum({"dpo": DPO(beta=0.2), "sft": SFT()}, {"dpo": 1.0, "sft": 0.5})
    assert instantiate(config, _convert_="all") == expected


def test_the_weight_of_wpo_has_no_gradient():
    logps = random_logps()
    weight = (logps.policy / logps.length).view(-1, 2).sum(1).exp()
    torch.testing.assert_close(gradient(WPO(DPO()), logps), weight.repeat_interleave(2) * gradient(DPO(), logps))


def test_importance_weights_move_pairs_of_the_reference_onto_the_policy():
    """The mean over pairs drawn from the reference equals the mean over pairs drawn from the policy."""
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, generator=g, dtype=torch.float64).log_softmax(-1)
    logps = all_pairs(policy, reference)
    of = lambda log_pi: log_pi.exp()[logps.pairs].prod(1)  # noqa: E731
    weighted = of(reference) @ WPO(DPO(), weight="importance")(logps)
    torch.testing.assert_close(weighted, of(policy) @ DPO()(logps))


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_candidate_weights_move_pairs_onto_the_policy_wherever_they_were_drawn(p):
    """Drawn from the reference or uniformly: the mean is that over pairs from the policy, less the labels' entropy."""
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, generator=g, dtype=torch.float64)  # not normalised on the four
    logps = all_pairs(policy, reference)
    logps = replace(logps, preference=torch.full_like(logps.preference, p))
    of = lambda log_pi: log_pi.softmax(-1)[logps.pairs].prod(1)  # noqa: E731
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p) if p < 1 else 0.0
    expected = of(policy) @ (per_unit(DPO(), logps) - entropy)
    for drawn, mass in (("reference", of(reference)), ("uniform", torch.full((16,), 1 / 16, dtype=torch.float64))):
        found = mass @ per_unit(WPO(DPO(), weight="candidates", drawn=drawn), logps)
        torch.testing.assert_close(found, expected)


def test_the_value_of_wpo_is_zero_where_every_pair_is_fitted():
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    logps = all_pairs(rewards / 0.1, torch.zeros_like(rewards))
    logps = replace(logps, preference=(rewards[logps.pairs[:, 0]] - rewards[logps.pairs[:, 1]]).sigmoid())
    found = per_unit(WPO(DPO(beta=0.1), weight="candidates", drawn="uniform"), logps)
    torch.testing.assert_close(found, torch.zeros_like(found))


def test_a_sum_is_linear():
    logps = random_logps()
    both = Sum({"a": DPO(), "b": SFT()}, {"a": 2.0, "b": 0.5})
    torch.testing.assert_close(both(logps), 2 * DPO()(logps) + 0.5 * SFT()(logps))


def test_a_loss_with_one_within_that_reads_the_baseline_reads_it():
    assert Sum({"a": DPO(), "b": BCO()}, {"a": 1.0, "b": 1.0}).reads_baseline
    assert WPO(BCO()).reads_baseline
    assert not WPO(DPO()).reads_baseline
