"""A Euclidean ball around the start."""

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
class L2Ball(Projection):
    """After every step, the trained weights lie within `radius` (L2) of where they started, up to rounding.

    With LoRA it is the ball of the adapters' products: radial scaling is the Euclidean projection and keeps the rank.
    """

    radius: float
    per_tensor: bool = False  # every weight tensor has a ball of its own, instead of one ball for all

    convex = True
    euclidean = True
    has_vertex = True

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius={self.radius}; choose a positive radius")

    def conflict(self, other: Constraint) -> str:
        if isinstance(other, LoRA) and other.dora:
            return "a DoRA change is not linear in its factors, so it cannot be scaled back; set dora=false"
        return ""

    def hold(self, gradient: Gradient) -> None:
        """A pull along the change, away from the start, is held back by so much of it as stands at the boundary."""
        inner, norms = gradient.inner(), self.change.norms()
        groups = [[name] for name in norms] if self.per_tensor else [list(norms)]
        for group in groups:
            size = math.hypot(*(norms[name] for name in group))
            outward = max(0.0, -sum(inner[name] for name in group if name in inner))
            if size:
                gradient.add_change(dict.fromkeys(group, outward / size**2 * min(1.0, size / self.radius)))

    def bound(self, gradient: Gradient) -> float:
        norms = gradient.norms()
        reach = sum(norms.values()) if self.per_tensor else math.hypot(*norms.values())
        return sum(gradient.inner().values()) + self.radius * reach

    def vertex(self, gradient: Gradient) -> None:
        """v = theta_0 - radius g / ||g||, of every tensor by itself if each has a ball; theta_0 where g is zero."""
        norms = gradient.norms()
        total = math.hypot(*norms.values())
        for name, g, delta in gradient.plain():
            norm = norms[name] if self.per_tensor else total
            g.mul_(self.radius / norm if norm else 0.0).add_(delta)

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        norms = self.change.norms()
        if not self.per_tensor:
            norms = dict.fromkeys(norms, math.hypot(*norms.values()))
        if self.record(self.radius - max(norms.values())):
            self.change.scale({name: self.radius / norm for name, norm in norms.items() if norm > self.radius})
