"""What a model does to the logits that its head makes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitTransform(NamedTuple):
    """What a model does to the logits of its head: cap * tanh(logit * scale / cap), without cap logit * scale."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """In place."""
        logits = logits if self.scale == 1 else logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)


UNCHANGED = LogitTransform()
