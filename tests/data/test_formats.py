"""The formats of preference data: their faults, messages in every form, and the real HH file by another road."""

from __future__ import annotations

import gzip
import json

import pytest
from preference_files import ASKED, HH, NO, YES, line

from cdpo.data.sources import Jsonl
from cdpo.errors import DataError


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0]}, "length"),
        ({"prompt": "Q?", "responses": ["a"], "rewards": [1.0]}, "length"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0, "2"]}, "number"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0, True]}, "number"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0, 10**400]}, "number"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0, 2.0], "chosen": "b", "rejected": "a"}, "key"),
        ({"prompt": "Q?", "responses": ["a", 5], "rewards": [1.0, 2.0]}, "type"),
        ({"prompt": "Q?", "responses": ["a", ""], "rewards": [1.0, 2.0]}, "empty"),
        ({"prompt": "Q?", "responses": ["a", "a"], "rewards": [1.0, 2.0]}, "identical"),
        ({"chosen": [ASKED, YES], "rejected": [{**ASKED, "content": "P?"}, NO]}, "prompt"),
        ({"prompt": [ASKED], "chosen": [YES], "rejected": [{**ASKED, "content": "P?"}, NO]}, "prompt"),
        ({"chosen": [YES], "rejected": [NO]}, "key"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "type"),
        ({"chosen": [], "rejected": []}, "type"),
        ({"chosen": ["yes"], "rejected": ["no"]}, "type"),
        ({"chosen": [ASKED, {"role": "assistant"}], "rejected": [ASKED, NO]}, "key"),
        ({"chosen": [ASKED, YES], "rejected": [ASKED, YES]}, "identical"),
        ({"chosen": "no dialogue", "rejected": "none"}, "transcript"),
        ({"chosen": "\n\nHuman: Q?\n\nAssistant:", "rejected": "\n\nHuman: Q?\n\nAssistant: no"}, "empty"),
        ({"chosen": "\n\nHuman: Q?\n\nAssistant: a", "rejected": "\n\nHuman: Q?\n\nAssistant: a"}, "identical"),
    ],
)
def test_faults_of_the_other_formats(tmp_path, record, kind):
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=rf"data\.jsonl:1: .*\[{kind}\]"):
        Jsonl(path=str(tmp_path / "data.jsonl")).load(0)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
        {"prompt": [ASKED], "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
        {"prompt": "Q?", "chosen": [YES], "rejected": [NO]},
        {"prompt": "other text, as in ultrafeedback_binarized", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    ],
)
def test_messages_with_whole_conversations_or_last_replies_are_one(tmp_path, record):
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    row = Jsonl(path=str(tmp_path / "data.jsonl"), eval_size=0).load(0).train[0]
    assert (row.prompt, row.responses) == ([ASKED], ["yes", "no"])


def test_one_odd_row_does_not_decide_the_format_and_a_forced_format_holds(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([line(prompt=..., promt="Q?"), line(prompt="1"), line(prompt="2")]))
    with pytest.raises(DataError, match=r"1 row .*\n.*data\.jsonl:1: no key 'prompt'; rename 'promt'"):
        Jsonl(path=str(path)).load(0)
    with pytest.raises(DataError, match=r"3 rows .*\n.*no key 'prompt'.*\n.*no key 'responses'"):
        Jsonl(path=str(path), format="scored").load(0)


@pytest.mark.skipif(not HH.exists(), reason="the HH file is not here")
def test_real_dialogues_are_cut_at_the_last_shared_assistant_turn():
    data = Jsonl(path=str(HH), eval_size=0).load(0)
    raw = [json.loads(text) for text in gzip.decompress(HH.read_bytes()).split(b"\n") if text]
    assert len(data.train) == len(raw) == data.ledger.kept == 2312
    for row, record in zip(data.train, raw):
        # the same rule by another road: split both into turns, and count the turns they share
        chosen, rejected = (record[key].split("\n\nAssistant:") for key in ("chosen", "rejected"))
        shared = next(k for k, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
        assert row.prompt == "\n\nAssistant:".join([*chosen[:shared], ""])
        assert [row.prompt + text for text in row.responses] == [record["chosen"], record["rejected"]]
    assert data.train[0].responses[0].startswith(" No, sorry!  All of these involve a pen")
    white = [row.source for row in data.train if " " in row.responses]
    assert white == data.ledger.notes["whitespace_only"].rows == [f"{HH.name}:{n}" for n in (87, 517, 926, 1104)]
