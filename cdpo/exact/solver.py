"""What brings starts to optima: which solver fits is decided here.

L-BFGS where the change is free or a product of factors, projected gradients in balls and boxes, an augmented
Lagrangian for budgets, exchanges of a support for sparse changes. Of a policy that takes long to ask (`Policy.quick`)
fewer starts go on, and L-BFGS takes Newton's place unless few numbers are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from cdpo.exact.closed_form import closed_form
from cdpo.exact.descent import HISTORY, Descent, Function, Points, lbfgs, projected_gradient, value_and_gradient
from cdpo.exact.factors import explored
from cdpo.exact.lagrangian import TIGHT, Augmented, Budget, within_budgets
from cdpo.exact.newton import newton, newton_step
from cdpo.exact.problem import Objective, norms
from cdpo.exact.results import Effort, Searches
from cdpo.exact.setting import Setting
from cdpo.exact.sparse import EXCHANGES, largest, swapped, thresholded
from cdpo.exact.watch import Watch
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
LONG, TURNS = 4, 4  # times the steps, where none is Newton's; turns of projected gradients and L-BFGS
NEWTON_UP_TO = 500  # numbers, of a policy that takes long to ask
MOST_PAIRS, ROOM = 100, 5e7  # that L-BFGS remembers of such a policy; numbers that all of them may have


def moves(loss: Loss) -> bool:
    """Whether the loss stops gradients in what the policy moves, so that its value ranks no points."""
    return bool(getattr(loss, "weights_move", False))


@dataclass(frozen=True)
class Solver:
    """Brings starts to optima."""

    objective: Objective
    setting: Setting
    effort: Effort
    watch: Watch = field(default_factory=Watch)

    def unconstrained(self) -> Tensor:
        """The optimum of the loss alone, or how far a few steps come where it lies at infinity. [numbers]"""
        known = closed_form(self.objective.policy, self.objective.loss, Setting())
        if known is not None:
            return known[0]
        function = self.objective.free()
        x = torch.zeros(1, function.size, dtype=torch.float64)
        return lbfgs(replace(self.descent(function, x, FREE_STEPS), arrived=self._small), x).x[0]

    def downhill(self, free: Tensor) -> Tensor:
        """As far as the unconstrained optimum, but straight down the gradient at the reference. [n] -> [n]"""
        gradient = value_and_gradient(self.objective.free(), torch.zeros_like(free)[None])[1][0]
        return -gradient * (torch.linalg.vector_norm(free) / self.scale)

    def random(self, free: Tensor) -> Tensor:
        """Starts of the size of the unconstrained optimum, without what changes no probability. [starts, n]"""
        generator = torch.Generator().manual_seed(self.effort.seed)
        drawn = torch.randn(self.effort.starts, self.objective.size, generator=generator, dtype=torch.float64)
        moved = free[free != 0]
        return self.objective.spread(drawn, float(moved.square().mean()) ** 0.5 if len(moved) else 1.0)

    def solved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All starts, the more promising ones to the end, and multipliers of the KL. [S, n] -> [S, n], [S]"""
        none = x.new_zeros(len(x))
        if self.setting.k is not None:
            exchanges = 0 if moves(self.objective.loss) else EXCHANGES
            sparse = thresholded if self.objective.policy.quick else swapped
            return sparse(self.objective, self.minimised, largest(x, self.setting.k), exchanges), none
        if budgets := self.budgets():
            return self.solved_within(x, budgets)
        if len(x) > 1:
            x = self.explored(x)
        function, quick = self.function, self.objective.policy.quick
        best = self.best(function, x, FINALISTS if quick else FEW)
        x = x.index_copy(0, best, self.minimised(function, self.inside(x[best])))
        at_once = AT_ONCE // int(self.moved(x).sum())
        steps, few = self.effort.steps, -(-self.effort.steps // QUARTER)
        rounds = [(max(WINNERS, at_once), few), (1, steps)] if quick else [(1, few if self.curved else LONG * steps)]
        for most, steps in rounds[: 1 if moves(self.objective.loss) else 2]:
            best = self.best(function, x, most)
            x = x.index_copy(0, best, self.finished(function, self.inside(x[best]), steps))
        return self.inside(x), none

    def explored(self, x: Tensor) -> Tensor:
        """A few steps of every start; of low rank also scans of its rows, where each has its own part of the loss."""
        loss = self.objective.loss
        apart = not moves(loss) and not getattr(loss, "whole_steps", False) and self.objective.policy.linear
        if self.setting.rank is None or not apart or self.objective.table.features is not None:
            return self.minimised(self.function, self.inside(x), EXPLORED)
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
        if self.setting.bounded or self.setting.budget or not self.objective.policy.quick:
            return none, math.nan
        if moves(self.objective.loss):
            beyond = value_and_gradient(self.objective.free(), ON * self.objective.change(x))[1]
            return norms(beyond) <= NOTHING * self.scale, math.nan
        best = x[value.argmin()][None]
        active = self.moved(x) & ((best[0] != 0) if self.setting.k is not None else True)
        step, promised = newton_step(self.descent(self.objective, x), best, active)
        further = (self.objective.change(best + step) - self.objective.change(best)).abs().max()
        if not further > FURTHER:
            return none, math.nan
        return none.index_fill(0, value.argmin(), True), float(promised)

    def budgets(self) -> list[Budget]:
        """What is to be at most 0: the KL less its budget; the norm of a product less its radius."""
        found: list[Budget] = [partial(self._kl_left, self.setting.budget)] if self.setting.budget else []
        if self.setting.rank is not None and self.setting.radius is not None and not self.radial:
            found.append(partial(self._norm_left, self.setting.radius))
        return found

    def _kl_left(self, limit: float, x: Tensor) -> Tensor:
        return self.objective.policy.kl(self.objective.change(x)) / limit - 1

    def _norm_left(self, radius: float, x: Tensor) -> Tensor:
        return self.objective.change(x).square().sum(1) / radius**2 - 1

    def minimised(self, function: Function, x: Tensor, steps: int | None = None) -> Tensor:
        """A function of points that begin with those of the objective. [S, m] -> [S, m]"""
        how = self.descent(function, x, steps or self.effort.steps)
        return projected_gradient(how, x, self._project).x if self.projects else lbfgs(how, x).x

    def minimised_again(self, function: Function, x: Tensor) -> Tensor:
        """The same from near an optimum, with Newton's method where that is no dearer. [S, m] -> [S, m]"""
        near = self.minimised(function, x, max(1, self.effort.steps // ROUNDS))
        again = self.finished if self.objective.policy.quick else self.minimised
        return again(function, near, -(-self.effort.steps // ROUNDS))

    def finished(self, function: Function, x: Tensor, steps: int) -> Tensor:
        """Newton's method, where nothing is projected; else, if values are dear, more of the same. [S, m] -> [S, m]"""
        if self.projects:
            return x if self.objective.policy.quick else self.on_faces(function, x, steps)
        if not self.curved:
            return self.minimised(function, x, steps)
        enough = ENOUGH * float((self.at_start - function(x).amin()).abs())
        return newton(replace(self.descent(function, x, steps), enough=enough), x, self.moved(x))

    @property
    def radial(self) -> bool:
        """Whether products of factors are scaled into their ball: one search in place of a budget's many."""
        product_in_ball = self.setting.rank is not None and self.setting.radius is not None
        return product_in_ball and not self.setting.budget and not self.objective.policy.quick

    def function(self, x: Tensor) -> Tensor:
        """What is descended: the objective, where x is `inside`. [S, n] -> [S]"""
        return self.objective(self.inside(x))

    def inside(self, x: Tensor) -> Tensor:
        """Factors whose product is scaled into its ball, and so projected on it. [S, n] -> [S, n]"""
        radius = self.setting.radius if self.radial else None
        if radius is None:
            return x
        share = radius / norms(self.objective.change(x)).clamp(min=1e-300)
        return x * share.clamp(max=1.0).sqrt()[:, None]

    def on_faces(self, function: Function, x: Tensor, steps: int) -> Tensor:
        """L-BFGS on the face of the set where projected gradients come to rest, and in turn these, from there.

        Hager and Zhang 2006, whose faces are those of a box; of f(project(z)), which a ball has too. [S, n] -> [S, n]
        """

        def projected(z: Tensor) -> Tensor:
            return function(self._project(z))

        for _ in range(TURNS):
            x = self.minimised(function, x, EXPLORED)
            how = replace(self.descent(projected, x, -(-steps // TURNS)), arrived=self._small)
            moved = self._project(lbfgs(how, self.setting.beyond(x)).x)
            x = torch.where((function(moved) < function(x))[:, None], moved, x)
        return x

    def descent(self, function: Function, x: Tensor, steps: int = 1) -> Descent:
        """How to descend a function from such points, in so many steps."""
        quick, has_values = self.objective.policy.quick, not moves(self.objective.loss)
        pairs = HISTORY if quick else max(HISTORY, min(MOST_PAIRS, int(ROOM / x.numel())))
        return Descent(function, self._arrived, steps, has_values, pairs, smooth=quick, tell=self.watch)

    @property
    def curved(self) -> bool:
        """Whether Hessians can be had in good time."""
        return self.objective.policy.quick or self.objective.size <= NEWTON_UP_TO

    def moved(self, x: Tensor) -> Tensor:
        """Which numbers of points that begin with x can change the loss at all. [S, m] -> [m]"""
        return torch.nn.functional.pad(self.objective.moved(), (0, x.shape[1] - self.objective.size))

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
