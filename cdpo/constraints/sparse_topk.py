"""Sparse updates: most weights keep the value that they started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.lora import LoRA
from cdpo.constraints.projection import Projection

if TYPE_CHECKING:
    from cdpo.model.gradient import Gradient


@dataclass
class SparseTopK(Projection):
    """After every step, at most k of all trained weights differ from where they started: the k that moved furthest.

    Blumensath and Davies 2009, iterative hard thresholding. Among ties it keeps some. It needs one temporary copy
    of the trained weights.
    """

    k: int | None = None  # how many weights may differ
    fraction: float | None = None  # or their share of the trained weights, rounded down, at least one

    not_with_fsdp = "the largest of all changes must be looked for in one tensor; use trainer.distributed=ddp"

    def __post_init__(self) -> None:
        if (self.k is None) == (self.fraction is None):
            raise ValueError("set either k or fraction")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k}; at least one weight has to move")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction}; choose it in (0, 1]")

    def conflict(self, other: Constraint) -> str:
        return (
            "a low-rank change with most weights put back is no longer of low rank" if isinstance(other, LoRA) else ""
        )

    def allowed(self, trained: int) -> int:
        """How many of so many weights may differ from their start."""
        return self.k or max(1, int((self.fraction or 1.0) * trained))

    def hold(self, gradient: Gradient) -> None:
        """What weights outside a full support may not do; `cdpo.training.swap` looks at other supports."""
        if self.full(gradient):
            gradient.keep(lambda _, delta: delta != 0)

    def full(self, gradient: Gradient) -> bool:
        """Whether as many weights have moved as may."""
        deltas = [delta for _, delta in gradient.change.deltas()]
        return sum(int(delta.count_nonzero()) for delta in deltas) >= self.allowed(sum(d.numel() for d in deltas))

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        moved = torch.cat([delta.abs().flatten() for _, delta in self.change.deltas()])
        allowed = self.allowed(len(moved))
        if self.record(allowed - int(moved.count_nonzero())):
            kept = torch.zeros_like(moved, dtype=torch.bool)
            kept[moved.topk(allowed, sorted=False).indices] = True
            self._put_back(kept)

    def _put_back(self, kept: Tensor) -> None:
        plain = list(self.change.plain())
        for mask, (_, parameter, start) in zip(kept.split([start.numel() for _, _, start in plain]), plain):
            parameter.copy_(parameter.where(mask.view_as(start), start))
