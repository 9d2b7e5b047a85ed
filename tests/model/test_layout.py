"""Packed trees where an architecture computes the right numbers from them, padded rows where it does not."""

from __future__ import annotations

import pytest
import torch
from architectures import DIMS, ITEMS, SHAPE, VOCABULARY, architectures, build, close, load, make_items, plain
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    MambaConfig,
    MistralConfig,
)

from cdpo.data.packing import pack
from cdpo.errors import ConfigError
from cdpo.model import attention
from cdpo.model.layout import choose_layout
from cdpo.model.logps import Scorer

WINDOWED = {**SHAPE, "num_key_value_heads": 1, "sliding_window": 4}
OTHERS = {  # none of these can attend over packed trees
    "mistral, sliding window": MistralConfig(**WINDOWED),
    "gemma 2, soft-capping": Gemma2Config(**WINDOWED, head_dim=8),
    "gemma 3, sliding window": Gemma3TextConfig(**WINDOWED, head_dim=8),
    "llama 4, chunks": Llama4TextConfig(
        **SHAPE,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=4,
        intermediate_size_mlp=20,
    ),
    "mamba, no attention": MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1),
    "bloom, alibi": BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
    "falcon, its own attention": FalconConfig(**DIMS, alibi=False),
}


@architectures
def test_known_architectures_take_packed_trees(folders, name):
    for dtype in ("float32", "bfloat16", "float64"):
        model = load(folders[name], dtype, packed=False)
        assert choose_layout(Scorer(model), ITEMS["uneven"], "trees") == (False, "")
        assert model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["uneven", "one token first"])
def test_other_architectures_fall_back_with_a_reason(name, kind):
    """One-token responses encode no branch, so nothing of a sibling is there to be seen: they alone prove nothing."""
    items = ITEMS["uneven"] if kind == "uneven" else make_items((2, [1, 1]), (5, [4, 6]))
    scorer = Scorer(model := build(OTHERS[name]))
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = plain(model, items)
        padded, reason = choose_layout(scorer, items, "trees")
        assert padded
        assert reason
        assert model.config._attn_implementation == before
        close(scorer(pack(items, padded=True))[0], expected, name, "float32")


def test_a_chosen_attention_pads(folders):
    model = load(folders["llama"], packed=False)
    assert choose_layout(Scorer(model), ITEMS["even"], "sdpa") == (True, "model.attention=sdpa")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("error", [NotImplementedError(), KeyError("x"), IndexError("no such row\nat all")])
def test_an_architecture_that_chokes_falls_back(folders, error, monkeypatch):
    model, forward = load(folders["llama"], packed=False), Scorer.forward

    def choke(scorer, batch):
        if batch.attention_mask is None:
            raise error
        return forward(scorer, batch)

    monkeypatch.setattr(Scorer, "forward", choke)
    padded, reason = choose_layout(Scorer(model), ITEMS["even"], "trees")
    assert padded
    assert reason in ("NotImplementedError", "'x'", "no such row")
    assert model.config._attn_implementation == "sdpa"


def test_packed_rows_are_refused_by_an_attention_that_would_ignore_the_trees(folders):
    scorer = Scorer(load(folders["llama"], packed=False))
    with pytest.raises(ConfigError, match="does not attend over packed trees"):
        scorer(pack(ITEMS["even"]))
    expected = scorer(pack(ITEMS["even"], padded=True))[0]
    assert choose_layout(scorer, ITEMS["even"], "trees") == (False, "")
    torch.testing.assert_close(scorer(pack(ITEMS["even"]))[0], expected)
