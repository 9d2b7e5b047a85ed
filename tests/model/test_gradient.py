"""Gradient against dense gradients of the merged model and NumPy's SVD of its change."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from policies import ALL, IDS, large_steps, make, moved, prepare

from cdpo.constraints.lora import LoRA
from cdpo.model.change import factors
from cdpo.model.gradient import Gradient


def objective(model):
    """A smooth function of the logits that depends on all of them."""
    logits = model(IDS).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    return (weight * logits.tanh()).sum()


def dense(model):
    """The gradient of the objective in every effective weight, from the merged model."""
    merged = copy.deepcopy(model)
    merged = merged.merge_and_unload() if hasattr(merged, "peft_config") else merged
    for parameter in merged.parameters():
        parameter.requires_grad_(True).grad = None
    objective(merged).backward()
    return {name: parameter.grad.numpy() for name, parameter in merged.named_parameters()}


def tangent(gradient, delta):
    """||g - (I - U U^T) g (I - V V^T)|| for the change U S V^T."""
    u, s, vt = np.linalg.svd(delta)
    rank = int((s > 1e-10 * s[0]).sum())
    u, v = u[:, :rank], vt[:rank].T
    left, right = np.eye(len(u)) - u @ u.T, np.eye(len(v)) - v @ v.T
    return np.linalg.norm(gradient - left @ gradient @ right)


def adapted(name, **options):
    """A policy with adapters that have moved, and its Gradient."""
    model, change = prepare(make(name), LoRA(**options))
    large_steps(model, steps=range(2), lr=0.3)
    return model, change


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 3, "alpha": 5, "rslora": True}], ids=["lora", "rslora"])
def test_of_adapted_weights_only_what_is_within_reach_of_their_rank(name, options):
    model, change = adapted(name, **options)
    objective(model).backward()
    gradients, deltas, found = dense(model), moved(model, name), Gradient(change).norms()
    assert set(found) == set(change.names)
    for key, norm in found.items():
        assert norm == pytest.approx(tangent(gradients[key], deltas[key]), rel=1e-6)
        assert norm < np.linalg.norm(gradients[key])
    assert Gradient(change).norm() == pytest.approx(math.hypot(*found.values()), rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "tabular"])
@pytest.mark.parametrize("which", [0, 1], ids=["tall", "wide"])
def test_factors_that_do_not_use_their_rank(name, which):
    """One factor has a direction of nothing, which the other knows nothing of: the change has rank 1."""
    model, change = adapted(name, rank=2)
    for layer in change.adapted.values():
        factor = factors(layer)[which]
        with torch.no_grad():
            (factor if which else factor.T)[1] = 0
    objective(model).backward()
    gradients, found = dense(model), Gradient(change).norms()
    for key, layer in change.adapted.items():
        tall, wide = (factor.detach().numpy() for factor in factors(layer))
        g = gradients[key]
        sides = (tall, wide.T) if len(g) == len(tall) else (wide.T, tall)  # those of an embedding are transposed
        u, v = (np.linalg.svd(one)[0][:, : np.linalg.matrix_rank(one)] for one in sides)
        rest = (np.eye(len(u)) - u @ u.T) @ g @ (np.eye(len(v)) - v @ v.T)
        assert found[key] == pytest.approx(np.linalg.norm(g - rest), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "tabular"])
@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
def test_inner_products_and_adding_the_change(name, adapter):
    model, change = prepare(make(name), *adapter)
    large_steps(model, steps=range(2), lr=0.3)
    objective(model).backward()
    gradients, deltas = dense(model), moved(model, name)
    gradient = Gradient(change)
    for key, inner in gradient.inner().items():
        assert inner == pytest.approx((gradients[key] * deltas[key]).sum(), rel=1e-9, abs=1e-9)
    shares = {key: 0.1 + i for i, key in enumerate(change.names)}
    shares.pop(left_out := change.names[-1])
    gradient.add_change(shares)
    for key, norm in gradient.norms().items():
        expected = gradients[key] + shares.get(key, 0.0) * deltas[key]
        assert norm == pytest.approx(tangent(expected, deltas[key]) if adapter else np.linalg.norm(expected), rel=1e-6)
    assert left_out in change.names


def test_keeping_and_the_l1_norm():
    model, change = prepare(make("tabular"))
    large_steps(model, steps=range(2), lr=0.3)
    objective(model).backward()
    full, delta = dense(model)["table.weight"], moved(model, "tabular")["table.weight"]
    gradient = Gradient(change)
    assert gradient.absolute() == pytest.approx(np.abs(full).sum(), rel=1e-12)
    gradient.keep(lambda g, d: (g * d > 0).double())
    kept = np.where(full * delta > 0, full, 0)
    np.testing.assert_allclose(model.table.weight.grad.numpy(), kept, rtol=1e-12)
    assert gradient.norm() == pytest.approx(np.linalg.norm(kept), rel=1e-12)
