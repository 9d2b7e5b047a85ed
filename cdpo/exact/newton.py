"""The last digits: Newton's method from points that are near an optimum already, also one that lies at infinity.

Where a loss stops gradients in what the policy moves there is no function to descend, and no Hessian; then the norm of
its gradient is made small (Levenberg 1944, Marquardt 1963), with differences of gradients, of all directions at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdpo.exact.descent import Descent, Function, Points, backtrack, descend, value_and_gradient

STEP = 1e-6  # of the differences, beside the size of x
DAMPING = 1e-12  # of curvature, beside the largest
LONGEST = 0.5  # step beside the size of x
HALVINGS = 12
EVENED = 10  # rounds of scaling


def newton(how: Descent, x: Tensor, active: Tensor | None = None) -> Tensor:
    """Points near x, each for itself, whose gradient is smaller. `active`: coordinates that move. [S, n] -> [S, n]"""
    indices = torch.arange(x.shape[1]) if active is None else active.nonzero().flatten()
    if how.has_values:
        return _descend(how, x, indices).x
    return torch.cat([_solve(how, Points.at(how.function, one[None]), indices).x for one in x])


def newton_step(how: Descent, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """A Newton step, and what it promises: how much lower the parabola there is. [S, n] -> [S, n], [S]

    The promise is half the square of the Newton decrement (Boyd and Vandenberghe 2004, 9.5.1), with |H| for H: it does
    not change with the scale of a coordinate, as a gradient's norm does. Where exp(-t) falls towards infinity a step
    has length 1 however far one has come, and promises half of what is left.
    """
    here = Points.at(how.function, x)
    direction = _direction(how, here, active.nonzero().flatten())
    return direction, _promised(here, direction)


def hessian(function: Function, x: Tensor, indices: Tensor) -> Tensor:
    """Second derivatives at every point. [S, n] -> [S, m, m] over the coordinates `indices`"""
    m = len(indices)
    copies = x.repeat_interleave(m, 0).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(function(copies).sum(), copies, create_graph=True)
        (rows,) = torch.autograd.grad(gradient.gather(1, indices.repeat(len(x))[:, None]).sum(), copies)
    curved = rows[:, indices].view(len(x), m, m)
    return (curved + curved.mT) / 2


def evened(matrices: Tensor) -> Tensor:
    """A scale for each coordinate, with which no row's largest number is far from 1: Ruiz 2001. [S, m, m] -> [S, m]"""
    scale = torch.ones_like(matrices[:, 0])
    for _ in range(EVENED):
        largest = (scale[:, :, None] * matrices * scale[:, None]).abs().amax(2)
        scale = scale / torch.where(largest > 0, largest, 1.0).sqrt()
    return scale


def _direction(how: Descent, here: Points, indices: Tensor) -> Tensor:
    """-|H|^-1 g: down where the curvature is positive, away from saddles where it is not. [S, n]"""
    curved = hessian(how.function, here.x, indices) if how.smooth else _differences(how, here, indices)
    scale = evened(curved)
    curvature, axes = torch.linalg.eigh(scale[:, :, None] * curved * scale[:, None])
    largest = curvature.abs().amax(1, keepdim=True).clamp(min=1e-300)
    curvature = torch.maximum(curvature.abs(), DAMPING * largest)
    along = (axes.mT @ (scale * here.gradient[:, indices])[:, :, None])[:, :, 0] / curvature
    step = -scale * (axes @ along[:, :, None])[:, :, 0]
    return torch.zeros_like(here.x).index_copy(1, indices, step)


def _promised(here: Points, direction: Tensor) -> Tensor:
    return -(here.gradient * direction).sum(1) / 2


def _descend(how: Descent, x: Tensor, indices: Tensor) -> Points:
    """Newton steps, none much longer than x, for as long as they lower the function by enough."""

    def move(at: Tensor, here: Points) -> tuple[Points, Tensor]:
        direction = _direction(how, here, indices)
        length, longest = (torch.linalg.vector_norm(one, dim=1) for one in (direction, here.x))
        share = (LONGEST * longest.clamp(min=1.0) / length.clamp(min=1e-300)).clamp(max=1.0)
        there, moved = backtrack(how, here, share[:, None] * direction)
        return there, ~moved | (_promised(here, direction) <= how.enough)

    return descend(how, Points.at(how.function, x), move)


def jacobian(how: Descent, here: Points, indices: Tensor) -> Tensor:
    """Of the gradient, by forward differences. [1, n] -> [m, m] over the coordinates `indices`"""
    step = STEP * max(1.0, float(here.x[:, indices].abs().max()))
    moved = here.x.repeat(len(indices), 1)
    moved[torch.arange(len(indices)), indices] += step
    return ((value_and_gradient(how.function, moved)[1] - here.gradient)[:, indices] / step).mT


def _differences(how: Descent, here: Points, indices: Tensor) -> Tensor:
    """Hessians of a function that can be differentiated once, at each of S points. [S, m, m]"""
    curved = torch.stack([jacobian(how, here[i], indices) for i in torch.arange(len(here.x))[:, None]])
    return (curved + curved.mT) / 2


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
