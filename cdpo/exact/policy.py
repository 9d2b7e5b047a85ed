"""What a search knows of a policy: log-probs of all the data as a function of the numbers that can change.

S starts at once are S copies of the data, whose Items are numbered on: so a loss needs to know nothing of them. All
numbers are float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from cdpo.batch import Batch, Logps
from cdpo.exact.products import Product


@dataclass(frozen=True)
class Policy(ABC):
    """A policy by the n numbers of its weights that can change, and one batch of all the data."""

    start: Tensor  # the reference's numbers, in any shape
    batch: Batch
    copies: dict[int, Logps] = field(default_factory=dict, compare=False, kw_only=True)  # of the data, by their number

    #: whether it can be asked thousands of times, and for Hessians
    quick: ClassVar[bool]

    @property
    def size(self) -> int:
        """Numbers that can change."""
        return self.start.numel()

    @property
    @abstractmethod
    def linear(self) -> bool:
        """Whether margins are linear in these numbers, and each response reads a row of its prompt's own."""

    @property
    def matrices(self) -> Tensor:
        """Which numbers are those of matrices. [n] or []"""
        return torch.tensor(True)

    @abstractmethod
    def policy(self, change: Tensor) -> Tensor:
        """log pi(y|x) of all responses, in nats. [S, n] -> [S, responses]"""

    @abstractmethod
    def products(self, rank: int, scaling: float) -> tuple[Product, ...]:
        """Factors of a change of this rank, in the order of the numbers."""

    def moved(self, products: Sequence[Product]) -> Tensor:
        """Which of the numbers, or of the factors' if there are any, can change the loss at all. [n]"""
        return torch.ones(sum(one.size for one in products) or self.size, dtype=torch.bool)

    @abstractmethod
    def spread(self, drawn: Tensor) -> Tensor:
        """Numbers that were drawn as changes to begin from. [S, n] -> [S, n]"""

    @abstractmethod
    def spread_factors(self, drawn: Tensor, products: Sequence[Product]) -> Tensor:
        """The same of factors. [S, m] -> [S, m]"""

    def kl(self, change: Tensor) -> Tensor:
        """Mean KL to the reference over the Items, each on its candidates, nats. [S, n] -> [S]"""
        return self.logps(change).candidate_kl().view(len(change), -1).mean(1)

    def logps(self, change: Tensor) -> Logps:
        """What a loss is given of S policies, as S copies of the data; training is over, so progress is 1."""
        policy, copies = self.policy(change), self.copies
        if len(policy) not in copies:
            one = self.batch.logps(self.batch.reference, progress=1.0, baseline=None)
            copies[len(policy)] = Logps.joined([one] * len(policy))
        return replace(copies[len(policy)], policy=policy.flatten())
