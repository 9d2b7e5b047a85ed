"""What losses share: an exponential and log-odds that stay finite, and checks of settings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXP_BOUND = 30.0  # exp(30) = 1e13: an optimizer can still square such a gradient in float32
CERTAIN = 1e-6  # a mean log-prob above -CERTAIN counts as certainty


def exp_or_tangent(x: Tensor) -> Tensor:
    """exp(x) up to x = EXP_BOUND, beyond it the tangent there: convex, increasing, and finite for every finite x."""
    return x.clamp(max=EXP_BOUND).exp() * (1 + F.relu(x - EXP_BOUND))


def log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, up to log p = -CERTAIN; beyond it the tangent, as certainty has infinite odds."""
    inside = log_prob.clamp(max=-CERTAIN)
    return inside - torch.log(-torch.expm1(inside)) + F.relu(log_prob + CERTAIN) / CERTAIN


def check_positive(**settings: float) -> None:
    """Raise ValueError unless every setting is finite and above 0."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number above 0")


def check_range(name: str, value: float, below: float) -> None:
    """Raise ValueError unless 0 <= value < below."""
    if not 0 <= value < below:
        raise ValueError(f"{name}={value} must be at least 0 and below {below}")


def check_choice(name: str, value: str | None, *choices: str | None) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value} must be one of {', '.join(map(str, choices))}")
