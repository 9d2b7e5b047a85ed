"""Is the policy at an optimum of its objective under its constraints? One gradient over the data, at the end of a run.

A certificate is a dict: status (certified, searched, not_reached or none), says (a sentence), mend (words for the
command line), and numbers, which stand in the metrics as certificate/<name>:

residual        norm of the gradient that the constraints do not hold back, over the norm at the first step
tolerance       what the residual is held against
bound           objective less its least value on the set, at most (Frank-Wolfe gap), where the problem is convex
infeasibility   by how much a budget is exceeded, in nats
norm            of the change
items           Items that the gradient is a mean over
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from cdpo.data.packing import by_tokens
from cdpo.losses.candidates import RLHF
from cdpo.losses.loss import per_unit, unit_weight
from cdpo.model.gradient import Gradient
from cdpo.model.tabular import Tabular
from cdpo.training.run import Run

PROVEN, SEARCHED = 1e-5, 1e-3  # of the residual: the error of the objective is of its square; 1e-3 at infinity
COARSE = 1e-2  # of weights in fewer digits
FEASIBLE = 1e-6  # nats


def certify(run: Run) -> dict[str, Any]:
    """The certificate of the policy as it is; it costs a gradient over `trainer.certificate_items` Items.

    May be interrupted between batches (Preempted). All ranks compute the same.
    """
    reason = uncertified(run)
    if reason:
        return {"status": "none", "says": reason, "mend": ""}
    found = measured(run)
    precise = all(parameter.dtype == torch.float64 for parameter in run.parameters)
    proof = proven(run) if precise and found["items"] == len(run.train.items) else ""
    found["tolerance"] = COARSE if not precise else PROVEN if proof else SEARCHED
    if proof != "convex":
        found.pop("bound", None)
    reached = found["residual"] <= found["tolerance"] and found.get("infeasibility", 0.0) <= FEASIBLE
    status = "not_reached" if not reached else "certified" if proof else "searched"
    return {"status": status, "says": sentence(status, proof, found), "mend": "" if reached else mend(run), **found}


def numbers_of(certificate: dict[str, Any]) -> dict[str, float]:
    """What stands in the metrics."""
    return {f"certificate/{name}": float(value) for name, value in certificate.items() if not isinstance(value, str)}


def uncertified(run: Run) -> str:
    """Why there can be no certificate, or ""."""
    for name, constraint in run.constraints.items():
        if constraint.no_optimum:
            return f"{name}: {constraint.no_optimum}"
    if getattr(run.loss, "whole_steps", False) and len(run.train.items) > run.plan.batch_size:
        return "this loss is another one for other portions of the data"
    if run.ranks.sharded:
        return "weights are sharded, so that no gradient lies in one place"
    return "" if run.trainer.certificate_items else "trainer.certificate_items=0"


def measured(run: Run) -> dict[str, Any]:
    """The numbers of a certificate."""
    run.scorer.eval()
    items = sample(len(run.train.items), run.trainer.certificate_items, run.plan.seed)
    excess = differentiated(run, items, excess=True)
    limits = taken(run)
    differentiated(run, items)
    bounds = [bound for one in run.constraints.values() if (bound := one.bound(Gradient(run.change))) is not None]
    scale, residual = run.state.first_gradient, least_residual(run, limits, excess)
    taken(run)
    return {
        "residual": residual / scale if scale else math.inf if residual else 0.0,
        **({"bound": max(0.0, min(bounds))} if bounds else {}),
        **({} if excess is None else {"infeasibility": max(0.0, excess)}),
        **run.state.search,
        "norm": run.change.norm(),
        "items": len(items),
    }


def taken(run: Run) -> list[Tensor | None]:
    """The gradients, which no longer lie on the parameters."""
    found = [parameter.grad for parameter in run.parameters]
    for parameter in run.parameters:
        parameter.grad = None
    return found


def sample(n: int, most: int, seed: int) -> list[int]:
    """All Items, or so many of them."""
    return list(range(n)) if n <= most else sorted(Random(f"certificate {seed}").sample(range(n), most))


def differentiated(run: Run, items: Sequence[int], excess: bool = False) -> float | None:
    """Leave the gradient of the objective on the parameters, or that of what has to be at most 0; returns its value.

    None, and no gradient, where nothing has a budget.
    """
    taken(run)
    total, weights = 0.0, sum(run.item_weights[i] for i in items)
    for portion in by_tokens(run.plan.sizes, items, run.trainer.micro_batch):
        run.session.pause()
        batch = run.train.batch(tuple(portion))
        with run.autocast():
            policy, _ = run.scorer(batch)
        logps = batch.logps(policy, **run.context())
        if excess:
            terms = [one for c in run.constraints.values() if (one := c.excess(logps)) is not None]
            if not terms:
                return None
            value = torch.stack([term.sum() for term in terms]).sum() / len(items)
        else:
            value = (per_unit(run.loss, logps) * unit_weight(run.loss, logps)).sum() / weights
        value.backward()
        total += float(value.detach())
    penalties = [] if excess else [one for c in run.constraints.values() if (one := c.parameter_penalty()) is not None]
    for penalty in penalties:
        penalty.backward()
        total += float(penalty.detach())
    return total


def least_residual(run: Run, limits: Sequence[Tensor | None], excess: float | None) -> float:
    """Norm of what the constraints do not hold back; a used-up budget holds back a multiple of its own gradient.

    The multiplier is the constraint's own, or the one with the least norm before anything else holds back: the square
    of that norm is a parabola in the multiplier, which three of its values tell.
    """
    gradient, objective = Gradient(run.change), taken(run)

    def put(multiplier: float) -> None:
        for parameter, own, limit in zip(run.parameters, objective, limits):
            moved = None if limit is None else multiplier * limit
            parameter.grad = moved if own is None else own.clone() if moved is None else own + moved

    def norm(multiplier: float, held: bool) -> float:
        put(multiplier)
        weight_by_weight_first = sorted(run.constraints.values(), key=lambda one: one.euclidean)
        for constraint in weight_by_weight_first if held else ():
            constraint.hold(gradient)
        return gradient.norm()

    if excess is None or excess < -FEASIBLE:
        return norm(0.0, held=True)
    at = [norm(multiplier, held=False) ** 2 for multiplier in (0.0, 1.0, 2.0)]
    curvature = at[2] - 2 * at[1] + at[0]
    best = max(0.0, (at[0] - at[1]) / curvature + 0.5) if curvature > 0 else 0.0
    own = [c.multiplier for c in run.constraints.values() if hasattr(c, "multiplier")]
    return min(norm(multiplier, held=True) for multiplier in (best, *own))


def proven(run: Run) -> str:
    """Why a stationary policy is the optimum: "convex", "closed form"; "" where nothing says so."""
    known = run.state.proof
    table = isinstance(run.session.spec.model, Tabular)
    one_token = all(len(response) == 1 for item in run.train.items for response in item.responses)
    if known or not (table and one_token):
        return known
    if isinstance(run.loss, RLHF) and not run.constraints:
        error = 1 - run.state.latest.get("objective/attained", math.nan)
        return "closed form" if error <= FEASIBLE else ""
    fixed = not getattr(run.loss, "weights_move", False)
    convex = fixed and getattr(run.loss, "convex", False) and all(one.convex for one in run.constraints.values())
    return "convex" if convex else ""


def mend(run: Run) -> str:
    """What to add to the command, so that an optimum is found."""
    if isinstance(run.session.spec.model, Tabular):
        how: Any = run.optimizer_config
        return f"optimizer.steps={4 * how.steps}" if run.searches else "optimizer=exact"
    schedule = "" if run.frank_wolfe else "trainer.batch_size=null optimizer.schedule=cosine "
    return f"{schedule}trainer.max_steps={4 * run.plan.steps}"


def sentence(status: str, proof: str, found: dict[str, Any]) -> str:
    """The certificate in words."""
    residual = f"residual {found['residual']:.1e}"
    if status == "certified":
        return f"optimal ({proof}; {residual})"
    if status == "searched":
        where = f"a supremum at infinity, norm {found['norm']:.1e}" if found.get("supremum") else "stationary"
        return f"{where} ({residual}); other optima are not excluded"
    excess = found.get("infeasibility", 0.0)
    over = f", {excess:.1e} nats over its budget" if excess > FEASIBLE else ""
    return f"not stationary ({residual}, tolerance {found['tolerance']:.0e}{over})"
