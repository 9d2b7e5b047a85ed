"""Sets around the start are held after steps that are far too large, and projections go to the nearest point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from policies import NAMES, flat, large_steps, make, moved, prepare, weights

from cdpo.constraints.freeze import Freeze
from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.linf_ball import LinfBall
from cdpo.constraints.lora import LoRA
from cdpo.constraints.sparse_topk import SparseTopK
from cdpo.constraints.weight_decay import WeightDecay


def total(deltas):
    return math.sqrt(sum((delta**2).sum() for delta in deltas.values()))


@NAMES
@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
def test_l2_ball_holds_the_whole_model(name, adapter):
    ball = L2Ball(radius=0.7)
    model, _ = prepare(make(name), *adapter, ball)
    for steps in ([0], [1, 2, 3]):
        large_steps(model, *adapter, ball, steps=steps)
        assert total(moved(model, name)) == pytest.approx(0.7, rel=1e-9)
    assert ball.report() == {"binds": 1, "boundary_distance": 0, "steps_projected": 4}
    large_steps(model, *adapter, ball, steps=[4], lr=0)
    assert ball.report()["boundary_distance"] == pytest.approx(0, abs=1e-12)


@NAMES
@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
def test_l2_ball_per_tensor(name, adapter):
    ball = L2Ball(radius=0.3, per_tensor=True)
    model, change = prepare(make(name), *adapter, ball)
    large_steps(model, *adapter, ball)
    deltas = moved(model, name)
    for key in change.names:
        assert np.linalg.norm(deltas[key]) == pytest.approx(0.3, rel=1e-9)
    if adapter:
        assert all(np.linalg.matrix_rank(deltas[key]) <= 2 for key in change.names)


@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
@pytest.mark.parametrize("share", [0.001, 0.9])
def test_l2_ball_projects_to_the_nearest_point(share, adapter):
    free, _ = prepare(make("gpt2"), *adapter)
    large_steps(free, steps=[0])
    outside = flat(moved(free, "gpt2"))
    ball = L2Ball(radius=share * np.linalg.norm(outside))
    held, _ = prepare(make("gpt2"), *adapter, ball)
    large_steps(held, ball, steps=[0])
    np.testing.assert_allclose(flat(moved(held, "gpt2")), share * outside, rtol=1e-9, atol=1e-12)


def test_l2_ball_leaves_alone_what_is_inside():
    ball = L2Ball(radius=1e6)
    free, _ = prepare(make("llama"))
    held, _ = prepare(make("llama"), ball)
    large_steps(free)
    large_steps(held, ball)
    assert all((a == b).all() for a, b in zip(weights(free).values(), weights(held).values()))
    report = ball.report()
    assert (report["binds"], report["steps_projected"]) == (0, 0)
    assert report["boundary_distance"] == pytest.approx(1e6 - total(moved(held, "llama")), rel=1e-12)


@NAMES
def test_linf_ball(name):
    ball = LinfBall(radius=0.01)
    model, _ = prepare(make(name), ball)
    large_steps(model, ball)
    assert max(abs(delta).max() for delta in moved(model, name).values()) == pytest.approx(0.01, rel=1e-9)
    assert ball.report() == {"binds": 1, "boundary_distance": 0, "steps_projected": 4}
    large_steps(model, ball, steps=[5], lr=0)
    assert ball.report()["boundary_distance"] == pytest.approx(0, abs=1e-12)


def test_linf_ball_clips_every_weight():
    ball = LinfBall(radius=3.0)
    free, _ = prepare(make("llama"))
    held, _ = prepare(make("llama"), ball)
    large_steps(free, steps=[0])
    large_steps(held, ball, steps=[0])
    expected = flat(moved(free, "llama")).clip(-3, 3)
    assert 0 < (abs(expected) < 3).mean() < 1
    np.testing.assert_allclose(flat(moved(held, "llama")), expected, atol=1e-12)


@NAMES
@pytest.mark.parametrize("k", [1, 50])
def test_sparse_topk_counts(name, k):
    sparse = SparseTopK(k=k)
    model, _ = prepare(make(name), sparse)
    large_steps(model, sparse)
    assert np.count_nonzero(flat(moved(model, name))) == k
    assert sparse.report() == {"binds": 1, "boundary_distance": 0, "steps_projected": 4}


def test_sparse_topk_keeps_the_largest_changes():
    sparse = SparseTopK(k=40)
    free, _ = prepare(make("llama"))
    held, _ = prepare(make("llama"), sparse)
    large_steps(free, steps=[0])
    large_steps(held, sparse, steps=[0])
    expected = flat(moved(free, "llama"))
    expected[abs(expected).argsort()[:-40]] = 0
    np.testing.assert_array_equal(flat(moved(held, "llama")), expected)


@torch.no_grad()
def test_sparse_topk_breaks_ties():
    model = make("tabular")
    model.table.weight.zero_()
    sparse = SparseTopK(k=7)
    prepare(model, sparse)
    model.table.weight += 1
    sparse.after_step(model, {})
    assert int(model.table.weight.sum()) == int(model.table.weight.count_nonzero()) == 7


def test_sparse_topk_fraction_is_of_the_trained_weights():
    freeze, sparse = Freeze(train_last_layers=1), SparseTopK(fraction=0.25)
    model, change = prepare(make("llama"), freeze, sparse)
    large_steps(model, freeze, sparse)
    assert np.count_nonzero(flat(moved(model, "llama"))) == change.trainable() // 4


def test_projections_and_shrinking_hold_together():
    constraints = [SparseTopK(k=60), L2Ball(radius=0.5), LinfBall(radius=0.1), L2ToStart(strength=1.0)]
    constraints += [L2Ball(radius=0.3, per_tensor=True), WeightDecay(strength=0.01)]
    for order in (constraints, constraints[::-1]):
        model, _ = prepare(make("llama"), *order)
        large_steps(model, *order)
        deltas = moved(model, "llama")
        assert 0 < np.count_nonzero(flat(deltas)) <= 60
        assert total(deltas) <= 0.5 * (1 + 1e-12)
        assert abs(flat(deltas)).max() <= 0.1 * (1 + 1e-12)
        assert max(np.linalg.norm(delta) for delta in deltas.values()) <= 0.3 * (1 + 1e-12)
