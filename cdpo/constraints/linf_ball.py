"""A box around the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.lora import LoRA
from cdpo.constraints.projection import Projection

if TYPE_CHECKING:
    from cdpo.model.gradient import Gradient


@dataclass
class LinfBall(Projection):
    """After every step, every trained weight lies within `radius` of where it started, up to rounding."""

    radius: float

    convex = True
    has_vertex = True

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius={self.radius}; choose a positive radius")

    def conflict(self, other: Constraint) -> str:
        return "a low-rank change clipped weight by weight is no longer of low rank" if isinstance(other, LoRA) else ""

    def hold(self, gradient: Gradient) -> None:
        """Of a weight that is pulled outwards so much of the pull is held back as stands at the boundary."""
        gradient.keep(lambda g, delta: 1 - (g * delta < 0) * (delta.abs() / self.radius).clamp(max=1))

    def bound(self, gradient: Gradient) -> float:
        return sum(gradient.inner().values()) + self.radius * gradient.absolute()

    def vertex(self, gradient: Gradient) -> None:
        """v = theta_0 - radius sign(g)."""
        for _, g, delta in gradient.plain():
            g.sign_().mul_(self.radius).add_(delta)

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        if self.record(self.radius - self.change.max_abs()):
            for _, parameter, start in self.change.plain():
                parameter.clamp_(start - self.radius, start + self.radius)
