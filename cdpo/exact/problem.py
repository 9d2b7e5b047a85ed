"""A loss on a table of logits as one function of the change, for many starts at once.

Knows the table, the loss and what is added to it; nothing of sets, steps or files. All numbers are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cdpo.batch import Batch, Logps
from cdpo.losses.loss import Loss, per_unit, unit_weight


@dataclass(frozen=True)
class Table:
    """A policy that is a table of C contexts by V symbols, [C, V], at its start, and one batch of all the data.

    With features the logits are fixed + features @ table, and the table has a row per feature. S starts at once are S
    copies of the data, whose Items are numbered on: so a loss needs to know nothing of them.
    """

    start: Tensor  # [C, V]; of the reference
    batch: Batch
    fixed: Tensor | float = 0.0  # [contexts, V]; logits beside those of the features
    features: Tensor | None = None  # [contexts, C]; None: the table holds the logits themselves
    copies: dict[int, Logps] = field(default_factory=dict, compare=False)  # of the data, by their number

    @property
    def size(self) -> int:
        """Numbers in the table."""
        return self.start.numel()

    def policy(self, change: Tensor) -> Tensor:
        """log pi(y|x) of all responses, in nats. [S, C * V] -> [S, responses]"""
        tokens = self.logits(change).log_softmax(-1)
        picked = tokens[:, self.context(), self.batch.target]
        if self.one_token:
            return picked
        owner = torch.repeat_interleave(self.batch.length)
        return picked.new_zeros(len(picked), len(self.batch.length)).index_add(1, owner, picked)

    def logits(self, change: Tensor) -> Tensor:
        """Of every next token, after every context. [S, C * V] -> [S, contexts, V]"""
        table = self.start + change.view(-1, *self.start.shape)
        return table if self.features is None else self.fixed + self.features @ table

    @property
    def one_token(self) -> bool:
        """Whether every response is one token, so that margins are linear in the table: the normaliser cancels."""
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

    def kl(self, change: Tensor) -> Tensor:
        """Mean KL to the reference over the Items, each on its candidates, nats. [S, C * V] -> [S]"""
        return self.logps(change).candidate_kl().view(len(change), -1).mean(1)

    def logps(self, change: Tensor) -> Logps:
        """What a loss is given of S policies, as S copies of the data; training is over, so progress is 1."""
        policy, copies = self.policy(change), self.copies
        if len(policy) not in copies:
            one = self.batch.logps(self.batch.reference, progress=1.0, baseline=None)
            copies[len(policy)] = Logps.joined([one] * len(policy))
        return replace(copies[len(policy)], policy=policy.flatten())


@dataclass(frozen=True)
class Objective:
    """f(x) for S points at once: the mean of a loss over the data, with what is added to it, on a table.

    x are the numbers that are trained: the change of the table itself, or the factors of one of rank `rank`.
    """

    table: Table
    loss: Loss
    rank: int | None = None  # of the change; None: the change is free
    scaling: float = 1.0  # of the product of the factors
    decay: float = 0.0  # decay / 2 * ||trained numbers||^2: of the table, or of its factors
    pull: float = 0.0  # pull / 2 * ||change||^2

    def change(self, x: Tensor) -> Tensor:
        """theta - theta_0. [S, n] -> [S, C * V]"""
        if self.rank is None:
            return x
        wide, tall = self.factors(x)
        return self.scaling * (tall @ wide).mT.flatten(1)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the adapter, as peft has them for an embedding. [S, n] -> [S, r, C], [S, V, r]"""
        contexts, symbols = self.table.start.shape
        assert self.rank is not None
        wide, tall = x.split([self.rank * contexts, symbols * self.rank], dim=1)
        return wide.view(-1, self.rank, contexts), tall.view(-1, symbols, self.rank)

    def factorised(self, change: Tensor) -> Tensor:
        """x whose change is the nearest of this rank, factors of equal size. [S, C * V] -> [S, n]"""
        if self.rank is None:
            return change
        u, s, v = torch.linalg.svd(change.view(-1, *self.table.start.shape), full_matrices=False)
        rank = min(self.rank, s.shape[1])
        root = (s[:, :rank] / self.scaling).sqrt()
        wide, tall = root[:, :, None] * u[:, :, :rank].mT, v[:, :rank].mT * root[:, None]
        extra = self.rank - rank  # a rank beyond the table's own: those factors stay zero
        wide, tall = (torch.nn.functional.pad(wide, (0, 0, 0, extra)), torch.nn.functional.pad(tall, (0, extra)))
        return torch.cat([wide.flatten(1), tall.flatten(1)], dim=1)

    def moved(self, x: Tensor) -> Tensor:
        """Which numbers of points that begin with x can change the loss at all. [S, m] -> [m]"""
        used = self.table.used()[:, None].expand_as(self.table.start)
        if self.rank is not None:
            used = torch.cat([self.table.used().repeat(self.rank), torch.ones(self.size - self.rank * len(used))])
        return torch.nn.functional.pad(used.flatten() > 0, (0, x.shape[1] - self.size))

    @property
    def size(self) -> int:
        """Numbers of x."""
        return self.table.size if self.rank is None else self.rank * sum(self.table.start.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """f at every point. [S, n] -> [S]"""
        change = self.change(x)
        total = self.shares(change).sum(1)
        if self.decay:
            trained = x if self.rank is not None else self.table.start.flatten() + x
            total = total + self.decay / 2 * trained.square().sum(1)
        return total + self.pull / 2 * change.square().sum(1) if self.pull else total

    def shares(self, change: Tensor) -> Tensor:
        """What each pair or Item adds to the mean of the loss. [S, C * V] -> [S, units]"""
        logps = self.table.logps(change)
        value, weight = per_unit(self.loss, logps), unit_weight(self.loss, logps)
        value, weight = (one.view(len(change), -1) for one in (value, weight))
        return value * weight / weight[0].sum()

    def free(self) -> Objective:
        """The same without a rank and without what is added to the loss."""
        return replace(self, rank=None, decay=0.0, pull=0.0)


def norms(x: Tensor) -> Tensor:
    """[S, n] -> [S]"""
    return torch.linalg.vector_norm(x, dim=1)
