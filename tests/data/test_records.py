"""Every format in every file type, and files that are damaged, cut or empty."""

from __future__ import annotations

import gzip
import re

import pytest
from preference_files import ASKED, DROP, GOOD, NO, YES, line, write

from cdpo.batch import Pair
from cdpo.data.sources import Jsonl
from cdpo.errors import DataError

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Oh\n\nHuman: Q?\n\nAssistant:"
LAYOUTS = {
    "columns": (GOOD, "Q?", ["yes", "no"]),
    "transcripts": (
        {"chosen": f"{DIALOGUE} yes", "rejected": f"{DIALOGUE} yet"},
        "\n\nHuman: Hi\n\nAssistant: Oh\n\nHuman: Q?\n\nAssistant:",
        [" yes", " yet"],
    ),
    "messages": ({"chosen": [ASKED, YES], "rejected": [ASKED, NO]}, [ASKED], ["yes", "no"]),
    "scored": ({"prompt": "Q?", "responses": ["a", "b", "c"], "rewards": [1.0, 3.5, 1.0]}, "Q?", ["a", "b", "c"]),
}


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz"])
def test_every_format_in_every_file_type(tmp_path, caplog, form, suffix):
    record, prompt, responses = LAYOUTS[form]
    path = tmp_path / f"data{suffix}"
    write(path, [record] * 3)
    with caplog.at_level("INFO"):
        data = Jsonl(path=str(path), eval_size=0).load(0)
    assert f"format {form}" in caplog.text
    assert len(data.train) == 3
    row = data.train[0]
    assert (row.prompt, row.responses, row.complete) == (prompt, responses, True)
    expected = [Pair(1, 0), Pair(1, 2), Pair(0, 2)] if form == "scored" else [Pair(0, 1)]
    assert [pair[:2] for pair in row.pairs] == [pair[:2] for pair in expected]
    assert row.rewards == ([1.0, 3.5, 1.0] if form == "scored" else None)
    assert row.source == f"data{suffix}:{2 if suffix in ('.json', '.json.gz') else 1}"


def test_a_json_list_is_reported_by_the_line_where_the_object_starts(tmp_path):
    path = tmp_path / "data.json"
    good, bad, also_bad = '{"prompt": "Q?",\n  "chosen": "a", "rejected": "b"}', '{"prompt": NaN}', '{"prompt":\n ""}'
    path.write_text(f"[\n {good},\n\n {bad},\n {also_bad}]\n")
    with pytest.raises(DataError) as error:
        Jsonl(path=str(path)).load(0)
    assert re.findall(r"data\.json:(\d+)", str(error.value)) == ["5", "6"]


DAMAGED = {
    "cut.jsonl.gz": lambda good: gzip.compress(b"\n".join([good] * 5000))[:-20],
    "flip.jsonl.gz": lambda good: gzip.compress(good)[:-8] + b"\0" * 8,
    "no.jsonl.gz": lambda good: good,
    "cut.json": lambda good: b"[" + good + b",\n" + good[:-9],
    "object.json": lambda good: good,
    "more.json": lambda good: b"[" + good + b"] []",
    "latin.json": lambda good: b"[" + good + b"\xef]",
    "no.parquet": lambda good: good,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_an_error_even_where_bad_rows_are_dropped(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name](line()))
    with pytest.raises(DataError, match=rf"{re.escape(name)}:\d+: the file cannot be read on"):
        Jsonl(path=str(tmp_path / name), max_drop_fraction=1.0, **DROP).load(0)


def test_a_file_cut_in_its_last_row_says_so(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(line() + b"\n" + line()[:-9])
    with pytest.raises(DataError, match=r"data\.jsonl:2: not valid JSON.*truncated\?"):
        Jsonl(path=str(tmp_path / "data.jsonl")).load(0)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_zero_rows(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.jsonl: 0 rows"):
        Jsonl(path=str(tmp_path / "data.jsonl")).load(0)
