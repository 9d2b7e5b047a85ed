"""From many starts to the best optimum that was found, with what all of them found beside it.

Which solver fits is decided here: L-BFGS where the change is free or a product of factors, projected gradients in balls
and boxes, an augmented Lagrangian for budgets, exchanges of a support for sparse changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from cdpo.exact.closed_form import closed_form
from cdpo.exact.descent import Descent, Function, Points, lbfgs, projected_gradient, value_and_gradient
from cdpo.exact.factors import explored
from cdpo.exact.lagrangian import TIGHT, Augmented, Budget, within_budgets
from cdpo.exact.newton import newton, newton_step
from cdpo.exact.problem import Objective, Table, norms
from cdpo.exact.setting import Setting
from cdpo.exact.sparse import EXCHANGES, largest, thresholded
from cdpo.losses.loss import Loss

EXPLORED = 80  # steps that every start is given
FINALISTS, FEW = 12, 4  # starts that go on from there; few where each means many problems
HALVINGS = 60  # of a start that is out of a budget
ROUNDS = 6  # of the steps, with better multipliers each
NOTHING = 1e-3  # of a gradient
ON, FURTHER = 1.5, 0.5  # beside its own length: how far a change is looked beyond. Of a logit: a step that leads away
WINNERS, AT_ONCE = 3, 300  # finalists that Newton's method brings further, more where their Hessians have few rows
QUARTER, ENOUGH = 4, 1e-7  # of the steps; the best of them may take all. Share of the fall that a step has to promise
FREE_STEPS = 300


@dataclass(frozen=True)
class Effort:
    """How hard to search: starts, steps of each at most, and the norm of the gradient to reach, over the first one."""

    starts: int
    steps: int
    tolerance: float
    seed: int


@dataclass(frozen=True)
class Searches:
    """What S starts came to. The objective is that of the loss with what the constraints add to it."""

    origins: list[str]  # [S]; where each began
    x: Tensor  # [S, n]; the trained numbers
    change: Tensor  # [S, C * V]
    value: Tensor  # [S]
    multiplier: Tensor  # [S]; of the KL budget, 0 without one
    at_start: float  # the objective at the reference
    at_infinity: Tensor  # [S]; whether an optimum lies there; told of the lowest value only, where values rank
    promised: float  # what one more Newton step from the lowest value would gain; NaN unless that lies at infinity
    proof: str  # why the best is the optimum: "convex", "closed form"; "" where it is the best that was found


def search(table: Table, loss: Loss, setting: Setting, effort: Effort, more: Mapping[str, Tensor]) -> Searches:
    """Minimise `loss` on a table within `setting`, from many starts. `more` are changes [C * V] to begin from too."""
    solver = Solver(Objective(table, loss, setting.rank, setting.scaling, setting.decay, setting.pull), setting, effort)
    known = closed_form(table, loss, setting)
    if known is not None:
        change, multiplier = known
        return solver.found(["closed form"], change[None], multiplier[None], "closed form")
    free = solver.unconstrained()
    convex = is_convex(table, loss, setting)
    begun = {"unconstrained optimum": free, **({} if convex else more)}
    x = solver.objective.factorised(torch.stack(list(begun.values())))
    drawn = x[:0] if convex else solver.random(free)
    names = [*begun, *(f"random {i}" for i in range(len(drawn)))]
    x = torch.cat([x, drawn])
    if moves(loss):  # each is brought to the end, as nothing tells which are promising
        x = x[: max(FEW, len(begun))]
    x, multiplier = solver.solved(x)
    return solver.found(names[: len(x)], x, multiplier, "convex" if convex else "")


def is_convex(table: Table, loss: Loss, setting: Setting) -> bool:
    """Whether a stationary point is the optimum: a loss convex in margins, which are linear, on a convex set."""
    return setting.convex and table.one_token and bool(getattr(loss, "convex", False)) and not moves(loss)


def moves(loss: Loss) -> bool:
    """Whether the loss stops gradients in what the policy moves, so that its value ranks no points."""
    return bool(getattr(loss, "weights_move", False))


@dataclass(frozen=True)
class Solver:
    """Brings starts to optima."""

    objective: Objective
    setting: Setting
    effort: Effort

    def unconstrained(self) -> Tensor:
        """The optimum of the loss alone, or how far a few steps come where it lies at infinity. [C * V]"""
        known = closed_form(self.objective.table, self.objective.loss, Setting())
        if known is not None:
            return known[0]
        function = self.objective.free()
        how = Descent(function, self._small, FREE_STEPS, not moves(self.objective.loss))
        return lbfgs(how, torch.zeros(1, function.size, dtype=torch.float64)).x[0]

    def random(self, free: Tensor) -> Tensor:
        """Starts of the size of the unconstrained optimum, without what changes no probability. [starts, n]"""
        generator = torch.Generator().manual_seed(self.effort.seed)
        objective, starts = self.objective, self.effort.starts
        drawn = torch.randn(starts, objective.size, generator=generator, dtype=torch.float64)
        moved = free[free != 0]
        size = float(moved.square().mean()) ** 0.5 if len(moved) else 1.0
        if objective.rank is None:
            table = drawn.view(starts, *objective.table.start.shape) * objective.table.used()[:, None]
            return size * (table - table.mean(-1, keepdim=True)).flatten(1)
        wide, tall = objective.factors(drawn * (size / objective.scaling) ** 0.5 / 2)
        wide, tall = wide * objective.table.used(), tall - tall.mean(1, keepdim=True)
        return torch.cat([wide.flatten(1), tall.flatten(1)], dim=1)

    def solved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All starts, the more promising ones to the end, and multipliers of the KL. [S, n] -> [S, n], [S]"""
        none = x.new_zeros(len(x))
        if self.setting.k is not None:
            exchanges = 0 if moves(self.objective.loss) else EXCHANGES
            return thresholded(self.objective, self.minimised, largest(x, self.setting.k), exchanges), none
        if budgets := self.budgets():
            return self.solved_within(x, budgets)
        if len(x) > 1:
            x = self.explored(x)
        best = self.best(self.objective, x, FINALISTS)
        x = x.index_copy(0, best, self.minimised(self.objective, x[best]))
        rows = int(self.objective.moved(x).sum())
        rounds = [(max(WINNERS, AT_ONCE // rows), QUARTER), (1, 1)]
        for most, share in rounds[: 1 if moves(self.objective.loss) else 2]:
            best = self.best(self.objective, x, most)
            x = x.index_copy(0, best, self.finished(self.objective, x[best], share))
        return x, none

    def explored(self, x: Tensor) -> Tensor:
        """A few steps of every start; of low rank also scans of its rows, where each has its own part of the loss."""
        loss, table = self.objective.loss, self.objective.table
        apart = not moves(loss) and not getattr(loss, "whole_steps", False) and table.one_token
        if self.setting.rank is None or not apart or table.features is not None:
            return self.minimised(self.objective, x, EXPLORED)
        return explored(self.objective, self.minimised, x)

    def solved_within(self, x: Tensor, budgets: Sequence[Budget]) -> tuple[Tensor, Tensor]:
        """The same where budgets are to be kept; every start begins within them. NaN where one was not finished."""
        values = self.objective(torch.cat([0 * x[:1], x]))
        augmented = Augmented(self.objective, budgets, at_stake=max(1e-6, float(values[0] - values.min())))
        begun = self.scaled_into(x, budgets)
        points = augmented.begun(begun)
        if len(x) > 1:
            points = self.minimised(augmented, points, EXPLORED)
        best, (x, *_) = self.best(augmented, points, FEW), augmented.parts(points)
        kept, multipliers = within_budgets(augmented, self.minimised_again, x[best])
        unfinished = torch.full_like(x, torch.nan)
        of_kl = multipliers[:, 0] / (self.setting.budget or torch.inf)
        x = self.with_better(unfinished.index_copy(0, best, kept), begun)
        return x, x.new_zeros(len(x)).index_copy(0, best, of_kl)

    def with_better(self, x: Tensor, begun: Tensor) -> Tensor:
        """x, with that start as it began which was better than all have become: another loss's solution, kept."""
        if moves(self.objective.loss):
            return x
        first, least = self.best(self.objective, begun, 1), self.objective(x).nan_to_num(torch.inf).min()
        return x.index_copy(0, first, begun[first]) if self.objective(begun[first]) < least else x

    def scaled_into(self, x: Tensor, budgets: Sequence[Budget]) -> Tensor:
        """Each start halved until it keeps the budgets: far beyond them a KL may be flat. [S, n] -> [S, n]"""
        x = x.clone()
        for _ in range(HALVINGS):
            outside = torch.stack([budget(x) > TIGHT for budget in budgets]).any(0)
            if not bool(outside.any()):
                break
            x[outside] /= 2
        return x

    def best(self, function: Function, x: Tensor, most: int) -> Tensor:
        """The starts with the lowest values; all of them where values rank nothing. [S, n] -> [most]"""
        if moves(self.objective.loss):
            return torch.arange(len(x))
        return function(x).topk(min(most, len(x)), largest=False).indices

    def found(self, names: list[str], x: Tensor, multiplier: Tensor, proof: str) -> Searches:
        """What the starts came to, without those that were not brought to the end."""
        ended = ~x.isnan().any(1)
        x, value = x[ended], self.objective(x[ended])
        change = self.objective.change(x)
        at_infinity, promised = self._towards_infinity(x, value)
        return Searches(
            origins=[name for name, one in zip(names, ended.tolist()) if one],
            x=x,
            change=change,
            value=value,
            multiplier=multiplier[ended],
            at_start=self.at_start,
            at_infinity=at_infinity,
            promised=promised,
            proof=proof,
        )

    def _towards_infinity(self, x: Tensor, value: Tensor) -> tuple[Tensor, float]:
        """Whether an optimum lies there, as Newton's step from the lowest value goes on and on; what that would gain.

        Where values rank nothing: whether no gradient is left beyond. [S, n] -> [S], []
        """
        none = torch.zeros(len(x), dtype=torch.bool)
        if self.setting.bounded or self.setting.budget:
            return none, math.nan
        if moves(self.objective.loss):
            beyond = value_and_gradient(self.objective.free(), ON * self.objective.change(x))[1]
            return norms(beyond) <= NOTHING * self.scale, math.nan
        best = x[value.argmin()][None]
        active = self.objective.moved(x) & ((best[0] != 0) if self.setting.k is not None else True)
        step, promised = newton_step(self.objective, best, active)
        further = (self.objective.change(best + step) - self.objective.change(best)).abs().max()
        if not further > FURTHER:
            return none, math.nan
        return none.index_fill(0, value.argmin(), True), float(promised)

    def budgets(self) -> list[Budget]:
        """What is to be at most 0: the KL less its budget; the norm of a product less its radius."""
        found: list[Budget] = [partial(self._kl_left, self.setting.budget)] if self.setting.budget else []
        if self.setting.rank is not None and self.setting.radius is not None:
            found.append(partial(self._norm_left, self.setting.radius))
        return found

    def _kl_left(self, limit: float, x: Tensor) -> Tensor:
        return self.objective.table.kl(self.objective.change(x)) / limit - 1

    def _norm_left(self, radius: float, x: Tensor) -> Tensor:
        return self.objective.change(x).square().sum(1) / radius**2 - 1

    def minimised(self, function: Function, x: Tensor, steps: int | None = None) -> Tensor:
        """A function of points that begin with those of the objective. [S, m] -> [S, m]"""
        how = Descent(function, self._arrived, steps or self.effort.steps, not moves(self.objective.loss))
        return projected_gradient(how, x, self._project).x if self.projects else lbfgs(how, x).x

    def minimised_again(self, function: Function, x: Tensor) -> Tensor:
        """The same from near an optimum, with Newton's method. [S, m] -> [S, m]"""
        return self.finished(function, self.minimised(function, x, max(1, self.effort.steps // ROUNDS)), ROUNDS)

    def finished(self, function: Function, x: Tensor, share: int) -> Tensor:
        """Newton's method, where nothing is projected, in a share of the steps. [S, m] -> [S, m]"""
        if self.projects:
            return x
        enough = ENOUGH * float((self.at_start - function(x).amin()).abs())
        how = Descent(function, self._arrived, -(-self.effort.steps // share), not moves(self.objective.loss), enough)
        return newton(how, x, self.objective.moved(x))

    @property
    def projects(self) -> bool:
        """Whether the change is projected after each step."""
        return self.setting.rank is None and (self.setting.radius is not None or self.setting.box is not None)

    def _project(self, points: Tensor) -> Tensor:
        n = self.objective.size
        return torch.cat([self.setting.project(points[:, :n]), points[:, n:]], dim=1)

    def _small(self, points: Points) -> Tensor:
        return norms(points.gradient) <= self.effort.tolerance * self.scale

    def _arrived(self, points: Points) -> Tensor:
        """Whether the gradient is small beside that of the loss at the reference; of factors, beside their size too."""
        x, gradient = (one[:, : self.objective.size] for one in (points.x, points.gradient))
        tolerance = self.effort.tolerance * self.scale
        if self.setting.rank is not None:
            return norms(gradient) <= tolerance * self.setting.scaling * norms(x) / 2
        return norms(self.setting.project(x - gradient) - x) <= tolerance

    @cached_property
    def at_start(self) -> float:
        """The objective at the reference: where the change is zero, and of factors one of them."""
        return float(self.objective(torch.zeros(1, self.objective.size, dtype=torch.float64)))

    @cached_property
    def scale(self) -> Tensor:
        """The norm of the gradient at the reference, before anything holds the policy back. []"""
        free = self.objective.free()
        return norms(value_and_gradient(free, torch.zeros(1, free.size, dtype=torch.float64))[1]).clamp(min=1e-300)[0]
