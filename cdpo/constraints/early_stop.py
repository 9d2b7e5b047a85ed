"""Stopping before the loss is minimised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from cdpo.batch import Logps
from cdpo.constraints.constraint import Constraint
from cdpo.errors import ConfigError

KL, SAMPLED = "early_stop/kl", "eval/kl/sampled"


@dataclass
class EarlyStop(Constraint):
    """Training ends at `step`, or when a held-out metric has stopped improving, or when the KL passes a limit.

    Whichever of those that are set comes first; at least one must be. The KL is that on the responses of the Items,
    after every step. On pairs without rewards, which have none, it is eval/kl/sampled, at evaluations: the mean
    log-ratio of `trainer.samples` plain draws of the policy.
    """

    step: int | None = None  # the last step
    metric: str | None = None  # a held-out metric, such as eval/loss
    patience: int = 3  # end at the evaluation that is the n-th in a row without an improvement
    min_delta: float = 0.0  # an improvement is a change by more than this
    mode: Literal["min", "max"] = "min"  # whether a smaller or a larger metric is better
    kl: float | None = None  # nats per Item, of the policy to the reference
    best: float = field(init=False)
    stale: int = field(init=False, default=0)  # evaluations since the best
    last_kl: float = field(init=False, default=0.0)
    stopped: bool = field(init=False, default=False)

    no_optimum = "early stopping is a point on the path of an optimizer, not a set of policies"

    def __post_init__(self) -> None:
        if self.step is None and self.metric is None and self.kl is None:
            raise ValueError("early_stop needs step, metric or kl")
        if self.step is not None and self.step < 1:
            raise ValueError(f"step={self.step}; choose at least 1")
        if self.metric is not None and not self.metric.startswith("eval/"):
            raise ValueError(f"metric={self.metric!r}; choose a held-out metric, which starts with eval/")
        if self.metric is None and (self.patience, self.min_delta, self.mode) != (3, 0.0, "min"):
            raise ValueError("patience, min_delta and mode belong to metric; set metric, such as eval/loss")
        if self.patience < 1:
            raise ValueError(f"patience={self.patience}; choose at least 1")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta={self.min_delta}; choose 0 or more")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r}; choose min or max")
        if self.kl is not None and not 0 < self.kl < math.inf:
            raise ValueError(f"kl={self.kl}; choose a positive limit")
        self.best = math.inf if self.mode == "min" else -math.inf

    def measure(self, logps: Logps) -> dict[str, Tensor]:
        return {} if self.kl is None or logps.base is None else {KL: logps.candidate_kl().detach()}

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        self.last_kl = metrics.get(KL, self.last_kl)

    def stop_reason(self, metrics: Mapping[str, float]) -> str | None:
        """ConfigError if an evaluation did not give `metric`."""
        if KL not in metrics:
            self.last_kl = metrics.get(SAMPLED, self.last_kl)
        reason = self._step_reason(metrics["step"]) or self._kl_reason() or self._metric_reason(metrics)
        self.stopped = reason is not None
        return reason

    def report(self) -> dict[str, float]:
        """`binds`: it ended the training; `boundary_distance`: nats left to the KL limit."""
        report = {"binds": float(self.stopped)}
        if self.kl is not None:
            report["boundary_distance"] = self.kl - self.last_kl
        if math.isfinite(self.best):
            report |= {"best": self.best, "stale": float(self.stale)}
        return report

    def _step_reason(self, step: float) -> str | None:
        if self.step is None or step < self.step:
            return None
        return f"step {int(step)} reached the limit of {self.step} steps"

    def _kl_reason(self) -> str | None:
        if self.kl is None or self.last_kl <= self.kl:
            return None
        return f"the KL to the reference, {self.last_kl:.4g} nats per Item, passed its limit of {self.kl:g}"

    def _metric_reason(self, metrics: Mapping[str, float]) -> str | None:
        evaluated = [name for name in metrics if name.startswith("eval/")]
        if self.metric is None or not evaluated:
            return None
        if self.metric not in metrics:
            raise ConfigError(f"early_stop.metric={self.metric} is not evaluated; choose one of {', '.join(evaluated)}")
        self._remember(metrics[self.metric])
        if self.stale < self.patience:
            return None
        return f"{self.metric} has not improved on {self.best:.6g} in {self.stale} evaluations"

    def _remember(self, value: float) -> None:
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self.stale = value, 0
        else:
            self.stale += 1
