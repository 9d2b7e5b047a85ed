"""A Euclidean ball around the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.lora import LoRA
from cdpo.constraints.projection import Projection


@dataclass
class L2Ball(Projection):
    """After every step, the trained weights lie within `radius` (L2) of where they started, up to rounding.

    With LoRA it is the ball of the adapters' products: radial scaling is the Euclidean projection and keeps the rank.
    """

    radius: float
    per_tensor: bool = False  # every weight tensor has a ball of its own, instead of one ball for all

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius={self.radius}; choose a positive radius")

    def conflict(self, other: Constraint) -> str:
        if isinstance(other, LoRA) and other.dora:
            return "a DoRA change is not linear in its factors, so it cannot be scaled back; set dora=false"
        return ""

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        norms = self.change.norms()
        if not self.per_tensor:
            norms = dict.fromkeys(norms, math.hypot(*norms.values()))
        if self.record(self.radius - max(norms.values())):
            self.change.scale({name: self.radius / norm for name, norm in norms.items() if norm > self.radius})
