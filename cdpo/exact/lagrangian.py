"""Budgets, c(x) <= 0, by an augmented Lagrangian: a few problems without budgets, each with better multipliers.

Hestenes 1969, Powell 1969; for inequalities Rockafellar 1973. Every start has its own multipliers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpo.exact.descent import Function
from cdpo.exact.problem import value_and_gradient

Budget = Callable[[Tensor], Tensor]  # x [S, n] -> [S]; at most 0 where it is kept
Solver = Callable[[Function, Tensor], Tensor]  # minimises a function from given points

ROUNDS = 25
STIFFNESS, STIFFEST = 10.0, 1e6  # of the quadratic term, at first and at most
TIGHT = 1e-10  # how far a budget may be left, or lie open while its multiplier pulls


@dataclass(frozen=True)
class Augmented:
    """f(x) + stiffness / 2 * max(0, c(x) + multiplier / stiffness)^2, summed over the budgets.

    A start's multipliers and stiffnesses ride along at the end of its x, where the gradient is zero: so they find the
    start, whichever of the starts are computed at a time.
    """

    function: Function
    budgets: Sequence[Budget]

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """[S, n + 2 budgets] -> [S], [S, n + 2 budgets]"""
        x, multipliers, stiffness = self.parts(points)
        value, gradient = self.function(x)
        for k, budget in enumerate(self.budgets):
            rho, mu = stiffness[:, k], multipliers[:, k]
            term, slope = value_and_gradient(lambda y: rho / 2 * (budget(y) + mu / rho).clamp(min=0).square(), x)  # noqa: B023
            value, gradient = value + term, gradient + slope
        return value, torch.nn.functional.pad(gradient, (0, 2 * len(self.budgets)))

    def parts(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, multipliers and stiffnesses. [S, n], 2 x [S, budgets]"""
        k = len(self.budgets)
        x, multipliers, stiffness = points.tensor_split([points.shape[1] - 2 * k, points.shape[1] - k], dim=1)
        return x, multipliers, stiffness


def within_budgets(function: Function, budgets: Sequence[Budget], solve: Solver, x: Tensor) -> tuple[Tensor, Tensor]:
    """Points that minimise a function where every budget is kept, and multipliers. [S, n] -> [S, n], [S, budgets]"""
    augmented = Augmented(function, budgets)
    multipliers = x.new_zeros(len(x), len(budgets))
    stiffness, worst = torch.full_like(multipliers, STIFFNESS), torch.full_like(multipliers, torch.inf)
    for _ in range(ROUNDS):
        x, _, _ = augmented.parts(solve(augmented, torch.cat([x, multipliers, stiffness], dim=1)))
        excess = torch.stack([budget(x) for budget in budgets], dim=1).detach()
        violation = torch.maximum(excess, -multipliers / stiffness).abs()
        multipliers = (multipliers + stiffness * excess).clamp(min=0)
        if bool((violation <= TIGHT).all()):
            break
        stiffness = torch.where(violation > worst / 4, 4 * stiffness, stiffness).clamp(max=STIFFEST)
        worst = violation
    return x, multipliers
