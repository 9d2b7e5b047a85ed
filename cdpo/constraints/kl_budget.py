"""A budget for how far the policy's distribution may move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from cdpo.batch import Logps
from cdpo.constraints.constraint import Constraint

KL, SAMPLED = "kl_budget/kl", "kl_budget/kl_sampled"


@dataclass
class KLBudget(Constraint):
    """The KL of the policy to the reference is driven to at most `budget` nats per Item by a Lagrange multiplier.

    Dual ascent: the loss gains multiplier * KL, and after every step multiplier <- max(0, multiplier + rate * (KL -
    budget)). The KL is `Logps.candidate_kl`, a sum over an Item's responses. It holds in the limit, not at every step.

    Pairs without rewards have no such sum. There every `draw_every` steps the policy continues `draws` prompts, and the
    KL is that of its next tokens along these draws (`Logps.next_token_kl`): in the step after drawing an unbiased
    estimate, up to the cut at `draw_tokens` tokens. This is the Rao-Blackwellised
    estimator of Amini et al. 2025 (arXiv 2504.10637); that the gradient takes the draws as given is our choice.
    """

    budget: float  # nats per Item
    rate: float = 0.1  # step of the multiplier per nat and training step
    draws: int = 16  # on pairs without rewards, like the next two: prompts that the policy continues, once each
    draw_every: int = 4  # steps until it draws anew
    draw_tokens: int = 64  # of each draw, at most
    multiplier: float = field(init=False, default=0.0)
    kl: float = field(init=False, default=0.0)  # of the last step; on pairs without rewards of the last draws

    not_with_lbfgs = "the multiplier changes the objective from step to step; use optimizer=sgd or adamw"

    def __post_init__(self) -> None:
        for name in ("budget", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; choose a positive {name}")
        for name, least in {"draws": 2, "draw_every": 1, "draw_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; choose at least {least}")

    def conflict(self, other: Constraint) -> str:
        return "two multipliers for one KL; keep the smaller budget" if isinstance(other, KLBudget) else ""

    def penalty(self, logps: Logps) -> Tensor | None:
        if logps.next_token_kl is not None:
            return self.multiplier * logps.next_token_kl
        return None if logps.base is None else self.multiplier * logps.candidate_kl()

    def excess(self, logps: Logps) -> Tensor:
        return logps.candidate_kl() - self.budget

    def measure(self, logps: Logps) -> dict[str, Tensor]:
        if logps.next_token_kl is not None:
            return {SAMPLED: logps.next_token_kl.detach()}
        return {} if logps.base is None else {KL: logps.candidate_kl().detach()}

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        self.kl = metrics[SAMPLED if SAMPLED in metrics else KL]
        self.multiplier = max(0.0, self.multiplier + self.rate * (self.kl - self.budget))

    def report(self) -> dict[str, float]:
        """`boundary_distance`: nats left of the budget at the last step, negative if it was exceeded."""
        return {
            "binds": float(self.multiplier > 0),
            "boundary_distance": self.budget - self.kl,
            "multiplier": self.multiplier,
        }
