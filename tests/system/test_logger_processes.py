"""wandb itself, in processes of its own: its copy is complete over a resume, and it never gets a secret."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

import forking

from cdpo.system.logger import run_id

RUN = """
import glob, os, signal, sys, time
from pathlib import Path
from cdpo.system.logger import Wandb
from cdpo.system.metrics import MetricsFile

def attempt(folder, first, last, checkpoint=-1, kill=False):
    metrics, copy = MetricsFile(folder / "metrics.jsonl"), Wandb(init_timeout=2, finish_timeout=20, tags=["t"])
    copy.start(folder, {"loss": {"beta": 0.1}, "note": os.environ["HF_TOKEN"]}, "sweep", metrics.truncate(checkpoint))
    began = time.monotonic()
    for step in range(first, last):
        row = {"step": step, "loss": step / 2, "accuracy": None}
        metrics.log(row)
        copy.log(row)
    assert time.monotonic() - began < 2
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    copy.finish(0)
"""


def attempt(folder: Path, call: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    clean |= {"HF_TOKEN": "hf_0123456789", "NETRC": "/dev/null", "HOME": str(folder.parent), **env}
    code = f"{RUN}\nattempt(Path({str(folder)!r}), {call})"
    return forking.run("-c", code, env=clean, timeout=120)


def records(path: Path):
    """Records of a wandb file: LevelDB log blocks of 32 KiB, each record crc (4), length (2), kind (1), payload."""
    from wandb.proto import wandb_internal_pb2

    raw, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
        part, at = part + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def copied(folder: Path) -> tuple[list[int], set]:
    """Steps in order of time, and what is said of the run."""
    steps, said = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name):
        for record in records(path):
            if record.HasField("run"):
                run = record.run
                said.add((run.run_id, run.project, run.run_group, run.job_type, *run.tags))
            if record.HasField("history"):
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                steps.append(row["_step"])
                assert row["loss"] == row["_step"] / 2
    return steps, said


def assert_no_secret(folder: Path, secret: str = "hf_0123456789") -> None:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert len(found) > 3
    assert not [path for path in found if secret.encode() in path.read_bytes()]


def test_offline_copy_is_written_once_per_step_across_a_resume(tmp_path):
    folder = tmp_path / "a run"
    assert attempt(folder, "0, 6").returncode == 0
    time.sleep(1)  # wandb names its folders by the second
    result = attempt(folder, "3, 9, checkpoint=2")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    steps, said = copied(folder)
    assert steps == list(range(9))
    assert said == {(run_id(folder), "cdpo", "sweep", "train", "t")}
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(9))
    assert_no_secret(folder)


def test_black_hole_goes_on_offline(tmp_path):
    """A server that accepts and never answers: the loop does not wait, the end does for a few seconds."""
    key = "0123456789abcdef0123456789abcdef01234567"
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        result = attempt(tmp_path / "run", "0, 4", WANDB_API_KEY=key, WANDB_BASE_URL=url)
    assert time.monotonic() - began < 60
    assert result.returncode == 0
    assert result.stderr.count("wandb cannot go online") == 1
    assert copied(tmp_path / "run")[0] == [0, 1, 2, 3]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert_no_secret(tmp_path / "run", key)


def test_death_of_wandbs_process_does_not_stop_the_run(tmp_path):
    """SLURM's SIGTERM goes to every process of a step and kills wandb's own."""
    code = f"""{RUN}
def children():
    listed = f"/proc/{{os.getpid()}}/task/*/children"
    return [int(pid) for path in glob.glob(listed) for pid in open(path).read().split()]

copy = Wandb(mode="offline", finish_timeout=5)
copy.start(Path({str(tmp_path)!r}), {{}})
while not list(Path({str(tmp_path)!r}).glob("wandb/offline-run-*/*.wandb")):
    time.sleep(0.05)
time.sleep(0.5)
assert children()
for pid in children():
    os.kill(pid, signal.SIGKILL)
for step in range(20):
    copy.log({{"step": step}})
    time.sleep(0.02)
copy.finish()
print("finished")
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    result = forking.run("-c", code, env=env, timeout=60)
    assert (result.returncode, result.stdout) == (0, "finished\n"), result.stderr
    assert result.stderr.count("wandb is gone") == 1
    assert "Traceback" not in result.stderr


def test_kill_leaves_the_metrics_complete(tmp_path):
    assert attempt(tmp_path / "run", "0, 50, kill=True").returncode == -signal.SIGKILL
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 50
