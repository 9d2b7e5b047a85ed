"""Frozen weights stay bit for bit, and what cannot be frozen is refused."""

from __future__ import annotations

import pytest
from policies import large_steps, make, moved, prepare

from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.freeze import Freeze
from cdpo.errors import ConfigError


@pytest.mark.parametrize("name", ["llama", "qwen", "neox", "gpt2"])
def test_freeze_all_but_the_last_layer(name):
    freeze = Freeze(train_last_layers=1)
    model, _ = prepare(make(name), freeze)
    large_steps(model, freeze)
    deltas = moved(model, name)
    layer = {"neox": "gpt_neox.layers.1.", "gpt2": "transformer.h.1."}.get(name, "model.layers.1.")
    assert all(delta.any() == key.startswith(layer) for key, delta in deltas.items())
    frozen = sum(delta.size for key, delta in deltas.items() if not key.startswith(layer))
    assert freeze.report() == {"binds": 1, "frozen": frozen}


def test_freeze_patterns_are_searched_in_names():
    model, _ = prepare(make("llama"), Freeze(patterns=["embed", r"\.0\..*(q|k)_proj"]))
    large_steps(model)
    still = {key for key, delta in moved(model, "llama").items() if not delta.any()}
    assert still == {"model.embed_tokens.weight", *(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")}


def test_freeze_pattern_without_a_match_lists_near_names():
    with pytest.raises(ConfigError, match=r"'embed_token\.weights'.*model\.embed_tokens\.weight"):
        Freeze(patterns=["embed_token.weights"]).wrap(make("llama"))


@pytest.mark.parametrize(
    ("constraint", "name", "reason"),
    [
        (Freeze(patterns=["weight"]), "llama", "nothing is left to train"),
        (Freeze(patterns=["table"]), "tabular", "nothing is left to train"),
        (Freeze(train_last_layers=3), "llama", "has 2 layers"),
        (Freeze(train_last_layers=1), "tabular", "no decoder layers"),
        (BiasOnly(), "llama", "LlamaForCausalLM has no bias"),
        (BiasOnly(), "tabular", "TabularForCausalLM has no bias"),
    ],
)
def test_freezing_that_a_model_cannot_do(constraint, name, reason):
    with pytest.raises(ConfigError, match=reason):
        constraint.wrap(make(name))
