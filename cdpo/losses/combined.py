"""Losses made of other pair losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses import Loss
from cdpo.losses.numerics import EXP_BOUND


@dataclass(frozen=True)
class WPO:
    """Any pair loss, weighted by how likely the policy is to write the pair; no gradient flows through the weight.

    Zhou et al. 2024 (arXiv 2406.11827), the weight before their alignment step. TRL's `use_weighting` is aligned:
    it divides each token's probability by sum_v pi(v)^2, which needs the logits of every token.
    """

    loss: Loss
    """the pair loss"""
    weight: Literal["per_token", "importance"] = "per_token"
    """per_token: product of the mean token probabilities (geometric); importance: product of pi_theta / pi_ref, at most
    exp(30), which moves pairs that were drawn from the reference onto the policy"""
    unit: ClassVar[Literal["pair"]] = "pair"

    def __post_init__(self) -> None:
        check_pair_loss("loss", self.loss)
        if self.weight not in ("per_token", "importance"):
            raise ValueError(f"weight={self.weight} must be per_token or importance")

    def __call__(self, logps: Logps) -> Tensor:
        log_prob = logps.policy / logps.length if self.weight == "per_token" else logps.log_ratio()
        chosen, rejected = logps.of_pairs(log_prob.detach())
        return (chosen + rejected).clamp(max=EXP_BOUND).exp() * self.loss(logps)


@dataclass(frozen=True)
class Sum:
    """A weighted sum of named pair losses, for example DPO with SFT on the chosen response."""

    losses: dict[str, Loss]
    """name -> pair loss"""
    weights: dict[str, float]
    """name -> weight, at least 0; the same names"""
    unit: ClassVar[Literal["pair"]] = "pair"

    def __post_init__(self) -> None:
        if not self.losses or set(self.losses) != set(self.weights):
            raise ValueError(
                f"losses {sorted(self.losses)} and weights {sorted(self.weights)} must have the same names"
            )
        for name, loss in self.losses.items():
            check_pair_loss(f"losses.{name}", loss)
            if not 0 <= self.weights[name] < math.inf:
                raise ValueError(f"weights.{name}={self.weights[name]} must be a finite number, at least 0")

    def __call__(self, logps: Logps) -> Tensor:
        return sum((self.weights[name] * loss(logps) for name, loss in self.losses.items()), logps.policy.new_zeros(()))


def check_pair_loss(name: str, loss: Loss) -> None:
    """Raise ValueError unless `loss` gives one number per pair."""
    if loss.unit != "pair":
        raise ValueError(f"{name} must be a loss of pairs; {type(loss).__name__} is one of {loss.unit}s")
