"""Would another support of a sparse change do better? What a gradient within the support cannot tell.

One exchange is tried, of the two weights that first suggest themselves (ours): that which moved least goes back to its
start, and that with the largest gradient of those outside moves: as far, then to the lowest point of the parabola
through both values. Other weights stay, so an optimum gains nothing; that nothing is gained proves no optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.sparse_topk import SparseTopK
from cdpo.model.gradient import Gradient
from cdpo.training.run import Run


class Number(NamedTuple):
    """One number of a parameter."""

    values: Tensor  # all of the parameter, flat
    at: int
    start: float

    @contextmanager
    def moved(self, by: float) -> Iterator[None]:
        """Within the block it is so far from where it started."""
        before = self.values[self.at].clone()
        self.values[self.at] = self.start + by
        try:
            yield
        finally:
            self.values[self.at] = before


@torch.no_grad()
def gained_by_swap(run: Run, gradient: Gradient, objective: Callable[[], float]) -> float | None:
    """What the exchange gains, as a share of the objective's fall since the start; 0 if it loses.

    None unless one constraint holds the change sparse and no other forbids any policy, its support is full but not all
    there is, the loss's values rank policies, and the objective has fallen. Needs the objective's gradient on the
    parameters, and five of its values.
    """
    sets = [one for one in run.constraints.values() if forbids(one)]
    if len(sets) != 1 or not isinstance(sets[0], SparseTopK) or getattr(run.loss, "weights_move", False):
        return None
    found = exchange(run) if sets[0].full(gradient) else None
    if found is None:
        return None
    leaves, enters, slope = found
    step, down = abs(float(leaves.values[leaves.at]) - leaves.start), math.copysign(1.0, -slope)
    here = objective()
    with run.change.at_start():
        fall = objective() - here
    with leaves.moved(0.0):
        without = objective()
        with enters.moved(down * step):
            first = objective()
        curvature = 2 * (first - without + abs(slope) * step) / step**2
        with enters.moved(down * (abs(slope) / curvature if curvature > 0 else 2 * step)):
            second = objective()
    return max(0.0, here - min(first, second)) / fall if fall > 0 else None


def forbids(constraint: Constraint) -> bool:
    """Whether it is a set of policies: it holds back gradients, or has a budget."""
    return any(getattr(type(constraint), hook) is not getattr(Constraint, hook) for hook in ("hold", "excess"))


def exchange(run: Run) -> tuple[Number, Number, float] | None:
    """The weight of the support that moved least; that outside with the largest gradient, and its gradient.

    None where no weight is outside.
    """
    inside, outside = [], []
    for _, parameter, start in run.change.plain():
        if parameter.grad is None:
            continue
        delta = (parameter - start).flatten()
        least = torch.where(delta != 0, delta.abs(), torch.inf).min(0)
        most = torch.where(delta == 0, parameter.grad.flatten().abs(), -1.0).max(0)
        values = parameter.data.view(-1)
        inside.append((float(least.values), Number(values, i := int(least.indices), float(start.flatten()[i]))))
        slope = float(parameter.grad.flatten()[j := int(most.indices)])
        outside.append((float(most.values), Number(values, j, float(start.flatten()[j])), slope))
    _, leaves = min(inside, key=lambda one: one[0])
    most_of_all, enters, slope = max(outside, key=lambda one: one[0])
    return (leaves, enters, slope) if most_of_all >= 0 else None
