"""Budgets, c(x) <= 0, by an augmented Lagrangian: a few problems without budgets, each with better multipliers.

Hestenes 1969, Powell 1969; for inequalities Rockafellar 1973. Every start has its own multipliers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpo.exact.descent import Function

Budget = Callable[[Tensor], Tensor]  # x [S, n] -> [S]; at most 0 where it is kept
Solver = Callable[[Function, Tensor], Tensor]  # minimises a function from given points

ROUNDS = 25
STIFFNESS, STIFFER = 10.0, 1e5  # of the quadratic term beside what is at stake; how much more it may become
TIGHT = 1e-10  # share by which a budget may be left, or lie open while its multiplier pulls


@dataclass(frozen=True)
class Augmented:
    """f(x) + stiffness / 2 * max(0, c(x) + multiplier / stiffness)^2, summed over the budgets.

    A start's multipliers and stiffnesses ride along at the end of its x, where the gradient is zero: so they find the
    start, whichever of the starts are computed at a time.
    """

    function: Function
    budgets: Sequence[Budget]
    at_stake: float = 1.0  # by how much the function falls where no budget is kept

    def __call__(self, points: Tensor) -> Tensor:
        """[S, n + 2 budgets] -> [S]"""
        x, multipliers, stiffness = self.parts(points)
        value = self.function(x)
        for budget, mu, rho in zip(self.budgets, multipliers.detach().mT, stiffness.detach().mT):
            value = value + rho / 2 * (budget(x) + mu / rho).clamp(min=0).square()
        return value

    def begun(self, x: Tensor) -> Tensor:
        """Points without multipliers yet, and so stiff that no start gains by leaving a budget far behind, where it
        may be flat. [S, n] -> [S, n + 2 budgets]
        """
        none = x.new_zeros(len(x), len(self.budgets))
        return torch.cat([x, none, torch.full_like(none, STIFFNESS * self.at_stake)], dim=1)

    def parts(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, multipliers and stiffnesses. [S, n], 2 x [S, budgets]"""
        k = len(self.budgets)
        x, multipliers, stiffness = points.tensor_split([points.shape[1] - 2 * k, points.shape[1] - k], dim=1)
        return x, multipliers, stiffness


def within_budgets(augmented: Augmented, solve: Solver, x: Tensor) -> tuple[Tensor, Tensor]:
    """Points that minimise its function where every budget is kept, and multipliers. [S, n] -> [S, n], [S, budgets]"""
    x, multipliers, stiffness = augmented.parts(augmented.begun(x))
    worst, stiffest = torch.full_like(multipliers, torch.inf), STIFFER * stiffness
    for _ in range(ROUNDS):
        x, _, _ = augmented.parts(solve(augmented, torch.cat([x, multipliers, stiffness], dim=1)))
        excess = torch.stack([budget(x) for budget in augmented.budgets], dim=1).detach()
        violation = torch.maximum(excess, -multipliers / stiffness).abs()
        multipliers = (multipliers + stiffness * excess).clamp(min=0)
        if bool((violation <= TIGHT).all()):
            break
        stiffness = torch.where(violation > worst / 4, 4 * stiffness, stiffness).minimum(stiffest)
        worst = violation
    return x, multipliers
