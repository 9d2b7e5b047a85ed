"""Losses of a pair that hold each response to a level of its own, beside or instead of the margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_choice, check_positive


@dataclass(frozen=True)
class DPOPositive(PairLoss):
    """Pal et al. 2024 (arXiv 2402.13228): -log sigmoid(beta [m - penalty max(0, -Δ(w))]).

    DPO can be satisfied with both responses less likely; here the chosen one may not fall below the reference.
    """

    penalty: float = 50.0  # their lambda, above 0
    convex: ClassVar[bool] = True  # the bracket is concave, as Δ is
    kinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(penalty=self.penalty)

    def __call__(self, logps: Logps) -> Tensor:
        chosen, _ = logps.of_pairs(logps.log_ratio())
        return -F.logsigmoid(self.beta * (logps.margin() - self.penalty * F.relu(-chosen)))


@dataclass(frozen=True)
class CalDPO(PairLoss):
    """Xiao et al. 2024 (arXiv 2412.14516): -log sigmoid(m) + weight [(Δ(w) - 1/(2 beta))^2 + (Δ(l) + 1/(2 beta))^2].

    The squares calibrate the log-ratios: without them only their difference is asked for.
    """

    beta: float = 0.1  # the log-ratios are pulled towards +-1 / (2 beta)
    weight: float = 1.0  # of the squares; 0.5 in the authors' code

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(weight=self.weight)

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.log_ratio())
        target = 0.5 / self.beta
        squares = (chosen - target) ** 2 + (rejected + target) ** 2
        return self.weight * squares - F.logsigmoid(chosen - rejected)


@dataclass(frozen=True)
class KTO(PairLoss):
    """Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 7, weighted: sigmoid(beta [z - Δ(w)]) + sigmoid(beta [Δ(l) - z]).

    Every pair is one desirable and one undesirable response. z stands for KL(pi || pi_ref) and has no gradient. The
    authors take the mean log-ratio of a batch's responses to other prompts; ours is that of the pairs of earlier steps
    (baseline, at least 0), or the exact KL on the prompt's responses (candidates). With z = 0 this is `APOZero`.
    """

    desirable: float = 1.0  # weight of the chosen response, above 0
    undesirable: float = 1.0  # weight of the rejected response, above 0
    kl: Literal["baseline", "candidates"] = "baseline"
    weights_move: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(desirable=self.desirable, undesirable=self.undesirable)
        check_choice("kl", self.kl, "baseline", "candidates")

    @property
    def reads_baseline(self) -> bool:  # type: ignore[override]
        """Where the KL is estimated from it."""
        return self.kl == "baseline"

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.log_ratio())
        z = self.reference_point(logps)
        desirable, undesirable = (self.beta * (z - chosen)).sigmoid(), (self.beta * (rejected - z)).sigmoid()
        return self.desirable * desirable + self.undesirable * undesirable

    def reference_point(self, logps: Logps) -> Tensor | float:
        """z, nats. [P], or one for all"""
        if self.kl == "candidates":
            return logps.candidate_kl().detach()[logps.item[logps.pairs[:, 0]]]
        assert logps.baseline is not None  # as reads_baseline is set
        return max(0.0, logps.baseline)
