"""What a loss is, and the only way to evaluate one. A loss sees log-probs; it knows nothing of models or config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from cdpo.batch import Logps
from cdpo.errors import NumericsError
from cdpo.losses.numerics import check_positive

SHOWN = 3  # rows that a message names


@runtime_checkable
class Loss(Protocol):
    """A frozen, pure function of log-probs: one number per pair or per Item, never reduced.

    A pair loss takes every pair as a hard label, winner over loser, and reads neither `preference` nor `weight`. It is
    finite, with a finite gradient, wherever the log-probs are. It may say more of itself, as `PairLoss` lists; what it
    does not say is false. Also optional is `least(preference)`, the least value of a pair under any policy [P], which
    `WPO` subtracts.
    """

    @property
    def unit(self) -> Literal["pair", "item"]:
        """What one number of the result belongs to."""

    def __call__(self, logps: Logps) -> Tensor:
        """[P] for a pair loss, [I] for an item loss."""


@dataclass(frozen=True)
class PairLoss:
    """What most losses of pairs share: a beta above 0, for most of them the scale of the implicit reward beta Δ."""

    beta: float = 0.1  # strength of the regulariser towards the reference
    unit: ClassVar[Literal["pair"]] = "pair"
    # for every table of logits whose log-softmax the log-probs are; a convex function of margins is, as they are linear
    convex: ClassVar[bool] = False
    # the value is no objective that its gradient descends: a factor or shift moves with the policy, without a gradient
    weights_move: ClassVar[bool] = False
    kinks: ClassVar[bool] = False  # convex with corners, where an optimum may lie and no gradient vanishes
    reads_progress: ClassVar[bool] = False  # `Logps.progress`: the objective changes from step to step
    reads_baseline: ClassVar[bool] = False  # `Logps.baseline`, None for others: it costs a wait for the device per step
    reads_rewards: ClassVar[bool] = False  # `Logps.rewards`
    reads_preference: ClassVar[bool] = False  # `Logps.preference`: has soft labels of its own, and is asked once
    reference_free: ClassVar[bool] = False  # nothing depends on `Logps.reference`
    fixed_reference: ClassVar[bool] = False  # it is J's, or what the pairs were drawn from: no other may take its place
    whole_steps: ClassVar[bool] = False  # and `Logps.weight`: a pair's number depends on all pairs of a step

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def __call__(self, logps: Logps) -> Tensor:
        """One number per pair, for hard labels, in nats; no reduction. May raise ConfigError. [P]"""
        raise NotImplementedError


def per_unit(loss: Loss, logps: Logps) -> Tensor:
    """The loss of every pair or Item, soft labels included: p * loss(winner, loser) + (1 - p) * loss(loser, winner)."""
    if loss.unit == "item" or not logps.soft or getattr(loss, "reads_preference", False):
        return loss(logps)
    won, lost = loss(logps.both_ways()).chunk(2)
    return torch.lerp(lost, won, logps.preference)


def unit_weight(loss: Loss, logps: Logps) -> Tensor:
    """Weight of each value that the loss returns: the pair's, or 1 per Item."""
    return logps.weight if loss.unit == "pair" else torch.ones(logps.items, device=logps.policy.device)


def reward_beta(loss: Any, default: float) -> float:
    """beta of the implicit reward beta * log-ratio: the loss's own, or that of the first loss within, or `default`."""
    inner = [getattr(loss, "loss", None), *getattr(loss, "losses", {}).values()]
    betas = [one.beta for one in (loss, *inner) if hasattr(one, "beta")]
    return float(betas[0]) if betas else default


def check_finite(logps: Logps) -> None:
    """Raise NumericsError, naming the first rows, if a log-prob is NaN or infinite."""
    finite = logps.policy.isfinite() & logps.reference.isfinite()
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        rows = "; ".join(describe(logps, s) for s in broken[:SHOWN]) + ("; ..." if len(broken) > SHOWN else "")
        raise NumericsError(f"{len(broken)} of {len(logps.policy)} responses have a NaN or infinite log-prob: {rows}")


def describe(logps: Logps, response: int) -> str:
    """Where a response comes from, and its log-probs."""
    item = int(logps.item[response])
    name = logps.sources[item] if logps.sources else f"item {item}"
    policy, reference = logps.policy[response].item(), logps.reference[response].item()
    return f"{name}, response row {response} (policy {policy:g}, reference {reference:g})"
