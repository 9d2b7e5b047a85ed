"""Losses of whole candidate sets: RLHF itself, exactly, and the regression that has its gradient.

The policy and the reference are distributions on each Item's K responses (`Logps.renormalised`), so every expectation
over responses is a finite sum. Rewards are the data's own, or fitted to its preferences (`cdpo.data.bradley_terry`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cdpo.batch import Logps
from cdpo.errors import ConfigError
from cdpo.losses.numerics import check_choice, check_positive


@dataclass(frozen=True)
class OnCandidates:
    """What the losses here share: f(k) = beta * log(pi(k) / pi_ref(k)) - r(k) is constant over k at the optimum."""

    beta: float = 0.1  # strength of the KL regulariser
    rewards: Literal["data", "fitted"] = "data"  # the data's own, or a Bradley-Terry fit to the prompt's preferences
    ridge: float = 0.0  # of that fit: weight of sum r^2 / 2 beside the mean log-likelihood of connected pairs
    unit: ClassVar[Literal["item"]] = "item"
    convex: ClassVar[bool] = False
    weights_move: ClassVar[bool] = False
    fixed_reference: ClassVar[bool] = True  # J's

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_choice("rewards", self.rewards, "data", "fitted")
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge={self.ridge} must be a finite number, at least 0")
        if self.ridge and self.rewards == "data":
            raise ValueError(f"ridge={self.ridge} is not used with rewards=data; set ridge=0")

    @property
    def reads_rewards(self) -> bool:
        """Those of the data."""
        return self.rewards == "data"

    def policy_and_f(self, logps: Logps) -> tuple[Tensor, Tensor]:
        """log pi(k), and f(k) up to a constant per Item. Raises ConfigError where rewards are missing. [S], [S]"""
        rewards = logps.rewards if self.rewards == "data" else logps.fitted_rewards
        if rewards is None:
            raise ConfigError(f"{type(self).__name__} needs rewards, and {', '.join(logps.sources[:3])} have none")
        if logps.base is None:  # pairs with fitted rewards: the two alike, which makes f a function of the margin
            logps = replace(logps, base=torch.zeros_like(logps.reference))
        return logps.renormalised().policy, self.beta * logps.renormalised().log_ratio() - rewards


@dataclass(frozen=True)
class RLHF(OnCandidates):
    """-J = beta * KL(pi || pi_ref) - E_pi[r], exact on each Item's candidates; no sampling, no baseline, no clipping.

    The objective of Stiennon et al. 2020 (arXiv 2009.01325) and Ouyang et al. 2022 (arXiv 2203.02155). [I]
    """

    def __call__(self, logps: Logps) -> Tensor:
        policy, f = self.policy_and_f(logps)
        return logps.sum_by_item(policy.exp() * f)


@dataclass(frozen=True)
class OnPolicyRegression(OnCandidates):
    """E_{y1,y2 ~ sg(pi)} of (f(y1) - f(y2))^2 / 4, which is Var_sg(pi)(f) / 2: no gradient flows through the weights.

    Its gradient is beta times that of RLHF, as grad KL(pi || pi*) = Cov_pi(log pi/pi*, grad log pi) (ours). So what it
    descends is not the squared error, whose weights move too, but beta (J* - J) = beta^2 KL(pi || pi*). That is the
    value returned here, for line searches and comparisons of restarts. [I]
    """

    def __call__(self, logps: Logps) -> Tensor:
        policy, f = self.policy_and_f(logps)
        error = self.squared_error(logps, policy.detach().exp(), f)
        # f / beta is log(pi / pi*) up to a constant; renormalising -f / beta, with pi as prior, makes it pi* itself
        optimum = logps.log_softmax_by_item(policy - f / self.beta)
        descended = self.beta**2 * logps.sum_by_item(policy.exp() * (policy - optimum))
        return error + (descended - error).detach()

    @staticmethod
    def squared_error(logps: Logps, weight: Tensor, f: Tensor) -> Tensor:
        """Half the variance of f under `weight`, Item by Item. [S], [S] -> [I]"""
        mean = logps.sum_by_item(weight * f)
        return logps.sum_by_item(weight * (f - mean[logps.item]).square()) / 2
