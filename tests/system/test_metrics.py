"""Means do not depend on how rows are split; metrics.jsonl has every step once."""

import errno
import json
import math
import os
import signal

import forking
import pytest
import torch

from cdpo.errors import DiskError
from cdpo.system.metrics import Means, MetricsFile


@pytest.mark.parametrize("split", [[8], [4, 4], [5, 3], [1] * 8, [0, 8]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_means_do_not_depend_on_the_split(split, dtype):
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(8, generator=generator) * torch.logspace(-4, 4, 8)).to(dtype)
    weight = torch.rand(8, generator=generator)
    means = Means()
    for part, mass in zip(values.split(split), weight.split(split)):
        means.add("weighted", part.requires_grad_(), mass)
        means.add("plain", part)
    expected = math.fsum(v * w for v, w in zip(values.tolist(), weight.tolist())) / math.fsum(weight.tolist())
    result = means.reduce()
    assert result["weighted"] == pytest.approx(expected, rel=1e-14)
    assert result["plain"] == pytest.approx(math.fsum(values.tolist()) / 8, rel=1e-14)
    assert means.reduce() == {}


def test_ranks_are_summed_before_the_division():
    ours, theirs = Means(), Means()
    ours.add("a", torch.tensor([1.0]))
    ours.add("b", torch.tensor([3.0]), torch.tensor([0.0]))
    theirs.add("b", torch.tensor([5.0]), torch.tensor([0.0]))
    theirs.add("a", torch.tensor([4.0, 4.0, 4.0]))
    tables = []
    theirs.reduce(lambda sums: tables.append(sums) or [sums])
    result = ours.reduce(lambda sums: [sums, tables[0]])
    assert result["a"] == 13 / 4
    assert math.isnan(result["b"])  # no weight at all


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_strict_json_and_on_the_way_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "sekrit-1234")
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.log({"step": 1, "loss": math.nan, "note": "sekrit-1234\n"})
    file.log({"step": 2, "loss": 0.1})
    file.sync()
    assert rows(file.path) == [{"step": 1, "loss": None, "note": "<redacted>\n"}, {"step": 2, "loss": 0.1}]
    for bad in ({"loss": 1.0}, {"step": 1.0}):
        with pytest.raises(ValueError, match="int 'step'"):
            file.log(bad)


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 2, "lo', b'{"step": 2}', b"\xff\n", b'{"loss": 1}\n', b"[2]\n", b"\n"]
)
def test_after_a_resume_every_step_is_there_once(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in range(6):
        first.log({"step": step, "run": 1})
    first.close()
    path.write_bytes(path.read_bytes() + torn)
    second = MetricsFile(path)
    assert second.truncate(3) == 5
    for step in (4, 5, 6):
        second.log({"step": step, "run": 2})
    assert [row["step"] for row in rows(path)] == list(range(7))
    assert [row["run"] for row in rows(path)] == [1] * 4 + [2] * 3


def test_truncate_without_a_checkpoint_and_without_rows(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.truncate(-1) == -1
    file.log({"step": 0})
    assert file.truncate(0) == 0
    assert rows(file.path) == [{"step": 0}]
    assert file.truncate(-1) == 0
    assert rows(file.path) == []


def test_truncate_is_atomic(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log({"step": 1})
    file.log({"step": 2})

    def failing(*args):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(DiskError):
        file.truncate(1)
    file.log({"step": 3})
    assert [row["step"] for row in rows(file.path)] == [1, 2, 3]


def test_a_full_disk_is_a_disk_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(DiskError, match="disk full"):
        MetricsFile("/dev/full").log({"step": 1})


def test_rows_survive_a_kill(tmp_path):
    code = f"""
import os, signal
from cdpo.system.metrics import MetricsFile
file = MetricsFile({str(tmp_path / "m.jsonl")!r})
for step in range(100):
    file.log({{"step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert forking.run("-c", code).returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path / "m.jsonl")] == list(range(100))
