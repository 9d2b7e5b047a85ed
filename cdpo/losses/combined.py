"""Losses made of other pair losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import Loss
from cdpo.losses.numerics import EXP_BOUND, check_choice


def _of_any(name: str) -> property:
    return property(lambda self: any(getattr(part, name, False) for part in self.parts), doc="Whether a part's is.")


class Combined:
    """What a loss made of others says of itself (`PairLoss` lists it): what any of its parts does."""

    parts: Iterable[Loss]
    unit: ClassVar[Literal["pair"]] = "pair"
    weights_move: ClassVar[Any] = _of_any("weights_move")
    kinks: ClassVar[Any] = _of_any("kinks")
    reads_progress: ClassVar[Any] = _of_any("reads_progress")
    reads_baseline: ClassVar[Any] = _of_any("reads_baseline")
    reads_rewards: ClassVar[Any] = _of_any("reads_rewards")
    fixed_reference: ClassVar[Any] = _of_any("fixed_reference")

    @property
    def reference_free(self) -> bool:
        """Whether all parts are."""
        return all(getattr(part, "reference_free", False) for part in self.parts)


@dataclass(frozen=True)
class WPO(Combined):
    """Any pair loss, weighted by how likely the policy is to write the pair; no gradient flows through the weight.

    Zhou et al. 2024 (arXiv 2406.11827), the weight before their alignment step. TRL's `use_weighting` is aligned:
    it divides each token's probability by sum_v pi(v)^2, which needs the logits of every token.

    The weight depends on the policy, so the value would also fall where probability leaves pairs with uncertain labels.
    So the least value that any policy reaches (`least` of the loss within, where it has one; for DPO the entropy of the
    label) is subtracted, which has no gradient: 0 then means that every pair the policy writes is fitted.
    """

    loss: Loss  # the pair loss
    # per_token: product of the mean token probabilities (geometric); importance: product of pi_theta / pi_ref, at most
    # exp(30), which moves pairs that were drawn from the reference onto the policy; candidates: product of the policy's
    # probabilities over those of `drawn`, renormalised on each Item's responses: pairs as if the policy drew them
    weight: Literal["per_token", "importance", "candidates"] = "per_token"
    # for candidates: where the pairs were drawn from; uniform for data in which every pair of responses stands
    drawn: Literal["reference", "uniform"] | None = None
    convex: ClassVar[bool] = False
    weights_move: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_pair_loss("loss", self.loss)
        check_choice("weight", self.weight, "per_token", "importance", "candidates")
        if self.weight == "candidates":
            check_choice("drawn", self.drawn, "reference", "uniform")
        elif self.drawn is not None:
            raise ValueError(f"drawn={self.drawn} is not used with weight={self.weight}; set drawn=null")

    def __call__(self, logps: Logps) -> Tensor:
        chosen, rejected = logps.of_pairs(self.log_weight(logps).detach())
        least = self.loss.least(logps.preference) if hasattr(self.loss, "least") else 0.0
        return (chosen + rejected).clamp(max=EXP_BOUND).exp() * (self.loss(logps) - least)

    @property
    def parts(self) -> Iterable[Loss]:  # type: ignore[override]
        """The loss within."""
        return (self.loss,)

    @property
    def fixed_reference(self) -> bool:  # type: ignore[override]
        """Where the weight is by what drew the pairs, or that of the loss within is."""
        return self.weight == "importance" or self.drawn == "reference" or super().fixed_reference

    @property
    def reference_free(self) -> bool:
        """Whether neither the weight nor the loss within reads it."""
        return not self.fixed_reference and super().reference_free

    def log_weight(self, logps: Logps) -> Tensor:
        """Logarithm of a response's factor of the weight. [S]"""
        if self.weight == "per_token":
            return logps.policy / logps.length
        if self.weight == "importance":
            return logps.log_ratio()
        on_item = logps.renormalised()
        if self.drawn == "reference":
            return on_item.log_ratio()
        responses = logps.sum_by_item(torch.ones_like(logps.reference))  # K
        return on_item.policy + responses.log()[logps.item]


@dataclass(frozen=True)
class Sum(Combined):
    """A weighted sum of named pair losses, for example DPO with SFT on the chosen response."""

    losses: dict[str, Loss]  # name -> pair loss
    weights: dict[str, float]  # name -> weight, at least 0; the same names

    def __post_init__(self) -> None:
        if not self.losses or set(self.losses) != set(self.weights):
            raise ValueError(
                f"losses {sorted(self.losses)} and weights {sorted(self.weights)} must have the same names"
            )
        for name, loss in self.losses.items():
            check_pair_loss(f"losses.{name}", loss)
            if not 0 <= self.weights[name] < math.inf:
                raise ValueError(f"weights.{name}={self.weights[name]} must be a finite number, at least 0")

    @property
    def parts(self) -> Iterable[Loss]:  # type: ignore[override]
        """The losses."""
        return self.losses.values()

    @property
    def convex(self) -> bool:
        """Whether all parts are, as no weight is negative."""
        return all(getattr(part, "convex", False) for part in self.parts)

    def __call__(self, logps: Logps) -> Tensor:
        return sum((self.weights[name] * loss(logps) for name, loss in self.losses.items()), logps.policy.new_zeros(()))


def check_pair_loss(name: str, loss: Loss) -> None:
    """Raise ValueError unless `loss` gives one number per pair, whatever the others are."""
    if getattr(loss, "whole_steps", False):
        raise ValueError(f"{name} must be a loss of single pairs; {type(loss).__name__} is one of all pairs of a step")
    if loss.unit != "pair":
        raise ValueError(f"{name} must be a loss of pairs; {type(loss).__name__} is one of {loss.unit}s")
