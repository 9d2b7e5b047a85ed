"""The optimum of RLHF on a table, where it is known: pi_ref exp(r / (beta + mu)); mu is 0, or uses up the budget.

mu is the multiplier of the KL's budget (ours). Without a budget it is the optimum that DPO is derived from (Rafailov et
al. 2023, arXiv 2305.18290, Eq. 4).
"""

from __future__ import annotations

from torch import Tensor

from cdpo.exact.policy import Policy
from cdpo.exact.problem import Table
from cdpo.exact.setting import Setting
from cdpo.losses.candidates import RLHF, OnPolicyRegression
from cdpo.losses.loss import Loss

BISECTIONS = 200
LARGEST = 1e12  # mu, at which the KL is nothing


def closed_form(policy: Policy, loss: Loss, setting: Setting) -> tuple[Tensor, Tensor] | None:
    """The change of a table at the optimum of RLHF, and mu; None for other losses, settings, longer responses.

    And for features that cannot make that optimum, and for other policies.

    [C * V], []
    """
    if not isinstance(policy, Table):
        return None
    known = isinstance(loss, (RLHF, OnPolicyRegression)) and setting == Setting(budget=setting.budget)
    fitted = getattr(loss, "rewards", "data") == "fitted"
    rewards = policy.batch.fitted_rewards if fitted else policy.batch.rewards
    tilt = policy.placed(rewards) if known and rewards is not None and policy.linear else None
    if tilt is None:
        return None
    beta = loss.beta  # type: ignore[attr-defined]
    if setting.budget is None or _kl(policy, tilt / beta) <= setting.budget:
        return tilt / beta, tilt.new_zeros(())
    low, high = 0.0, LARGEST
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if low else min(1.0, high / 2)
        inside = _kl(policy, tilt / (beta + middle)) <= setting.budget
        low, high = (low, middle) if inside else (middle, high)
        if high - low <= 1e-15 * high:
            break
    return tilt / (beta + high), tilt.new_tensor(high)


def _kl(table: Table, change: Tensor) -> float:
    return float(table.kl(change[None]))
