"""Descent of one function from many points at once: L-BFGS without constraints, spectral projected gradients on a set.

Every point goes its own way, with its own step; those that have arrived are no longer computed. A function returns
the values [S] of S points [S, n], each of its own point alone, and is differentiated here. Nothing here knows what is
minimised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]  # [S, n] -> [S]

HISTORY = 10  # pairs that L-BFGS remembers, unless told otherwise
TRIALS = 30  # of a line search
ARMIJO, WOLFE = 1e-4, 0.9
ROUNDING = 1e-14  # relative: values closer than that are equal
MONOTONE = 10  # steps that a projected gradient may look back for a larger value


def value_and_gradient(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """A function of many points and its gradient at each of them. [S, n] -> [S], [S, n]"""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@dataclass(frozen=True)
class Points:
    """Where the starts are: x [S, n], f [S], its gradient [S, n]."""

    x: Tensor
    value: Tensor
    gradient: Tensor

    @staticmethod
    def at(function: Function, x: Tensor) -> Points:
        """The points with what the function says of them."""
        return Points(x, *value_and_gradient(function, x))

    def __getitem__(self, index: Tensor) -> Points:
        return Points(self.x[index], self.value[index], self.gradient[index])

    def put(self, index: Tensor, other: Points) -> Points:
        """The same with others at `index`."""
        return Points(
            *(mine.index_copy(0, index, theirs) for mine, theirs in zip(vars(self).values(), vars(other).values()))
        )


@dataclass(frozen=True)
class Descent:
    """How to descend. `arrived`: which points need no more steps, [S] truth values."""

    function: Function
    arrived: Callable[[Points], Tensor]
    steps: int
    #: whether the values rank points; where a loss's weights move, only the slope along the step is looked at
    has_values: bool = True
    history: int = HISTORY
    smooth: bool = True  # whether the function can be differentiated twice; else Hessians are differences of gradients
    enough: float = 0.0  # what a Newton step has to promise, at least, to be made
    #: hears how many steps are done, and of how many; where the starts are, and which of them still move
    tell: Callable[[int, int, Points, Tensor], None] = lambda *_: None


def descend(how: Descent, now: Points, move: Callable[[Tensor, Points], tuple[Points, Tensor]]) -> Points:
    """Move the starts that have not arrived until they have, or are stuck, or there were enough steps.

    `move` gets the numbers of the starts and where they are; it returns where they go, and which of them are stuck.
    """
    alive = torch.ones(len(now.x), dtype=torch.bool)
    for step in range(how.steps):
        alive &= ~how.arrived(now)
        if not alive.any():
            break
        how.tell(step, how.steps, now, alive)
        at = alive.nonzero().flatten()
        there, stuck = move(at, now[at])
        alive[at[stuck]] = False
        now = now.put(at, there)
    return now


def lbfgs(how: Descent, x: Tensor) -> Points:
    """Limited-memory BFGS with a line search for the weak Wolfe conditions, as Lewis and Overton 2013 do it.

    [S, n] -> S points. Liu and Nocedal 1989.
    """
    memory = Memory(x, how.history)

    def move(at: Tensor, here: Points) -> tuple[Points, Tensor]:
        direction = memory.direction(at, here.gradient)
        there, moved = line_search(how, here, direction, memory.first_step(at, here.gradient))
        memory.add(at, there.x - here.x, there.gradient - here.gradient)
        memory.forget(at[~moved])
        return there, ~moved & (memory.failed[at] > 1)  # steepest descent from there failed too

    return descend(how, Points.at(how.function, x), move)


class Memory:
    """The last steps and changes of the gradient, start by start: an inverse Hessian in few numbers."""

    def __init__(self, x: Tensor, pairs: int) -> None:
        self.s = x.new_zeros(pairs, *x.shape)
        self.y, self.rho = torch.zeros_like(self.s), x.new_zeros(pairs, len(x))  # rho 0: no pair
        self.scale = x.new_zeros(len(x))  # 0: nothing is known
        self.failed = torch.zeros(len(x), dtype=torch.long)  # line searches in a row
        self.oldest = 0

    def direction(self, at: Tensor, gradient: Tensor) -> Tensor:
        """-H g for the starts `at`, steepest descent where nothing is known. [A, n] -> [A, n]"""
        newest_first = [(self.oldest - 1 - i) % len(self.s) for i in range(len(self.s))]
        order = [i for i in newest_first if bool((self.rho[i, at] > 0).any())]
        q, alphas = gradient.clone(), {}
        for i in order:
            alphas[i] = self.rho[i, at] * (self.s[i, at] * q).sum(1)
            q -= alphas[i][:, None] * self.y[i, at]
        q *= torch.where(self.scale[at] > 0, self.scale[at], 1.0)[:, None]
        for i in reversed(order):
            beta = self.rho[i, at] * (self.y[i, at] * q).sum(1)
            q += (alphas[i] - beta)[:, None] * self.s[i, at]
        return -q

    def first_step(self, at: Tensor, gradient: Tensor) -> Tensor:
        """What the line search tries first: 1, or a step of length 1 where nothing is known. [A]"""
        return torch.where(self.scale[at] > 0, 1.0, 1 / torch.linalg.vector_norm(gradient, dim=1).clamp(min=1e-300))

    def add(self, at: Tensor, s: Tensor, y: Tensor) -> None:
        """A step of the starts `at`; kept where the curvature along it is positive."""
        curvature, size = (s * y).sum(1), y.square().sum(1)
        kept = curvature > 1e-12 * size.sqrt() * torch.linalg.vector_norm(s, dim=1)
        slot = self.oldest
        self.rho[slot] = 0
        self.rho[slot, at] = torch.where(kept, 1 / torch.where(kept, curvature, 1.0), 0.0)
        self.s[slot, at], self.y[slot, at] = s, y
        self.scale[at] = torch.where(kept, curvature / torch.where(kept, size, 1.0), self.scale[at])
        self.failed[at] = 0
        self.oldest = (slot + 1) % len(self.s)

    def forget(self, at: Tensor) -> None:
        """What is known of the starts `at` has misled them."""
        was_known = self.scale[at] > 0
        self.rho[:, at], self.scale[at] = 0.0, 0.0
        self.failed[at] = torch.where(was_known, 1, 2)


def line_search(how: Descent, here: Points, direction: Tensor, step: Tensor) -> tuple[Points, Tensor]:
    """Points along `direction` that satisfy the weak Wolfe conditions, by bisection; whether they were found. [A]"""
    slope = (here.gradient * direction).sum(1)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    found, there = torch.zeros_like(step, dtype=torch.bool), here
    open_ = (slope < 0).nonzero().flatten()
    for _ in range(TRIALS):
        if not len(open_):
            break
        trial = Points.at(how.function, here.x[open_] + step[open_, None] * direction[open_])
        new_slope = (trial.gradient * direction[open_]).sum(1)
        too_far = ~low_enough(how, here[open_], trial, step[open_] * slope[open_], (slope[open_], new_slope))
        too_near = ~too_far & (new_slope < WOLFE * slope[open_])
        high[open_] = torch.where(too_far, step[open_], high[open_])
        low[open_] = torch.where(too_near, step[open_], low[open_])
        good = ~too_far
        there = there.put(open_[good], trial[good])
        found[open_[good]] = True
        middle = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        open_ = open_[too_far | too_near]
        step = torch.where(torch.zeros_like(found).index_fill(0, open_, True), middle, step)
    return there, found


def low_enough(how: Descent, here: Points, trial: Points, gain: Tensor, slopes: tuple[Tensor, Tensor]) -> Tensor:
    """Armijo's condition; where values agree to rounding, the slope's (Hager and Zhang 2005). [A]"""
    before, after = slopes
    flat = after.abs() <= WOLFE * before.abs()
    finite = trial.value.isfinite() & trial.gradient.isfinite().all(1)
    if not how.has_values:
        return finite & (after <= WOLFE * before.abs())
    equal = trial.value <= here.value + ROUNDING * here.value.abs().clamp(min=1.0)
    return finite & ((trial.value <= here.value + ARMIJO * gain) | (equal & flat))


def projected_gradient(how: Descent, x: Tensor, project: Callable[[Tensor], Tensor]) -> Points:
    """Spectral projected gradients: Birgin, Martinez and Raydan 2000, with their non-monotone line search.

    Feasible at every step. [S, n] -> S points
    """
    start = Points.at(how.function, project(x))
    length = 1 / torch.linalg.vector_norm(start.gradient, dim=1).clamp(min=1e-300)
    recent = [start.value]  # of all starts, the last one newest

    def move(at: Tensor, here: Points) -> tuple[Points, Tensor]:
        direction = project(here.x - length[at, None] * here.gradient) - here.x
        highest = torch.stack(recent)[:, at].amax(0)
        there, moved = backtrack(how, replace(here, value=highest), direction)
        there = here.put(moved.nonzero().flatten(), there[moved])
        s, y = there.x - here.x, there.gradient - here.gradient
        curvature = (s * y).sum(1)
        spectral = (s.square().sum(1) / curvature.clamp(min=1e-300)).clamp(1e-10, 1e10)
        length[at] = torch.where(curvature > 0, spectral, 1e3)
        recent[:] = [*recent, recent[-1].index_copy(0, at, there.value)][-MONOTONE:]
        return there, ~moved

    return descend(how, start, move)


def backtrack(how: Descent, here: Points, direction: Tensor) -> tuple[Points, Tensor]:
    """The first of steps 1, 1/2, 1/4, ... that is low enough; whether there was one. [A]"""
    slope = (here.gradient * direction).sum(1)
    step, there = torch.ones_like(slope), here
    open_, found = (slope < 0).nonzero().flatten(), torch.zeros_like(slope, dtype=torch.bool)
    for _ in range(TRIALS):
        if not len(open_):
            break
        trial = Points.at(how.function, here.x[open_] + step[open_, None] * direction[open_])
        new_slope = (trial.gradient * direction[open_]).sum(1)
        good = low_enough(how, here[open_], trial, step[open_] * slope[open_], (slope[open_], new_slope))
        there = there.put(open_[good], trial[good])
        found[open_[good]] = True
        open_ = open_[~good]
        step[open_] /= 2
    return there, found
