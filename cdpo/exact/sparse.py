"""At most k numbers of the change differ from zero: supports are guessed, solved on, and improved by exchanges.

Blumensath and Davies 2009 (hard thresholding); Foucart 2011, who solves on every support. Exchanges of single numbers,
tried many at once, and of shares of a support are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cdpo.exact.descent import Function, value_and_gradient

Solver = Callable[..., Tensor]  # of a function, points and perhaps `steps`; minimises

OUT, IN = 6, 6  # numbers of the support, and beside it, that exchanges are tried with: all pairs of them
EXCHANGES = 60  # at most
SKETCH = 25  # steps that tell which exchange is best
SWAPPED, TRIED = 0.5, 80  # share of a support that is exchanged first; steps that tell whether the new one is better


def largest(x: Tensor, k: int) -> Tensor:
    """x with all but its k largest numbers set to zero. [S, n] -> [S, n]"""
    kept = torch.zeros_like(x).scatter(1, x.abs().topk(k, dim=1).indices, 1.0)
    return x * kept


def thresholded(function: Function, solve: Solver, x: Tensor, most: int) -> Tensor:
    """Solve on the supports of x; then exchange numbers, at most so often, as long as that lowers the best value.

    [S, n] -> [S, n]
    """
    x = polished(function, solve, x)
    values = function(x)
    best = int(values.argmin())
    for _ in range(most):
        tried = polished(function, partial(solve, steps=SKETCH), exchanges(function, x[best : best + 1]))
        i = int(function(tried).argmin())
        better = polished(function, solve, tried[i : i + 1])
        value = function(better)[0]
        if not value < values[best] - 1e-12 * values[best].abs():
            break
        x[best], values[best] = better[0], value
    return x


def polished(function: Function, solve: Solver, x: Tensor) -> Tensor:
    """The minimum over the numbers of x that are not zero. A mask rides along at the end of x. [S, n] -> [S, n]"""
    n = x.shape[1]

    def on_support(points: Tensor) -> Tensor:
        return function(points[:, :n] * points[:, n:].detach())

    return solve(on_support, torch.cat([x, (x != 0).to(x)], dim=1))[:, :n]


def exchanges(function: Function, x: Tensor) -> Tensor:
    """x with one small number of its support put back, and one promising number moved. [1, n] -> [OUT * IN, n]"""
    _, gradient = value_and_gradient(function, x)
    inside = torch.where(x != 0, x.abs(), torch.inf)
    outside = torch.where(x == 0, gradient.abs(), 0.0)
    leave = inside.topk(min(OUT, int((x != 0).sum())), largest=False).indices[0]
    enter = outside.topk(min(IN, int((x == 0).sum()))).indices[0]
    pairs = torch.cartesian_prod(leave, enter)
    tried = x.repeat(len(pairs), 1)
    rows = torch.arange(len(pairs))
    tried[rows, pairs[:, 0]] = 0.0
    tried[rows, pairs[:, 1]] = -1e-3 * gradient[0, pairs[:, 1]].sign()
    return tried


def swapped(function: Function, solve: Solver, x: Tensor, most: int) -> Tensor:
    """The same with few values: exchange a share of each support at once, smaller shares where that gains nothing.

    At most so often; then solve on the best supports. [S, n] -> [S, n]
    """
    tried_on = partial(solve, steps=TRIED)
    x = polished(function, tried_on, x)
    values, count = function(x), (SWAPPED * (x != 0).sum(1)).long().clamp(min=1)
    for _ in range(most):
        if not bool(count.any()):
            break
        tried = polished(function, tried_on, torch.cat([_swap(function, *one) for one in zip(x[:, None], count)]))
        now = function(tried)
        better = now < values - 1e-12 * values.abs()
        x, values = torch.where(better[:, None], tried, x), torch.where(better, now, values)
        count = torch.where(better, count, count // 2)
    return polished(function, solve, x)


def _swap(function: Function, x: Tensor, count: Tensor) -> Tensor:
    """x with so many of the smallest numbers of its support put back, and the steepest ones moved. [1, n] -> [1, n]"""
    _, gradient = value_and_gradient(function, x)
    k = int(count)
    leave = torch.where(x != 0, x.abs(), torch.inf).topk(k, largest=False).indices
    enter = torch.where(x == 0, gradient.abs(), 0.0).topk(k).indices
    moved = -1e-3 * gradient.gather(1, enter).sign()
    return x.scatter(1, leave, 0.0).scatter(1, enter, moved)
