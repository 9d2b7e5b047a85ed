"""The tiny model and its byte tokenizer: its start, its shapes, and texts that come back whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from architectures import BYTES, NO_DATA, SMALL, plain, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpo.batch import Pair
from cdpo.data.bandit import Bandit
from cdpo.data.rows import Data, Ledger, Row
from cdpo.data.tokenise import tokenise
from cdpo.model.tiny import EOS, PAD, Tiny


@pytest.mark.parametrize("length", [1, 2])
def test_tiny_starts_clearly_away_from_uniform(length):
    """Total variation from the uniform distribution over the responses of each prompt, above 0.1."""
    dataset = Bandit(length=length, prompts=4)
    data = dataset.load(0)
    tokenizer = Tiny().tokenizer(data)
    items, _ = tokenise(data.train, tokenizer, dataset)
    with torch.no_grad():
        logps = plain(Tiny().load(tokenizer, data), items).view(4, 8**length)
    p = logps.softmax(1)
    distance = (p - 1 / 8**length).abs().sum(1) / 2
    assert distance.min() > 0.1
    assert p.max() < 0.9  # nor is it certain
    assert (p[0] - p[1]).abs().sum() > 0.05  # prompts differ


def test_tiny_depends_on_its_own_seed_only():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        found.append(weights(SMALL.load(BYTES, NO_DATA)))
        assert torch.equal(torch.rand(3), expected)  # and leaves the run's random numbers alone
    assert torch.equal(*found)
    other = dataclasses.replace(SMALL, init_seed=1)
    assert not torch.allclose(weights(other.load(BYTES, NO_DATA)), found[0])


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_logit_std_is_the_spread_of_the_logits(std):
    with torch.no_grad():
        logits = Tiny(logit_std=std).load(BYTES, NO_DATA)(torch.arange(200)[None]).logits
    assert logits.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtypes_share_one_start(dtype):
    policy = dataclasses.replace(SMALL, dtype=dtype).load(BYTES, NO_DATA)
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
    rounded = weights(SMALL.load(BYTES, NO_DATA)).to(getattr(torch, dtype)).double()
    assert torch.equal(weights(policy), rounded)


@pytest.mark.parametrize(
    "option",
    [{"hidden_size": 30}, {"hidden_size": 0}, {"heads": 0}, {"layers": 0}, {"vocab_size": 257}, {"logit_std": 0.0}],
)
def test_shapes_that_cannot_be_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Tiny(**option)


def test_the_smallest_shape_works():
    tiny = Tiny(hidden_size=2, heads=1, layers=1, max_positions=4).load(BYTES, NO_DATA)
    assert tiny(torch.tensor([[1, 2, 3, 4]])).logits.isfinite().all()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bytes_round_trip(text):
    """Any text, and one token per byte."""
    ids = BYTES(text, add_special_tokens=False).input_ids
    assert BYTES.decode(ids) == text
    if "<|" not in text:
        assert len(ids) == len(text.encode())
        assert not {BYTES.eos_token_id, BYTES.pad_token_id} & set(ids)


def test_special_tokens_are_single_and_the_vocabulary_is_full():
    assert len(BYTES) == 258
    assert len(set(BYTES.get_vocab().values())) == 258
    assert BYTES(EOS, add_special_tokens=False).input_ids == [BYTES.eos_token_id]
    assert (BYTES.eos_token, BYTES.pad_token, BYTES.bos_token) == (EOS, PAD, None)


def test_merges_are_learnt_from_the_training_rows():
    """BPE's first merge is the most frequent pair of bytes; texts of the held-out rows are not looked at."""
    rows = [
        Row("a:1", "xyxyxy", ["xy xy xy", "ab"], [Pair(0, 1)]),
        Row("a:2", [{"role": "user", "content": "qr qr"}], ["qrqr", "z"], [Pair(0, 1)]),
    ]
    held_out = [Row("b:1", "mnmnmn" * 9, ["mn" * 9, "z"], [Pair(0, 1)])]
    data = Data(rows, held_out, Ledger())
    assert BYTES.get_vocab() == SMALL.tokenizer(data).get_vocab()  # 258 leaves no room for merges
    tokenizer = dataclasses.replace(SMALL, vocab_size=260).tokenizer(data)
    assert set(tokenizer.get_vocab()) - set(BYTES.get_vocab()) == {"xy", "qr"}
    assert len(tokenizer("xyqrmn", add_special_tokens=False).input_ids) == 1 + 1 + 2
    assert tokenizer.decode(tokenizer("xyqrmn é", add_special_tokens=False).input_ids) == "xyqrmn é"
    policy = SMALL.load(tokenizer, data)
    assert policy.get_input_embeddings().num_embeddings == policy.lm_head.out_features == 260


def test_the_chat_template_is_the_transcript_form():
    messages = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    text = BYTES.apply_chat_template(messages, tokenize=False)
    assert text == "\n\nHuman: Q?\n\nAssistant: A."
    asked = BYTES.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
