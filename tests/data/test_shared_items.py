"""Tokenised rows out of the cache equal those tokenised here; what changes them is in the key."""

from __future__ import annotations

from dataclasses import replace

import pytest
from architectures import NO_DATA

from cdpo.batch import Pair
from cdpo.data import tokenise as module
from cdpo.data.rows import Data, Dataset, Ledger, Row
from cdpo.data.tokenise import tokenise
from cdpo.errors import DataError
from cdpo.model.tiny import Tiny

TOKENIZER = Tiny().tokenizer(NO_DATA)
LIMITS = Dataset(max_prompt_tokens=9, max_response_tokens=6, max_drop_fraction=0.5)
ROWS = [
    Row(
        f"data:{i}",
        f"prompt é {i}",
        [f" yes {i}", f" no{'' if i % 4 else ' yes <|endoftext|>'}"],
        [Pair(0, 1, 0.1 + i / 1000)],
        [0.1, i / 3],
    )
    for i in range(50)
] + [Row("data:51", "p", [" 12345678", " 12345679"], [Pair(0, 1)])]  # alike once they are cut: dropped


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(module, "FEW", 10)


def tokenised(tmp_path, rows=ROWS, tokenizer=TOKENIZER, limits=LIMITS):
    return tokenise(rows, tokenizer, limits, shared=tmp_path)


def tokenised_here(tmp_path, **options):
    """Items and ledger, and whether they were made in this call: then it may pause."""
    pauses = []
    found = tokenise(**{"rows": ROWS, "tokenizer": TOKENIZER, "limits": LIMITS, **options}, shared=tmp_path,
                     pause=lambda: pauses.append(1))  # fmt: skip
    return found, bool(pauses)


def test_items_and_ledger_come_back_as_they_were(tmp_path, caplog):
    expected = tokenise(ROWS, TOKENIZER, LIMITS)
    said = [record.message for record in caplog.records]
    caplog.clear()
    assert "special tokens" in said[0]
    assert tokenised_here(tmp_path) == (expected, True)
    caplog.clear()
    assert tokenised_here(tmp_path) == (expected, False)
    assert [record.message for record in caplog.records] == said
    assert expected[1].dropped["identical"].count == 1
    assert all(isinstance(pair, Pair) for item in tokenised(tmp_path)[0] for pair in item.pairs)


@pytest.mark.parametrize(
    "change", ["prompt", "response", "label", "reward", "source", "complete", "limit", "merges", "template"]
)
def test_what_tokens_depend_on_is_in_the_key(tmp_path, change):
    tokenised(tmp_path)
    rows, limits, tokenizer = list(ROWS), LIMITS, TOKENIZER
    new = {
        "prompt": {"prompt": "another"},
        "response": {"responses": [" a", " b"]},
        "label": {"pairs": [Pair(1, 0)]},
        "reward": {"rewards": [5.0, 6.0]},
        "source": {"source": "elsewhere"},
        "complete": {"complete": False},
    }
    rows[1] = replace(rows[1], **new.get(change, {}))
    if change == "limit":
        limits = replace(LIMITS, max_response_tokens=7)
    if change in ("merges", "template"):
        tokenizer = Tiny(vocab_size=300 if change == "merges" else 258).tokenizer(Data(ROWS, [], Ledger()))
    if change == "template":
        tokenizer.chat_template = "{{ messages }}"
    found = tokenised_here(tmp_path, rows=rows, tokenizer=tokenizer, limits=limits)
    assert found == (tokenise(rows, tokenizer, limits), True)


def test_limits_that_are_passed_are_refused_again(tmp_path):
    """Nothing is kept of rows that were refused."""
    for _ in range(2):
        with pytest.raises(DataError, match="rows dropped"):
            tokenised(tmp_path, limits=replace(LIMITS, max_drop_fraction=0.0))
    assert not list(tmp_path.glob("*/values.safetensors"))


def test_a_damaged_file_is_made_anew(tmp_path, caplog):
    expected = tokenised(tmp_path)
    (path,) = tmp_path.glob("*/values.safetensors")
    path.write_bytes(path.read_bytes().replace(b"prompt", b"prompd").replace(b"[0,1,0.1", b"[1,0,0.1"))
    assert tokenised_here(tmp_path) == (expected, True)
    assert "damaged" in caplog.text


def test_few_rows_leave_no_file(tmp_path):
    assert tokenised(tmp_path, ROWS[:9]) == tokenise(ROWS[:9], TOKENIZER, LIMITS)
    assert not list(tmp_path.iterdir())


def test_training_on_text_changes_nothing_where_there_are_no_merges():
    """So it is left out for the default vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([text for row in ROWS for text in row.texts()], trainer)
    found = Tiny().tokenizer(Data(ROWS, [], Ledger()))
    assert found.get_vocab() == trained.get_vocab()
