"""Losses of a pair that name the preference and the pull to the reference apart, without an implicit reward.

So they go from the Bradley-Terry policy, proportional to exp(r), to the reference as the pull's weight grows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss
from cdpo.losses.numerics import check_choice, exp_or_tangent


@dataclass(frozen=True)
class EXPO(PairLoss):
    """Hu et al. 2025 (arXiv 2506.07492): -log sigmoid(log pi(w) - log pi(l)) + beta KL(pi_ref || pi).

    The KL is that of the pair's prompt, so in the mean over pairs a prompt's KL counts as much as its pairs do.
    candidates: over all K responses of the prompt, on which both are renormalised, as the authors' code has it; that
    code divides the KL by K, so its weight is K times this beta. With K = 2 both are two coins, and the loss is, up to
    a constant, (1 + beta) times the preference loss with (p + beta q) / (1 + beta) in place of the label p, where q is
    the sigmoid of log pi_ref(w) - log pi_ref(l).
    pair (ours): [k(Δ(w)) + k(Δ(l))] / 2, k(Δ) = exp(Δ) - 1 - Δ by `exp_or_tangent`, where responses are a sample of all
    that could be written: unbiased if pi_ref wrote them, never negative, and least at pi_ref whoever did.
    """

    beta: float = 0.1  # weight of the KL: towards 0 the preferences rule, towards infinity the reference
    kl: Literal["candidates", "pair"] = "candidates"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kl", self.kl, "candidates", "pair")

    @property
    def convex(self) -> bool:  # type: ignore[override]
        """The exact KL is -sum_k pi_ref(k) log pi(k), up to a constant."""
        return self.kl == "candidates"

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.policy)
        return -F.logsigmoid(chosen - rejected) + self.beta * self.divergence(logps)

    def divergence(self, logps: Logps) -> Tensor:
        """KL(pi_ref || pi) of each pair's prompt, or its estimate from the pair, nats. [P]"""
        if self.kl == "candidates":
            own = logps if logps.base is not None else replace(logps, base=logps.reference)  # a pair: two coins
            on_item = own.renormalised()
            kl = logps.sum_by_item(-on_item.reference.exp() * on_item.log_ratio())
            return kl[logps.item[logps.pairs[:, 0]]]
        log_ratio = logps.log_ratio()
        chosen, rejected = logps.of_pairs(exp_or_tangent(log_ratio) - 1 - log_ratio)
        return (chosen + rejected) / 2


@dataclass(frozen=True)
class EXPORegression(PairLoss):
    """(P - 1)^2 + beta (P - Q)^2 with P = sigmoid(log pi(w) - log pi(l)), and Q the same of pi_ref.

    Our form of the regression that Hu et al. 2025 (arXiv 2506.07492) name beside EXPO; their formula was not at hand.
    With labels that are right with probability p its minimum is P = (p + beta Q) / (1 + beta), so EXPO's two limits
    hold, and where Q = p nothing moves.
    """

    beta: float = 0.1  # weight of the reference's own preference beside the label

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(logps.policy)
        chosen_reference, rejected_reference = logps.of_pairs(logps.reference)
        policy, reference = (chosen - rejected).sigmoid(), (chosen_reference - rejected_reference).sigmoid()
        return (rejected - chosen).sigmoid() ** 2 + self.beta * (policy - reference) ** 2
