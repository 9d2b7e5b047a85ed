"""The last digits: Newton's method from points that are near an optimum already, also one that lies at infinity.

The Hessian is a difference of gradients, of all directions at once. Where a loss stops gradients in what the policy
moves there is no function to descend; then the norm of its gradient is made small (Levenberg 1944, Marquardt 1963).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdpo.exact.descent import Descent, Points, line_search

STEP = 1e-6  # of the differences, beside the size of x
DAMPING = 1e-10  # of curvature, beside the largest
HALVINGS = 12


def newton(how: Descent, x: Tensor, active: Tensor | None = None) -> Tensor:
    """Points near x, each for itself, whose gradient is smaller. `active`: coordinates that move. [S, n] -> [S, n]"""
    polish = _descend if how.has_values else _solve
    indices = torch.arange(x.shape[1]) if active is None else active.nonzero().flatten()
    return torch.cat([polish(how, Points.at(how.function, one[None]), indices).x for one in x])


def jacobian(how: Descent, here: Points, indices: Tensor) -> Tensor:
    """Of the gradient, by forward differences. [1, n] -> [m, m] over the coordinates `indices`"""
    step = STEP * max(1.0, float(here.x[:, indices].abs().max()))
    moved = here.x.repeat(len(indices), 1)
    moved[torch.arange(len(indices)), indices] += step
    return ((how.function(moved)[1] - here.gradient)[:, indices] / step).mT


def _descend(how: Descent, here: Points, indices: Tensor) -> Points:
    """Steps along -|H|^-1 g: down where the curvature is positive, away from saddles where it is not."""
    for _ in range(how.steps):
        if bool(how.arrived(here).all()):
            break
        hessian = jacobian(how, here, indices)
        curvature, axes = torch.linalg.eigh((hessian + hessian.mT) / 2)
        curvature = curvature.abs().clamp(min=DAMPING * float(curvature.abs().max().clamp(min=1e-300)))
        direction = torch.zeros_like(here.x)
        direction[0, indices] = -axes @ ((axes.mT @ here.gradient[0, indices]) / curvature)
        there, moved = line_search(how, here, direction, torch.ones(1, dtype=torch.float64))
        if not bool(moved.all()):
            break
        here = there
    return here


def _solve(how: Descent, here: Points, indices: Tensor) -> Points:
    """Steps that make the gradient itself smaller, damped until they do."""
    damping = 1e-8
    for _ in range(how.steps):
        if bool(how.arrived(here).all()):
            break
        slope, gradient = jacobian(how, here, indices), here.gradient[0, indices]
        square, down = slope.mT @ slope, slope.mT @ gradient
        for _ in range(HALVINGS):
            eye = damping * float(square.diagonal().max()) * torch.eye(len(indices), dtype=torch.float64)
            direction = torch.zeros_like(here.x)
            direction[0, indices] = -torch.linalg.solve(square + eye, down)
            there = Points.at(how.function, here.x + direction)
            if torch.linalg.vector_norm(there.gradient) < torch.linalg.vector_norm(here.gradient):
                here, damping = there, max(damping / 10, 1e-14)
                break
            damping *= 10
        else:
            break
    return here
