"""Losses of a pair that ask no reference: the policy's own mean log-probs per token are the reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_range, exp_or_tangent, log_odds


@dataclass(frozen=True)
class SimPO(PairLoss):
    """Meng et al. 2024 (arXiv 2405.14734): -log sigmoid(beta [s(w) - s(l)] - gamma), s = mean log-prob per token.

    With alpha, AlphaPO of Gupta et al. 2025 (arXiv 2501.03884): (1 - exp(-alpha s)) / alpha in place of s, by
    `exp_or_tangent`. Its slope in s is exp(-alpha s): unlikely responses move it more if alpha > 0, less if alpha < 0.
    """

    beta: float = 2.0  # scale of the reward, a mean log-prob per token
    gamma: float = 0.5  # margin of rewards to be reached, at least 0
    alpha: float = 0.0  # shape of the reward; 0 is s itself
    reference_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("gamma", self.gamma, below=math.inf)
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha} must be finite")

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(self.reward(logps.policy / logps.length))
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.gamma)

    def reward(self, mean_log_prob: Tensor) -> Tensor:
        """In place of s."""
        return (1 - exp_or_tangent(-self.alpha * mean_log_prob)) / self.alpha if self.alpha else mean_log_prob


@dataclass(frozen=True)
class ORPO(PairLoss):
    """Hong et al. 2024 (arXiv 2403.07691): per-token NLL of chosen + beta * -log sigmoid(log odds(w) - log odds(l)).

    Odds are p / (1 - p), log p the mean log-prob per token; see `log_odds` for p near 1. TRL's NLL averages over all
    tokens of a batch, prompts included; ours is one number per pair, whatever shares its batch.
    """

    beta: float = 0.1  # weight of the odds ratio beside the NLL
    reference_free: ClassVar[bool] = True

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.policy / logps.length)
        return -chosen - self.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
