"""Numbers that several processes need are computed by one of them, also where one is killed, stopped or interrupted."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter

import forking
import pytest
import torch

from cdpo.system import cache
from cdpo.system.locks import locked

WORKER = """
import logging, sys, time, torch
from pathlib import Path
from cdpo.system import cache
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def compute(tell):
    with open(folder / "computed", "a") as file:
        file.write(name + "\\n")
    (folder / f"began-{name}").touch()
    for i in range(10):
        tell(i)
        time.sleep(seconds / 10)
    return torch.arange(5, dtype=torch.float64)
seen = []
entry = cache.Entry(folder / "cache", {"what": "numbers"})
with entry.claimed(seen.append) as found:
    here = found is None
    found = entry.keep(compute(entry.telling(seen.append, 10))) if here else found
assert found.tolist() == [0, 1, 2, 3, 4]
print(name, "computed" if here else "read", len(seen))
"""


def worker(tmp_path, name, seconds):
    return forking.Program("-c", WORKER, tmp_path, name, seconds)


def begun(tmp_path, name):
    deadline = time.monotonic() + 60
    while not (tmp_path / f"began-{name}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_of_processes_at_once_one_computes(tmp_path):
    workers = [worker(tmp_path, f"w{i}", 3) for i in range(2)]
    assert [process.wait() for process in workers] == [0, 0], [process.err for process in workers]
    assert Counter(process.out.split()[1] for process in workers) == {"computed": 1, "read": 1}
    assert len((tmp_path / "computed").read_text().split()) == 1


def test_who_waits_sees_progress_and_says_for_whom(tmp_path):
    holder = worker(tmp_path, "holder", 6)
    begun(tmp_path, "holder")
    waiter = worker(tmp_path, "waiter", 0)
    assert waiter.wait() == 0, waiter.err
    assert holder.wait() == 0, holder.err
    assert f"computed by pid {holder.pid} on host" in waiter.err
    assert int(waiter.out.split()[2]) > 1


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holder = worker(tmp_path, "holder", 600)
    begun(tmp_path, "holder")
    waiter = worker(tmp_path, "waiter", 0)
    time.sleep(1)
    holder.send_signal(signal.SIGKILL)
    waiter.wait()
    assert waiter.out.split()[:2] == ["waiter", "computed"], waiter.err
    late = worker(tmp_path, "late", 0)
    late.wait()
    assert late.out.split()[:2] == ["late", "read"], late.err


def test_a_stopped_holder_is_not_waited_for_for_ever(tmp_path, monkeypatch, caplog):
    """It has the lock, and its sign of life is old."""
    monkeypatch.setattr(cache, "PATIENCE", 1.0)
    holder = worker(tmp_path, "holder", 600)
    begun(tmp_path, "holder")
    holder.send_signal(signal.SIGSTOP)
    (life,) = (tmp_path / "cache").glob("*/lock.json")
    os.utime(life, (time.time() - 1000, time.time() - 1000))
    try:
        entry, numbers = cache.Entry(tmp_path / "cache", {"what": "numbers"}), torch.arange(5, dtype=torch.float64)
        with entry.claimed(lambda done: None) as found:
            assert found is None
            assert torch.equal(entry.keep(numbers), numbers)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert torch.equal(entry.read(), numbers)
    assert "no sign of life" in caplog.text


def test_a_signal_ends_the_wait(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    entry = cache.Entry(tmp_path, {"what": "numbers"})

    def interrupted(done):
        raise KeyboardInterrupt

    with locked(entry.place), pytest.raises(KeyboardInterrupt), entry.claimed(interrupted):
        pytest.fail("claimed")
    assert not entry.file.exists()
