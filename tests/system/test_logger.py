"""A wandb that fails or hangs: the copy can neither stop nor slow a run."""

from __future__ import annotations

import logging
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from cdpo.system import logger
from cdpo.system.logger import NoLogger, Wandb, run_id


class Fake(types.ModuleType):
    """Stands for wandb; `fail` raises or blocks where a test says so."""

    def __init__(self, **fail):
        super().__init__("wandb")
        self.fail, self.modes, self.rows, self.ended = fail, [], [], []
        self.Settings = lambda **settings: types.SimpleNamespace(**settings)

    def _maybe(self, name):
        self.fail.get(name, lambda: None)()

    def init(self, mode, **settings):
        self.modes.append(mode)
        self._maybe(f"init {mode}")
        return self

    def log(self, row, step):
        self._maybe("log")
        self.rows.append(step)

    def finish(self, exit_code):
        self._maybe("finish")
        self.ended.append(exit_code)

    def teardown(self):
        self._maybe("teardown")


def broken():
    raise RuntimeError("wandb broke\nand more")


def settle() -> None:
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(10)


def train(monkeypatch, folder, fake, mode="online", **settings) -> float:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    copy = Wandb(mode=mode, **settings)
    began = time.monotonic()
    copy.start(folder, {})
    for step in range(20):
        copy.log({"step": step, "loss": 0.5})
    took = time.monotonic() - began
    copy.finish(7)
    return took


@pytest.mark.parametrize(
    ("fail", "modes", "rows", "warnings"),
    [
        ([], ["online"], 20, 0),
        (["init online"], ["online", "offline"], 20, 1),
        (["init online", "teardown"], ["online", "offline"], 20, 1),
        (["init online", "init offline"], ["online", "offline"], 0, 2),
        (["log", "teardown"], ["online"], 0, 1),
        (["finish"], ["online"], 20, 1),
    ],
)
def test_no_failure_reaches_the_run(tmp_path, monkeypatch, caplog, fail, modes, rows, warnings):
    fake = Fake(**dict.fromkeys(fail, broken))
    train(monkeypatch, tmp_path, fake)
    assert fake.modes == modes
    assert fake.rows == list(range(rows))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warnings
    assert all("RuntimeError: wandb broke)" in record.message for record in caplog.records)
    assert fake.ended == ([7] if rows == 20 and "finish" not in fail else [])


@pytest.mark.parametrize("where", ["init online", "log", "finish"])
def test_a_hang_does_not_slow_the_run(tmp_path, monkeypatch, caplog, where):
    release = threading.Event()
    began = time.monotonic()
    assert train(monkeypatch, tmp_path, Fake(**{where: release.wait}), finish_timeout=0.2) < 0.5
    assert time.monotonic() - began < 2
    assert "has not finished in 0.2 s" in caplog.text
    release.set()
    settle()


def test_wandb_that_does_not_keep_up_is_dropped_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logger, "WAITING", 5)
    release = threading.Event()
    fake = Fake(log=release.wait)
    train(monkeypatch, tmp_path, fake)
    assert caplog.text.count("does not keep up") == 1
    release.set()
    while len(fake.rows) < 5:  # what waits is still copied: by this test's wandb, not the next one's
        time.sleep(0.01)


def test_what_was_copied_is_remembered_over_two_resumes(tmp_path, monkeypatch):
    for after, first, expected in ((-1, 0, list(range(5))), (4, 2, []), (3, 3, [5, 6])):
        fake = Fake()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        copy = Wandb(mode="offline")
        copy.start(tmp_path, {}, after=after)
        for step in range(first, 5 if first < 3 else 7):
            copy.log({"step": step})
        copy.finish()
        assert fake.rows == expected


@pytest.mark.parametrize(
    ("env", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "", "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ({}, "machine api.wandb.ai login user password p", "online"),
        ({"WANDB_BASE_URL": "https://other.example"}, "machine api.wandb.ai login user password p", "offline"),
        ({}, "nonsense", "offline"),
    ],
)
def test_auto_is_online_only_with_a_key(tmp_path, monkeypatch, env, netrc, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    for name, value in {**env, "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    fake = Fake()
    train(monkeypatch, tmp_path / "run", fake, mode="auto")
    assert fake.modes == [mode]


def test_the_id_belongs_to_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_id(Path("a b:c")) == run_id(tmp_path / "a b:c") != run_id(tmp_path / "x" / "a b:c")
    assert run_id(Path("a b:c")).startswith("a-b-c-")


def test_settings_are_checked_and_nothing_does_nothing(tmp_path):
    with pytest.raises(ValueError, match="seconds"):
        Wandb(init_timeout=0)
    Wandb().log({"step": 1})  # never started
    copy = NoLogger()
    copy.start(tmp_path, {})
    copy.log({"step": 1})
    copy.finish()
    assert not list(tmp_path.iterdir())


def test_yaml_has_the_keys_of_the_class():
    import dataclasses

    import yaml

    conf = Path(__file__).parents[2] / "conf" / "logger"
    for name, kind in (("wandb", Wandb), ("none", NoLogger)):
        settings = yaml.safe_load((conf / f"{name}.yaml").read_text())
        assert settings.pop("_target_") == f"cdpo.system.{kind.__name__}"
        assert list(settings) == [field.name for field in dataclasses.fields(kind)]
        assert kind(**settings) == kind()
