"""Schedules at hand-computed points; optimizers against recursions by hand, torch's own, and exact minima."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cdpo.optim import LBFGS, SGD, AdamW, OptimizerConfig, RMSprop

CURVATURE = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)
START = [3.0, -2.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # 2 warm-up steps of 6 at a rate of 8
        ("constant", [4, 8, 8, 8, 8, 8]),
        ("linear", [4, 8, 8, 6, 4, 2]),
        ("cosine", [4, 8, 8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    assert [OptimizerConfig(8.0, schedule, 2).learning_rate_at(step, 6) for step in range(6)] == pytest.approx(expected)


def test_schedules_without_warm_up_and_at_the_edges():
    assert [OptimizerConfig(3.0, "linear").learning_rate_at(step, 3) for step in range(3)] == pytest.approx([3, 2, 1])
    assert OptimizerConfig(3.0, "cosine").learning_rate_at(0, 1) == 3.0
    assert OptimizerConfig(3.0, "cosine").learning_rate_at(50, 100) == pytest.approx(1.5)
    assert [OptimizerConfig(6.0, "linear", 3).learning_rate_at(step, 2) for step in range(2)] == [
        2,
        4,
    ]  # all of it is warm-up
    assert [OptimizerConfig(6.0, "linear", 3).learning_rate_at(step, 3) for step in range(3)] == [2, 4, 6]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_learning_rate_must_be_positive(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        AdamW(rate)


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (AdamW, {"betas": (0.9, 1.0)}),
        (AdamW, {"betas": (-0.1, 0.9)}),
        (AdamW, {"eps": -1e-8}),
        (AdamW, {"warmup_steps": -1}),
        (SGD, {"momentum": -0.1}),
        (SGD, {"momentum": 1.0}),
        (RMSprop, {"alpha": 1.5}),
        (RMSprop, {"eps": math.nan}),
        (LBFGS, {"max_iter": 0}),
        (LBFGS, {"history_size": 0}),
        (LBFGS, {"tolerance_grad": -1.0}),
    ],
)
def test_options_out_of_range_are_named(cls, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        cls(1e-3, **option)


def descend(optimizer, steps=25):
    """The path on sum(curvature * x ** 2) / 2 from START, as training steps: rate set, closure given."""
    x = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optim = optimizer.build([x]) if isinstance(optimizer, OptimizerConfig) else optimizer([x])
    path = []

    def closure():
        optim.zero_grad()
        value = (CURVATURE * x**2).sum() / 2
        value.backward()
        return value.item()

    for _ in range(steps):
        optim.step(closure)
        path.append(x.detach().clone())
    return torch.stack(path)


def test_sgd_is_its_closed_form():
    """x_t = (1 - rate * curvature) ** t * x_0"""
    t = torch.arange(1, 26, dtype=torch.float64)[:, None]
    expected = (1 - 0.1 * CURVATURE) ** t * torch.tensor(START, dtype=torch.float64)
    torch.testing.assert_close(descend(SGD(0.1)), expected)


def test_sgd_with_momentum_is_heavy_ball():
    """x_{t+1} = x_t - rate * gradient + momentum * (x_t - x_{t-1})"""
    path = [torch.tensor(START, dtype=torch.float64)] * 2
    for _ in range(25):
        path.append(path[-1] - 0.1 * CURVATURE * path[-1] + 0.8 * (path[-1] - path[-2]))
    torch.testing.assert_close(descend(SGD(0.1, momentum=0.8)), torch.stack(path[2:]))


def test_rmsprop_is_its_recursion():
    x, square = torch.tensor(START, dtype=torch.float64), 0.0
    path = []
    for _ in range(25):
        gradient = CURVATURE * x
        square = 0.95 * square + 0.05 * gradient**2
        x = x - 0.01 * gradient / (square**0.5 + 1e-6)
        path.append(x)
    torch.testing.assert_close(descend(RMSprop(0.01, alpha=0.95, eps=1e-6)), torch.stack(path))
    torch.testing.assert_close(descend(RMSprop(0.01)), descend(lambda p: torch.optim.RMSprop(p, 0.01)))


def test_adamw_is_adam_without_weight_decay():
    """Kingma and Ba 2015, Algorithm 1."""
    x, first, second = torch.tensor(START, dtype=torch.float64), 0.0, 0.0
    path = []
    for t in range(1, 26):
        gradient = CURVATURE * x
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        x = x - 0.05 * (first / (1 - 0.8**t)) / ((second / (1 - 0.9**t)) ** 0.5 + 1e-3)
        path.append(x)
    torch.testing.assert_close(descend(AdamW(0.05, betas=(0.8, 0.9), eps=1e-3)), torch.stack(path))
    torch.testing.assert_close(descend(AdamW(0.05)), descend(lambda p: torch.optim.Adam(p, 0.05)))


def test_lbfgs_finds_the_minimum():
    assert descend(LBFGS(1.0), steps=3)[-1].abs().max() < 1e-7  # an objective below 1e-14
    strong = {"max_iter": 3, "history_size": 2, "line_search_fn": "strong_wolfe"}
    ours = LBFGS(1.0, max_iter=3, history_size=2, tolerance_grad=1e-7, tolerance_change=1e-9)
    torch.testing.assert_close(descend(ours, 2), descend(lambda p: torch.optim.LBFGS(p, **strong), 2))


def test_only_lbfgs_needs_the_full_batch():
    assert [cls(1e-3).full_batch for cls in (AdamW, SGD, RMSprop, LBFGS)] == [False, False, False, True]
