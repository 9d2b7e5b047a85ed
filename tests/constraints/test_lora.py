"""LoRA: what adapters may change, by singular values; where they sit, and how precise and how large they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policies import NAMES, large_steps, make, moved, prepare, weights

from cdpo.constraints.lora import LoRA
from cdpo.errors import ConfigError


@NAMES
@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": 3.0}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_lora_changes_have_low_rank(name, rank, options):
    model, change = prepare(make(name), LoRA(rank=rank, **options))
    large_steps(model)
    deltas = moved(model, name)
    assert {key for key, delta in deltas.items() if delta.any()} == set(change.names)
    for key in change.names:
        values = np.linalg.svd(deltas[key], compute_uv=False)
        assert values[rank - 1] > 1e-6 * values[0]
        assert values[rank] < 1e-12 * values[0]


@NAMES
def test_lora_adapts_all_linear_layers_but_the_head(name):
    _, change = prepare(make(name), LoRA(rank=1))
    matrices = {key for key, value in weights(make(name)).items() if value.ndim == 2}
    lookups = {
        "model.embed_tokens.weight",
        "gpt_neox.embed_in.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert set(change.names) == matrices - lookups - {"lm_head.weight", "embed_out.weight"}


@pytest.mark.parametrize(("base", "adapter"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", ["llama", "tabular"])
def test_lora_adapters_are_as_precise_as_the_base_or_float32(name, base, adapter):
    model, _ = prepare(make(name).to(getattr(torch, base)), LoRA(rank=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, adapter)}


@pytest.mark.parametrize(("options", "scaling"), [({}, 2), ({"alpha": 3}, 0.75), ({"alpha": 3, "rslora": True}, 1.5)])
def test_lora_scaling(options, scaling):
    _, change = prepare(make("llama"), LoRA(rank=4, **options))
    assert {layer.scaling["default"] for layer in change.adapted.values()} == {scaling}


def test_lora_targets_may_be_a_regular_expression_or_names():
    for targets in (r".*\.1\..*(q|v)_proj", ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]):
        _, change = prepare(make("llama"), LoRA(rank=1, target_modules=targets))
        assert change.names == [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qv"]


def test_lora_targets_that_match_nothing_are_an_error():
    with pytest.raises(ConfigError, match="no_such_layer"):
        LoRA(rank=1, target_modules=["no_such_layer"]).wrap(make("llama"))


def test_dora_changes_norms_too():
    model, _ = prepare(make("tabular"), LoRA(rank=1, dora=True))
    large_steps(model, lr=1.0)
    assert np.linalg.matrix_rank(moved(model, "tabular")["table.weight"]) > 1
