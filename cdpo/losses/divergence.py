"""DPO with the KL regulariser replaced by another f-divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_choice, exp_or_tangent


@dataclass(frozen=True)
class FDPO(PairLoss):
    """Wang et al. 2023 (arXiv 2309.16240): -log sigmoid(beta [f'(u_w) - f'(u_l)]), u = pi_theta / pi_ref = exp(Δ).

    reverse_kl: f'(u) = log u; forward_kl: -1/u; jensen_shannon: log(2u / (1 + u)); alpha: -u^-a / a; up to constants.
    alpha goes from reverse_kl (a -> 0) to forward_kl (a -> 1); TRL counts the other way, its coefficient is 1 - a.
    u^-1 and u^-a are `exp_or_tangent`: exact while a Δ >= -30.
    """

    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"  # f; reverse_kl is DPO
    alpha: float | None = None  # a in (0, 1), for divergence=alpha only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, "reverse_kl", "forward_kl", "jensen_shannon", "alpha")
        if self.divergence != "alpha" and self.alpha is not None:
            raise ValueError(f"alpha={self.alpha} is not used by divergence={self.divergence}; set alpha=null")
        if self.divergence == "alpha" and not (self.alpha is not None and 0 < self.alpha < 1):
            raise ValueError(f"alpha={self.alpha} must lie in (0, 1); its limits are reverse_kl (0) and forward_kl (1)")

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(self.slope(logps.log_ratio()))
        return -F.logsigmoid(self.beta * (chosen - rejected))

    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(exp(Δ)), up to a constant, which cancels between chosen and rejected."""
        if self.divergence == "reverse_kl":
            return log_ratio
        if self.divergence == "jensen_shannon":
            return math.log(2) + F.logsigmoid(log_ratio)
        a = 1.0 if self.alpha is None else self.alpha
        return -exp_or_tangent(-a * log_ratio) / a
