"""The Frank-Wolfe bound of balls and boxes against the optima that cvxpy finds, on small random convex problems."""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest
import torch
from independent_gap import PRECISE
from torch import nn

from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.linf_ball import LinfBall
from cdpo.model.change import Change
from cdpo.model.gradient import Gradient

PROBLEMS, PAIRS, SIZE = 17, 10, 6  # problems of each kind; pairs and numbers of a problem


class Problem:
    """DPO or IPO on random differences of features, of a model that is one vector in two parts."""

    def __init__(self, seed: int, loss: str) -> None:
        random = np.random.default_rng(seed)
        self.a, self.p = random.normal(size=(PAIRS, SIZE)), random.uniform(0.1, 0.9, PAIRS)
        self.loss, self.start, self.random = loss, random.normal(size=SIZE), random
        self.model = nn.ParameterDict({"one": torch.tensor(self.start[:2]), "two": torch.tensor(self.start[2:])})
        self.change = Change(self.model)

    def value(self) -> torch.Tensor:
        """Of the model as it is."""
        delta = torch.cat([self.model["one"], self.model["two"]]) - torch.tensor(self.start)
        m, p = torch.tensor(self.a) @ delta, torch.tensor(self.p)
        if self.loss == "ipo":
            return (p * (m - 1) ** 2 + (1 - p) * (m + 1) ** 2).mean()
        return -(p * nn.functional.logsigmoid(m) + (1 - p) * nn.functional.logsigmoid(-m)).mean()

    def best(self, constraint: L2Ball | LinfBall) -> tuple[float, np.ndarray]:
        """The least value on the set, and where it is."""
        delta = cvxpy.Variable(SIZE)
        m, p = self.a @ delta, self.p
        if self.loss == "ipo":
            fit = cvxpy.multiply(p, cvxpy.square(m - 1)) + cvxpy.multiply(1 - p, cvxpy.square(m + 1))
        else:
            fit = cvxpy.multiply(p, cvxpy.logistic(-m)) + cvxpy.multiply(1 - p, cvxpy.logistic(m))
        parts = [delta[:2], delta[2:]] if getattr(constraint, "per_tensor", False) else [delta]
        norm = cvxpy.norm2 if isinstance(constraint, L2Ball) else cvxpy.norm_inf
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(fit) / PAIRS), [norm(x) <= constraint.radius for x in parts])
        return float(problem.solve(cvxpy.CLARABEL, **PRECISE)), delta.value

    def descend(self, constraint: L2Ball | LinfBall, steps: int) -> None:
        """Projected gradient descent."""
        for _ in range(steps):
            self.differentiate()
            with torch.no_grad():
                for parameter in self.model.values():
                    parameter -= 0.3 * parameter.grad
                constraint.after_step(self.model, {})

    def scatter(self, constraint: L2Ball | LinfBall) -> None:
        """Go to a random point of the set, on its boundary or within."""
        with torch.no_grad():
            for parameter in self.model.values():
                parameter += torch.tensor(self.random.normal(size=len(parameter)))
            constraint.after_step(self.model, {})

    def go(self, delta: np.ndarray) -> None:
        """Go to a point."""
        with torch.no_grad():
            self.model["one"].copy_(torch.tensor((self.start + delta)[:2]))
            self.model["two"].copy_(torch.tensor((self.start + delta)[2:]))

    def differentiate(self) -> float:
        for parameter in self.model.values():
            parameter.grad = None
        value = self.value()
        value.backward()
        return float(value.detach())

    def bound_and_error(self, constraint: L2Ball | LinfBall, best: float) -> tuple[float, float]:
        value = self.differentiate()
        return constraint.bound(Gradient(self.change)), value - best


SETS = {
    "ball": lambda radius: L2Ball(radius),
    "balls": lambda radius: L2Ball(radius, per_tensor=True),
    "box": lambda radius: LinfBall(radius),
}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_error_is_at_most_the_bound_everywhere_and_both_are_nothing_at_the_optimum(kind, loss):
    for seed in range(PROBLEMS):
        problem = Problem(seed, loss)
        constraint = SETS[kind](float(problem.random.uniform(0.05, 0.6)))
        constraint.begin(problem.model, problem.change)
        best, where = problem.best(constraint)
        for visit in (lambda: problem.scatter(constraint), lambda: problem.descend(constraint, 3)):  # noqa: B023
            visit()
            bound, error = problem.bound_and_error(constraint, best)
            assert bound >= error - 1e-8 >= -2e-8
        problem.go(where)
        bound, error = problem.bound_and_error(constraint, best)
        assert abs(error) < 1e-8
        assert abs(bound) < 1e-5
