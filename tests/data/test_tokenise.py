"""Tokenisation on two kinds of real tokenizer, against the tokenizers library, plain slicing, and decoding back."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_files import HH
from real_tokenizers import EOS, TOKENIZERS, byte_level, raw, row
from tokenizers import AddedToken

from cdpo.batch import Pair
from cdpo.data.bandit import Bandit
from cdpo.data.rows import Dataset, Ledger
from cdpo.data.shared_items import decoded, encoded
from cdpo.data.sources import Jsonl
from cdpo.data.tokenise import CHUNK, on_all_cores, tokenise
from cdpo.errors import ConfigError, DataError


def test_prompt_and_responses_are_tokenised_apart_and_end_with_eos(tokenizer):
    items, ledger = tokenise([row()], tokenizer, Dataset())
    bos = [1] if tokenizer is TOKENIZERS["metaspace"] else []
    assert items[0].prompt == bos + raw(tokenizer, "hello")
    assert items[0].responses == [[*raw(tokenizer, text), EOS] for text in (" world", " there")]
    assert (items[0].pairs, items[0].source) == ([Pair(0, 1)], "a:1")
    assert (ledger.rows, ledger.kept) == (1, 1)


def test_a_text_that_holds_a_bos_gets_no_second_one():
    items, _ = tokenise([row("<s>hello")], TOKENIZERS["metaspace"], Dataset())
    assert items[0].prompt.count(1) == 1
    assert items[0].prompt[0] == 1


def test_a_text_that_ends_with_eos_gets_no_second_one(tokenizer):
    items, _ = tokenise([row(chosen=" world" + tokenizer.eos_token)], tokenizer, Dataset())
    assert items[0].responses[0] == [*raw(tokenizer, " world"), EOS]


def test_eos_is_taught_where_pad_is_eos():
    tokenizer = TOKENIZERS["byte_level"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    items, _ = tokenise([row()], tokenizer, Dataset())
    assert [response[-1] for response in items[0].responses] == [EOS, EOS]


def test_bandit_responses_get_no_eos_and_need_none():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    bandit = Bandit(prompts=3, alphabet=2, length=2)
    items, ledger = tokenise(bandit.load(0).train, tokenizer, bandit)
    assert [[tokenizer.decode(ids) for ids in item.responses] for item in items] == [["aa", "ab", "ba", "bb"]] * 3
    assert [tokenizer.decode(item.prompt) for item in items] == ["p00 ", "p01 ", "p02 "]
    assert items[0].rewards == bandit.load(0).train[0].rewards
    assert ledger.notes["lost_eos"].count == 0
    with pytest.raises(ConfigError, match="no EOS"):
        tokenise([row()], tokenizer, bandit)


def test_a_tokenizer_without_eos_is_named():
    tokenizer = byte_level()
    tokenizer.eos_token, tokenizer.name_or_path = None, "some/model"
    with pytest.raises(ConfigError, match="'some/model' has no EOS"):
        tokenise([row()], tokenizer, Dataset())


def test_prompts_lose_their_beginning_and_responses_their_end(tokenizer):
    prompt, chosen, rejected = "is the world well? " * 5, " hello" * 9, " x"
    limits = Dataset(max_prompt_tokens=6, max_response_tokens=5)
    items, ledger = tokenise([row(prompt, chosen, rejected)], tokenizer, limits)
    ids, bos = raw(tokenizer, prompt), [1] if tokenizer is TOKENIZERS["metaspace"] else []
    assert items[0].prompt == bos + ids[len(ids) - 6 + len(bos) :]
    assert items[0].responses == [raw(tokenizer, chosen)[:5], [*raw(tokenizer, rejected), EOS]]
    assert {kind: t.count for kind, t in ledger.notes.items() if t.count and kind != "boundary_mismatches"} == {
        "cut_rows": 1,
        "cut_prompts": 1,
        "cut_responses": 1,
        "lost_eos": 1,
    }
    assert ledger.notes["cut_prompts"].rows == ["a:1"]


def test_a_response_that_just_fits_loses_its_eos_and_says_so():
    tokenizer = TOKENIZERS["byte_level"]
    n, pair = len(raw(tokenizer, " world there")), row(chosen=" world there", rejected="h")
    items, ledger = tokenise([pair], tokenizer, Dataset(max_response_tokens=n))
    assert items[0].responses == [raw(tokenizer, " world there"), [*raw(tokenizer, "h"), EOS]]
    assert ledger.notes["lost_eos"].count == 1
    _, ledger = tokenise([pair], tokenizer, Dataset(max_response_tokens=n + 1))
    assert ledger.notes["lost_eos"].count == 0


def test_rows_without_a_difference_or_a_token_are_dropped_and_counted(tokenizer):
    same = row(chosen=" hello" * 9 + " a", rejected=" hello" * 9 + " b", source="a:2")
    good = [row(source=f"a:{i}") for i in range(3, 20)]
    items, ledger = tokenise([row(), same, *good], tokenizer, Dataset(max_response_tokens=4))
    assert [item.source for item in items] == ["a:1", *(r.source for r in good)]
    assert {kind: (t.count, t.rows) for kind, t in ledger.dropped.items()} == {"identical": (1, ["a:2"])}
    assert (ledger.rows, ledger.kept) == (19, 18)
    with pytest.raises(DataError, match=r"1 of 19 rows dropped.*max_drop_fraction=0.01.*identical: 1 \(a:2\)"):
        tokenise([row(), same, *good], tokenizer, Dataset(max_response_tokens=4, max_drop_fraction=0.01))
    with pytest.raises(DataError, match="1 of 1 rows dropped"):
        tokenise([same], tokenizer, Dataset(max_response_tokens=4, max_drop_fraction=1.0))


def test_a_response_that_the_tokenizer_erases_is_dropped():
    from tokenizers import normalizers

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    items, ledger = tokenise([row(chosen="\u200b"), *[row()] * 9], tokenizer, Dataset(max_drop_fraction=0.1))
    assert (len(items), ledger.dropped["empty"].count) == (9, 1)


def test_boundary_mismatches_are_counted_and_fail_above_the_limit():
    tokenizer = TOKENIZERS["byte_level"]
    split, clean = row("hel", "lo", " there", source="a:1"), row(source="a:2")
    assert raw(tokenizer, "hello") != raw(tokenizer, "hel") + raw(tokenizer, "lo")  # or this test shows nothing
    assert raw(tokenizer, "hello world") == raw(tokenizer, "hello") + raw(tokenizer, " world")
    _, ledger = tokenise([split, clean], tokenizer, Dataset())
    assert (ledger.notes["boundary_mismatches"].count, ledger.notes["boundary_mismatches"].rows) == (1, ["a:1"])
    with pytest.raises(DataError, match=r"1 of 2 rows have other tokens.*max_mismatch_fraction=0.4 \(a:1\)"):
        tokenise([split, clean], tokenizer, Dataset(max_mismatch_fraction=0.4))


def test_a_mismatch_is_seen_wherever_a_word_is_cut():
    tokenizer, text = TOKENIZERS["byte_level"], "hello there, world"
    rows = [row(text[:k], text[k:], "\n", source=f"a:{k}") for k in range(1, len(text))]
    _, ledger = tokenise(rows, tokenizer, Dataset())
    cuts = [
        k for k in range(1, len(text)) if raw(tokenizer, text) != raw(tokenizer, text[:k]) + raw(tokenizer, text[k:])
    ]
    assert 0 < len(cuts) < len(rows)
    assert ledger.notes["boundary_mismatches"].rows == [f"a:{k}" for k in cuts]


def test_special_tokens_inside_a_response(tokenizer, caplog):
    rows = [row(), row(chosen=f" world{tokenizer.eos_token} there", source="a:2")]
    _, ledger = tokenise(rows, tokenizer, Dataset())
    assert (ledger.notes["special_tokens"].count, ledger.notes["special_tokens"].rows) == (1, ["a:2"])
    assert "1 rows with special tokens, first a:2" in caplog.text
    items, ledger = tokenise(rows, tokenizer, Dataset(on_special_tokens="drop", max_drop_fraction=0.5))
    assert ([item.source for item in items], ledger.dropped["special_tokens"].rows) == (["a:1"], ["a:2"])
    with pytest.raises(DataError, match="a:2: a response spells a special token"):
        tokenise(rows, tokenizer, Dataset(on_special_tokens="error"))


def test_should_stop_is_asked_between_chunks():
    asked = []
    rows = [row(source=f"a:{i}") for i in range(2 * CHUNK + 1)]
    items, _ = tokenise(rows, TOKENIZERS["byte_level"], Dataset(), lambda: asked.append(len(asked)))
    assert asked == [0, 1, 2]
    assert [item.source for item in items] == [r.source for r in rows]

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenise(rows, TOKENIZERS["byte_level"], Dataset(), stop)


def test_no_rows_give_no_items():
    items, ledger = tokenise([], TOKENIZERS["byte_level"], Dataset())
    assert (items, ledger.rows, ledger.lengths) == ([], 0, {})


def test_lengths_are_means_and_maxima_of_tokens():
    rows = [row("a", "b", "ccc"), row("aaa", "bb", "d")]  # bytes that merge with nothing
    _, ledger = tokenise(rows, TOKENIZERS["byte_level"], Dataset())
    assert ledger.lengths == {
        "prompt_mean": 2.0,
        "prompt_max": 3,
        "chosen_mean": 2.5,
        "chosen_max": 3,
        "rejected_mean": 3.0,
        "rejected_max": 4,
    }
    assert json.loads(json.dumps(ledger.to_dict()))["lengths"] == ledger.lengths


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(*[st.text("helo wrd\u00e9\n", min_size=1, max_size=30)] * 3), min_size=1, max_size=8),
    st.integers(2, 12),
    st.integers(1, 12),
    st.sampled_from(sorted(TOKENIZERS)),
)
def test_every_item_obeys_the_rules_and_every_row_is_accounted_for(texts, prompt_limit, response_limit, name):
    tokenizer, bos = TOKENIZERS[name], [1] if name == "metaspace" else []
    rows = [row(*text, source=f"a:{i}") for i, text in enumerate(texts)]
    limits = Dataset(max_prompt_tokens=prompt_limit, max_response_tokens=response_limit, max_drop_fraction=1.0)
    expected = {}
    for r in rows:
        prompt = bos + raw(tokenizer, r.prompt)[-(prompt_limit - len(bos)) :]
        answers = [[*raw(tokenizer, text), EOS][:response_limit] for text in r.responses]
        if answers[0] != answers[1]:
            expected[r.source] = prompt, answers
    if not expected:
        with pytest.raises(DataError, match="or leaving none"):
            tokenise(rows, tokenizer, limits)
        return
    items, ledger = tokenise(rows, tokenizer, limits)
    assert {item.source: (item.prompt, item.responses) for item in items} == expected
    assert (ledger.kept, ledger.rows) == (len(expected), len(rows))
    assert ledger.kept + sum(t.count for t in ledger.dropped.values()) == ledger.rows


@pytest.mark.skipif(not HH.exists(), reason="the HH file is not here")
def test_real_dialogues_decode_back_to_the_file():
    data = Jsonl(path=str(HH), eval_size=0, max_prompt_tokens=10_000, max_response_tokens=10_000)
    tokenizer = TOKENIZERS["byte_level"]
    items, ledger = tokenise(data.load(0).train, tokenizer, data)
    records = [json.loads(text) for text in gzip.decompress(HH.read_bytes()).split(b"\n") if text]
    assert len(items) == len(records) == ledger.kept == 2312
    for item, record in list(zip(items, records))[::10]:  # decoding is slow
        for response, key in zip(item.responses, ("chosen", "rejected")):
            assert tokenizer.decode(item.prompt + response) == record[key] + "<end>"
    assert not ledger.dropped
    assert not ledger.notes["cut_prompts"].count


@pytest.mark.skipif(not HH.exists(), reason="the HH file is not here")
def test_boundary_mismatches_of_real_dialogues_equal_those_of_their_whole_texts(tokenizer):
    """Prompts cut in the middle of words, so that both kinds occur."""
    data = Jsonl(path=str(HH), eval_size=0, max_rows=60).load(0)
    rows = [
        row(r.prompt + text[: i % 7], text[i % 7 :], "no", source=r.source)
        for i, r in enumerate(data.train)
        for text in [r.responses[0] + " etc"]
    ]
    _, ledger = tokenise(rows, tokenizer, Dataset())

    def differs(r, text):
        return raw(tokenizer, r.prompt + text) != raw(tokenizer, r.prompt) + raw(tokenizer, text)

    whole = [r for r in rows if any(differs(r, text) for text in r.responses)]
    assert ledger.notes["boundary_mismatches"].count == len(whole) > 0
    assert (len(whole) < len(rows)) == (tokenizer is TOKENIZERS["byte_level"])


def test_an_added_token_that_is_not_special_is_text():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(" world", special=False)])
    _, ledger = tokenise([row()], tokenizer, Dataset())
    assert ledger.notes["special_tokens"].count == 0


def test_equal_ids_are_one_object(tokenizer):
    """Python makes an object of every number above 256; the rows of the second call come out of a folder."""
    rows = [row(" ".join(f"word{i}" for i in range(40)), f" {k}") for k in range(3)]
    items, _ = tokenise(rows, tokenizer, Dataset())
    again, _ = decoded(encoded(items, Ledger()))
    assert again == items
    for found in (items, again):
        one, *others = (item.prompt for item in found)
        assert one
        assert all(a is b for other in others for a, b in zip(one, other, strict=True))


def test_a_forked_process_tokenises_without_its_parents_threads(tokenizer):
    rows = [row(f"prompt {i}", f" answer {i}", f" other {i}") for i in range(50)]
    expected, _ = tokenise(rows, tokenizer, Dataset())
    child = os.fork()
    if not child:
        os._exit(0 if tokenise(rows, tokenizer, Dataset())[0] == expected else 1)
    until = time.monotonic() + 120
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.02)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert found == (child, 0)


@pytest.mark.parametrize(("chosen", "within"), [(None, "true"), ("off", "true"), ("false", "false"), ("true", "true")])
def test_a_users_choice_of_cores_stays(chosen, within, tokenizer, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if chosen:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", chosen)
    with on_all_cores():
        assert os.environ["TOKENIZERS_PARALLELISM"] == within
    assert os.environ["TOKENIZERS_PARALLELISM"] == (chosen or "off")
