"""Starts of a change of low rank, brought into better valleys: its rows are chosen anew, each the best for itself.

A change of rank r gives every row of the table r numbers, which say how far it goes along directions that all rows
share. With the directions held, a row's part of the loss is its own. So descent, which moves a row downhill only, takes
turns with a scan of many values for each number, of all rows and all starts at once (ours).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdpo.exact.problem import Objective

SIZES = (0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0, 30.0)  # of the rows' median
SCANNED = (0.0, *(sign * size for size in SIZES for sign in (1, -1)))
STAGES = ((None, 25), (None, 25), (24, 60), (24, 60), (24, 60))  # how many of the best starts (None: all), steps


def explored(objective: Objective, solve: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Where starts come to, the more promising ones in more stages, between which rows are scanned. [S, n] -> [S, n]

    `solve` minimises from given points in so many steps.
    """
    for i, (most, steps) in enumerate(STAGES):
        at = objective(x).topk(min(most or len(x), len(x)), largest=False).indices
        y = solve(objective, x[at], steps)
        x = x.index_copy(0, at, scanned(objective, y) if i + 1 < len(STAGES) else y)
    return x


def scanned(objective: Objective, x: Tensor) -> Tensor:
    """x with the numbers of every row chosen from a few, where that lowers the objective. [S, n] -> [S, n]"""
    found = x
    for k in range(objective.rank or 0):
        found = _scanned(objective, found, k)
    return torch.where((objective(found) < objective(x))[:, None], found, x)


def _scanned(objective: Objective, x: Tensor, k: int) -> Tensor:
    """The same for the k-th number of each row."""
    wide, tall = objective.factors(x)
    median = wide[:, k, objective.table.used() > 0].abs().median(1, keepdim=True).values
    best, chosen = by_row(objective, x), wide[:, k]
    for share in SCANNED:
        tried = (share * median).expand_as(chosen)
        value = by_row(objective, _joined(wide, k, tried, tall))
        lower = value < best
        best, chosen = torch.where(lower, value, best), torch.where(lower, tried, chosen)
    return _joined(wide, k, chosen, tall)


def by_row(objective: Objective, x: Tensor) -> Tensor:
    """What each row of the table adds to the objective, for responses of one token, each of which reads one row.

    Of a loss whose pairs know nothing of each other, and directions that are held, it depends on the row's numbers
    alone. [S, n] -> [S, C]
    """
    change, batch, c = objective.change(x), objective.table.batch, len(objective.table.start)
    shares = objective.shares(change)
    row = torch.zeros(len(batch.sources), dtype=torch.long).index_copy(0, batch.item, objective.table.context())
    row = row if objective.loss.unit == "item" else row[batch.item[batch.pairs[:, 0]]]
    wide, _ = objective.factors(x)
    decayed, pulled = wide.square().sum(1), change.view(len(x), c, -1).square().sum(2)
    return (objective.decay / 2 * decayed + objective.pull / 2 * pulled).index_add(1, row, shares)


def _joined(wide: Tensor, k: int, row: Tensor, tall: Tensor) -> Tensor:
    """The factors with the k-th row of the first one replaced, as a point."""
    others = wide.index_copy(1, torch.tensor([k]), row[:, None])
    return torch.cat([others.flatten(1), tall.flatten(1)], dim=1)
