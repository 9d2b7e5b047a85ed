"""Attention over packed trees: masks against their definition, and what would be ignored is refused."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from architectures import ITEMS, architectures, close, plain, score
from torch.nn.attention.flex_attention import flex_attention

from cdpo.batch import Item
from cdpo.constraints.lora import LoRA
from cdpo.data.packing import pack
from cdpo.model import attention, logps
from cdpo.model.layers import decoder_layers


@pytest.fixture
def masked(monkeypatch):
    """On the CPU too flex_attention is used."""

    class Masked(attention.Trees):
        def __init__(self, batch):
            super().__init__(batch)
            self.block_mask = attention._block_mask(batch.tree[0], batch.branch[0])

    monkeypatch.setattr(logps, "Trees", Masked)


@architectures
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_eager_flex_attention_gives_the_numbers_of_the_plain_forward(models, name, masked, monkeypatch):
    """What CUDA uses, run eagerly on the CPU, forward only. The compiled kernel itself is not run here."""
    calls = []

    def eager(*args, **kwargs):
        calls.append(1)
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "_flex", lambda: eager)
    model, other = models(name, "float32")
    with torch.no_grad():
        for kind in ("uneven", "even"):
            found = score(model, pack(ITEMS[kind]))
            close(found, plain(other, ITEMS[kind]), name, "float32")
    assert len(calls) == 4  # two layers, two batches


@architectures
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_compiled_layers_take_other_trees_without_another_compilation(models, name, adapted, masked):
    """Traced as on CUDA, with flex_attention within the layer; run by torch's eager kernels, forward only."""
    model, other = models(name, "float32")
    policy = copy.deepcopy(model)
    policy = LoRA(rank=2).wrap(policy) if adapted else policy
    attention.register_for_compiled_layers()  # after it the name stands for another function
    for layer in decoder_layers(policy):
        layer.compile(dynamic=True, backend="aot_eager")
    try:
        with torch.no_grad():
            for times, items in enumerate(ITEMS.values()):
                with torch.compiler.set_stance("fail_on_recompile" if times > 1 else "default"):
                    close(score(policy, pack(items)), plain(other, items), name, "float32")
    finally:
        attention.register()
        torch._dynamo.reset()


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
