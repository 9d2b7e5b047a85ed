"""The Gaussian view of any pair loss: signal and noise variance of every pair, and what the penalty makes of them.

For a pair, γ = (pi(l) / pi(w))^beta is the signal variance that training moves and λ = (pi_ref(l) / pi_ref(w))^beta the
noise variance that the reference fixes. After Kong, Hu, He and Wipf (AISTATS 2025); the derivations are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40


def gaussian_view(logps: Logps, beta: float) -> dict[str, Tensor]:
    """log γ and log λ, with chosen as winner; and two shares that follow from x = γ / λ = exp(-beta m). name -> [P]

    effective_weight: x / (1 + x) = sigmoid(-beta m), the slope of log(γ + λ) in log γ, DPO's weight of the pair.
    concavity: 1 - effective_weight / log(1 + x), one minus the exponent that the penalty log(1 + γ/λ) has at this γ:
    0 where it is linear, like l1 (γ << λ), towards 1 where it is flat, like l0 (γ >> λ). Ours.
    """
    chosen, rejected = logps.of_pairs(logps.policy.detach().double())
    reference_chosen, reference_rejected = logps.of_pairs(logps.reference.double())
    log_gamma, log_lambda = beta * (rejected - chosen), beta * (reference_rejected - reference_chosen)
    log_x = log_gamma - log_lambda
    exponent = torch.where(log_x < -30, 1.0, log_x.sigmoid() / F.softplus(log_x.clamp(min=-30)))
    columns = {"log_gamma": log_gamma, "log_lambda": log_lambda, "effective_weight": log_x.sigmoid()}
    return columns | {"concavity": 1 - exponent}


def summarise(view: Mapping[str, Tensor], weight: Tensor) -> dict[str, float]:
    """Weighted mean and quantiles of each column, and the share of pairs with γ < λ (one half of a tie counts)."""
    found = {"gamma_below_lambda": _mean(_below(view["log_gamma"], view["log_lambda"]), weight)}
    for name, values in view.items():
        found[name] = _mean(values, weight)
        found |= {f"{name}_q{100 * q:02.0f}": value for q, value in zip(QUANTILES, quantiles(values, weight))}
    return found


def quantiles(values: Tensor, weight: Tensor) -> list[float]:
    """The smallest value at which the share of weight reaches each of QUANTILES. [P], [P]"""
    ordered, order = values.sort()
    share = weight[order].cumsum(0) / weight.sum()
    at = torch.searchsorted(share, share.new_tensor(QUANTILES)).clamp(max=len(values) - 1)
    return ordered[at].tolist()


def histograms(view: Mapping[str, Tensor], weight: Tensor) -> dict[str, Any]:
    """Share of weight in each of BINS bins: name -> edges [BINS + 1], shares [BINS]."""
    tables = {}
    for name, values in view.items():
        low, high = float(values.min()), float(values.max())
        if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):  # one value, up to rounding: NumPy has no bins for it
            low, high = low - 0.5, high + 0.5
        shares, edges = np.histogram(
            values.cpu().numpy(), BINS, (low, high), weights=(weight / weight.sum()).cpu().numpy()
        )
        tables[name] = {"edges": edges.tolist(), "shares": shares.tolist()}
    return tables


def _mean(values: Tensor, weight: Tensor) -> float:
    return float((values * weight).sum() / weight.sum())


def _below(a: Tensor, b: Tensor) -> Tensor:
    return (a < b).double() + (a == b).double() / 2
