"""The step of optimizer=exact: a search for the optimum, whose result the policy is set to.

What every start came to is in searches.csv. The optimum is checked afterwards like that of any other run, by a gradient
through the model itself (`certificate`).
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cdpo.batch import Batch, Logps
from cdpo.constraints.kl_budget import KLBudget
from cdpo.exact.problem import Table, norms
from cdpo.exact.search import Effort, Searches, moves, search
from cdpo.exact.setting import setting_of
from cdpo.measure.objective import attained, objective
from cdpo.model.change import factors
from cdpo.system.files import write_atomic, write_csv
from cdpo.training.run import Run

SAME = 1e-6  # share of the objective's fall within which two optima are one


def solve(run: Run) -> None:
    """Set the policy to the best optimum that is found, and remember what the search says of it."""
    table, setting = table_of(run), setting_of(run.constraints, run.change.trainable())
    how = run.optimizer_config
    effort = Effort(how.starts, how.steps, how.tolerance, run.plan.seed)  # type: ignore[attr-defined]
    found = search(table, run.loss, setting, effort, known_solutions(run))
    shares = attained_by(table, found.change, run.objective_beta)
    by_objective = not moves(run.loss)
    order = found.value if by_objective or shares is None else -shares
    best = int(order.argmin())
    put(run, found, best)
    fall = found.at_start - float(found.value[best])
    write_searches(run, found, shares)
    solution = {"change": found.change[best].reshape(table.start.shape).contiguous()}
    run.ranks.from_first(lambda: write_atomic(run.directory.solution, save(solution)))
    run.state.proof = found.proof
    run.state.search = {
        "starts": len(found.origins),
        "hits": float(((order - order[best]).abs() <= SAME * abs(fall)).double().mean()),
        "origin": found.origins[best],
        "ranked_by": "objective" if by_objective else "J",
        **_range(order, shares, best, how.epsilon * abs(fall)),  # type: ignore[attr-defined]
        "epsilon": how.epsilon,  # type: ignore[attr-defined]
        "supremum": bool(found.at_infinity[best]),
    }


def table_of(run: Run) -> Table:
    """The policy's table where it started, and all of the data."""
    plain = [start for _, _, start in run.change.plain()]
    (start,) = plain or [layer.get_base_layer().weight.detach() for layer in run.change.adapted.values()]
    batch: Batch = run.train.batch(tuple(range(len(run.train.items))))
    return Table(start.double(), batch)


def known_solutions(run: Run) -> dict[str, Tensor]:
    """Changes to begin from besides, which another run has left: optima of other losses on the same problem."""
    path = run.directory.starts
    if not path.is_file():
        return {}
    return {name: change.double().flatten() for name, change in sorted(load_file(path).items())}


def attained_by(table: Table, change: Tensor, beta: float) -> Tensor | None:
    """Share of what J can gain, of every change; None without rewards. [S, C * V] -> [S]"""
    logps: Logps = table.logps(change)
    if logps.rewards is None:
        return None
    columns = objective(logps, beta)
    means = {name: columns[name].view(len(change), -1).mean(1).tolist() for name in ("J", "J_reference", "J_optimum")}
    return torch.tensor([attained(dict(zip(means, row))) for row in zip(*means.values())], dtype=torch.float64)


@torch.no_grad()
def put(run: Run, found: Searches, best: int) -> None:
    """The policy gets the change of that start."""
    for _, parameter, start in run.change.plain():
        parameter.copy_(start + found.change[best].view_as(start))
    for layer in run.change.adapted.values():
        tall, wide = factors(layer)
        first, second = found.x[best].split([wide.numel(), tall.numel()])
        wide.copy_(first.view_as(wide))
        tall.copy_(second.view_as(tall))
    for constraint in run.constraints.values():
        if isinstance(constraint, KLBudget):
            constraint.multiplier = float(found.multiplier[best])


def write_searches(run: Run, found: Searches, shares: Tensor | None) -> None:
    """searches.csv, a row per start."""
    nowhere = torch.full_like(found.value, torch.nan)
    columns = {
        "origin": found.origins,
        "objective": found.value.tolist(),
        "attained": (nowhere if shares is None else shares).tolist(),
        "norm": norms(found.change).tolist(),
    }
    rows: list[dict[str, Any]] = [dict(zip(columns, row)) for row in zip(*columns.values())]
    run.ranks.from_first(lambda: write_csv(run.directory.searches, rows))


def _range(order: Tensor, shares: Tensor | None, best: int, epsilon: float) -> dict[str, float]:
    """What the solutions attain that are as good as the best one, but for epsilon."""
    if shares is None:
        return {}
    near = shares[order <= order[best] + epsilon]
    return {"attained_low": float(near.min()), "attained_high": float(near.max())}
