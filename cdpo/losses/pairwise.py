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
from cdpo.errors import ConfigError
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_choice, check_positive, check_range, exp_or_tangent, log_odds


@dataclass(frozen=True)
class DPO(PairLoss):
    """Rafailov et al. 2023 (arXiv 2305.18290): -log sigmoid(beta m).

    With label smoothing, cDPO of Mitchell 2023, "A note on DPO with noisy preferences".
    """

    label_smoothing: float = 0.0  # probability that a label is wrong, in [0, 0.5): preferences p = 1 - label_smoothing

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, below=0.5)

    def __call__(self, logps: Logps) -> Tensor:
        reward = self.beta * logps.margin()
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

    def __post_init__(self) -> None:
        check_positive(tau=self.tau)

    def __call__(self, logps: Logps) -> Tensor:
        log_ratio = logps.log_ratio() / logps.length if self.length_normalized else logps.log_ratio()
        chosen, rejected = logps.of_pairs(log_ratio)
        return (chosen - rejected - 1 / (2 * self.tau)) ** 2


@dataclass(frozen=True)
class Hinge(PairLoss):
    """max(0, 1 - beta m): SLiC of Zhao et al. 2023 (arXiv 2305.10425), on log-ratios as in RSO (arXiv 2309.06657)."""

    beta: float = 0.1  # 1 / beta is the margin beyond which a pair no longer counts

    def __call__(self, logps: Logps) -> Tensor:
        return F.relu(1 - self.beta * logps.margin())


@dataclass(frozen=True)
class Robust(PairLoss):
    """Chowdhury et al. 2024 (arXiv 2403.00409): DPO, unbiased when a share of the labels is flipped.

    ((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e) with L = DPO; unbounded below, as the correction demands.
    """

    label_smoothing: float = 0.1  # e, the share of flipped labels, in [0, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, below=0.5)

    def __call__(self, logps: Logps) -> Tensor:
        e, reward = self.label_smoothing, self.beta * logps.margin()
        return (e * F.logsigmoid(-reward) - (1 - e) * F.logsigmoid(reward)) / (1 - 2 * e)


@dataclass(frozen=True)
class EXO(PairLoss):
    """Ji et al. 2024 (arXiv 2402.00856), Eq. 16: reverse KL of (sigmoid(beta m), sigmoid(-beta m)) to (1 - e, e)."""

    label_smoothing: float = 1e-3  # e in (0, 0.5): a hard label would be infinitely far

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(label_smoothing=self.label_smoothing)
        check_range("label_smoothing", self.label_smoothing, below=0.5)

    def __call__(self, logps: Logps) -> Tensor:
        reward = self.beta * logps.margin()
        chosen, rejected = F.logsigmoid(reward), F.logsigmoid(-reward)
        label = reward.new_tensor([1 - self.label_smoothing, self.label_smoothing]).log()
        return chosen.exp() * (chosen - label[0]) + rejected.exp() * (rejected - label[1])


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

    Chosen goes up, rejected down: for data better than the policy.
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
class SimPO(PairLoss):
    """Meng et al. 2024 (arXiv 2405.14734): -log sigmoid(beta [s(w) - s(l)] - gamma), s = mean log-prob per token."""

    beta: float = 2.0  # scale of the reward, a mean log-prob per token
    gamma: float = 0.5  # margin of rewards to be reached, at least 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("gamma", self.gamma, below=float("inf"))

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.policy / logps.length)
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(frozen=True)
class ORPO(PairLoss):
    """Hong et al. 2024 (arXiv 2403.07691): per-token NLL of chosen + beta * -log sigmoid(log odds(w) - log odds(l)).

    Odds are p / (1 - p), log p the mean log-prob per token; see `log_odds` for p near 1. TRL's NLL averages over all
    tokens of a batch, prompts included; ours is one number per pair, whatever shares its batch.
    """

    beta: float = 0.1  # weight of the odds ratio beside the NLL

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.policy / logps.length)
        return -chosen - self.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


@dataclass(frozen=True)
class ODPO(PairLoss):
    """Amini et al. 2024 (arXiv 2402.10571): -log sigmoid(beta m - offset), a margin that a pair has to reach.

    The offset is `scale`, or `scale * (r(w) - r(l))`, which unlike a log of the difference allows ties and soft labels.
    """

    offset: Literal["constant", "rewards"] = "constant"  # the same for all pairs, or from the rewards of the data
    scale: float = 1.0  # the constant, or the factor of the difference of rewards; above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(scale=self.scale)
        check_choice("offset", self.offset, "constant", "rewards")

    def __call__(self, logps: Logps) -> Tensor:
        return -F.logsigmoid(self.beta * logps.margin() - self.scale * self.gap(logps))

    def gap(self, logps: Logps) -> Tensor | float:
        """r_w - r_l, or 1."""
        if self.offset == "constant":
            return 1.0
        if logps.rewards is None:
            raise ConfigError("offset=rewards needs a data set with rewards; choose one, or set offset=constant")
        chosen, rejected = logps.of_pairs(logps.rewards)
        return chosen - rejected


@dataclass(frozen=True)
class EXPO(PairLoss):
    """Hu et al. 2025 (arXiv 2506.07492), as we read it: Bradley-Terry of the policy itself + beta KL(pi_ref, pi_theta).

    -log sigmoid(log pi_theta(w) - log pi_theta(l)) + beta [k(Δ(w)) + k(Δ(l))] / 2 with k(Δ) = exp(Δ) - 1 - Δ. The KL
    is a sum over all responses. Its estimate from the pair is ours: unbiased for responses drawn from pi_ref, never
    negative, and least at pi_ref wherever they were drawn. Its exponential is `exp_or_tangent`.
    """

    beta: float = 0.1  # weight of the KL: towards 0 the preferences rule, towards infinity the reference

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.policy)
        log_ratio = logps.log_ratio()
        kl = sum(logps.of_pairs(exp_or_tangent(log_ratio) - 1 - log_ratio))
        return -F.logsigmoid(chosen - rejected) + 0.5 * self.beta * kl


@dataclass(frozen=True)
class SFT:
    """Maximum likelihood of the chosen response. TRL's `sft` averages over all tokens of a batch, ours per response."""

    length_normalized: bool = True  # mean over the tokens of a response instead of their sum
    unit: ClassVar[Literal["pair"]] = "pair"

    def __call__(self, logps: Logps) -> Tensor:
        chosen, _ = logps.of_pairs(logps.policy / logps.length if self.length_normalized else logps.policy)
        return -chosen
