"""The tabular policy against log_softmax of its table and products along a chain."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from architectures import score
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from cdpo.constraints.lora import LoRA
from cdpo.data.bandit import Bandit
from cdpo.data.packing import Scored, pack
from cdpo.data.rows import Data, Ledger
from cdpo.data.tokenise import tokenise
from cdpo.errors import ConfigError
from cdpo.model import attention
from cdpo.model.change import Change
from cdpo.model.export import export
from cdpo.model.layout import choose_layout
from cdpo.model.logps import Scorer, one_by_one
from cdpo.model.sampling import generations, sampled_kl
from cdpo.model.tabular import Tabular, TabularForCausalLM


def bandit(dtype="float64", **options):
    """(data, tokenizer, model, items) of a generated world."""
    dataset = Bandit(**{"prompts": 5, "alphabet": 4, **options})
    data = dataset.load(0)
    choice = Tabular(dtype)
    tokenizer = choice.tokenizer(data)
    items, _ = tokenise(data.train, tokenizer, dataset)
    return data, tokenizer, packed(choice.load(tokenizer, data)), items


def packed(model):
    """The model as a run asks it; it has no attention, so any will do."""
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


@pytest.mark.parametrize("padded", [False, True])
def test_one_token_responses_give_the_softmax_of_the_table(padded):
    data, _, model, items = bandit()
    table = torch.tensor(data.table, dtype=torch.float64)
    expected = table[len(data.symbols) :].log_softmax(-1)  # prompt after prompt, symbol after symbol
    found = score(model, pack(items, padded=padded))
    torch.testing.assert_close(found.view(5, 4), expected, rtol=1e-14, atol=1e-14)
    assert [item.responses for item in items] == [[[0], [1], [2], [3]]] * 5
    assert [item.prompt for item in items] == [[4], [5], [6], [7], [8]]


@pytest.mark.parametrize("padded", [False, True])
def test_longer_responses_are_chains(padded):
    data, _, model, items = bandit(alphabet=3, length=3)
    expected = []
    for x, row in enumerate(data.train):
        for word in row.responses:
            total, context = 0.0, data.table[len(data.symbols) + x]
            for letter in word:
                symbol = data.symbols.index(letter)
                total += context[symbol] - math.log(sum(math.exp(z) for z in context))
                context = data.table[symbol]
            expected.append(total)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(score(model, pack(items, padded=padded)), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one_by_one(model, items), expected, rtol=1e-13, atol=1e-13)
    totals = expected.view(5, 27).exp().sum(1)
    torch.testing.assert_close(totals, torch.ones(5, dtype=torch.float64))  # all words of three letters


def test_it_takes_packed_trees():
    _, _, model, items = bandit(alphabet=3, length=3)
    assert choose_layout(Scorer(model), items, "trees") == (False, "")
    assert model.config._attn_implementation == attention.NAME


def test_the_gradient_is_that_of_log_softmax():
    """d log pi(y|x) / d table[x] = onehot(y) - pi(.|x), and nothing elsewhere."""
    data, _, model, items = bandit()
    score(model, pack(items))[4 * 2 + 3].backward()  # symbol 3 after prompt 2
    row = torch.tensor(data.table[4 + 2], dtype=torch.float64)
    expected = torch.zeros(9, 4, dtype=torch.float64)
    expected[4 + 2] = torch.eye(4, dtype=torch.float64)[3] - row.softmax(0)
    torch.testing.assert_close(model.table.weight.grad, expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lora_changes_the_table_by_a_matrix_of_its_rank(rank):
    data, _, model, items = bandit(prompts=12, alphabet=6)
    start = torch.tensor(data.table, dtype=torch.float64)
    policy = LoRA(rank=rank).wrap(model)
    torch.testing.assert_close(score(policy, pack(items)).view(12, 6), start[6:].log_softmax(-1))
    torch.manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    with torch.no_grad():
        logits = policy(torch.arange(18)[None]).logits[0]
    values = torch.linalg.svdvals(logits - start)
    assert values[rank - 1] > 1e-3
    assert values[rank:].max() < 1e-12
    torch.testing.assert_close(score(policy, pack(items)).view(12, 6), logits[6:].log_softmax(-1))


def test_save_and_load(tmp_path):
    _, tokenizer, model, items = bandit()
    model.table.weight.data.normal_()
    export(model, tokenizer, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    again = packed(TabularForCausalLM.from_pretrained(tmp_path))
    assert again.dtype == torch.float64
    assert torch.equal(again.table.weight, model.table.weight)
    assert torch.equal(score(again, pack(items)), score(model, pack(items)))


def test_an_adapter_is_saved_with_its_table(tmp_path):
    _, tokenizer, model, items = bandit()
    start = model.table.weight.detach().clone()
    policy = LoRA(rank=2).wrap(model)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    export(policy, tokenizer, tmp_path)
    base = packed(TabularForCausalLM.from_pretrained(tmp_path / "base"))
    assert torch.equal(base.table.weight, start)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert not torch.allclose(
        score(again, pack(items)), score(packed(TabularForCausalLM(base.config).double()), pack(items))
    )
    assert torch.equal(score(again, pack(items)), score(policy, pack(items)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_dtype(dtype):
    data, _, model, _ = bandit(dtype)
    assert model.table.weight.dtype == getattr(torch, dtype)
    torch.testing.assert_close(model.table.weight.double(), torch.tensor(data.table, dtype=torch.float64))


def test_generation_follows_the_table():
    """Each next symbol is the likeliest after the one before; samples stay among the symbols."""
    data, _, model, _ = bandit(length=2)
    found = model.generate(torch.tensor([[4 + 1]]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0].tolist()
    expected = [4 + 1]
    for _ in range(5):
        row = data.table[expected[-1]]
        expected.append(row.index(max(row)))
    assert found == expected


def test_samples_have_the_policys_frequencies():
    data, _, model, _ = bandit()
    torch.manual_seed(0)
    start = torch.full((4000, 1), 4 + 3)
    found = model.generate(start, max_new_tokens=1, do_sample=True, top_k=0, pad_token_id=0)[:, 1]
    share = torch.bincount(found, minlength=4) / 4000
    p = torch.tensor(data.table[4 + 3]).softmax(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()


def test_samples_are_written_as_text():
    data, tokenizer, model, items = bandit()
    found = list(generations(Scorer(model), Scored(items, False, torch.device("cpu")), 3, 2, 0))
    assert [item.prompt for item in found] == [item.prompt for item in items[:3]]
    assert all(len(item.responses[0]) == 2 for item in found)
    assert all(set(tokenizer.decode(item.responses[0]).split()) <= set(data.symbols) for item in found)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_sampled_kl_agrees_with_the_exact_one(adapted):
    """Three letters, each given the one before: the exact KL by the chain rule, in NumPy."""
    _, _, model, items = bandit()
    model = LoRA(rank=2).wrap(model) if adapted else model
    change = Change(model)
    start = np.array(model.get_input_embeddings().weight.detach())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.7 * torch.randn_like(parameter)
    table = start + np.array(dict(change.deltas())["table.weight"])
    pi, ref = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (table, start))
    step = (pi * np.log(pi / ref)).sum(1)  # KL of the next letter, given the last token
    state = np.eye(len(pi))[items[0].prompt[-1]]
    exact = 0.0
    for _ in range(3):
        exact += state @ step
        state = np.append(state @ pi, np.zeros(len(pi) - pi.shape[1]))
    prompts = Scored([items[0]] * 1500, False, torch.device("cpu"))
    samples = Scored(list(generations(Scorer(model), prompts, 1500, 3, 0)), False, torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ratio = sampled_kl(Scorer(model), change, samples, 200)
    assert abs(float(ratio.mean()) - exact) < 4 * float(ratio.std()) / 1500**0.5
    assert float(ratio.std()) / 1500**0.5 < 0.1 * exact
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert {p.requires_grad for n, p in model.named_parameters() if "lora" in n or not adapted} == {True}


def test_it_needs_a_world():
    with pytest.raises(ConfigError, match="dataset=bandit"):
        Tabular().tokenizer(Data([], [], Ledger()))


text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(text, min_size=4, max_size=8, unique=True), st.integers(1, 2))
def test_any_texts_are_one_token_each(texts, prompts):
    """A user's own prompts and responses: regular expressions, spaces, prefixes of each other."""
    symbols, contexts = texts[prompts:], texts[:prompts]
    data = Data([], [], Ledger(), [[0.0] * len(symbols)] * len(texts), symbols, contexts)
    tokenizer = Tabular().tokenizer(data)
    ids = tokenizer([*symbols, *contexts], add_special_tokens=False).input_ids
    assert ids == [[i] for i in range(len(texts))]


def test_a_prompt_that_is_a_response_too_is_refused(tmp_path):
    world = {"prompts": ["yes", "q"], "responses": ["yes", "no"], "rewards": [[0, 1], [1, 0]]}
    (tmp_path / "world.json").write_text(json.dumps(world))
    data = Bandit(path=str(tmp_path / "world.json")).load(0)
    with pytest.raises(ConfigError, match="'yes' is a prompt and a response"):
        Tabular().tokenizer(data)
