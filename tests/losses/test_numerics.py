"""Where exp and log-odds would overflow, they go on as their tangents."""

from __future__ import annotations

import math

import pytest
import torch

from cdpo.losses.numerics import exp_or_tangent, log_odds


def value_and_slope(function, at: float) -> tuple[float, float]:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    y = function(x)
    return y.item(), torch.autograd.grad(y, x)[0].item()


def test_the_exponential_goes_on_as_its_tangent():
    for x in (-700.0, -1.0, 0.0, 29.9, 30.0):
        assert value_and_slope(exp_or_tangent, x) == pytest.approx((math.exp(x), math.exp(x)), rel=1e-12)
    for x in (30.1, 88.0, 1e6):
        assert value_and_slope(exp_or_tangent, x) == pytest.approx((math.exp(30) * (x - 29), math.exp(30)), rel=1e-12)


def test_log_odds_go_on_as_their_tangent():
    for p in (1e-300, 0.1, 0.5, 0.999, 1 - 2e-6):
        assert value_and_slope(log_odds, math.log(p)) == pytest.approx((math.log(p / (1 - p)), 1 / (1 - p)), rel=1e-9)
    for x in (-1e-7, 0.0, 3.0):
        expected = math.log(1e6) + 1e6 * (x + 1e-6), 1e6
        assert value_and_slope(log_odds, x) == pytest.approx(expected, rel=1e-6)
