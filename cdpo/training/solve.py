"""The step of optimizer=exact: a search for the optimum, whose result the policy is set to.

What every start came to is in searches.csv. The optimum is checked afterwards like that of any other run, by a gradient
through the model itself (`certificate`).
"""

from __future__ import annotations

import csv
import math
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cdpo.batch import Batch, Logps
from cdpo.constraints.kl_budget import KLBudget
from cdpo.exact.closed_form import closed_form
from cdpo.exact.problem import Table, norms
from cdpo.exact.search import Effort, Searches, moves, search
from cdpo.exact.setting import Setting, setting_of
from cdpo.losses.candidates import RLHF
from cdpo.measure.objective import attained, objective
from cdpo.model.change import factors
from cdpo.system.files import write_atomic, write_csv
from cdpo.training.run import Run

SAME = 1e-4  # share of the objective's fall within which two optima are one
HANDED_OVER = "from "  # how the origin of a solution begins that is another run's


def solve(run: Run) -> None:
    """Set the policy to the best optimum that is found, and remember what the search says of it.

    Where another run has left solutions to begin from (`cdpo.sweep.polish`), these take the place of random starts, and
    what the starts before them came to still counts.
    """
    how: Any = run.optimizer_config
    table, setting = table_of(run), setting_of(run.constraints, run.change.trainable())
    begun = known_solutions(run)
    effort = Effort(0 if begun else how.starts, how.steps, how.tolerance, run.plan.seed)
    found = search(table, run.loss, setting, effort, begun | ideal(run, table))
    shares = attained_by(table, found.change, run.objective_beta)
    by_objective = shares is None or not moves(run.loss)
    best = int((found.value if by_objective else -shares).argmin())  # type: ignore[operator]
    put(run, found, best)
    before, name = earlier(run, bool(begun)), run.directory.path.name
    rows = joined(before, rows_of(found, shares), by_objective, name)
    solution = save({"change": found.change[best].reshape(table.start.shape).contiguous()})
    run.ranks.from_first(lambda: write_csv(run.directory.searches, rows))
    run.ranks.from_first(lambda: write_atomic(run.directory.solution, solution))
    fall = found.at_start - float(found.value[best]) if by_objective else 1.0
    run.state.proof = found.proof
    run.state.search = {
        "ranked_by": "objective" if by_objective else "J",
        **told(rows, by_objective, fall, how.epsilon),
        "supremum": bool(found.at_infinity[best]),
        **({} if math.isnan(found.promised) else {"promised": found.promised / fall}),
    }


def table_of(run: Run) -> Table:
    """The policy's table where it started, the features that it is read by if it has some, and all of the data."""
    plain = [start for _, _, start in run.change.plain()]
    (start,) = plain or [layer.get_base_layer().weight.detach() for layer in run.change.adapted.values()]
    batch: Batch = run.train.batch(tuple(range(len(run.train.items))))
    extra = {name: one.double() for name, one in run.scorer.model.named_buffers()}
    by_name = {name.rpartition(".")[2]: one for name, one in extra.items()}  # adapters put names before it
    return Table(start.double(), batch, by_name.get("fixed", 0.0), by_name.get("features"))


def known_solutions(run: Run) -> dict[str, Tensor]:
    """Changes to begin from besides, which another run has left: optima of other losses on the same problem."""
    path = run.directory.starts
    if not path.is_file():
        return {}
    return {f"{HANDED_OVER}{name}": change.double().flatten() for name, change in sorted(load_file(path).items())}


def ideal(run: Run, table: Table) -> dict[str, Tensor]:
    """The optimum of J without a constraint, where solutions are ranked by J because the loss's value ranks none."""
    if not moves(run.loss):
        return {}
    known = closed_form(table, RLHF(beta=run.objective_beta), Setting())
    return {} if known is None else {"optimum of J": known[0]}


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


def rows_of(found: Searches, shares: Tensor | None) -> list[dict[str, Any]]:
    """A row of searches.csv per start."""
    nowhere = torch.full_like(found.value, torch.nan)
    columns = {
        "origin": found.origins,
        "objective": found.value.tolist(),
        "attained": (nowhere if shares is None else shares).tolist(),
        "norm": norms(found.change).tolist(),
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def earlier(run: Run, again: bool) -> list[dict[str, Any]]:
    """The rows of the search before, if this one goes on from it."""
    path = run.directory.searches
    if not again or not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {key: float(row[key]) for key in ("objective", "attained", "norm")} for row in rows]


def joined(
    before: list[dict[str, Any]], after: list[dict[str, Any]], by_objective: bool, name: str
) -> list[dict[str, Any]]:
    """The rows of both rounds of a run of that name.

    What began from its own solution has gone on from where that began: no other run has handed it over.
    """
    if before:
        best = min(before, key=lambda row: row["objective"] if by_objective else -row["attained"])
        own = {"origin": best["origin"]}
        after = [row | own if row["origin"] == f"{HANDED_OVER}{name}" else row for row in after]
    return [*before, *after]


def told(rows: list[dict[str, Any]], by_objective: bool, fall: float, epsilon: float) -> dict[str, float]:
    """How many searches there were, the share that found the best, what all solutions attain that are nearly as good.

    A solution that another run has handed over is no search; a start that went on in a second round is one.
    """
    shares = torch.tensor([row["attained"] for row in rows], dtype=torch.float64)
    order = torch.tensor([row["objective"] for row in rows], dtype=torch.float64) if by_objective else -shares
    behind = order - order.min()
    near = shares[behind <= epsilon * abs(fall)]
    own: dict[str, bool] = {}  # whether a start found the best
    for row, is_best in zip(rows, (behind <= SAME * abs(fall)).tolist()):
        if not row["origin"].startswith(HANDED_OVER):
            own[row["origin"]] = own.get(row["origin"], False) or is_best
    found = {"starts": len(own), "hits": sum(own.values()) / max(1, len(own)), "epsilon": epsilon, "fall": abs(fall)}
    if near.isnan().any():
        return found
    return found | {"attained_low": float(near.min()), "attained_high": float(near.max())}
