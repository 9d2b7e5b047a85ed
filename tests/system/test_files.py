"""Files are replaced whole or not at all; a lock names who holds it; secrets never reach a file."""

import errno
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from cdpo.errors import ConfigError, DiskError
from cdpo.system import files
from cdpo.system.files import read_json, redact, remove_drafts, to_json, write_atomic, write_json
from cdpo.system.locks import locked


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "é\n")
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "disk full; need 3 bytes, have"),
        (errno.EDQUOT, "disk full"),
        (errno.EIO, "check the disk"),
        (errno.EACCES, "make its folder writable"),
        (errno.EROFS, "make its folder writable"),
    ],
)
def test_a_failure_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, name, number, said):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def failing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, failing)
    with pytest.raises(DiskError, match=said) as fault:
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert str(fault.value).startswith(f"{path}: not written (")
    assert "\n" not in str(fault.value)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_any_other_failure_leaves_the_old_file_too(tmp_path):
    write_atomic(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "file") as draft:  # noqa: PT012
        draft.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_folder_that_is_a_file_is_a_disk_error(tmp_path):
    write_atomic(tmp_path / "file", b"")
    with pytest.raises(DiskError):
        write_atomic(tmp_path / "file" / "below", b"")


def test_remove_drafts_takes_drafts_only(tmp_path):
    for name in (".a.1-0f.tmp", ".lock", "b.tmp", "c"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".folder.1-0f.tmp" / "sub").mkdir(parents=True)
    remove_drafts(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "b.tmp", "c"}


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"nan": math.nan, "deep": [(1, -math.inf)], "text": "é"})
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert read_json(tmp_path / "a.json") == {"nan": None, "deep": [[1, None]], "text": "é"}
    with pytest.raises(TypeError):
        to_json({"x": object()})


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} x'])
def test_broken_json_is_named(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_secrets_reach_no_file(tmp_path, monkeypatch):
    secrets = {
        "WANDB_API_KEY": "wk-0123456789",
        "HF_TOKEN": 'hf_"quoted"\\1234',
        "AWS_SECRET_ACCESS": "wk-0123456789-longer",
        "db_password": "pass word 1",
    }
    for name, value in {**secrets, "SHORT_KEY": "short", "PLACE": "an ordinary value"}.items():
        monkeypatch.setenv(name, value)
    tree = {"list": [f"token={value}!" for value in secrets.values()], "kept": ["short", "an ordinary value", 1, None]}
    write_json(tmp_path / "a.json", tree)
    write_atomic(tmp_path / "a.txt", "\n".join(tree["list"]))
    assert read_json(tmp_path / "a.json") == {"list": ["token=<redacted>!"] * 4, "kept": tree["kept"]}
    assert (tmp_path / "a.txt").read_text().split("\n") == ["token=<redacted>!"] * 4
    assert redact(("wk-0123456789",)) == ["<redacted>"]


HOLDER = """
import sys, time
from cdpo.system.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=rf"by pid {holder.pid} on host \S+ since \d{{4}}-"), locked(tmp_path):
                pytest.fail("two processes hold one folder")
            (tmp_path / "lock.json").write_text("{")
            with pytest.raises(ConfigError, match="by another process"), locked(tmp_path):
                pytest.fail("two processes hold one folder")
        finally:
            holder.send_signal(signal.SIGKILL)
    with locked(tmp_path):  # the system dropped the dead holder's lock
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"), locked(tmp_path):
            pytest.fail("two runs of one process hold one folder")
    with locked(tmp_path):
        pass


def test_importing_the_small_modules_is_cheap():
    modules = ", ".join(f"cdpo.system.{name}" for name in ("files", "locks", "signals", "progress", "logger"))
    code = f"import sys, {modules}; print({{'torch', 'wandb', 'numpy'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
