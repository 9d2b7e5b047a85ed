"""Optimizers and schedules. A schedule is a pure function of the step, so there is nothing of it to save or to lose.

Weight decay is a constraint (conf/constraint/weight_decay.yaml), so every optimizer here has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer


def _check(name: str, value: float, least: float, below: float = math.inf) -> None:
    if not least <= value < below:
        raise ValueError(f"{name}={value} must lie in [{least:g}, {below:g})")


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rate over the steps: linear warm-up, then constant, or falling to zero linearly or as a cosine."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0

    full_batch: ClassVar[bool] = False  # whether every step must see all Items
    states: ClassVar[int] = 0  # numbers that the optimizer keeps for each that is trained

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive and finite")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate of `step`, counted from 0, out of `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * factor[self.schedule]

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The torch optimizer over the trainable parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), without weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    states: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for beta in self.betas:
            _check("betas", beta, 0, below=1)
        _check("eps", self.eps, 0)

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW(
            parameters,
            self.learning_rate,
            self.betas,
            self.eps,
            weight_decay=0.0,
            fused=True,  # one pass, no copies
        )


@dataclass(frozen=True)
class SGD(OptimizerConfig):
    """Stochastic gradient descent, with heavy-ball momentum."""

    momentum: float = 0.0

    @property
    def states(self) -> int:  # type: ignore[override]
        return int(self.momentum > 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("momentum", self.momentum, 0, below=1)

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(parameters, self.learning_rate, self.momentum)


@dataclass(frozen=True)
class RMSprop(OptimizerConfig):
    """The optimizer of the original DPO code (Rafailov et al. 2023, arXiv 2305.18290)."""

    alpha: float = 0.99
    eps: float = 1e-8

    states: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("alpha", self.alpha, 0, below=1)
        _check("eps", self.eps, 0)

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.RMSprop(parameters, self.learning_rate, self.alpha, self.eps)


@dataclass(frozen=True)
class LBFGS(OptimizerConfig):
    """Limited-memory BFGS with a strong-Wolfe line search: exact minima of small problems, on the full batch."""

    max_iter: int = 20  # per step
    history_size: int = 20
    tolerance_grad: float = 1e-12
    tolerance_change: float = 1e-15

    full_batch: ClassVar[bool] = True

    @property
    def states(self) -> int:  # type: ignore[override]
        return 2 * self.history_size + 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_iter", 1), ("history_size", 1), ("tolerance_grad", 0), ("tolerance_change", 0)):
            _check(name, getattr(self, name), least)

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        options = {name: getattr(self, name) for name in ("max_iter", "history_size")}
        tolerances = {name: getattr(self, name) for name in ("tolerance_grad", "tolerance_change")}
        return torch.optim.LBFGS(parameters, self.learning_rate, **options, **tolerances, line_search_fn="strong_wolfe")


@dataclass(frozen=True)
class Exact:
    """No steps at all: one search for the optimum (`cdpo.exact`), which takes the place of the run's only step."""

    learning_rate: None = None  # there is none; models bring one along
    starts: int | None = None  # null: 128 on a table, 8 on another model (`config.schema.starts_of`)
    steps: int = 250  # of each start, at most
    tolerance: float = 1e-8  # of the gradient, as a share of its norm at the reference
    epsilon: float = 0.01  # share of the objective's fall within which solutions count as equally good

    full_batch: ClassVar[bool] = True
    states: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            raise ValueError(f"learning_rate={self.learning_rate} is not used: a search has none; set it to null")
        _check("starts", 1 if self.starts is None else self.starts, 1)
        for name, least in (("steps", 1), ("tolerance", 0), ("epsilon", 0)):
            _check(name, getattr(self, name), least)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """None is used."""
        return 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Never stepped; it only has a state that can be saved."""
        return torch.optim.SGD(parameters, lr=0.0)


@dataclass(frozen=True)
class FrankWolfe:
    """Frank and Wolfe 1956 (Jaggi 2013, Algorithm 1), on the full batch, in the ball around the start of a constraint.

    theta <- theta - h (theta - v), h = 2 / (step + 2), where v is the point of the ball furthest against the gradient.
    The constraint puts theta - v in the gradient's place (`Constraint.vertex`), so what is left is a step down it.
    """

    learning_rate: None = None  # there is none; models bring one along

    full_batch: ClassVar[bool] = True
    states: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            raise ValueError(f"learning_rate={self.learning_rate} is not used: steps are 2/(step + 2); set it to null")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The share h of the way to v, of `step`, counted from 0."""
        return 2 / (step + 2)

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Without a state: the step tells all."""
        return torch.optim.SGD(parameters, lr=1.0)
