"""DPO as Gaussian estimation, and the family around it: noise-adaptive concave penalties of the signal variance.

After Kong, Hu, He, Wipf, "Common Learning Constraints Alter Interpretations of Direct Preference Optimization"
(AISTATS 2025). The derivations are ours, made from its claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_choice, check_positive, exp_or_tangent


@dataclass(frozen=True)
class Gaussian(PairLoss):
    """-2 log-likelihood of the observation v = 0 under N(0, γ + λ), up to a constant: log(γ + λ) - log λ.

    γ = (pi_theta(l) / pi_theta(w))^beta is the signal variance, λ = (pi_ref(l) / pi_ref(w))^beta the noise variance. So
    the default equals DPO: a concave penalty of γ, like log γ for pairs with small λ, like γ / λ for large λ.
    Computed from log γ and log λ; the penalties linear and power, and the observation, need an exponential, and take
    `exp_or_tangent`: exact up to exp(30), then its tangent.
    """

    beta: float = 0.1  # exponent of both variances; strength of the KL regulariser in DPO's reading
    noise: Literal["reference", "constant"] = "reference"  # λ from the reference, or λ = 1, which needs no reference
    noise_scale: float = 1.0  # c: λ becomes c λ; the same as a margin shifted by log c
    # c falls from noise_scale, above 1, to 1 over training, linearly or geometrically (graduated non-convexity)
    noise_schedule: Literal["linear", "exponential"] | None = None
    # v > 0 instead of 0 adds v^2 / (γ + λ): the best γ is max(v^2 - λ, 0), not 0. For penalty=log only, as no other
    # penalty is a likelihood
    observation: float | None = None
    # log(1 + γ/λ); min_g γ/g + log(1 + g/λ); γ/λ; (γ/λ)^power
    penalty: Literal["log", "variational", "linear", "power"] = "log"
    power: float | None = None  # in (0, 1], for penalty=power only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(noise_scale=self.noise_scale)
        check_choice("noise", self.noise, "reference", "constant")
        check_choice("noise_schedule", self.noise_schedule, None, "linear", "exponential")
        check_choice("penalty", self.penalty, "log", "variational", "linear", "power")
        if self.noise_schedule and self.noise_scale <= 1:
            raise ValueError(
                f"noise_schedule={self.noise_schedule} falls to 1: set noise_scale above 1, or no schedule"
            )
        if self.observation is not None:
            check_positive(observation=self.observation)
            if self.penalty != "log":
                raise ValueError(f"observation needs penalty=log, not {self.penalty}; set observation=null")
        if self.penalty != "power" and self.power is not None:
            raise ValueError(f"power={self.power} is not used by penalty={self.penalty}; set power=null")
        if self.penalty == "power" and not (self.power is not None and 0 < self.power <= 1):
            raise ValueError(f"power={self.power} must lie in (0, 1] for penalty=power")

    @property
    def convex(self) -> bool:  # type: ignore[override]
        """Every penalty is, of log γ; the observation's exponential of a falling function is not."""
        return self.observation is None

    @property
    def reference_free(self) -> bool:  # type: ignore[override]
        """Where every pair has the same noise."""
        return self.noise == "constant"

    @property
    def reads_progress(self) -> bool:  # type: ignore[override]
        """Where the noise falls."""
        return self.noise_schedule is not None

    def __call__(self, logps: Logps) -> Tensor:
        signal, noise = self.log_signal(logps), self.log_noise(logps)
        penalty = self.penalty_of(signal - noise)
        if self.observation is None:
            return penalty
        return penalty + exp_or_tangent(2 * math.log(self.observation) - torch.logaddexp(signal, noise))

    def log_signal(self, logps: Logps) -> Tensor:
        """log γ. [P]"""
        chosen, rejected = logps.of_pairs(logps.policy)
        return self.beta * (rejected - chosen)

    def log_noise(self, logps: Logps) -> Tensor:
        """log λ, the scale c included. [P]"""
        chosen, rejected = logps.of_pairs(self.beta * logps.reference)
        log_noise = rejected - chosen if self.noise == "reference" else torch.zeros_like(chosen)
        return log_noise + self.log_scale(logps.progress)

    def log_scale(self, progress: float) -> float:
        """log c, `progress` through training."""
        if self.noise_schedule == "linear":
            return math.log(self.noise_scale + (1 - self.noise_scale) * progress)
        left = 1 - progress if self.noise_schedule == "exponential" else 1.0
        return left * math.log(self.noise_scale)

    def penalty_of(self, log_snr: Tensor) -> Tensor:
        """The penalty of γ, less its value at γ = 0, from log(γ / λ)."""
        if self.penalty == "log":
            return -F.logsigmoid(-log_snr)
        if self.penalty == "variational":
            return variational(log_snr)
        return exp_or_tangent((self.power or 1.0) * log_snr)


def variational(log_snr: Tensor) -> Tensor:
    """min_g γ/g + log(λ + g), less log λ.

    The minimum is 2x / (x + s) + log((2λ + x^2 + x s) / 2), x = √γ, s = √(4λ + x^2). With x = 2 √λ sinh(a), that is
    1 - exp(-2a) + 2a + log λ, and exp(a) = (u + √(4 + u^2)) / 2, u = √(γ/λ), which needs logaddexp only.
    """
    root = 0.5 * torch.logaddexp(log_snr, log_snr.new_tensor(math.log(4)))
    a = torch.logaddexp(0.5 * log_snr, root) - math.log(2)
    return 2 * a - torch.expm1(-2 * a)
