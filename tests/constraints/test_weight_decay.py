"""Weight decay is that of torch's AdamW, and keeps to what other constraints leave it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policies import IDS, large_steps, make, moved, prepare

from cdpo.constraints.freeze import Freeze
from cdpo.constraints.lora import LoRA
from cdpo.constraints.weight_decay import WeightDecay
from cdpo.errors import ConfigError


def test_weight_decay_is_that_of_adamw():
    """Three steps, to bit-closeness, with and without biases and norms."""
    for matrices_only in (False, True):
        ours, theirs = make("gpt2"), make("gpt2")
        decay = WeightDecay(strength=0.5, matrices_only=matrices_only)
        prepare(ours, decay)
        matrices, vectors = ([p for p in theirs.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0 if matrices_only else 0.5}]
        adam = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.0)
        adamw = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            for model in (ours, theirs):
                model.zero_grad()
                model(IDS, labels=IDS).loss.backward()
            with torch.no_grad():
                decay.before_step(ours, 0.1)
            adam.step()
            adamw.step()
        for one, other in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
        decayed = [p for p in theirs.parameters() if p.ndim >= 2 or not matrices_only]
        assert decay.report() == {
            "binds": 1,
            "norm": pytest.approx(float(torch.cat([p.flatten() for p in decayed]).norm())),
        }


def test_with_sgd_it_is_the_penalty_alpha_theta_squared_in_the_loss():
    """docs/losses.md: strength 2 alpha, all weights, no momentum."""
    ours, theirs, alpha = make("gpt2"), make("gpt2"), 0.25
    decay = WeightDecay(strength=2 * alpha, matrices_only=False)
    prepare(ours, decay)
    steps = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    for _ in range(3):
        for model, step in zip((ours, theirs), steps):
            step.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters()) if model is theirs else 0.0
            (model(IDS, labels=IDS).loss + alpha * penalty).backward()
        with torch.no_grad():
            decay.before_step(ours, 0.1)
        for step in steps:
            step.step()
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_weight_decay_keeps_frozen_weights_and_the_rank_of_adapters():
    for other in (Freeze(train_last_layers=1), LoRA(rank=2)):
        decay = WeightDecay(strength=0.05)
        model, change = prepare(make("llama"), other, decay)
        large_steps(model, other, decay)
        deltas = moved(model, "llama")
        assert {key for key, delta in deltas.items() if delta.any()} <= set(change.names)
        if change.adapted:
            assert all(np.linalg.matrix_rank(deltas[key]) == 2 for key in change.names)


def test_weight_decay_beyond_zero_is_refused():
    decay = WeightDecay(strength=1.0)
    model, _ = prepare(make("tabular"), decay)
    with pytest.raises(ConfigError, match="flip"):
        decay.before_step(model, 1.5)
