"""Reading and validation: every known fault at known places, every format in every file type, the real HH file."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpo.batch import Pair
from cdpo.data.rows import Ledger, Row
from cdpo.data.sources import Jsonl, note, split
from cdpo.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
HH = ROOT / "../shared/data/hh-harmless-base-test.jsonl.gz"
GOOD = {"prompt": "Q?", "chosen": "yes", "rejected": "no"}


def line(**changes):
    return json.dumps({k: v for k, v in {**GOOD, **changes}.items() if v is not ...}).encode()


# one way to spoil a row per fault of the catalogue, with the kind it must be reported as
FAULTS = {
    "broken": (b'{"prompt": "Q?", "chosen": "yes" "rejected": "no"}', "json"),
    "cut": (b'{"prompt": "Q?", "chosen": "ye', "json"),
    "more text": (line() + b" {}", "json"),
    "deep": (b"[" * 100_000, "json"),
    "digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "json"),
    "duplicate key": (b'{"prompt": "Q?", "chosen": "a", "rejected": "b", "chosen": "c"}', "duplicate_key"),
    "surrogate": (b'{"prompt": "Q?", "chosen": "\\ud83d", "rejected": "no"}', "encoding"),
    "latin-1": ('{"prompt": "Q?", "chosen": "na\xefve", "rejected": "no"}'.encode("latin-1"), "encoding"),
    "NaN": (b'{"prompt": "Q?", "chosen": NaN, "rejected": "no"}', "number"),
    "list": (b'["Q?", "yes", "no"]', "type"),
    "number": (line(chosen=5), "type"),
    "list of text": (line(rejected=["no"]), "type"),
    "null": (line(prompt=None), "type"),
    "true": (line(chosen=True), "type"),
    "typo": (line(chosen=..., choosen="yes"), "key"),
    "missing": (line(rejected=...), "key"),
    "empty chosen": (line(chosen=""), "empty"),
    "empty prompt": (line(prompt=""), "empty"),
    "identical": (line(rejected="yes"), "identical"),
    "long": (line(chosen="y" * 2000), "long"),
}
DROP = dict.fromkeys(("on_malformed", "on_empty", "on_identical", "on_long"), "drop")


def spoiled_file(path, seed, good, bad):
    """Good rows with bad ones, blank lines and CRLF strewn in. Returns the good rows and the faults, by line number."""
    random = Random(seed)
    plan = ["good"] * good + ["blank"] * (good // 20) + [random.choice(list(FAULTS)) for _ in range(bad)]
    random.shuffle(plan)
    rows, faults, lines = {}, {}, []
    for number, what in enumerate(plan, 1):
        if what == "good":
            rows[number] = [f"Q{number}?", f"yes {random.random()}", f"no {random.random()}"]
            lines.append(json.dumps(dict(zip(GOOD, rows[number])), ensure_ascii=False).encode())
        elif what == "blank":
            lines.append(b"  ")
        else:
            faults[number] = FAULTS[what][1]
            lines.append(FAULTS[what][0])
    path.write_bytes(b"\xef\xbb\xbf" + random.choice([b"\n", b"\r\n"]).join(lines))
    return rows, faults


@pytest.mark.parametrize("seed", range(4))
def test_every_bad_row_is_reported_once_with_its_line_and_kind(tmp_path, seed):
    _, faults = spoiled_file(tmp_path / "data.jsonl", seed, good=180, bad=20)
    with pytest.raises(DataError) as error:
        Jsonl(path=str(tmp_path / "data.jsonl"), max_chars=1000).load(0)
    found = re.findall(r"^  data\.jsonl:(\d+): .*\[(\w+)\]$", str(error.value), re.MULTILINE)
    assert [(int(number), kind) for number, kind in found] == sorted(faults.items())
    assert "20 rows cannot be used" in str(error.value)
    assert error.value.exit_code == 3


def test_good_rows_are_untouched_and_kept_and_dropped_add_up(tmp_path):
    rows, faults = spoiled_file(tmp_path / "data.jsonl", seed=9, good=1800, bad=200)
    data = Jsonl(path=str(tmp_path / "data.jsonl"), max_chars=1000, eval_size=0, max_drop_fraction=0.2, **DROP).load(0)
    assert {int(row.source.split(":")[1]): [row.prompt, *row.responses] for row in data.train} == rows
    assert {kind: tally.count for kind, tally in data.ledger.dropped.items()} == Counter(faults.values())
    assert data.ledger.kept + sum(t.count for t in data.ledger.dropped.values()) == data.ledger.rows == 2000
    report = data.ledger.to_dict()
    assert json.loads(json.dumps(report)) == report
    assert len(report["dropped"]["json"]["rows"]) == 20  # names are cut, counts are not


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_stops_the_run_and_names_its_remedy(tmp_path, fault):
    (tmp_path / "data.jsonl").write_bytes(b"\n".join([line(prompt="1"), line(prompt="2"), b"", FAULTS[fault][0]]))
    with pytest.raises(DataError, match=r"data\.jsonl:4: ") as error:
        Jsonl(path=str(tmp_path / "data.jsonl"), max_chars=1000).load(0)
    kind = FAULTS[fault][1]
    option = f"dataset.on_{kind if kind in ('empty', 'identical', 'long') else 'malformed'}=drop"
    assert option in str(error.value)
    if fault == "typo":
        assert "no key 'chosen'; rename 'choosen'" in str(error.value)


def test_a_report_shows_twenty_rows_and_the_total(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\n".join([b"{"] * 33))
    with pytest.raises(DataError, match="33 rows cannot be used") as error:
        Jsonl(path=str(tmp_path / "data.jsonl")).load(0)
    assert "data.jsonl:20:" in str(error.value)
    assert "data.jsonl:21:" not in str(error.value)
    assert "and 13 more" in str(error.value)


def test_dropping_more_than_the_allowed_share_stops_the_run(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\n".join([line(prompt="1"), line(prompt="2"), line(chosen="")]))
    with pytest.raises(DataError, match=r"1 of 3 rows dropped.*max_drop_fraction=0.1.*data\.jsonl:3"):
        Jsonl(path=str(tmp_path / "data.jsonl"), on_empty="drop").load(0)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_any_text_survives_reading_unchanged(tmp_path_factory, texts):
    """NUL, zero-width, line separators, and the rest of Unicode; escaped or not."""
    path = tmp_path_factory.mktemp("text") / "data.jsonl"
    rows = [{"prompt": p, "chosen": "+" + c, "rejected": "-" + c} for p, c in texts]
    for ascii_only in (True, False):
        path.write_bytes(b"\n".join(json.dumps(row, ensure_ascii=ascii_only).encode() for row in rows))
        data = Jsonl(path=str(path), eval_size=0, format="columns").load(0)
        assert [[row.prompt, *row.responses] for row in data.train] == [list(row.values()) for row in rows]


ASKED, YES, NO = ({"role": r, "content": c} for r, c in (("user", "Q?"), ("assistant", "yes"), ("assistant", "no")))


def test_raw_control_characters_and_zero_width_spaces_are_text(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "Q\x00\t\xe2\x80\x8b?", "chosen": "\x01", "rejected": "no"}')
    row = Jsonl(path=str(tmp_path / "data.jsonl"), eval_size=0).load(0).train[0]
    assert (row.prompt, row.responses) == ("Q\0\t\u200b?", ["\x01", "no"])


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


def write(path, records):
    """The records as the file type that `path` names."""
    import pyarrow

    inner = path.with_suffix("") if path.suffix == ".gz" else path
    if inner.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), inner)
    else:
        text = json.dumps(records, indent=1) if inner.suffix == ".json" else "\n".join(map(json.dumps, records))
        inner.write_text(text)
    if inner != path:
        path.write_bytes(gzip.compress(inner.read_bytes()))


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
    assert row.pairs == ([Pair(1, 0), Pair(1, 2)] if form == "scored" else [Pair(0, 1)])
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


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0]}, "length"),
        ({"prompt": "Q?", "responses": ["a"], "rewards": [1.0]}, "length"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0, "2"]}, "number"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0, True]}, "number"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1.0, 10**400]}, "number"),
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


def test_duplicates_and_contradictions_are_counted_with_both_rows(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    swapped = line(chosen="no", rejected="yes")
    path.write_bytes(b"\n".join([line(), line(prompt="P"), line(), swapped, line(chosen=" ")]))
    notes = Jsonl(path=str(path), eval_size=0).load(0).ledger.to_dict()
    assert notes["duplicates"] == {"count": 1, "rows": ["data.jsonl:3 and data.jsonl:1"]}
    assert notes["contradictions"] == {"count": 1, "rows": ["data.jsonl:4 and data.jsonl:1"]}
    assert notes["whitespace_only"] == {"count": 1, "rows": ["data.jsonl:5"]}
    assert "1 contradictions: data.jsonl:4 and data.jsonl:1" in caplog.text
    with pytest.raises(DataError, match=r"contradictions: data\.jsonl:4"):
        Jsonl(path=str(path), on_contradiction="error").load(0)


def test_rows_whose_rewards_all_tie_are_kept_and_counted():
    ledger = Ledger()
    note([Row("a:1", "Q", ["x", "y"], [], [1.0, 1.0])], ledger)
    assert ledger.notes["without_pairs"].rows == ["a:1"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 3), st.floats(0.2, 0.6))
def test_the_split_keeps_every_row_once_and_no_prompt_in_both(prompts, seed, size):
    rows = [Row(f"a:{i}", str(p), ["x", "y"], []) for i, p in enumerate(prompts)]
    if min(Counter(prompts).values()) > max(1, round(size * len(rows))):  # no prompt is rare enough
        with pytest.raises(DataError, match="holds out 0 of"):
            split("a", rows, size, seed)
        return
    train, held_out = split("a", rows, size, seed)
    assert sorted(train + held_out, key=rows.index) == rows
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert 0 < len(held_out) <= max(1, round(size * len(rows)))


def test_held_out_rows_by_share_number_file_and_maximum(tmp_path):
    write(tmp_path / "a.jsonl", [{**GOOD, "prompt": str(i)} for i in range(50)])
    write(tmp_path / "b.jsonl", [{**GOOD, "prompt": f"b{i}"} for i in range(9)])
    path, other = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    for options, sizes in (
        ({}, (45, 5)),
        ({"eval_size": 7.0}, (43, 7)),
        ({"eval_path": other}, (50, 9)),
        ({"max_rows": 20}, (18, 2)),
        ({"eval_path": other, "max_eval_rows": 4}, (50, 4)),
    ):
        data = Jsonl(path=path, **options).load(0)
        assert (len(data.train), len(data.eval)) == sizes
    held_out = [[row.source for row in Jsonl(path=path).load(seed).eval] for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]
    assert {row.source.split(":")[0] for row in Jsonl(path=path, eval_path=other).load(0).eval} == {"b.jsonl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"path": "data.csv"}, "data.csv: unknown file type; use .jsonl"),
        ({"path": "a.jsonl", "eval_path": "b.jsonl", "eval_size": 0.2}, "dataset.eval_size=0.2 has no effect"),
        ({"path": "a.jsonl", "eval_size": 1.5}, "dataset.eval_size=1.5"),
        ({"path": "a.jsonl", "max_chars": 0}, "dataset.max_chars=0"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Jsonl(**options).load(0)


def test_importing_the_data_layer_imports_no_heavy_library():
    heavy = "{'transformers', 'datasets', 'pyarrow'}"
    code = f"import sys, cdpo.data, cdpo.data.tokenise\nprint({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


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
