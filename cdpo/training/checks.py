"""What can be said of a config before any data is read: of which kind its objects are, and what does not go together.

Raises ConfigError with what to change; nothing here trains or writes.
"""

from __future__ import annotations

import copy
from typing import Any

from cdpo.config.build import build
from cdpo.config.schema import Config
from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.constraint import Constraint, check
from cdpo.constraints.freeze import Freeze
from cdpo.constraints.lora import LoRA
from cdpo.errors import ConfigError
from cdpo.exact.setting import setting_of
from cdpo.model.tabular import Tabular
from cdpo.optim import LBFGS, Exact, FrankWolfe

LARGEST = 1_000_000  # numbers of a model that optimizer=exact searches: 8 starts take 2 GB, a step of each seconds


def checked(composed: dict[str, Any]) -> Config:
    """A config's objects, checked as far as no data is needed. Raises ConfigError."""
    spec = build(composed)
    _check_kinds(spec)
    _check_drawn(spec)
    _check_lbfgs(spec)
    if isinstance(spec.optimizer, FrankWolfe):
        _check_frank_wolfe(spec)
    check(spec.constraint, lbfgs=isinstance(spec.optimizer, LBFGS), fsdp=spec.trainer.distributed == "fsdp")
    if spec.trainer.distributed != "none" and getattr(spec.loss, "whole_steps", False):
        raise ConfigError(
            f"trainer.distributed={spec.trainer.distributed} deals the pairs of a step to ranks, and loss "
            f"{type(spec.loss).__name__} sorts all of them: set trainer.distributed=none"
        )
    if spec.trainer.distributed == "fsdp":
        _check_fsdp(spec)
    if isinstance(spec.optimizer, Exact):
        _check_exact(spec)
    if spec.trainer.sync_reference is not None:
        _check_sync(spec)
    if spec.trainer.compile and isinstance(spec.model, Tabular):
        raise ConfigError("a table of logits has no decoder layers, which trainer.compile needs; set it to false")
    return spec


def solvable(composed: dict[str, Any]) -> bool:
    """Whether optimizer=exact would do this run."""
    search = {"optimizer": {"_target_": "cdpo.optim.Exact"}}
    search["trainer"] = composed["trainer"] | {"max_steps": 1, "batch_size": None}
    try:
        checked(copy.deepcopy(composed | search))
    except ConfigError:
        return False
    return True


def _check_drawn(spec: Config) -> None:
    """ConfigError where a loss takes pairs for drawn from what they were not drawn from."""
    drawn = getattr(spec.loss, "drawn", None)
    sampling = getattr(spec.dataset, "sampling", "uniform")  # of other data with rewards, every pair stands
    if drawn is None or drawn == sampling == "uniform" or (drawn == sampling and isinstance(spec.model, Tabular)):
        return
    where, advice = sampling, f"loss.drawn={sampling}"
    if sampling == "reference" and not isinstance(spec.model, Tabular):
        where, advice = "from the world's table, not this model", "loss.drawn=uniform dataset.sampling=uniform"
    raise ConfigError(f"loss.drawn={drawn}, but the pairs are drawn {where}: set {advice}")


def _check_exact(spec: Config) -> None:
    """ConfigError for what optimizer=exact cannot solve."""
    if not isinstance(spec.model, Tabular):
        _check_searched(spec)
    if spec.trainer.max_steps != 1 or spec.trainer.distributed != "none":
        raise ConfigError(
            "optimizer=exact takes one step, the whole search: leave trainer.max_steps=1, distributed=none"
        )
    reasons = {
        "reads_baseline": "reads means of earlier steps",
        "reads_progress": "is another one in every step",
        "kinks": "has corners, at which no gradient vanishes",
        "whole_steps": "mixes all pairs of a step, and many searches share one",
    }
    if reason := next((why for name, why in reasons.items() if getattr(spec.loss, name, False)), None):
        raise ConfigError(f"optimizer=exact: this loss {reason}; use optimizer=adamw")
    setting_of(spec.constraint, size=1)
    frozen = [name for name, one in spec.constraint.items() if isinstance(one, (Freeze, BiasOnly))]
    if frozen and isinstance(spec.model, Tabular):
        raise ConfigError(f"constraint={frozen[0]}: a table is one matrix, so nothing would be left to search")


def _check_searched(spec: Config) -> None:
    """ConfigError for what optimizer=exact cannot solve on a model that is no table."""
    reasons = []
    if getattr(spec.model, "dtype", None) != "float64":
        reasons.append("it searches a model in float64: set model.dtype=float64, or use optimizer=lbfgs or adamw")
    if spec.trainer.gradient_checkpointing or spec.trainer.compile:
        reasons.append("set trainer.gradient_checkpointing=false trainer.compile=false: it puts weights in their place")
    balls = [name for name, one in spec.constraint.items() if getattr(one, "per_tensor", False)]
    reasons += [f"no solver here knows constraint.{name}.per_tensor=true; set it to false" for name in balls]
    if reasons:
        raise ConfigError("optimizer=exact:\n  " + "\n  ".join(reasons))


def unsearchable(spec: Config, policy: Any, device: str) -> str:
    """Why optimizer=exact does not search a policy that is loaded, adapted or not; "" if it does.

    L-BFGS keeps 20 copies of its numbers for each start.
    """
    numbers = sum(one.numel() for name, one in policy.named_parameters() if "lora_" not in name)
    if isinstance(spec.model, Tabular):
        return ""
    if numbers > LARGEST:
        return f"it searches models of at most {LARGEST:,} numbers, and this one has more; use a smaller one, or adamw"
    return "" if device == "cpu" else "it searches models on the CPU: set trainer.device=cpu"


def check_searchable(spec: Config, policy: Any, device: str = "cpu") -> None:
    """ConfigError for a policy that optimizer=exact does not search."""
    if isinstance(spec.optimizer, Exact) and (reason := unsearchable(spec, policy, device)):
        raise ConfigError(f"optimizer=exact: {reason}")


def _check_lbfgs(spec: Config) -> None:
    """ConfigError where a line search would descend what is no objective, or not the same one in every step."""
    reasons = {
        "weights_move": "a part of it moves with the policy without a gradient, so its value is no objective to search",
        "reads_progress": "it changes from step to step, so curvature of earlier steps is that of another objective",
    }
    for name, reason in reasons.items():
        if isinstance(spec.optimizer, LBFGS) and getattr(spec.loss, name, False):
            loss = type(spec.loss).__name__
            raise ConfigError(f"loss {loss} with optimizer=lbfgs: {reason}; set optimizer=adamw or optimizer=sgd")


def _check_frank_wolfe(spec: Config) -> None:
    """ConfigError for what optimizer=frank_wolfe cannot move in, and for what would bend its steps."""
    balls = [name for name, one in spec.constraint.items() if one.has_vertex]
    reasons = []
    if len(balls) != 1:
        found = " and ".join(balls) or "none"
        reasons.append(f"it moves in one ball around the start, and finds {found}: choose l2_ball or linf_ball")
    for name, one in spec.constraint.items():
        if isinstance(one, LoRA):
            reasons.append(f"{name} makes of the ball a set that is not convex: use optimizer=sgd")
        elif one.not_with_lbfgs and not one.has_vertex:
            reasons.append(f"{name} moves the weights or the objective besides: use optimizer=sgd")
    if spec.trainer.batch_size is not None:
        reasons.append("it needs the gradient of the full batch: set trainer.batch_size=null")
    if spec.trainer.max_grad_norm is not None:
        reasons.append("a clipped gradient has no use, as only its direction counts: set trainer.max_grad_norm=null")
    if spec.trainer.distributed == "fsdp":
        reasons.append("the ball needs whole weights: use trainer.distributed=ddp")
    if reasons:
        raise ConfigError("optimizer=frank_wolfe:\n  " + "\n  ".join(reasons))


def _check_sync(spec: Config) -> None:
    """ConfigError where the reference of the loss cannot be moved, or moving it would change nothing."""
    loss, optimizer = type(spec.loss).__name__, type(spec.optimizer).__name__
    reasons = []
    if getattr(spec.loss, "reference_free", False):
        reasons.append(f"loss {loss} reads no reference, so nothing would change: set it to null")
    if getattr(spec.loss, "fixed_reference", False):
        reasons.append(f"the reference of loss {loss} is that of J, or what its pairs were drawn from: set it to null")
    if isinstance(spec.optimizer, (Exact, LBFGS, FrankWolfe)):
        reasons.append(f"optimizer {optimizer} needs one fixed objective: use optimizer=adamw or optimizer=sgd")
    for name, one in spec.constraint.items():
        if isinstance(one, LoRA) and spec.trainer.sync_mixture < 1:
            reasons.append(f"a mixture of two adapters {name} has twice their rank: set trainer.sync_mixture=1.0")
    if reasons:
        raise ConfigError("trainer.sync_reference moves the reference of the loss:\n  " + "\n  ".join(reasons))


def _check_fsdp(spec: Config) -> None:
    """ConfigError for what does not work on shards."""
    refused = {
        f"optimizer={type(spec.optimizer).__name__.lower()}": spec.optimizer.full_batch,
        "a table of logits (model=tabular, loglinear)": not any(
            hasattr(spec.model, key) for key in ("attention", "layers")
        ),
        "trainer.samples": spec.trainer.samples > 0,
        "trainer.compile": spec.trainer.compile,
    }
    if names := [name for name, found in refused.items() if found]:
        raise ConfigError(f"trainer.distributed=fsdp does not go with {', '.join(names)}; use trainer.distributed=ddp")


def _check_kinds(spec: Config) -> None:
    """ConfigError if a group holds something of another kind, or nothing."""
    kinds = {"model": "load", "dataset": "load", "loss": "unit", "optimizer": "build", "logger": "start"}
    for group, method in kinds.items():
        if not hasattr(getattr(spec, group), method):
            raise ConfigError(f"{group}={getattr(spec, group)!r} is no {group}: choose one of conf/{group}/")
    for name, constraint in spec.constraint.items():
        if not isinstance(constraint, Constraint):
            raise ConfigError(f"constraint.{name}={constraint!r} is no constraint: choose with constraint={name}")
