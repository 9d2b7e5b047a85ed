"""Packed trees and padded rows against transformers' own forward over one sequence at a time, values and gradients."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import (
    CONFIGS,
    ITEMS,
    POSITIONS,
    SHAPE,
    VOCABULARY,
    build,
    gradients,
    load,
    make_items,
    plain,
    plain_logits,
    random_weights,
)
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
)

from cdpo.batch import Item
from cdpo.constraints.lora import LoRA
from cdpo.data.packing import pack
from cdpo.model import attention
from cdpo.model.layout import layout_for
from cdpo.model.logps import one_by_one, score, score_with_statistics

TOLERANCE = {"float32": 2e-5, "float64": 1e-10}
IN_FLOAT32 = ("llama", "qwen3")  # their norms compute in float32 whatever the dtype is, and so do the gradients
architectures = pytest.mark.parametrize("name", CONFIGS)
DIMS = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
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


def close(found, expected, name, dtype="float64"):
    """Equal but for rounding."""
    tolerance = max(TOLERANCE[dtype], 2e-6 if name in IN_FLOAT32 else 0)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def models(folders):
    """(packed, plain) models of an architecture and dtype with the same weights; loaded once."""
    kept = {}

    def get(name, dtype="float64"):
        if (name, dtype) not in kept:
            kept[name, dtype] = load(folders[name], dtype), load(folders[name], dtype, packed=False)
        return kept[name, dtype]

    return get


@architectures
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("layout", ["trees", "rows"])
def test_log_probs_and_gradients_equal_the_plain_forward(models, name, dtype, kind, layout):
    packed, other = models(name, dtype)
    model, items = packed if layout == "trees" else other, ITEMS[kind]
    expected = plain(other, items)
    expected_gradients = gradients(other, expected)
    found = score(model, pack(items, padded=layout == "rows"))
    close(found, expected, name, dtype)
    close(gradients(model, found), expected_gradients, name, dtype)
    assert max(g.abs().max() for g in expected_gradients.values()) > 0.1  # the gradients are no zeros


@architectures
def test_one_by_one_is_the_plain_forward(models, name):
    _, model = models(name, "float32")
    with torch.no_grad():
        close(one_by_one(model, ITEMS["uneven"]), plain(model, ITEMS["uneven"]), name, "float32")


@architectures
@pytest.mark.parametrize("layout", ["trees", "rows"])
def test_a_sequence_may_fill_all_positions(models, name, layout):
    packed, other = models(name)
    items = make_items((POSITIONS - 3, [4, 2]))  # the last token of a response needs no position
    with torch.no_grad():
        found = score(packed if layout == "trees" else other, pack(items, padded=layout == "rows"))
        close(found, one_by_one(other, items), name)


@architectures
@pytest.mark.parametrize("layout", ["trees", "rows"])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (1,) * 8])
def test_gradients_do_not_depend_on_the_split(models, name, layout, sizes):
    model = models(name)[layout == "rows"]
    items = make_items(*((3 + i % 4, [1 + i % 3, 4, 2][: 2 + i % 2]) for i in range(8)))
    ends = np.cumsum([0, *sizes])
    parts = [pack(items[a:b], padded=layout == "rows") for a, b in pairwise(ends)]
    whole = gradients(model, score(model, pack(items, padded=layout == "rows")))
    split = gradients(model, torch.cat([score(model, part) for part in parts]))
    close(split, whole, name)


@architectures
@pytest.mark.parametrize("lora", [False, True])
def test_training_mode_with_gradient_checkpointing(folders, name, lora):
    """As a run trains: adapters, checkpointed layers and training mode change neither log-probs nor gradients."""
    model, other = load(folders[name]), load(folders[name], packed=False)
    if lora:
        model, other = (LoRA(rank=2).wrap(m) for m in (model, other))
        torch.manual_seed(3)
        for own, its in zip(model.parameters(), other.parameters()):
            if own.requires_grad:  # B = 0 would leave half of the gradients 0
                own.data = its.data = 0.3 * torch.randn_like(own)
    expected = plain(other.eval(), ITEMS["uneven"])
    expected_gradients = gradients(other, expected)
    assert all("lora" in key for key in expected_gradients) == lora
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    base = model.get_base_model() if lora else model
    names = ("layers.0.input_layernorm", "h.0.ln_1")
    layer = next(module for key, module in base.named_modules() if key.endswith(names))
    layer.register_forward_hook(lambda *_: calls.append(1))
    found = score(model, pack(ITEMS["uneven"]))
    close(found, expected, name)
    close(gradients(model, found), expected_gradients, name)
    assert len(calls) == 2  # the backward pass computed the layer again


@architectures
@pytest.mark.parametrize("kind", ["uneven", "even"])
def test_a_response_does_not_see_its_siblings_or_other_items(models, name, kind):
    model, _ = models(name, "float32")
    items = ITEMS[kind]
    changed = list(items)
    response = items[1].responses[1]
    other = [(token + 1 - 2) % (VOCABULARY - 2) + 2 for token in response]
    changed[1] = Item(items[1].prompt, [items[1].responses[0], other, *items[1].responses[2:]], items[1].pairs)
    at = len(items[0].responses) + 1
    with torch.no_grad():
        before, after = score(model, pack(items)), score(model, pack(changed))
    assert before[at] != after[at]
    kept = [i for i in range(len(before)) if i != at]
    assert torch.equal(before[kept], after[kept])  # bit for bit


@architectures
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_eager_flex_attention_gives_the_numbers_of_the_plain_forward(models, name, monkeypatch):
    """What CUDA uses, run eagerly on the CPU, forward only. The compiled kernel itself is not run here."""

    def block_mask(trees):
        return attention._block_mask(trees._batch.tree[0], trees._batch.branch[0])

    calls = []

    def eager(*args, **kwargs):
        calls.append(1)
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(attention.Trees, "block_mask", property(block_mask))
    monkeypatch.setattr(attention, "_compiled_flex", lambda: eager)
    model, other = models(name, "float32")
    with torch.no_grad():
        for kind in ("uneven", "even"):
            found = score(model, pack(ITEMS[kind]))
            close(found, plain(other, ITEMS[kind]), name, "float32")
    assert len(calls) == 4  # two layers, two batches


def test_masks_are_the_definition():
    batch = pack(ITEMS["uneven"])
    tree, branch = batch.tree[0].tolist(), batch.branch[0].tolist()
    n = len(tree)

    def sees(q, k):
        return tree[q] == tree[k] and k <= q and (branch[k] == 0 or branch[k] == branch[q])

    expected = torch.tensor([[sees(q, k) for k in range(n)] for q in range(n)])
    blocks = torch.block_diag(*attention.Trees(batch).masks)
    assert torch.equal(blocks, expected)
    rule = attention._block_mask(batch.tree[0], batch.branch[0]).mask_mod
    one = torch.zeros((), dtype=torch.long)
    found = torch.tensor([[bool(rule(one, one, torch.tensor(q), torch.tensor(k))) for k in range(n)] for q in range(n)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_hold_all_that_is_seen_and_full_ones_nothing_else(seed):
    """Against the definition, block by block; trees from a few tokens to several blocks, K from 2 to 5."""
    draw = Random(seed)
    items = [
        Item([1] * draw.choice([1, 30, 150, 400]), [[2] * draw.randint(1, 300) for _ in range(draw.randint(2, 5))], [])
        for _ in range(6)
    ]
    batch = pack(items)
    n, size = batch.tokens, attention.BLOCK
    blocks = attention._block_mask(batch.tree[0], batch.branch[0])
    seen = torch.zeros(-(-n // size) * size, -(-n // size) * size, dtype=torch.bool)
    seen[:n, :n] = torch.block_diag(*attention.Trees(batch).masks)
    seen = seen.unfold(0, size, size).unfold(1, size, size)  # [query block, key block, size, size]
    listed = {}
    for kind in ("kv", "full_kv"):
        listed[kind] = torch.zeros(seen.shape[:2], dtype=torch.bool)
        for q, (count, order) in enumerate(
            zip(getattr(blocks, f"{kind}_num_blocks")[0, 0], getattr(blocks, f"{kind}_indices")[0, 0])
        ):
            listed[kind][q, order[:count]] = True
    assert not (listed["kv"] & listed["full_kv"]).any()
    assert ((listed["kv"] | listed["full_kv"]) >= seen.any(-1).any(-1)).all()
    assert seen.all(-1).all(-1)[listed["full_kv"]].all()
    needed = int(seen.any(-1).any(-1).sum())
    assert needed <= int((listed["kv"] | listed["full_kv"]).sum()) <= 1.2 * needed
    assert int(listed["full_kv"].sum()) > 0


def test_what_would_be_ignored_is_refused():
    x = torch.randn(1, 2, 3, 8)
    trees = attention.Trees(pack([Item([1, 2], [[3, 4], [5]], [])]))  # three tokens are encoded
    attention.tree_attention(None, x, x, x, None, trees=trees)
    for options in ({"softcap": 30.0}, {"sliding_window": 4}, {"s_aux": x}, {"position_bias": x}):
        with pytest.raises(ValueError, match="packed trees do not support"):
            attention.tree_attention(None, x, x, x, None, trees=trees, **options)
    with pytest.raises(ValueError, match="packed trees do not support"):
        attention.tree_attention(None, x, x, x, torch.zeros(1, 1, 3, 3), trees=trees)
    with pytest.raises(ValueError, match="packed trees do not support"):
        attention.tree_attention(None, x, x, x, None)
    trees.block_mask = object()  # as on CUDA
    with pytest.raises(ValueError, match="dropout"):
        attention.tree_attention(None, x, x, x, None, dropout=0.1, trees=trees)


@architectures
def test_known_architectures_take_packed_trees(folders, name):
    for dtype in ("float32", "bfloat16", "float64"):
        model = load(folders[name], dtype, packed=False)
        assert layout_for(model, ITEMS["uneven"], "trees") == (False, "")
        assert model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["uneven", "one token first"])
def test_other_architectures_fall_back_with_a_reason(name, kind):
    """One-token responses encode no branch, so nothing of a sibling is there to be seen: they alone prove nothing."""
    items = ITEMS["uneven"] if kind == "uneven" else make_items((2, [1, 1]), (5, [4, 6]))
    model = build(OTHERS[name])
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = plain(model, items)
        padded, reason = layout_for(model, items, "trees")
        assert padded
        assert reason
        assert model.config._attn_implementation == before
        close(score(model, pack(items, padded=True)), expected, name, "float32")


def test_a_chosen_attention_pads(folders):
    model = load(folders["llama"], packed=False)
    assert layout_for(model, ITEMS["even"], "sdpa") == (True, "model.attention=sdpa")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("error", [NotImplementedError(), KeyError("x"), IndexError("no such row\nat all")])
def test_an_architecture_that_chokes_falls_back(folders, error, monkeypatch):
    model = load(folders["llama"], packed=False)

    def choke(model, batch):
        if batch.attention_mask is None:
            raise error
        return score(model, batch)

    monkeypatch.setattr("cdpo.model.layout.score", choke)
    padded, reason = layout_for(model, ITEMS["even"], "trees")
    assert padded
    assert reason in ("NotImplementedError", "'x'", "no such row")
    assert model.config._attn_implementation == "sdpa"


def test_generation_attends_as_transformers_does(models):
    packed, other = models("llama", "float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 6, "do_sample": False}
    with attention.ordinary_attention(packed):
        found = packed.generate(ids, **options)
    assert torch.equal(found, other.generate(ids, **options))
    assert packed.config._attn_implementation == attention.NAME
    with pytest.raises(ZeroDivisionError), attention.ordinary_attention(packed):
        _ = 1 / 0
    assert packed.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("layout", ["trees", "rows"])
def test_statistics_are_their_formulas(models, layout):
    packed, other = models("qwen3")
    items = ITEMS["uneven"]
    with torch.no_grad():
        model = packed if layout == "trees" else other
        found, statistics = score_with_statistics(model, pack(items, padded=layout == "rows"))
        torch.testing.assert_close(found, score(model, pack(items, padded=layout == "rows")), rtol=0, atol=0)
        entropy, logit = [], []
        for item in items:
            for response in item.responses:
                rows = plain_logits(other, item, response).tolist()
                totals = [sum(math.exp(z) for z in row) for row in rows]
                per_token = [
                    -sum(math.exp(z) / total * (z - math.log(total)) for z in row) for row, total in zip(rows, totals)
                ]
                entropy.append(sum(per_token) / len(rows))
                logit.append(sum(map(sum, rows)) / len(rows) / VOCABULARY)
    torch.testing.assert_close(statistics.entropy, torch.tensor(entropy, dtype=torch.float64))
    torch.testing.assert_close(statistics.logit, torch.tensor(logit, dtype=torch.float64))


class Given(torch.nn.Module):
    """A model whose logits are given, [T, vocabulary]."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, logits_to_keep, **_):
        return SimpleNamespace(logits=self.logits[None, logits_to_keep])


def test_bfloat16_logits_lose_nothing_more():
    """2,048 tokens: the sum over bfloat16 logits is within 1e-3 of float64's; bfloat16 arithmetic is off by more."""
    n, vocabulary = 2048, 2000
    logits = (5 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(0))).bfloat16()
    z = logits[: n - 1].double().numpy()
    exact = (z[np.arange(n - 1), np.arange(n - 1) % vocabulary] - np.log(np.exp(z).sum(1))).sum()
    item = Item([0], [[i % vocabulary for i in range(n - 1)], [1]], [])
    model = Given(logits)
    found, statistics = score_with_statistics(model, pack([item]))
    assert abs(found.tolist()[0] - exact) < 1e-3
    naive = logits[: n - 1].log_softmax(-1).gather(1, torch.tensor(item.responses[0])[:, None]).sum()
    assert abs(float(naive) - exact) > 1
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert float(statistics.entropy[0]) == pytest.approx(-(p * np.log(p)).sum(1).mean(), abs=1e-4)
    found.sum().backward()
    assert model.logits.grad.isfinite().all()


def test_impossible_tokens_leave_finite_numbers():
    """A logit of -inf elsewhere is probability 0, not NaN; on a response's own token the log-prob is -inf."""
    logits = torch.tensor([[0.0, 1.0, -math.inf], [2.0, -math.inf, 0.5]])
    model = Given(logits)
    item = Item([0], [[1, 0], [2]], [])
    found, statistics = score_with_statistics(model, pack([item]))
    first, second = 1 - math.log(1 + math.e), 2 - math.log(math.exp(2) + math.exp(0.5))
    assert found.tolist() == [pytest.approx(first + second), -math.inf]
    p, q = 1 / (1 + math.e), 1 / (1 + math.exp(1.5))
    entropies = [-(x * math.log(x) + (1 - x) * math.log(1 - x)) for x in (p, q)]
    assert statistics.entropy.tolist() == pytest.approx([sum(entropies) / 2, entropies[0]])
    found[0].backward()
    assert model.logits.grad.isfinite().all()


def test_functional_dropout_is_zeroed():
    """OPT drops by plain floats on its modules; a loaded model must not drop in training mode."""
    from cdpo.model.pretrained import without_dropout

    sizes = {"ffn_dim": 20, "word_embed_proj_dim": 16, "max_position_embeddings": POSITIONS, **DIMS}
    config = OPTConfig(**sizes, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    model = random_weights(build(config))
    with torch.no_grad():
        expected = plain(model, ITEMS["even"])
        copy.deepcopy(model).train()
        assert not torch.equal(plain(model.train(), ITEMS["even"]), expected)
        torch.testing.assert_close(plain(without_dropout(model).train(), ITEMS["even"]), expected)
