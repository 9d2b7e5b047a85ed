"""The benchmark of GPUs, on a CPU: one side after the other, what is refused, and what is left out by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import alone, cases, channel, gpu, ours, sides, table
from benchmarks.first_step import stepped
from scripted_sides import Scripted

from cdpo.batch import Item
from cdpo.data import packing

ROOT = Path(__file__).parents[1]
needs_data = pytest.mark.skipif(not cases.HH.is_file(), reason=f"no {cases.HH.name}")


@pytest.mark.slow
@needs_data
def test_one_side_after_the_other(tmp_path):
    """As on a GPU, with cdpo's own packing without sharing too."""
    command = [ROOT / "launch/gpu.sh", "--device", "cpu", "--cases", "tiny", "--threads", "1", "--out", tmp_path]
    environment = os.environ | {"PYTHON": sys.executable}
    command += ["--parts", "start", "benchmark", "--rounds", "2"]
    done = subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=300, capture_output=True, text=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert min(found["start"]["cold"], found["start"]["warm"]) > 0.5
    rows = {row["side"]: row for row in found["benchmark"]["rows"]}
    assert list(rows) == ["cdpo", "apart", "best", "checkpointed"]
    for side in ("apart", "best", "checkpointed"):
        assert rows[side]["same"]["gradient"] < 1e-4
        assert abs(rows[side]["same"]["second_loss"] - 0.6931) > 1e-4
        assert rows[side]["faster"][1] <= rows[side]["faster"][0] <= rows[side]["faster"][2]
    assert table.table(found) in done.stdout


ITEMS = [Item([1, 2], [[3, 4], [5, 6, 7]], [])] * (alone.WARM_UP + 2)
BENCH = alone.Bench(Path("hh"), rounds=2, until=float("inf"), speed=1e9, peak=2e9)


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """What becomes of sides with these losses and gradients."""
    monkeypatch.setattr(alone, "prepare", lambda setup, data: ITEMS)

    def rows(bench=BENCH, **given):
        setup = cases.Setup(cases.Case("x", batch=1), tmp_path, bench.steps)
        made = {name: Scripted(name, tmp_path, *what) for name, what in given.items()}
        found = list(alone.run([(name, setup) for name in given], bench, lambda name, *_: made[name]))
        assert all(side.closed for side in made.values())
        return found, made

    return rows


SAME = [0.7, 0.6, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4], [3.0, 4.0]


def test_sides_that_agree_are_timed_one_after_the_other(rows_of):
    (ours, theirs), made = rows_of(cdpo=SAME, best=SAME)
    assert made["cdpo"].steps == alone.WARM_UP + 2  # all there are
    assert made["best"].steps == 5 + 2  # warm after 3 compiled and 2 more
    assert theirs["warm_up"] == 5
    assert theirs["steady"]
    assert theirs["faster"] == [1, 1, 1]
    assert ours["mfu"] == pytest.approx(ours["floors"] ** -1 / 2)  # the stated peak is twice the speed here


OTHERS = {
    "gradient": (SAME[0], [3.0, 4.001]),
    "second loss": ([0.7, 0.6002, *SAME[0][2:]], SAME[1]),
    "later loss": ([*SAME[0][:4], 0.502, *SAME[0][5:]], SAME[1]),
    "nan": ([*SAME[0][:4], float("nan"), *SAME[0][5:]], SAME[1]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_times_of_sides_that_differ_are_not_told(rows_of, other):
    (_, theirs), _ = rows_of(cdpo=SAME, best=other)
    assert "is allowed" in theirs["different"]
    assert not {"seconds", "faster", "pairs_per_second"} & theirs.keys()
    assert "REFUSED" in table.line(theirs)


def test_out_of_memory_is_a_result(rows_of):
    full = sides.Ended("best", "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate")
    (ours, theirs, last), _ = rows_of(cdpo=SAME, best=([0.7, full], SAME[1]), checkpointed=SAME)
    assert table.line(theirs) == "| x | TRL | out of memory |"
    assert "seconds" in ours
    assert "faster" in last


def test_nothing_is_held_against_a_cdpo_that_ended(rows_of):
    (ours, theirs), made = rows_of(cdpo=([sides.Ended("cdpo", "a\nb")], SAME[1]), best=SAME)
    assert ours["failed"] == "b"
    assert theirs["skipped"] == "nothing to hold it against"
    assert made["best"].steps == 0


def test_what_there_is_no_time_for_is_named(rows_of):
    late = BENCH._replace(until=0.0)
    found, made = rows_of(late, cdpo=SAME, best=SAME)
    assert [row["skipped"] for row in found] == ["no time left"] * 2
    assert made["cdpo"].steps == 0


@pytest.mark.parametrize(
    ("says", "until", "why"),
    [
        (
            "import sys; sys.exit('cdpo-train: the device\\'s memory is full, with micro-batches')",
            None,
            "out of memory",
        ),
        ("import sys; sys.exit('line\\nValueError: x')", None, "ValueError: x"),
        ("import time; time.sleep(60)", 0.0, "out of time"),
    ],
)
def test_why_a_process_ended(tmp_path, monkeypatch, says, until, why):
    monkeypatch.setattr(sides, "command", lambda name, setup: ["-c", says])
    with pytest.raises(sides.Ended) as ended, sides.Side("best", cases.Setup(cases.CASES["tiny"], tmp_path, 1), until):
        pass
    assert ended.value.why == why


def test_warm_up_by_hand():
    equal, quiet = [1.0] * 6, [0] * 7
    assert alone.warmed([9.0, 5.0, 1.0, 1.1], equal, quiet) == 4
    assert alone.warmed([9.0, 5.0, 1.0, 1.3], equal, quiet) is None
    assert alone.warmed([9.0, 5.0, 1.0, 1.3], [1, 1, 1, 1.3], quiet) == 4  # more work
    assert alone.warmed([1.0] * 6, equal, [0, 1, 2, 2, 3, 3, 3]) == 6
    assert alone.warmed([1.0], equal, quiet) is None


def test_apart_by_hand(monkeypatch):
    """Two trees of one Item, each with the prompt: predicted from its own copy."""
    monkeypatch.setattr(packing, "_packed_trees", packing._packed_trees)  # put back afterwards
    ours.share_nothing()
    found = packing.pack(ITEMS[:1])
    assert found.input_ids.tolist() == [[1, 2, 3, 1, 2, 5, 6]]
    assert found.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert found.tree.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert found.predict_at[found.position].tolist() == [1, 2, 4, 5, 6]
    assert found.length.tolist() == [2, 3]
    assert found.item.tolist() == [0, 0]


def test_a_sample_of_a_gradient_keeps_its_norm():
    gradient = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    kept = channel.sampled(gradient)
    assert len(kept) < channel.COMPARED
    assert float(kept.norm()) == pytest.approx(float(gradient.norm()), rel=0.01)
    assert torch.equal(channel.sampled(gradient[:2]), gradient[:2].flatten())


def test_a_first_step_is_a_whole_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not stepped(path)
    path.write_text('{"step": 0}\n{"step": 1')
    assert not stepped(path)
    path.write_text('{"step": 0}\n{"step": 1}\n')
    assert stepped(path)


@pytest.mark.parametrize(("body", "failed"), [("pass", False), ("assert 0", True)])
def test_tests_for_gpus_run_first(tmp_path, monkeypatch, body, failed):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    given = SimpleNamespace(until=time.monotonic() + 60)
    assert gpu.tests(given)["says"] == "there are none"
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda: x")
    mark = "@pytest.mark." + "cuda"  # in two, so that this file has none itself
    text = f"import pytest\n{mark}\ndef test_it():\n    {body}\ndef test_other():\n    assert 0\n"
    (tmp_path / "tests/test_x.py").write_text(text)
    found = gpu.tests(given)
    assert found["failed"] == failed
    assert found["says"].startswith("1 failed" if failed else "1 passed")


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "start", lambda given: 1 / 0)
    given = SimpleNamespace(found={"start": {"rows": [1]}}, out=tmp_path)
    gpu.carry_out("start", given)
    found = json.loads((tmp_path / "gpu.json").read_text())["start"]
    assert found["rows"] == [1]
    assert found["says"].startswith("ZeroDivisionError")
    assert found["failed"]


def test_every_side_of_a_gpu_has_a_case():
    assert gpu.SIDES.keys() == cases.FOR_GPUS.keys()
    assert all(names[0] == "cdpo" for names in gpu.SIDES.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "torch sees no GPU here"), (["--device", "cpu", "--data", "nowhere.jsonl.gz"], "--data nowhere.jsonl.gz")],
)
def test_what_is_missing_is_said_before_anything_is_done(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu.sh", *words])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
