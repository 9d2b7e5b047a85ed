"""Losses of one preference pair, chosen w over rejected l. Each is a frozen value that names its paper.

Δ is the log-ratio log pi_theta - log pi_ref of a response, m = Δ(w) - Δ(l) the margin; log-probs are sums over tokens,
in nats, unless a loss says otherwise. Equation numbers are the ones that TRL cites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_positive, check_range, exp_or_tangent


def margin_of(logps: Logps, length_normalized: bool) -> Tensor:
    """The margin, of log-ratios per token if `length_normalized`. [P]"""
    chosen, rejected = logps.of_pairs(logps.log_ratio() / logps.length if length_normalized else logps.log_ratio())
    return chosen - rejected


@dataclass(frozen=True)
class DPO(PairLoss):
    """Rafailov et al. 2023 (arXiv 2305.18290): -log sigmoid(beta m).

    With label smoothing, cDPO of Mitchell 2023, "A note on DPO with noisy preferences". With lengths, TRL's
    `sigmoid_norm`, with which Tulu 3 was trained (Lambert et al. 2024, arXiv 2411.15124).
    """

    label_smoothing: float = 0.0  # probability that a label is wrong, in [0, 0.5): preferences p = 1 - label_smoothing
    length_normalized: bool = False  # divide each log-ratio by the tokens of its response

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, below=0.5)

    @property
    def convex(self) -> bool:  # type: ignore[override]
        """Only of the margin; responses of unequal lengths have another."""
        return not self.length_normalized

    def __call__(self, logps: Logps) -> Tensor:
        reward = self.beta * margin_of(logps, self.length_normalized)
        return -(1 - self.label_smoothing) * F.logsigmoid(reward) - self.label_smoothing * F.logsigmoid(-reward)

    def least(self, preference: Tensor) -> Tensor:
        """What no margin goes below, the loss of both orders weighted with p and 1 - p: the label's entropy, nats."""
        p = self.label_smoothing + (1 - 2 * self.label_smoothing) * preference
        return torch.special.entr(p) + torch.special.entr(1 - p)


@dataclass(frozen=True)
class IPO:
    """Azar et al. 2023 (arXiv 2310.12036), Eq. 17: (m - 1 / (2 tau))^2.

    The paper writes the margin of whole responses, hence the sum. Its authors used the mean per token, says TRL, whose
    `ipo` is `length_normalized=True`.
    """

    tau: float = 0.1  # the margin is pulled towards 1 / (2 tau)
    length_normalized: bool = False  # divide each log-ratio by the tokens of its response
    unit: ClassVar[Literal["pair"]] = "pair"
    weights_move: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(tau=self.tau)

    @property
    def convex(self) -> bool:
        """As DPO."""
        return not self.length_normalized

    def __call__(self, logps: Logps) -> Tensor:
        return (margin_of(logps, self.length_normalized) - 1 / (2 * self.tau)) ** 2


@dataclass(frozen=True)
class Hinge(PairLoss):
    """max(0, 1 - beta m): SLiC of Zhao et al. 2023 (arXiv 2305.10425), on log-ratios as in RSO (arXiv 2309.06657)."""

    beta: float = 0.1  # 1 / beta is the margin beyond which a pair no longer counts
    convex: ClassVar[bool] = True
    kinks: ClassVar[bool] = True

    def __call__(self, logps: Logps) -> Tensor:
        return F.relu(1 - self.beta * logps.margin())


@dataclass(frozen=True)
class Robust(PairLoss):
    """Chowdhury et al. 2024 (arXiv 2403.00409): DPO, unbiased when a share of the labels is flipped.

    ((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e) with L = DPO; unbounded below, as the correction demands.
    """

    label_smoothing: float = 0.1  # e, the share of flipped labels, in [0, 0.5)
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, below=0.5)

    def __call__(self, logps: Logps) -> Tensor:
        e, reward = self.label_smoothing, self.beta * logps.margin()
        return (e * F.logsigmoid(-reward) - (1 - e) * F.logsigmoid(reward)) / (1 - 2 * e)


@dataclass(frozen=True)
class EXO(PairLoss):
    """Ji et al. 2024 (arXiv 2402.00856), Eq. 16: reverse KL of (sigmoid(beta m), sigmoid(-beta m)) to (1 - e, e).

    A soft label p is a target of its own, q = e + (1 - 2 e) p and 1 - q, reached where beta m = logit q. A mixture of
    the KLs to both hard labels would have its minimum at (2 p - 1) logit(1 - e) instead.
    """

    label_smoothing: float = 1e-3  # e in (0, 0.5): a hard label would be infinitely far
    reads_preference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(label_smoothing=self.label_smoothing)
        check_range("label_smoothing", self.label_smoothing, below=0.5)

    def __call__(self, logps: Logps) -> Tensor:
        reward = self.beta * logps.margin()
        chosen, rejected = F.logsigmoid(reward), F.logsigmoid(-reward)
        label = torch.stack([logps.preference, 1 - logps.preference])
        first, second = (self.label_smoothing + (1 - 2 * self.label_smoothing) * label).log()
        return chosen.exp() * (chosen - first) + rejected.exp() * (rejected - second)


@dataclass(frozen=True)
class NCA(PairLoss):
    """Chen et al. 2024 (arXiv 2402.05369), for pairs: chosen as data against both responses as noise.

    -log sigmoid(beta Δ(w)) - [log sigmoid(-beta Δ(w)) + log sigmoid(-beta Δ(l))] / 2
    """

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(self.beta * logps.log_ratio())
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class BCO(PairLoss):
    """Jung et al. 2024 (arXiv 2404.04656): a classifier, -log sigmoid(r(w) - d) - log sigmoid(d - r(l)).

    r = beta Δ; the shift d is the running mean of r over both sides in earlier steps. TRL's `bco_pair` leaves it out.
    """

    weights_move: ClassVar[bool] = True
    reads_baseline: ClassVar[bool] = True

    def __call__(self, logps: Logps) -> Tensor:
        assert logps.baseline is not None  # as reads_baseline is set
        chosen, rejected = logps.of_pairs(self.beta * (logps.log_ratio() - logps.baseline))
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPO(PairLoss):
    """Wu et al. 2024 (arXiv 2405.00675), Eq. 4.7: (Δ(w) - 1 / (2 beta))^2 + (Δ(l) + 1 / (2 beta))^2.

    A soft label p moves the targets to +-(p - 1/2) / beta, up to a constant; the paper's eta is our 1 / beta.
    """

    beta: float = 0.1  # the log-ratios are pulled towards +-1 / (2 beta)

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.log_ratio())
        target = 0.5 / self.beta
        return (chosen - target) ** 2 + (rejected + target) ** 2


@dataclass(frozen=True)
class APOZero(PairLoss):
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), Eq. 7: sigmoid(-beta Δ(w)) + sigmoid(beta Δ(l)).

    Chosen goes up, rejected down: for data better than the policy. Of unpaired responses (TRL's `apo_zero_unpaired`) it
    is the same sum.
    """

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(self.beta * logps.log_ratio())
        return (-chosen).sigmoid() + rejected.sigmoid()


@dataclass(frozen=True)
class APODown(PairLoss):
    """D'Oosterlinck et al. 2024 (arXiv 2408.06266), Eq. 8: sigmoid(beta Δ(w)) + sigmoid(-beta m).

    Both go down, rejected more: for data worse than the policy.
    """

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(self.beta * logps.log_ratio())
        return chosen.sigmoid() + (rejected - chosen).sigmoid()


@dataclass(frozen=True)
class DiscoPOP(PairLoss):
    """Lu et al. 2024 (arXiv 2406.08414), Eq. 5: g exp(-z) - (1 - g) log sigmoid(z), z = beta m, g = sigmoid(z / tau).

    g exp(-z) is formed in the log domain, so z << 0 is harmless; `exp_or_tangent` is needed only for tau > 1.
    """

    tau: float = 0.05  # width of the gate between the logistic and the exponential loss

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(tau=self.tau)

    def __call__(self, logps: Logps) -> Tensor:
        reward = self.beta * logps.margin()
        exponential = exp_or_tangent(F.logsigmoid(reward / self.tau) - reward)
        return exponential - (-reward / self.tau).sigmoid() * F.logsigmoid(reward)


@dataclass(frozen=True)
class SFT:
    """Maximum likelihood of the chosen response. TRL's `sft` averages over all tokens of a batch, ours per response."""

    length_normalized: bool = True  # mean over the tokens of a response instead of their sum
    unit: ClassVar[Literal["pair"]] = "pair"
    convex: ClassVar[bool] = True
    weights_move: ClassVar[bool] = False
    reference_free: ClassVar[bool] = True

    def __call__(self, logps: Logps) -> Tensor:
        chosen, _ = logps.of_pairs(logps.policy / logps.length if self.length_normalized else logps.policy)
        return -chosen
