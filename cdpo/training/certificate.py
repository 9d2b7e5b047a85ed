"""Is the policy at an optimum of its objective under its constraints? One gradient over the data, at the end of a run.

A certificate is a dict: status (certified, searched, not_reached or none), says (a sentence), mend (words for the
command line: what finds an optimum, or searches harder), and numbers, which stand in the metrics as certificate/<name>:

residual        norm of the gradient that the constraints do not hold back, over the norm at the first step
tolerance       what the residual is held against
promised        what a Newton step would gain, as a share of what was gained; takes residual's place towards infinity
swap            what another support of a sparse change would gain, as the same share: the best exchange that was tried
bound           objective less its least value on the set, at most (Frank-Wolfe gap), where the problem is convex
infeasibility   by how much a budget is exceeded, in nats
norm            of the change
items           Items that the gradient is a mean over
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from cdpo.batch import Logps
from cdpo.config.schema import starts_of
from cdpo.constraints.constraint import Constraint
from cdpo.data.packing import by_tokens
from cdpo.losses.candidates import RLHF
from cdpo.losses.loss import per_unit, unit_weight
from cdpo.model.gradient import Gradient
from cdpo.model.tabular import Tabular
from cdpo.training.checks import solvable, unsearchable
from cdpo.training.run import Run
from cdpo.training.swap import gained_by_swap

PROVEN, SEARCHED = 1e-5, 1e-3  # of the residual: the error of the objective is of its square
PROMISED = 1e-4  # of the objective's fall, where the best lies at infinity: there a gradient's norm says little
COARSE = 1e-2  # of weights in fewer digits
FEASIBLE = 1e-6  # nats
ROUNDS, SETTLED = 1000, 1e-8  # of several constraints that hold a gradient back together; beside the first gradient


def certify(run: Run, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The certificate of the policy as it is, of which an evaluation has found these metrics.

    It costs a gradient over `trainer.certificate_items` Items, and may be interrupted between batches (Preempted). All
    ranks compute the same.
    """
    reason = uncertified(run)
    if reason:
        return {"status": "none", "says": reason, "mend": ""}
    found = measured(run)
    precise = all(parameter.dtype == torch.float64 for parameter in run.parameters)
    proof = proven(run, metrics) if precise and found["items"] == len(run.train.items) else ""
    found["tolerance"] = COARSE if not precise else PROVEN if proof else SEARCHED
    if proof:
        found.pop("promised", None)
    if proof != "convex":
        found.pop("bound", None)
    reached = stationary(found) and found.get("infeasibility", 0.0) <= FEASIBLE
    status = "not_reached" if not reached else "certified" if proof else "searched"
    return {"status": status, "says": sentence(status, proof, found), "mend": mend(run, status, found), **found}


def stationary(found: Mapping[str, Any]) -> bool:
    """Whether the gradient is as good as zero; towards infinity, whether one more Newton step would gain nothing."""
    if found.get("swap", 0.0) > found["tolerance"]:
        return False
    if "promised" in found:
        return bool(found["promised"] <= PROMISED)
    return bool(found["residual"] <= found["tolerance"])


def swapped(found: Mapping[str, Any]) -> bool:
    """Whether nothing but another support would be better."""
    return bool(found["residual"] <= found["tolerance"] < found.get("swap", 0.0))


def numbers_of(certificate: dict[str, Any]) -> dict[str, float]:
    """What stands in the metrics."""
    return {f"certificate/{name}": float(value) for name, value in certificate.items() if not isinstance(value, str)}


def uncertified(run: Run) -> str:
    """Why there can be no certificate, or ""."""
    for name, constraint in run.constraints.items():
        if constraint.no_optimum:
            return f"{name}: {constraint.no_optimum}"
    if run.trainer.sync_reference is not None:
        return "the loss's reference moves along the path of training (trainer.sync_reference): no objective is fixed"
    if run.drawing is not None:
        return "the KL is held to its budget on draws of the policy, which are others whenever it draws"
    if getattr(run.loss, "whole_steps", False) and len(run.train.items) > run.plan.batch_size:
        return "this loss is another one for other portions of the data"
    if getattr(run.loss, "kinks", False):
        return "this loss has corners, at which no gradient vanishes"
    if run.ranks.sharded:
        return "weights are sharded, so that no gradient lies in one place"
    return "" if run.trainer.certificate_items else "trainer.certificate_items=0"


def measured(run: Run) -> dict[str, Any]:
    """The numbers of a certificate."""
    run.scorer.eval()
    items = sample(len(run.train.items), run.trainer.certificate_items, run.plan.seed)
    has_budget = any(type(one).excess is not Constraint.excess for one in run.constraints.values())
    budgets = differentiated(run, over_budget(run, items)) if has_budget else None
    limits = [parameter.grad for parameter in run.parameters]
    differentiated(run, objective(run, items))
    gradient = Gradient(run.change)
    swap = gained_by_swap(run, gradient, lambda: sum(map(float, objective(run, items))))
    bounds = [bound for one in run.constraints.values() if (bound := one.bound(gradient)) is not None]
    holds = [partial(one.hold, gradient) for one in run.constraints.values() if type(one).hold is not Constraint.hold]
    if budgets is not None and budgets > -FEASIBLE:
        holds.append(partial(hold_budget, run, gradient, limits))
    keep_free(run, holds)
    residual = gradient.norm()
    scale = run.state.first_gradient
    found = {
        "residual": residual / scale if scale else math.inf if residual else 0.0,
        **({"bound": max(0.0, min(bounds))} if bounds else {}),
        **({} if budgets is None else {"infeasibility": max(0.0, budgets)}),
        **({} if swap is None else {"swap": swap}),
        **run.state.search,
        "norm": run.change.norm(),
        "items": len(items),
    }
    for parameter in run.parameters:
        parameter.grad = None
    return found


def sample(n: int, most: int, seed: int) -> list[int]:
    """All Items, or so many of them."""
    return list(range(n)) if n <= most else sorted(Random(f"certificate {seed}").sample(range(n), most))


def differentiated(run: Run, terms: Iterable[Tensor]) -> float:
    """Leave the gradient of a sum on the parameters; returns the sum."""
    for parameter in run.parameters:
        parameter.grad = None
    total = 0.0
    for term in terms:
        term.backward()
        total += float(term.detach())
    return total


def objective(run: Run, items: Sequence[int]) -> Iterator[Tensor]:
    """What the objective is the sum of: the share of every micro-batch, then what weights are shrunk for. [] each"""
    weights = sum(run.item_weights[i] for i in items)
    for logps in scored(run, items):
        yield (per_unit(run.loss, logps) * unit_weight(run.loss, logps)).sum() / weights
    yield from (one for c in run.constraints.values() if (one := c.parameter_penalty()) is not None)


def over_budget(run: Run, items: Sequence[int]) -> Iterator[Tensor]:
    """What the mean of all that has to be at most 0 is the sum of, in nats. [] each"""
    for logps in scored(run, items):
        terms = (one for c in run.constraints.values() if (one := c.excess(logps)) is not None)
        yield torch.stack([term.sum() for term in terms]).sum() / len(items)


def scored(run: Run, items: Sequence[int]) -> Iterator[Logps]:
    """What the policy says of these Items, micro-batch by micro-batch."""
    for portion in by_tokens(run.plan.sizes, items, run.trainer.micro_batch):
        run.session.pause()
        batch = run.train.batch(tuple(portion))
        with run.autocast():
            policy, _ = run.scorer(batch)
        yield batch.logps(policy, **run.context())


def keep_free(run: Run, holds: Sequence[Callable[[], None]]) -> None:
    """Take from the gradient what these hold back together, each of which takes what it holds back alone.

    -gradient is projected on the intersection of their tangent cones: Boyle and Dykstra 1986.
    """
    if len(holds) == 1:
        return holds[0]()
    taken = [[torch.zeros_like(one) for one in gradients_of(run)] for _ in holds]
    for _ in range(ROUNDS if holds else 0):
        run.session.pause()
        changed = 0.0
        for i, hold in enumerate(holds):
            with_taken = [one.add_(other).clone() for one, other in zip(gradients_of(run), taken[i])]
            hold()
            now = [before.sub_(after) for before, after in zip(with_taken, gradients_of(run))]
            changed = math.hypot(changed, *(float((one - other).norm()) for one, other in zip(now, taken[i])))
            taken[i] = now
        if changed <= SETTLED * run.state.first_gradient:
            break
    return None


def gradients_of(run: Run) -> list[Tensor]:
    """Of all weights that have one."""
    return [parameter.grad for parameter in run.parameters if parameter.grad is not None]


def hold_budget(run: Run, gradient: Gradient, limits: Sequence[Tensor | None]) -> None:
    """Add that multiple, at least 0, of the gradient of a budget that is used up which leaves the least norm.

    The square of the norm is a parabola in the multiplier: three of its values tell the best one.
    """

    def with_multiplier(step: float) -> float:
        with torch.no_grad():
            for parameter, limit in zip(run.parameters, limits):
                if limit is not None and parameter.grad is not None:
                    parameter.grad += step * limit
        return gradient.norm()

    at = [with_multiplier(0.0), with_multiplier(1.0), with_multiplier(1.0)]  # at 0, 1 and 2
    curvature = at[2] ** 2 - 2 * at[1] ** 2 + at[0] ** 2
    slope = at[1] ** 2 - at[0] ** 2 - curvature / 2
    with_multiplier((max(0.0, -slope / curvature) if curvature > 0 else 0.0) - 2)


def proven(run: Run, metrics: Mapping[str, float]) -> str:
    """Why a stationary policy is the optimum: "convex", "closed form"; "" where nothing says so."""
    known = run.state.proof
    table = isinstance(run.session.spec.model, Tabular)
    one_token = all(len(response) == 1 for item in run.train.items for response in item.responses)
    if known or not (table and one_token):
        return known
    if isinstance(run.loss, RLHF) and not run.constraints:
        error = 1 - metrics.get("objective/attained", math.nan)
        return "closed form" if error <= FEASIBLE else ""
    fixed = not getattr(run.loss, "weights_move", False)
    convex = fixed and getattr(run.loss, "convex", False) and all(one.convex for one in run.constraints.values())
    return "convex" if convex else ""


def mend(run: Run, status: str, found: Mapping[str, Any]) -> str:
    """What to add to the command, so that an optimum is found, or is searched for harder; "" where there is nothing."""
    composed = run.session.task.composed
    if status == "certified":
        return ""
    if run.searches:
        how: Any = run.optimizer_config
        few = run.state.search.get("ranked_by") == "J"  # of the starts are used, however many there are
        harder = "" if few else f"optimizer.starts={4 * starts_of(how, composed['model']['_target_'])}"
        return harder if status == "searched" or swapped(found) else f"optimizer.steps={4 * how.steps}"
    if not unsearchable(run.session.spec, run.policy, run.device.type) and solvable(composed):
        return "optimizer=exact trainer.max_steps=1 trainer.batch_size=null"  # whatever the command says of these
    if status == "searched" or swapped(found):  # more steps move nothing
        return ""
    schedule = "" if run.frank_wolfe else "trainer.batch_size=null optimizer.schedule=cosine "
    return f"{schedule}trainer.max_steps={4 * run.plan.steps}"


def sentence(status: str, proof: str, found: dict[str, Any]) -> str:
    """The certificate in words."""
    residual = f"residual {found['residual']:.1e}"
    promised = f"a Newton step would gain {found['promised']:.0e} of the fall" if "promised" in found else ""
    left = f", {promised}" if promised else ""
    if status == "certified" and found.get("supremum"):
        return f"the infimum lies at infinity and is not attained ({proof}; {residual}, norm {found['norm']:.1e})"
    if status == "certified":
        return f"optimal ({proof}; {residual})"
    if status == "searched":
        where = f"a supremum at infinity, norm {found['norm']:.1e}" if found.get("supremum") else "stationary"
        return f"{where} ({residual}{left}); other optima are not excluded"
    excess = found.get("infeasibility", 0.0)
    over = f", {excess:.1e} nats over its budget" if excess > FEASIBLE else ""
    if swapped(found):
        return f"another support gains {found['swap']:.0e} of the fall, tolerance {found['tolerance']:.0e} ({residual})"
    held = f"{promised}, tolerance {PROMISED:.0e}" if promised else f"{residual}, tolerance {found['tolerance']:.0e}"
    return f"not stationary ({held}{over})"
