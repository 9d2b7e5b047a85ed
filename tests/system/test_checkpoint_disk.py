"""A checkpoint is whole or not there: killed at any file operation or on a full disk, the older one stays."""

from __future__ import annotations

import builtins
import errno
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import same, state_of

from cdpo.errors import DiskError
from cdpo.system import checkpoint
from cdpo.system.checkpoint import newest, save


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")]


OPERATIONS = [(builtins, "open"), (checkpoint, "save_file")]
OPERATIONS += [(os, name) for name in ("open", "fsync", "replace", "mkdir", "unlink", "rmdir")]


def save_and_die(folder: Path, step: int, state: dict, at: int, after: bool) -> bool:
    """Save in a forked process that kills itself at its `at`-th file operation; whether it got that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(call):
            def counted(*args, **kwargs):
                nonlocal count
                count += 1
                mine = count
                if mine == at and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return call(*args, **kwargs)
                finally:
                    if mine == at:
                        os.kill(os.getpid(), signal.SIGKILL)

            return counted

        for module, name in OPERATIONS:
            setattr(module, name, dying(getattr(module, name)))
        try:
            save(folder, step, state, keep=1)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("old", [None, 10, 20], ids=["first", "next", "same step"])
def test_kill_at_every_file_operation(tmp_path, old, after):
    state = {**state_of(20), "new": True}
    possible = [None if old is None else (old, state_of(old)), (20, state)]
    for at in range(1, 200):
        folder = tmp_path / str(at)
        if old is not None:
            save(folder, old, state_of(old), keep=1)
        killed = save_and_die(folder, 20, state, at, after)
        found = newest(folder)
        assert any(same(found, expected) for expected in possible), (at, found)
        save(folder, 30, state_of(30), keep=1)
        assert same(newest(folder), (30, state_of(30)))
        assert [path.name for path in folder.iterdir()] == ["checkpoint-00000030"]
        if not killed:
            break
    assert same(found, possible[1])
    assert at > 20  # each file is opened, synced and renamed


@pytest.mark.parametrize(
    ("name", "calls_of_a_save"), [("fsync", range(1, 8)), ("replace", range(1, 5)), ("mkdir", [2])]
)
@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "disk full"), (errno.EIO, "error"), (errno.EACCES, "writable")]
)
def test_a_failing_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch, name, calls_of_a_save, number, said):
    save(tmp_path, 1, state_of(1), keep=1)
    call, calls = getattr(os, name), []

    def failing(at, *args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    for at in calls_of_a_save:
        calls.clear()
        monkeypatch.setattr(os, name, partial(failing, at))
        with pytest.raises(DiskError, match=said) as fault:
            save(tmp_path, 2, state_of(2), keep=1)
        assert "checkpoint-00000002: not written" in str(fault.value)
        assert "\n" not in str(fault.value)
        assert not leftovers(tmp_path)
        assert same(newest(tmp_path), (1, state_of(1)))


def test_no_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1, state_of(1), keep=1)
    monkeypatch.setattr("cdpo.system.files.free_bytes", lambda path: 10)
    monkeypatch.setattr(checkpoint, "_write", lambda *args: pytest.fail("began to write"))
    with pytest.raises(DiskError, match="need 84 bytes, have 10"):
        save(tmp_path, 2, state_of(2), keep=1)
    assert same(newest(tmp_path), (1, state_of(1)))


@pytest.mark.parametrize("guarded", [True, False], ids=["seen before", "met while writing"])
def test_a_disk_that_is_really_full(tmp_path, monkeypatch, guarded):
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a tmpfs here")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    try:
        if not guarded:
            monkeypatch.setattr(checkpoint, "require_space", lambda *args: None)
        small, large = {"w": torch.ones(20_000)}, {"w": torch.ones(140_000)}
        save(tmp_path, 1, small, keep=1)
        with pytest.raises(DiskError, match="disk full; need 560,000 bytes, have"):
            save(tmp_path, 2, large, keep=1)
        assert not leftovers(tmp_path)
        assert same(newest(tmp_path), (1, small))
        save(tmp_path, 3, small, keep=1)
        assert newest(tmp_path)[0] == 3
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
