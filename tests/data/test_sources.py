"""Reading and validation: every known fault at known places, what is counted, what is held out, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_files import DROP, GOOD, line, write

from cdpo.data.rows import Row
from cdpo.data.sources import Jsonl, split
from cdpo.errors import ConfigError, DataError

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


def test_raw_control_characters_and_zero_width_spaces_are_text(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "Q\x00\t\xe2\x80\x8b?", "chosen": "\x01", "rejected": "no"}')
    row = Jsonl(path=str(tmp_path / "data.jsonl"), eval_size=0).load(0).train[0]
    assert (row.prompt, row.responses) == ("Q\0\t\u200b?", ["\x01", "no"])


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
        assert (len(data.train), len(data.held_out)) == sizes
    held_out = [[row.source for row in Jsonl(path=path).load(seed).held_out] for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]
    assert {row.source.split(":")[0] for row in Jsonl(path=path, eval_path=other).load(0).held_out} == {"b.jsonl"}


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
