"""Packed trees and padded rows against transformers' own forward over one sequence at a time, values and gradients."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import (
    ITEMS,
    POSITIONS,
    TOLERANCE,
    VOCABULARY,
    architectures,
    close,
    gradients,
    lean,
    load,
    make_items,
    plain,
    plain_logits,
    score,
)

from cdpo.batch import Item
from cdpo.constraints.lora import LoRA
from cdpo.data.packing import pack
from cdpo.model.logps import Scorer, one_by_one


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


@pytest.mark.parametrize("layout", ["trees", "rows"])
def test_statistics_are_their_formulas(models, layout):
    packed, other = models("qwen3")
    items = ITEMS["uneven"]
    with torch.no_grad():
        model = packed if layout == "trees" else other
        found, statistics = lean(model)(pack(items, padded=layout == "rows"), statistics=True)
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
    found, statistics = Scorer(model)(pack([item]), statistics=True)
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
    found, statistics = Scorer(model)(pack([item]), statistics=True)
    first, second = 1 - math.log(1 + math.e), 2 - math.log(math.exp(2) + math.exp(0.5))
    assert found.tolist() == [pytest.approx(first + second), -math.inf]
    p, q = 1 / (1 + math.e), 1 / (1 + math.exp(1.5))
    entropies = [-(x * math.log(x) + (1 - x) * math.log(1 - x)) for x in (p, q)]
    assert statistics.entropy.tolist() == pytest.approx([sum(entropies) / 2, entropies[0]])
    found[0].backward()
    assert model.logits.grad.isfinite().all()
