"""What a run's constraints mean for its optimum: a rank, sets, budgets, penalties. One place that knows them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.constraint import Constraint
from cdpo.constraints.freeze import Freeze
from cdpo.constraints.kl_budget import KLBudget
from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.linf_ball import LinfBall
from cdpo.constraints.lora import LoRA
from cdpo.constraints.sparse_topk import SparseTopK
from cdpo.constraints.weight_decay import WeightDecay
from cdpo.errors import ConfigError

BISECTIONS = 100
AT, OUTSIDE = 1e-9, 1.5  # share of a size within which it is at its limit; times that limit is well beyond it


@dataclass
class Setting:
    """The set that the change of a policy must lie in, and what is added to the loss. The defaults restrict nothing."""

    rank: int | None = None
    scaling: float = 1.0
    radius: float | None = None  # of the L2 ball
    box: float | None = None  # of the L-infinity ball
    k: int | None = None  # numbers that may differ
    budget: float | None = None  # of the KL, in nats per Item
    decay: float = 0.0  # of matrices and of factors
    vector_decay: float = 0.0  # of biases and norms
    pull: float = 0.0

    @property
    def convex(self) -> bool:
        """Whether the set is; a KL budget is not, in logits."""
        return self.rank is None and self.k is None and self.budget is None

    @property
    def bounded(self) -> bool:
        """Whether a set or a penalty of the weights keeps the optimum from infinity."""
        return self.radius is not None or self.box is not None or self.decay > 0 or self.pull > 0

    def project(self, change: Tensor) -> Tensor:
        """The nearest change in ball and box. [S, n] -> [S, n]"""
        if self.radius is None or self.rank is not None:
            return change if self.box is None else change.clamp(-self.box, self.box)
        if self.box is None:
            return change * (self.radius / torch.linalg.vector_norm(change, dim=1, keepdim=True)).clamp(max=1.0)
        return _in_ball_and_box(change, self.radius, self.box)

    def beyond(self, change: Tensor) -> Tensor:
        """Points that `project` brings to these, of which it holds what lies at the boundary. [S, n] -> [S, n]"""
        size = change.abs() if self.box is not None else torch.linalg.vector_norm(change, dim=1, keepdim=True)
        limit = self.radius if self.box is None else self.box
        return torch.where(size >= (1 - AT) * (limit or torch.inf), OUTSIDE * change, change)


def _in_ball_and_box(change: Tensor, radius: float, box: float) -> Tensor:
    """The nearest point of both is clamp(share * change) for the largest share in [0, 1] that fits. [S, n] -> [S, n]"""
    low, high = torch.zeros_like(change[:, :1]), torch.ones_like(change[:, :1])
    fits = torch.linalg.vector_norm(change.clamp(-box, box), dim=1, keepdim=True) <= radius
    low = torch.where(fits, 1.0, low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = torch.linalg.vector_norm((middle * change).clamp(-box, box), dim=1, keepdim=True) <= radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (low * change).clamp(-box, box)


def setting_of(constraints: Mapping[str, Constraint], size: int) -> Setting:
    """What these constraints mean for a policy of which `size` numbers are trained.

    Raises ConfigError, by name, where one has no set of policies, or no solver here knows it.
    """
    found = Setting()
    for name, constraint in constraints.items():
        for key, value in _meaning(name, constraint, size):
            before = getattr(found, key)
            setattr(found, key, value if before == getattr(Setting(), key) else _both(key, before, value))
    _check(found)
    return found


def _meaning(name: str, constraint: Constraint, size: int) -> Iterator[tuple[str, float]]:
    match constraint:
        case LoRA(dora=False, dropout=0.0):
            yield "rank", constraint.rank
            yield "scaling", constraint.scaling
        case L2Ball():
            yield "radius", constraint.radius
        case LinfBall():
            yield "box", constraint.radius
        case SparseTopK():
            yield "k", constraint.allowed(size)
        case KLBudget():
            yield "budget", constraint.budget
        case WeightDecay():
            yield "decay", constraint.strength
            yield "vector_decay", 0.0 if constraint.matrices_only else constraint.strength
        case L2ToStart():
            yield "pull", constraint.strength
        case Freeze() | BiasOnly():  # fewer numbers change, and these alone are looked at
            pass
        case _:
            reason = constraint.no_optimum or "no solver here knows it"
            raise ConfigError(f"optimizer=exact with constraint={name}: {reason}; use optimizer=adamw")


def _both(key: str, one: float, other: float) -> float:
    """Two constraints of one kind: penalties add, of sets the smaller counts."""
    return one + other if key in ("decay", "vector_decay", "pull") else min(one, other)


def _check(setting: Setting) -> None:
    """ConfigError for what no solver here does together."""
    if setting.k is not None and (setting.budget or setting.radius or setting.box):
        raise ConfigError("optimizer=exact has no solver for sparse_topk with another set; use optimizer=sgd")
