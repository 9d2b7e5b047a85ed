"""A change of low rank as the product of two factors, for many starts at once: what an adapter can make of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """The factors of the change of one weight [rows, columns]: scaling * B A, or its transpose, as peft has them.

    S starts lie in S rows of numbers: A, then B.
    """

    shape: tuple[int, int]  # of the weight
    rank: int
    scaling: float
    transposed: bool = False  # of embeddings, and of layers that keep their weight transposed

    @property
    def size(self) -> int:
        """Numbers of both factors."""
        return self.rank * sum(self.shape)

    @property
    def width(self) -> int:
        """Columns of A; those of the weight, or its rows."""
        return self.shape[0 if self.transposed else 1]

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B. [S, size] -> [S, rank, width], [S, rest, rank]"""
        wide, tall = x.split([self.rank * self.width, self.rank * (sum(self.shape) - self.width)], dim=1)
        return wide.view(-1, self.rank, self.width), tall.view(-1, sum(self.shape) - self.width, self.rank)

    def change(self, x: Tensor) -> Tensor:
        """[S, size] -> [S, numbers of the weight]"""
        wide, tall = self.factors(x)
        product = tall @ wide
        return self.scaling * (product.mT if self.transposed else product).flatten(1)

    def nearest(self, change: Tensor) -> Tensor:
        """Factors of equal size whose product is nearest to a change. [S, numbers of the weight] -> [S, size]"""
        u, s, v = torch.linalg.svd(change.view(-1, *self.shape), full_matrices=False)
        rank = min(self.rank, s.shape[1])
        root = (s[:, :rank] / self.scaling).sqrt()
        left, right = u[:, :, :rank].mT * root[:, :, None], v[:, :rank] * root[:, :, None]
        wide, tall = (left, right.mT) if self.transposed else (right, left.mT)
        extra = self.rank - rank  # a rank beyond the weight's own: those factors stay zero
        wide, tall = torch.nn.functional.pad(wide, (0, 0, 0, extra)), torch.nn.functional.pad(tall, (0, extra))
        return torch.cat([wide.flatten(1), tall.flatten(1)], dim=1)
