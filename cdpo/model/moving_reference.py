"""The reference that a loss reads, where it follows the policy: TR-DPO of Gorbatovski et al. 2024 (arXiv 2404.09656).

The problem keeps the reference that training began with: J, every KL, constraints and evaluations read that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cdpo.batch import Item, Logps
from cdpo.model.change import Change
from cdpo.system.ranks import sharded_like


@dataclass
class MovingReference:
    """What a loss reads in place of the first reference, once it has been moved."""

    change: Change  # of the policy
    mixture: float  # share of the policy's weights in it; the rest is the reference before
    log_probs: dict[int, Tensor] = field(default_factory=dict)  # Item -> [K] nats, as far as read; empty: never moved
    weights: dict[str, Tensor] = field(default_factory=dict)  # the trained ones; none where it is a copy of the policy

    def read(self, logps: Logps, indices: Sequence[int], baseline: float) -> Logps:
        """What the loss is given of these Items; `baseline` is the mean log-ratio since the reference was moved."""
        if not self.log_probs:
            return logps
        reference = torch.cat([self.log_probs[i] for i in indices])
        return logps.with_reference(reference.to(logps.reference.device, non_blocking=True), baseline)

    def move(self, items: Sequence[int], score: Callable[[], list[Tensor]]) -> None:
        """reference <- mixture * policy + (1 - mixture) * reference, then `score` these Items with it.

        Nothing is changed where `score` raises. A mixture of plain weights only: that of adapters has twice their rank.
        """
        weights = self._mixed() if self.mixture < 1 else {}
        with self.change.at(weights):
            found = score()
        self.weights, self.log_probs = weights, dict(zip(items, found))

    @torch.no_grad()
    def _mixed(self) -> dict[str, Tensor]:
        plain = self.change.plain()
        return {name: torch.lerp(self.weights.get(name, start), now, self.mixture) for name, now, start in plain}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs; nothing where it was never moved."""
        if not self.log_probs:
            return {}
        values = torch.cat(list(self.log_probs.values()))
        return {"items": list(self.log_probs), "log_probs": values, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any], items: Sequence[Item]) -> None:
        """Restore what `state_dict` returned, of a run on these Items."""
        if state:
            sizes = [len(items[i].responses) for i in state["items"]]
            self.log_probs = dict(zip(state["items"], state["log_probs"].split(sizes)))
            saved = state["weights"]
            plain = [(name, parameter) for name, parameter, _ in self.change.plain() if name in saved]
            self.weights = {name: sharded_like(saved[name], p).to(p.device) for name, p in plain}
