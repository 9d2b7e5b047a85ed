"""The step of optimizer=exact: a search for the optimum, whose result the policy is set to.

What every start came to is in searches.csv. The optimum is checked afterwards like that of any other run, by a gradient
through the model itself (`certificate`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cdpo.batch import Batch, Logps
from cdpo.config.schema import starts_of
from cdpo.constraints.kl_budget import KLBudget
from cdpo.exact.closed_form import closed_form
from cdpo.exact.network import Network
from cdpo.exact.policy import Policy
from cdpo.exact.problem import Table, norms
from cdpo.exact.products import Product
from cdpo.exact.results import Effort, Searches
from cdpo.exact.search import objective_of, search
from cdpo.exact.setting import Setting, setting_of
from cdpo.exact.solver import moves
from cdpo.losses.candidates import RLHF
from cdpo.measure.objective import attained, objective
from cdpo.model.change import factors
from cdpo.model.tabular import Tabular
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
    policy, setting = policy_of(run), setting_of(run.constraints, run.change.trainable())
    begun = known_solutions(run, policy.size)
    starts = 0 if begun else starts_of(how, run.session.task.composed["model"]["_target_"])
    effort = Effort(starts, how.steps, how.tolerance, run.plan.seed)
    with run.change.at_start():
        found = search(policy, run.loss, setting, effort, begun | ideal(run, policy))
        shares = attained_by(policy, found.change, run.objective_beta)
    by_objective = shares is None or not moves(run.loss)
    best = int((found.value if by_objective else -shares).argmin())  # type: ignore[operator]
    put(run, found, best, objective_of(policy, run.loss, setting).products)
    before, name = earlier(run, bool(begun)), run.directory.path.name
    rows = joined(before, rows_of(found, shares), by_objective, name)
    solution = save({"change": found.change[best].reshape(policy.start.shape).contiguous()})
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


def policy_of(run: Run) -> Policy:
    """The run's policy as a function of its weights: the table that it is, or the model itself."""
    if isinstance(run.session.spec.model, Tabular):
        return table_of(run)
    return Network.of(run.scorer, run.change, run.train, run.trainer.micro_batch, run.session.pause)


def table_of(run: Run) -> Table:
    """The policy's table where it started, the features that it is read by if it has some, and all of the data."""
    plain = [start for _, _, start in run.change.plain()]
    (start,) = plain or [layer.get_base_layer().weight.detach() for layer in run.change.adapted.values()]
    batch: Batch = run.train.batch(tuple(range(len(run.train.items))))
    extra = {name: one.double() for name, one in run.scorer.model.named_buffers()}
    by_name = {name.rpartition(".")[2]: one for name, one in extra.items()}  # adapters put names before it
    return Table(start.double(), batch, by_name.get("fixed", 0.0), by_name.get("features"))


def known_solutions(run: Run, size: int) -> dict[str, Tensor]:
    """Changes of so many numbers to begin from besides, which other runs have left. Some may adapt other weights."""
    path = run.directory.starts
    if not path.is_file():
        return {}
    found = {name: change.double().flatten() for name, change in sorted(load_file(path).items())}
    return {f"{HANDED_OVER}{name}": change for name, change in found.items() if len(change) == size}


def ideal(run: Run, policy: Policy) -> dict[str, Tensor]:
    """The optimum of J without a constraint, where solutions are ranked by J because the loss's value ranks none."""
    if not moves(run.loss):
        return {}
    known = closed_form(policy, RLHF(beta=run.objective_beta), Setting())
    return {} if known is None else {"optimum of J": known[0]}


@torch.no_grad()
def attained_by(policy: Policy, change: Tensor, beta: float) -> Tensor | None:
    """Share of what J can gain, of every change; None without rewards. [S, numbers] -> [S]"""
    logps: Logps = policy.logps(change)
    if logps.rewards is None:
        return None
    columns = objective(logps, beta)
    means = {name: columns[name].view(len(change), -1).mean(1).tolist() for name in ("J", "J_reference", "J_optimum")}
    return torch.tensor([attained(dict(zip(means, row))) for row in zip(*means.values())], dtype=torch.float64)


@torch.no_grad()
def put(run: Run, found: Searches, best: int, products: Sequence[Product]) -> None:
    """The policy gets the change of that start."""
    plain, adapted = list(run.change.plain()), list(run.change.adapted.values())
    changes = found.change[best].split([start.numel() for _, _, start in plain]) if plain else ()
    for (_, parameter, start), change in zip(plain, changes):
        parameter.copy_(start + change.view_as(start))
    parts = found.x[best][None].split([one.size for one in products], dim=1) if products else ()
    for layer, product, part in zip(adapted, products, parts):
        for factor, value in zip(factors(layer), reversed(product.factors(part))):
            factor.copy_(value[0])
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
