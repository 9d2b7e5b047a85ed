"""A loss on a policy as one function of the change, for many starts at once; and the policy that is a table of logits.

Knows the policy, the loss and what is added to it; nothing of sets, steps or files. All numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cdpo.exact.policy import Policy
from cdpo.exact.products import Product
from cdpo.losses.loss import Loss, per_unit, unit_weight


@dataclass(frozen=True)
class Table(Policy):
    """A policy that is a table of C contexts by V symbols: its start is [C, V].

    With features the logits are fixed + features @ table, and the table has a row per feature.
    """

    fixed: Tensor | float = 0.0  # [contexts, V]; logits beside those of the features
    features: Tensor | None = None  # [contexts, C]; None: the table holds the logits themselves

    quick = True

    def policy(self, change: Tensor) -> Tensor:
        """log pi(y|x) of all responses, in nats. [S, C * V] -> [S, responses]"""
        tokens = self.logits(change).log_softmax(-1)
        picked = tokens[:, self.context(), self.batch.target]
        if self.linear:
            return picked
        owner = torch.repeat_interleave(self.batch.length)
        return picked.new_zeros(len(picked), len(self.batch.length)).index_add(1, owner, picked)

    def logits(self, change: Tensor) -> Tensor:
        """Of every next token, after every context. [S, C * V] -> [S, contexts, V]"""
        table = self.start + change.view(-1, *self.start.shape)
        return table if self.features is None else self.fixed + self.features @ table

    @property
    def linear(self) -> bool:
        """Whether every response is one token, so that the normaliser cancels in margins."""
        return bool((self.batch.length == 1).all())

    def context(self) -> Tensor:
        """The token that every response token comes after. [N]"""
        return self.batch.input_ids.flatten()[self.batch.predict_at][self.batch.position]

    def placed(self, values: Tensor) -> Tensor | None:
        """The least change that adds these numbers to the logits of responses of one token. [responses] -> [C * V]

        With features up to a constant per Item, which no policy knows; None where no change does.
        """
        if self.features is not None:
            item, ones = self.batch.item, torch.ones_like(values)
            sums, sizes = (one.new_zeros(len(self.batch.sources)).index_add(0, item, one) for one in (values, ones))
            values = values - (sums / sizes)[item]
        logits = torch.zeros_like(self.logits(self.start.new_zeros(1, self.size))[0])
        logits = logits.index_put((self.context(), self.batch.target), values.double())
        if self.features is None:
            return logits.flatten()
        change = torch.linalg.pinv(self.features) @ logits
        return change.flatten() if torch.allclose(self.features @ change, logits, rtol=0.0, atol=1e-12) else None

    def used(self) -> Tensor:
        """1 for rows of the table that the data come to, else 0. [C]"""
        if self.features is not None:
            return (self.features[self.context()] != 0).any(0).to(self.start)
        return torch.zeros_like(self.start[:, 0]).index_fill(0, self.context(), 1.0)

    def products(self, rank: int, scaling: float) -> tuple[Product, ...]:
        rows, columns = self.start.shape
        return (Product((rows, columns), rank, scaling, transposed=True),)

    def moved(self, products: Sequence[Product]) -> Tensor:
        """All but those of rows that no data come to."""
        if not products:
            return self.used().repeat_interleave(self.start.shape[1]) > 0
        return torch.cat([self.used().repeat(products[0].rank), torch.ones(products[0].rank * self.start.shape[1])]) > 0

    def spread(self, drawn: Tensor) -> Tensor:
        """Without what changes no probability."""
        table = drawn.view(-1, *self.start.shape) * self.used()[:, None]
        return (table - table.mean(-1, keepdim=True)).flatten(1)

    def spread_factors(self, drawn: Tensor, products: Sequence[Product]) -> Tensor:
        wide, tall = products[0].factors(drawn)
        wide, tall = wide * self.used(), tall - tall.mean(1, keepdim=True)
        return torch.cat([wide.flatten(1), tall.flatten(1)], dim=1)


@dataclass(frozen=True)
class Objective:
    """f(x) for S points at once: the mean of a loss over the data, with what is added to it, of a policy.

    x are the numbers that are trained: the change of the policy itself, or the factors of one of rank `rank`.
    """

    policy: Policy
    loss: Loss
    rank: int | None = None  # of the change; None: the change is free
    scaling: float = 1.0  # of the product of the factors
    decay: float = 0.0  # decay / 2 * ||trained numbers||^2: of matrices, or of their factors
    vector_decay: float = 0.0  # the same of all else
    pull: float = 0.0  # pull / 2 * ||change||^2

    @property
    def table(self) -> Table:
        """The policy, where it is one."""
        assert isinstance(self.policy, Table)
        return self.policy

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """The factors of each weight; none where the change is free."""
        return () if self.rank is None else self.policy.products(self.rank, self.scaling)

    def change(self, x: Tensor) -> Tensor:
        """theta - theta_0. [S, n] -> [S, numbers]"""
        if not self.products:
            return x
        parts = x.split([one.size for one in self.products], dim=1)
        return torch.cat([one.change(part) for one, part in zip(self.products, parts)], dim=1)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the adapter of a table. [S, n] -> [S, r, C], [S, V, r]"""
        return self.products[0].factors(x)

    def factorised(self, change: Tensor) -> Tensor:
        """x whose change is the nearest of this rank, factors of equal size. [S, numbers] -> [S, n]"""
        if not self.products:
            return change
        parts = change.split([math.prod(one.shape) for one in self.products], dim=1)
        return torch.cat([one.nearest(part) for one, part in zip(self.products, parts)], dim=1)

    def spread(self, drawn: Tensor, size: float) -> Tensor:
        """Draws from the normal distribution as points to begin from, whose changes have about this size.

        [S, n] -> [S, n]
        """
        if self.rank is None:
            return size * self.policy.spread(drawn)
        return self.policy.spread_factors(drawn * (size / self.scaling) ** 0.5 / 2, self.products)

    def moved(self) -> Tensor:
        """Which numbers of x can change the loss at all. [n]"""
        return self.policy.moved(self.products)

    @property
    def size(self) -> int:
        """Numbers of x."""
        return sum(one.size for one in self.products) if self.products else self.policy.size

    def __call__(self, x: Tensor) -> Tensor:
        """f at every point. [S, n] -> [S]"""
        change = self.change(x)
        total = self.shares(change).sum(1)
        if self.decay or self.vector_decay:
            trained = x if self.products else self.policy.start.flatten() + x
            matrices = (self.policy.matrices | bool(self.products)).double()
            strength = self.decay * matrices + self.vector_decay * (1 - matrices)
            total = total + (strength / 2 * trained.square()).sum(1)
        return total + self.pull / 2 * change.square().sum(1) if self.pull else total

    def shares(self, change: Tensor) -> Tensor:
        """What each pair or Item adds to the mean of the loss. [S, numbers] -> [S, units]"""
        logps = self.policy.logps(change)
        value, weight = per_unit(self.loss, logps), unit_weight(self.loss, logps)
        value, weight = (one.view(len(change), -1) for one in (value, weight))
        return value * weight / weight[0].sum()

    def free(self) -> Objective:
        """The same without a rank and without what is added to the loss."""
        return Objective(self.policy, self.loss)


def norms(x: Tensor) -> Tensor:
    """[S, n] -> [S]"""
    return torch.linalg.vector_norm(x, dim=1)
