"""A pull towards zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from cdpo.constraints.constraint import Constraint
from cdpo.errors import ConfigError
from cdpo.system.ranks import full_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from cdpo.model.change import Change


@dataclass
class WeightDecay(Constraint):
    """Before every step, the trained weights shrink to theta * (1 - learning_rate * strength).

    Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), as in torch.optim.AdamW. With LoRA it
    decays the adapter's factors, as AdamW does; with freezing, only what still trains. A rate above 1 is a ConfigError.
    """

    strength: float
    matrices_only: bool = True  # biases and norms are not decayed

    convex = True
    euclidean = True
    not_with_lbfgs = "moving the parameters between steps invalidates L-BFGS's curvature; use optimizer=sgd or adamw"

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength={self.strength}; choose a positive strength")

    def begin(self, model: nn.Module, change: Change) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.decayed = [parameter for parameter in trained if parameter.ndim >= 2 or not self.matrices_only]

    def parameter_penalty(self) -> Tensor:
        """strength / 2 * ||theta||^2, which gradient descent without momentum minimises so, and AdamW does not."""
        return sum((self.strength / 2 * p.square().sum() for p in self.decayed), torch.zeros(()))

    def before_step(self, model: nn.Module, learning_rate: float) -> None:
        rate = learning_rate * self.strength
        if rate > 1:
            raise ConfigError(f"learning_rate * strength = {rate:g} would flip the weights' sign; keep it below 1")
        for parameter in self.decayed:
            parameter.mul_(1 - rate)

    def report(self) -> dict[str, float]:
        """`norm`: L2 norm of the decayed weights, which is what is being pulled to zero."""
        norms = [full_tensor(torch.linalg.vector_norm(parameter.detach())).double() for parameter in self.decayed]
        return {"binds": float(bool(norms)), "norm": math.hypot(*map(float, norms))}
