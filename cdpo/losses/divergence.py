"""DPO with the KL regulariser replaced by another f-divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_choice, check_positive, exp_or_tangent


@dataclass(frozen=True)
class FDPO(PairLoss):
    """Wang et al. 2023 (arXiv 2309.16240): -log sigmoid(beta [f'(u_w) - f'(u_l)]), u = pi_theta / pi_ref = exp(Δ).

    reverse_kl: f'(u) = log u; forward_kl: -1/u; jensen_shannon: log(2u / (1 + u)); alpha: -u^-a / a; up to constants.
    alpha goes from reverse_kl (a -> 0) to forward_kl (a -> 1); TRL counts the other way, its coefficient is 1 - a.
    chi_squared: u + log u, the chi-squared preference optimisation of Huang et al. 2024 (arXiv 2407.13399).
    u, u^-1 and u^-a are `exp_or_tangent`: exact while Δ <= 30, or a Δ >= -30.
    """

    # f; reverse_kl is DPO
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha", "chi_squared"] = "reverse_kl"
    alpha: float | None = None  # a in (0, 1), for divergence=alpha only
    # for chi_squared, its paper's R_max: beta [f'(u_w) - f'(u_l)] is cut off at +-2 max_reward, beyond has no gradient
    max_reward: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha", "chi_squared")
        check_choice("divergence", self.divergence, *names)
        if self.divergence != "alpha" and self.alpha is not None:
            raise ValueError(f"alpha={self.alpha} is not used by divergence={self.divergence}; set alpha=null")
        if self.divergence == "alpha" and not (self.alpha is not None and 0 < self.alpha < 1):
            raise ValueError(f"alpha={self.alpha} must lie in (0, 1); its limits are reverse_kl (0) and forward_kl (1)")
        if self.max_reward is not None:
            check_positive(max_reward=self.max_reward)
            if self.divergence != "chi_squared":
                raise ValueError(f"max_reward is not used by divergence={self.divergence}; set max_reward=null")

    @property
    def convex(self) -> bool:  # type: ignore[override]
        """As DPO only."""
        return self.divergence == "reverse_kl"

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(self.slope(logps.log_ratio()))
        reward = self.beta * (chosen - rejected)
        if self.max_reward is not None:
            reward = reward.clamp(-2 * self.max_reward, 2 * self.max_reward)
        return -F.logsigmoid(reward)

    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(exp(Δ)), up to a constant, which cancels between chosen and rejected."""
        if self.divergence == "reverse_kl":
            return log_ratio
        if self.divergence == "chi_squared":
            return exp_or_tangent(log_ratio) + log_ratio
        if self.divergence == "jensen_shannon":
            return math.log(2) + F.logsigmoid(log_ratio)
        a = 1.0 if self.alpha is None else self.alpha
        return -exp_or_tangent(-a * log_ratio) / a
