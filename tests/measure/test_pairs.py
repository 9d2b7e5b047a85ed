"""The metrics of pairs, against what was worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pair_losses import logps_of

from cdpo.measure.pairs import add_kl, add_pair_metrics
from cdpo.model.logps import Statistics
from cdpo.system.metrics import Means


def test_every_metric_of_three_pairs():
    """A pair that is right, one that ties, and one whose loser is preferred, which is right too and counts twice."""
    policy, reference = torch.tensor([-1.0, -3.0, -2.0, -2.0, -4.0, -1.0]), torch.full([6], -2.0)
    preference, weight = torch.tensor([1.0, 1.0, 0.2]), torch.tensor([1.0, 1.0, 2.0])
    logps = logps_of(policy, reference, [1, 2, 2, 2, 4, 1], preference=preference, weight=weight)
    statistics = Statistics(entropy=torch.tensor([1.0, 0, 0, 0, 1.0, 0]), logit=torch.arange(1.0, 7.0))
    add_pair_metrics(means := Means(), logps, statistics, beta=0.1)
    add_kl(none := Means(), replace(logps, base=None))  # two responses from elsewhere have none
    assert not none.reduce()
    add_kl(means, logps)
    found = means.reduce()
    assert found == pytest.approx(
        {
            "rewards/chosen": (0.1 + 0 + 2 * 0.1) / 4,
            "rewards/rejected": (-0.1 + 0 - 2 * 0.2) / 4,
            "rewards/margins": (0.2 + 0 + 2 * 0.3) / 4,
            "rewards/accuracies": (1 + 0.5 + 2 * 1) / 4,
            "logps/chosen": (-1 - 2 - 2 * 1) / 4,
            "logps/rejected": (-3 - 2 - 2 * 4) / 4,
            "logps_mean/chosen": (-1 - 1 - 2 * 1) / 4,
            "logps_mean/rejected": (-1.5 - 1 - 2 * 1) / 4,
            "logits/chosen": (1 + 3 + 2 * 5) / 4,
            "logits/rejected": (2 + 4 + 2 * 6) / 4,
            "entropy": (1 * 1 + 4 * 1) / 12,
            "kl/candidates": (kl_to_one_half(2) + 0 + kl_to_one_half(3)) / 3,
        },
        rel=1e-6,
    )


def kl_to_one_half(log_odds: float) -> float:
    """Of two candidates that the reference likes alike, one of which the policy likes better."""
    p = 1 / (1 + math.exp(-log_odds))
    return p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
