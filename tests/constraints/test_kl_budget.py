"""The KL budget: dual ascent by hand, and a policy that is pulled far over the budget meets it in the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from candidates import logps

from cdpo.constraints.kl_budget import KLBudget


def test_kl_budget_is_met_in_the_end():
    """Rewards far stronger than the budget: without the multiplier the KL would end at log 4."""
    constraint = KLBudget(budget=0.2, rate=0.3)
    policy = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    reference, rewards = torch.zeros(8, dtype=torch.float64), torch.tensor([5.0, 0, 0, 0, -1, 3, -1, -1])
    for _ in range(800):
        lp = logps(policy, reference, [0, 0, 0, 0, 1, 1, 1, 1])
        probabilities = torch.cat([part.softmax(0) for part in policy.split(4)])
        loss = (constraint.penalty(lp).sum() - (probabilities * rewards).sum()) / 2
        (gradient,) = torch.autograd.grad(loss, policy)
        with torch.no_grad():
            policy -= 0.5 * gradient
        constraint.after_step(None, {name: float(v.mean()) for name, v in constraint.measure(lp).items()})
    kl = [float((part.softmax(0) * (part.log_softmax(0) + math.log(4))).sum()) for part in policy.split(4)]
    assert np.mean(kl) == pytest.approx(0.2, rel=1e-3)
    report = constraint.report()
    assert report["binds"] == 1
    assert report["multiplier"] > 1
    assert report["boundary_distance"] == pytest.approx(0.2 - np.mean(kl), abs=1e-4)


def test_kl_multiplier_follows_dual_ascent_and_never_falls_below_zero():
    constraint = KLBudget(budget=0.5, rate=2.0)
    seen = []
    for kl in (1e3, 0.6, 0.0, 0.0, 1e9):
        constraint.after_step(None, {"kl_budget/kl": kl})
        seen.append(constraint.multiplier)
    assert seen == pytest.approx([1999, 1999.2, 1998.2, 1997.2, 2e9 + 1996.2])
    constraint.multiplier = 0.3
    constraint.after_step(None, {"kl_budget/kl": 0.0})
    assert constraint.report() == {"binds": 0, "boundary_distance": 0.5, "multiplier": 0}
