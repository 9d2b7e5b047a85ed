"""Hub presets, as conf/dataset has them, on local files with the columns and splits that the hub's data cards list."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from composing import node_of
from preference_files import ASKED, NO, YES

from cdpo.batch import Pair
from cdpo.data.sources import Hub
from cdpo.errors import DataError

ROOT = Path(__file__).parents[2]
PROMPT = "\n\nHuman: Q?\n\nAssistant:"
COMPLETION = {
    "model": "m",
    "principle": "honesty",
    "custom_system_prompt": "",
    "critique": "",
    "fine-grained_score": 4.0,
}
COMPARED = {"post_id": "a", "domain": "askbaking_train", "history": "Q?", "score_ratio": 2.0}
SCORED = [{**COMPLETION, "response": r, "overall_score": s} for r, s in zip("abcd", (2.0, 7.5, 7.5, 1.0))]
BINARIZED = {"prompt": "Q?", "prompt_id": "0", "messages": [ASKED, YES], "score_chosen": 8.0, "score_rejected": 3.0}
CASES = {  # preset: rows as on the hub, splits, prompt, responses
    "hh": ([{"chosen": f"{PROMPT} yes", "rejected": f"{PROMPT} no"}], ["train", "test"], PROMPT, [" yes", " no"]),
    "shp": (
        [
            {**COMPARED, "human_ref_A": "no", "human_ref_B": "yes", "labels": 0},
            {**COMPARED, "human_ref_A": "yes", "human_ref_B": "no", "labels": 1},
        ],
        ["train", "validation"],
        PROMPT,
        [" yes", " no"],
    ),
    "ultrafeedback_binarized": (
        [{**BINARIZED, "chosen": [ASKED, YES], "rejected": [ASKED, NO]}],
        ["train_prefs", "test_prefs"],
        [ASKED],
        ["yes", "no"],
    ),
    "tldr": (
        [{"prompt": "POST: Q?\n\nTL;DR:", "chosen": " yes", "rejected": " no"}],
        ["train", "validation"],
        "POST: Q?\n\nTL;DR:",
        [" yes", " no"],
    ),
}


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Loads a preset from a local folder that holds `records` in every split, laid out as on the hub."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(name, records, splits):
        folder = tmp_path / "hub"
        (folder / "data").mkdir(parents=True)
        for part in splits:
            parquet.write_table(pyarrow.Table.from_pylist(records), folder / f"data/{part}-00000-of-00001.parquet")
        config = node_of("dataset", name)
        assert config.pop("_target_") == "cdpo.data.Hub"
        return Hub(**{**config, "name": str(folder)}).load(0)

    return load


@pytest.mark.parametrize("name", CASES)
def test_a_preset_reads_the_hubs_columns(preset, name):
    records, splits, prompt, responses = CASES[name]
    data = preset(name, records, splits)
    for rows, part in ((data.train, splits[0]), (data.held_out, splits[1])):
        assert [row.source for row in rows] == [f"{part}:{i + 1}" for i in range(len(records))]
        for row in rows:
            assert (row.prompt, row.responses, row.pairs) == (prompt, responses, [Pair(0, 1)])


def scored_rows(n):
    return [{"source": "flan", "instruction": f"Q{i}?", "models": ["m"] * 4, "completions": SCORED} for i in range(n)]


def test_ultrafeedback_gives_every_pair_with_its_preference(preset):
    data = preset("ultrafeedback", scored_rows(20), ["train"])
    assert (len(data.train), len(data.held_out)) == (18, 2)  # it has no held-out split
    for row in data.train:
        assert row.prompt == [{"role": "user", "content": f"Q{int(row.source.split(':')[1]) - 1}?"}]
        assert (row.responses, row.rewards) == (["a", "b", "c", "d"], [2.0, 7.5, 7.5, 1.0])
        odds = {(p.winner, p.loser): math.log(p.preference / (1 - p.preference)) for p in row.pairs}
        expected = {(1, 0): 5.5, (2, 0): 5.5, (1, 3): 6.5, (2, 3): 6.5, (0, 3): 1.0, (1, 2): 0.0}
        assert odds == pytest.approx(expected, abs=1e-9)


def test_bad_hub_rows_are_dropped_by_the_presets_and_counted(preset):
    records = scored_rows(20)
    records[4]["completions"] = [{**COMPLETION, "response": "a", "overall_score": None}] * 2
    data = preset("ultrafeedback", records, ["train"])
    assert data.ledger.to_dict()["dropped"] == {"type": {"count": 1, "rows": ["train:5"]}}
    assert len(data.train) + len(data.held_out) == 19


def test_what_is_said_of_all_splits_names_the_data_set(preset, caplog):
    preset("hh", *CASES["hh"][:2])  # the same row in both
    (line,) = [record.message for record in caplog.records if "duplicates" in record.message]
    assert "hub: 1 duplicates: test:1 and train:1" in line


def test_hh_reads_the_subset_that_data_dir_names(tmp_path, monkeypatch):
    """The hub keeps HH-RLHF as gzipped JSON lines, a folder for each subset."""
    import gzip
    import json

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for subset in ("harmless-base", "helpful-base"):
        (tmp_path / "hub" / subset).mkdir(parents=True)
        for part in ("train", "test"):
            text = json.dumps({"chosen": f"{PROMPT} {subset} {part}", "rejected": f"{PROMPT} no"})
            (tmp_path / "hub" / subset / f"{part}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    data = Hub(name=str(tmp_path / "hub"), data_dir="helpful-base", eval_split="test").load(0)
    assert [row.responses[0] for row in (*data.train, *data.held_out)] == [" helpful-base train", " helpful-base test"]


def test_a_data_set_that_cannot_be_loaded_says_what_to_check(tmp_path):
    with pytest.raises(DataError, match=r"cannot be loaded.*check dataset\.name"):
        Hub(name=str(tmp_path / "nothing")).load(0)
