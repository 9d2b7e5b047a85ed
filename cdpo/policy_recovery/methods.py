"""The penalties that are compared: Gaussian losses as they train, and what the reference of each thinks of a pair.

λ = exp(-b), where the reference prefers the response that was called chosen by b nats. A constant b > 0 is a reference
that follows the labels, wrong ones too; b < 0 one that contradicts them all. Where θ is the change, so that the policy
is the reference times exp(φ·θ), γ/λ does not depend on λ: there it acts on nothing. Here θ is the policy itself, as
where a constraint holds the weights (weight decay, a ball around 0) and the reference is another model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpo.losses.gaussian import Gaussian
from cdpo.policy_recovery.draws import Problem
from cdpo.policy_recovery.known import l1
from cdpo.policy_recovery.solver import Objective, minimise

BASELINE = "log"  # DPO with an indifferent reference: λ = 1
ALL = (
    BASELINE, "linear", "power", "variational", "log, small λ", "log, large λ", "log, falling λ",
    "log, reference right", "log, right or silent", "log, reference wrong", "linear, reference right", "l1",
)  # fmt: skip
FALLS = (0.0, 0.5, 1.0)  # progress at which falling noise is solved


@dataclass(frozen=True)
class Knobs:
    """The numbers that methods have."""

    radius: float  # of the ball
    strength: float  # nats by which a reference that is not indifferent prefers a response
    power: float
    fall_from: float  # λ at first, where it falls to 1


@dataclass(frozen=True)
class Method:
    """A loss, and what the reference thinks of the response called chosen: where the label is right, where wrong.

    1: it prefers it, -1: it prefers the other one, 0: it is indifferent. No loss: l1 by linear programmes.
    """

    loss: Gaussian | None
    about_right: float = 0.0
    about_wrong: float = 0.0

    def solve(self, problem: Problem, knobs: Knobs) -> tuple[Tensor, Tensor]:
        """θ [S, d], and the Frank-Wolfe gap of each, nats [S]; of l1 0, as HiGHS proves its solutions."""
        if self.loss is None:
            return l1(problem), torch.zeros(len(problem.truth))
        reference = knobs.strength * problem.reference(self.about_right, self.about_wrong)
        objective = Objective(problem, self.loss, reference, torch.ones_like(problem.truth, dtype=torch.bool))
        return minimise(objective, knobs.radius, FALLS if self.loss.reads_progress else (0.0,))


def methods(knobs: Knobs) -> dict[str, Method]:
    """All of them by name, in the order of ALL and of the figures."""
    log, linear = Gaussian(beta=1.0), Gaussian(beta=1.0, penalty="linear")
    small, large = (Gaussian(beta=1.0, noise="constant", noise_scale=math.exp(b * knobs.strength)) for b in (-1, 1))
    found = [
        Method(log),
        Method(linear),
        Method(Gaussian(beta=1.0, penalty="power", power=knobs.power)),
        Method(Gaussian(beta=1.0, penalty="variational")),
        Method(small),
        Method(large),
        Method(Gaussian(beta=1.0, noise_scale=knobs.fall_from, noise_schedule="exponential")),
        Method(log, 1.0, -1.0),
        Method(log, 1.0, 0.0),
        Method(log, -1.0, 1.0),
        Method(linear, 1.0, -1.0),
        Method(None),
    ]
    return dict(zip(ALL, found))
