"""Losses of a pair that read how much better the chosen response is: the rewards of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.errors import ConfigError
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_choice, check_positive


def reward_gap(logps: Logps, advice: str) -> Tensor:
    """r(w) - r(l), in the data's unit. Raises ConfigError with the advice where there are no rewards. [P]"""
    if logps.rewards is None:
        raise ConfigError(f"the loss needs a data set with rewards; choose one, or {advice}")
    chosen, rejected = logps.of_pairs(logps.rewards)
    return chosen - rejected


@dataclass(frozen=True)
class ODPO(PairLoss):
    """Amini et al. 2024 (arXiv 2402.10571): -log sigmoid(beta m - offset), a margin that a pair has to reach.

    The offset is `scale`, or `scale * (r(w) - r(l))`, which unlike a log of the difference allows ties and soft labels.
    """

    offset: Literal["constant", "rewards"] = "constant"  # the same for all pairs, or from the rewards of the data
    scale: float = 1.0  # the constant, or the factor of the difference of rewards; above 0
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(scale=self.scale)
        check_choice("offset", self.offset, "constant", "rewards")

    @property
    def reads_rewards(self) -> bool:  # type: ignore[override]
        """Where the offset is made of them."""
        return self.offset == "rewards"

    def __call__(self, logps: Logps) -> Tensor:
        gap = reward_gap(logps, "set offset=constant") if self.offset == "rewards" else 1.0
        return -F.logsigmoid(self.beta * logps.margin() - self.scale * gap)


@dataclass(frozen=True)
class REBEL(PairLoss):
    """Gao et al. 2024 (arXiv 2404.16767): (beta m - [r(w) - r(l)])^2, log-ratios regressed on rewards, off-policy.

    One iteration of REBEL, whose eta is 1 / beta, with the reference as the policy to start from and the pairs of the
    data. `OnPolicyRegression` draws them from the policy. A soft label changes nothing: rewards say it all.
    """

    convex: ClassVar[bool] = True
    reads_rewards: ClassVar[bool] = True

    def __call__(self, logps: Logps) -> Tensor:
        return (self.beta * logps.margin() - reward_gap(logps, "a loss of preferences")) ** 2
