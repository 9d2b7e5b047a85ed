"""A constraint is a restriction on learning and a participant in the step. One file per constraint, all with one shape.

`training/loop.py` calls the hooks in the order in which they stand here. Laws: a penalty on parameters belongs in
`before_step` or `after_step`, never inside autograd; state may depend only on reduced metrics, so that it is equal on
every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from cdpo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdpo.batch import Logps
    from cdpo.model.change import Change
    from cdpo.model.gradient import Gradient


class Constraint:
    """A restriction on learning. Override what you need; every hook does nothing by default."""

    #: why this constraint cannot be used with L-BFGS ("" if it can): its line search assumes one fixed smooth objective
    not_with_lbfgs: str = ""
    #: why this constraint cannot be used with trainer.distributed=fsdp ("" if it can): the weights are DTensors there
    not_with_fsdp: str = ""
    #: why this constraint describes no set of policies, in which there could be an optimum ("" if it does)
    no_optimum: str = ""
    #: whether it restricts the weights themselves to a convex set, or adds a convex penalty of theirs
    convex: bool = False
    #: on pairs without rewards, which tell nothing of the policy's KL: on how many of its draws it acts (0: none),
    #: after how many steps these are made anew, and how many tokens each has at most
    draws: int = 0
    draw_every: int = 1
    draw_tokens: int = 1
    #: whether it pulls back by the Euclidean distance, so that steps that rescale the gradient (AdamW) end elsewhere
    euclidean: bool = False
    #: whether it is a set with a `vertex`, in which optimizer=frank_wolfe can move
    has_vertex: bool = False

    def conflict(self, other: Constraint) -> str:
        """Why this constraint cannot be combined with `other`, or "" if it can. Asked in both directions."""
        return ""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Change the policy before training: adapters, freezing. At step 0 it still equals the reference.

        Wraps a model without weights too, before the real one, where memory is worked out: keep nothing of it.
        """
        return model

    def begin(self, model: nn.Module, change: Change) -> None:
        """Called once on the wrapped, not yet restored policy; `change` remembers where training started."""

    def penalty(self, logps: Logps) -> Tensor | None:
        """A term per Item, [I], added to the loss (mean over Items), inside autograd; of log-probs only.

        With `draws`, on pairs without rewards, it is asked for draws too, with `logps.next_token_kl`: also a mean.
        """
        return None

    def measure(self, logps: Logps) -> Mapping[str, Tensor]:
        """Quantities per Item, name -> [I], without gradient; their mean over all Items of the step is in `metrics`.

        Those of draws (`logps.next_token_kl`) besides with <name>_stderr, the standard error of that mean.
        """
        return {}

    def before_step(self, model: nn.Module, learning_rate: float) -> None:
        """The gradient is there, the optimizer has not stepped; under torch.no_grad."""

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        """The optimizer has stepped: project, shrink, move a multiplier; under torch.no_grad.

        `metrics` are the step's reduced metrics, among them `learning_rate` and what `measure` returned.
        """

    def stop_reason(self, metrics: Mapping[str, float]) -> str | None:
        """A sentence if training must stop now, else None. `metrics` hold `step`, and `eval/*` after an evaluation."""
        return None

    def report(self) -> dict[str, float]:
        """What the constraint did, logged as constraint/<name>/<key>: binds (0 or 1), distance to its boundary, ..."""
        return {}

    def parameter_penalty(self) -> Tensor | None:
        """What `before_step` or `after_step` shrink weights for, as a term of the objective, differentiable. []

        For certificates only: in the training step, inside autograd, it would be wrong where ranks share a step.
        """
        return None

    def excess(self, logps: Logps) -> Tensor | None:
        """A quantity per Item whose mean has to be at most 0, differentiable, for certificates. [I]"""
        return None

    def hold(self, gradient: Gradient) -> None:
        """Take from the gradient what this constraint holds back; nothing is left where the policy is stationary."""

    def bound(self, gradient: Gradient) -> float | None:
        """The Frank-Wolfe gap: a convex objective is at most so far above its least value on this set; else None."""
        return None

    def vertex(self, gradient: Gradient) -> None:
        """Replace the gradient by theta - v, v the point of this set with the least <gradient, v>, for Frank-Wolfe."""

    def state_dict(self) -> dict[str, Any]:
        """What `begin` cannot recompute: the dataclass fields with init=False. Plain numbers, equal on every rank."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init} if is_dataclass(self) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)


def check(constraints: Mapping[str, Constraint], lbfgs: bool, fsdp: bool = False) -> None:
    """Raise ConfigError with the reason of every combination, by name, that cannot be used together."""
    barred = {name: c.not_with_lbfgs for name, c in constraints.items() if lbfgs and c.not_with_lbfgs}
    reasons = [f"{name} with optimizer=lbfgs: {reason}" for name, reason in barred.items()]
    unsharded = {name: c.not_with_fsdp for name, c in constraints.items() if fsdp and c.not_with_fsdp}
    reasons += [f"{name} with trainer.distributed=fsdp: {reason}" for name, reason in unsharded.items()]
    for (a, one), (b, other) in combinations(constraints.items(), 2):
        if reason := one.conflict(other) or other.conflict(one):
            reasons.append(f"{a} with {b}: {reason}")
    if reasons:
        raise ConfigError("constraints that cannot be combined:\n  " + "\n  ".join(reasons))
