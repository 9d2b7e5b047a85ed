"""Change against weights that peft merged and numpy measured."""

import math

import numpy as np
import pytest
import torch
from policies import ALL, large_steps, make, moved, prepare

from cdpo.constraints.lora import LoRA
from cdpo.errors import ConfigError
from cdpo.model.change import Change

ADAPTERS = {
    "plain": [],
    "lora": [LoRA(rank=2)],
    "rslora": [LoRA(rank=3, alpha=4, rslora=True)],
    "dora": [LoRA(rank=2, dora=True)],
    "embedding": [LoRA(rank=2, target_modules=["embed_tokens", "wte", "embed_in", "table"])],
    "dora_embedding": [LoRA(rank=2, dora=True, target_modules=["embed_tokens", "wte", "embed_in", "table"])],
}


@pytest.fixture(scope="module", params=[(name, kind) for name in ALL for kind in ADAPTERS], ids="-".join)
def trained(request):
    """A policy's name, its change as cdpo sees it, and as numpy does."""
    name, kind = request.param
    model, change = prepare(make(name), *ADAPTERS[kind])
    large_steps(model, steps=range(2), lr=0.5)
    return change, moved(model, name)


def test_deltas_are_those_of_the_merged_model(trained):
    change, expected = trained
    deltas = dict(change.deltas())
    assert change.names == list(deltas)
    assert {name for name, delta in expected.items() if delta.any()} == set(deltas)
    for name, delta in deltas.items():
        np.testing.assert_allclose(delta.numpy(), expected[name], atol=1e-12)


def test_norms_and_largest_change(trained):
    change, expected = trained
    norms = change.norms()
    for name, norm in norms.items():
        assert norm == pytest.approx(np.sqrt((expected[name] ** 2).sum()), rel=1e-10)
    assert change.norm() == pytest.approx(math.sqrt(sum((delta**2).sum() for delta in expected.values())), rel=1e-10)
    assert change.max_abs() == pytest.approx(max(abs(delta).max() for delta in expected.values()), rel=1e-10)


def test_effective_rank(trained):
    change, expected = trained
    ranks = []
    for delta in expected.values():
        if delta.ndim == 2 and delta.any():
            share = np.linalg.svd(delta, compute_uv=False)
            share = share[share > 1e-12 * share[0]] / share.sum()
            ranks.append(np.exp(-(share * np.log(share)).sum()))
    assert change.effective_rank() == pytest.approx(np.mean(ranks), rel=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ALL)
def test_nothing_has_changed_at_the_start(name, kind):
    _, change = prepare(make(name), *ADAPTERS[kind])
    assert (change.norm(), change.max_abs(), change.effective_rank()) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["plain", "lora", "rslora", "embedding"])
@pytest.mark.parametrize("name", ["gpt2", "tabular"])
def test_scale_shrinks_the_named_weights_only(name, kind):
    model, change = prepare(make(name), *ADAPTERS[kind])
    large_steps(model, steps=range(2))
    before = moved(model, name)
    shrunk = change.names[0]
    change.scale({shrunk: 0.25})
    for key, delta in moved(model, name).items():
        np.testing.assert_allclose(delta, before[key] * (0.25 if key == shrunk else 1), rtol=1e-9, atol=1e-12)


def test_scaling_a_dora_layer_is_refused():
    _, change = prepare(make("tabular"), LoRA(rank=2, dora=True))
    with pytest.raises(ConfigError, match="dora=false"):
        change.scale({"table.weight": 0.5})


def test_only_trainable_plain_parameters_are_copied():
    model = make("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    names = [name for name, _, _ in Change(model).plain()]
    assert names == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    assert Change(model).trainable() == 2 * 16 * 20


def test_trainable_counts_adapter_factors():
    _, change = prepare(make("tabular"), LoRA(rank=2))
    assert change.trainable() == 2 * (24 + 8)
    assert list(change.plain()) == []


def test_a_small_change_of_bf16_weights_is_measured_in_float32():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    change = Change(model)
    torch.nn.init.constant_(model.weight, 1 + 2**-7)
    assert change.norm() == 2**-7


def test_matrices_of_a_stack_count_one_by_one():
    model = torch.nn.Module()
    model.experts = torch.nn.Parameter(torch.zeros(3, 4, 4))
    change = Change(model)
    with torch.no_grad():
        model.experts[0] = torch.eye(4)
        model.experts[1, 0, 0] = 1
    assert change.effective_rank() == pytest.approx((4 + 1) / 2)


def test_a_model_without_trainable_parameters():
    model = make("tabular").requires_grad_(False)
    change = Change(model)
    assert (change.norm(), change.max_abs(), change.effective_rank(), change.trainable()) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "tabular"])
def test_merging_an_untouched_float32_dora_is_no_change(name):
    _, change = prepare(make(name).float(), LoRA(rank=2, dora=True))
    assert change.max_abs() == 0


@pytest.mark.parametrize(("name", "random_factor"), [("gpt2", "lora_A"), ("tabular", "lora_embedding_B")])
def test_scaling_keeps_the_factor_that_started_at_random(name, random_factor):
    model, change = prepare(make(name), LoRA(rank=2))
    before = {key: parameter.clone() for key, parameter in model.named_parameters() if random_factor in key}
    change.scale(dict.fromkeys(change.names, 0.5))
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_at_start_the_policy_is_the_reference_and_afterwards_all_is_as_it_was(trained):
    change, _ = trained
    model = change.model
    adapted = list(change.adapted.values())
    if adapted:  # a factor that something else keeps fixed stays fixed
        next(p for name, p in adapted[0].named_parameters() if "lora" in name).requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    ids = torch.tensor([[1, 2, 3]])

    def logits():
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    moved_logits = logits()
    with change.at_start():
        start = logits()
    assert not torch.equal(start, moved_logits)
    assert torch.equal(logits(), moved_logits)
    for name, parameter in model.named_parameters():
        value, trains = before[name]
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == trains
