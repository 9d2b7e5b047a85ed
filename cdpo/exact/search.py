"""From many starts to the best optimum that was found, with what all of them found beside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cdpo.exact.closed_form import closed_form
from cdpo.exact.policy import Policy
from cdpo.exact.problem import Objective
from cdpo.exact.results import Effort, Searches
from cdpo.exact.setting import Setting
from cdpo.exact.solver import FEW, Solver, moves
from cdpo.losses.loss import Loss


def search(policy: Policy, loss: Loss, setting: Setting, effort: Effort, more: Mapping[str, Tensor]) -> Searches:
    """Minimise `loss` within `setting`, from many starts. `more` are changes [numbers] to begin from too."""
    solver = Solver(objective_of(policy, loss, setting), setting, effort)
    known = closed_form(policy, loss, setting)
    if known is not None:
        change, multiplier = known
        return solver.found(["closed form"], change[None], multiplier[None], "closed form")
    free = solver.unconstrained()
    convex = is_convex(policy, loss, setting)
    begun = {"unconstrained optimum": free, **({} if convex else more)}
    if not policy.quick:
        begun["down the gradient"] = solver.downhill(free)
    x = solver.objective.factorised(torch.stack(list(begun.values())))
    drawn = x[:0] if convex else solver.random(free)
    names = [*begun, *(f"random {i}" for i in range(len(drawn)))]
    x = torch.cat([x, drawn])
    if moves(loss):  # each is brought to the end, as nothing tells which are promising
        x = x[: max(FEW, len(begun))]
    x, multiplier = solver.solved(x)
    return solver.found(names[: len(x)], x, multiplier, "convex" if convex else "")


def objective_of(policy: Policy, loss: Loss, setting: Setting) -> Objective:
    """What is minimised, as far as it is no set."""
    added = {"decay": setting.decay, "vector_decay": setting.vector_decay, "pull": setting.pull}
    return Objective(policy, loss, setting.rank, setting.scaling, **added)


def is_convex(policy: Policy, loss: Loss, setting: Setting) -> bool:
    """Whether a stationary point is the optimum: a loss convex in margins, which are linear, on a convex set."""
    return setting.convex and policy.linear and bool(getattr(loss, "convex", False)) and not moves(loss)
