"""The policy that a loss leads to: θ in a ball, all draws at once; and k-sparse θ in it, by gradient support pursuit.

The penalties are concave in the signal variance γ, but convex in log γ, and so in θ: on a ball one start, at 0, finds
the minimum, and the Frank-Wolfe gap proves it. The k-sparse θ are no convex set: there GraSP, from 0 (Bahmani, Raj,
Boufounos 2013, JMLR 14:807-841), ends where its support repeats; the gap is then that of the ball on the support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cdpo.batch import Logps
from cdpo.exact.descent import Descent, Points, projected_gradient, value_and_gradient
from cdpo.losses.gaussian import Gaussian
from cdpo.policy_recovery.draws import Problem, largest

TOLERANCE = 1e-5  # the Frank-Wolfe gap of a solution, as a share of its loss
STEPS = 3000  # of projected gradients
LOOSE, FEW = 1e-3, 50  # the same while a support is sought
ROUNDS = 8  # of GraSP, for each value of falling noise


@dataclass(frozen=True)
class Objective:
    """The mean loss of a draw's pairs, as a function of [A, d + 1]: θ, and in the last column the number of its draw.

    The gradient of the number is 0, so no step moves it.
    """

    problem: Problem
    loss: Gaussian
    reference: Tensor  # [S, n]; log-odds by which the reference prefers the response that was called chosen, nats
    free: Tensor  # [S, d]; which entries of θ may move
    progress: float = 0.0  # of noise that falls

    def __call__(self, points: Tensor) -> Tensor:
        rows, theta = points[:, -1].detach().long(), points[:, :-1]
        all_there = len(rows) == len(self.free)  # then in order: saves a copy
        chosen = self.problem.chosen if all_there else self.problem.chosen[rows]
        theta = torch.where(self.free[rows], theta, theta.detach())
        margins = torch.bmm(chosen, theta[:, :, None]).squeeze(2)
        return self.loss(self._logps(margins, self.reference[rows])).view_as(margins).mean(1)

    def _logps(self, policy: Tensor, reference: Tensor) -> Logps:
        """The pairs as a loss sees them, each a prompt; log-probs up to a constant of the prompt, which cancels.

        So that of the rejected response is 0: it stands once, before all chosen ones.
        """
        rejected, ones = policy.new_zeros(1), policy.new_ones(policy.numel() + 1)
        chosen = torch.arange(1, len(ones))
        return Logps(
            torch.cat([rejected, policy.flatten()]),
            torch.cat([rejected, reference.flatten()]),
            length=ones,
            item=torch.arange(len(ones)),
            pairs=torch.stack([chosen, torch.zeros_like(chosen)], dim=1),
            preference=ones[1:],
            weight=ones[1:],
            progress=self.progress,
        )


def numbered(theta: Tensor, number: Tensor) -> Tensor:
    """[A, d], [A] -> [A, d + 1]"""
    return torch.cat([theta, number[:, None].to(theta)], 1)


def minimise(objective: Objective, radius: float, progress: Sequence[float] = (0.0,)) -> tuple[Tensor, Tensor]:
    """θ of least loss in the ball of `radius`, k-sparse where the problem is [S, d]; its Frank-Wolfe gap, nats [S].

    For every `progress` in turn, each from the solution of the one before, the first from 0.
    """
    theta = torch.zeros_like(objective.problem.truth)
    gap = theta[:, 0]
    for moment in progress:
        now = Ball(replace(objective, progress=moment), radius)
        if objective.problem.nonzeros is not None:
            now, theta = supported(now, theta, objective.problem.nonzeros)
        theta, gap = now.search(theta, torch.arange(len(theta)))
    return theta, gap


@dataclass(frozen=True)
class Ball:
    """An objective on the θ with a norm of at most `radius`."""

    objective: Objective
    radius: float
    tolerance: float = TOLERANCE
    steps: int = STEPS

    def on(self, free: Tensor) -> Ball:
        """The same where only these entries of θ may move. [S, d]"""
        return replace(self, objective=replace(self.objective, free=free))

    def search(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Projected gradients from θ for these draws: [A, d], [A] -> [A, d] and Frank-Wolfe gaps [A], nats."""
        how = Descent(self.objective, lambda points: self.gap(points) <= self.tolerance * points.value, self.steps)
        points = projected_gradient(how, numbered(theta, rows), self._project)
        return points.x[:, :-1], self.gap(points)

    def gap(self, points: Points) -> Tensor:
        """By how much the value exceeds the least one in the ball, at most: Frank and Wolfe 1956. [A]"""
        theta, gradient = points.x[:, :-1], points.gradient[:, :-1]
        return (theta * gradient).sum(1) + self.radius * torch.linalg.vector_norm(gradient, dim=1)

    def _project(self, points: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(points[:, :-1], dim=1).clamp(min=self.radius)
        return numbered(points[:, :-1] * (self.radius / norm)[:, None], points[:, -1])


def supported(ball: Ball, theta: Tensor, k: int) -> tuple[Ball, Tensor]:
    """GraSP from k-sparse θ [S, d]: the 2k steepest entries join, the best of all is found, its k largest stay.

    Returns the ball on the supports that it ends with, and where it is there, before a last search.
    """
    support, open_ = theta != 0, torch.arange(len(theta))
    rough = replace(ball, tolerance=LOOSE, steps=FEW)
    for _ in range(ROUNDS):
        free = support.clone()
        free[open_] |= steepest(ball.objective, numbered(theta[open_], open_), 2 * k)
        wide, _ = rough.on(free).search(theta[open_], open_)
        kept = largest(wide.abs(), k)
        repeated = (kept == support[open_]).all(1)
        support[open_] = kept
        theta = theta.index_copy(0, open_, rough.on(support).search(wide * kept, open_)[0])
        open_ = open_[~repeated]
        if not len(open_):
            break
    return ball.on(support), theta


def steepest(objective: Objective, points: Tensor, k: int) -> Tensor:
    """Which k entries of θ the loss falls along most steeply. [A, d + 1] -> [A, d] truth values"""
    whole = replace(objective, free=torch.ones_like(objective.free))
    gradient = value_and_gradient(whole, points)[1][:, :-1].abs()
    return largest(gradient, min(k, gradient.shape[1]))
