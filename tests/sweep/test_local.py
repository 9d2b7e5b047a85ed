"""Sweeps on this machine: whatever happens to one run, the others finish, and the same command does the rest."""

from __future__ import annotations

import signal
import time

import forking
import pytest
from sweeping import Sweeper

from cdpo.system.locks import locked


@pytest.fixture
def sweeper(tmp_path):
    return Sweeper(tmp_path)


@pytest.mark.slow
def test_a_run_that_dies_leaves_the_others_alone_and_the_same_command_does_the_rest(sweeper):
    hows = "loss.how=none,kill,segv,exit,raise"
    code, text = sweeper.run(hows)
    assert code == 1, text
    found = sweeper.endings()
    assert found["none"] == "done"
    for how, words in {"kill": "SIGKILL", "segv": "SIGSEGV", "exit": "exit(3)", "raise": "on purpose"}.items():
        assert words in found[how]
    page = (sweeper.out / "report.html").read_text()
    assert [
        words for words in ("SIGKILL", "SIGSEGV", "SystemExit: 3", "on purpose", "loss.how=segv") if words not in page
    ] == []
    sweeper.marker.unlink()
    assert sweeper.run(hows)[0] == 1  # exit and raise are failures that the run itself knows of
    found = sweeper.endings()
    assert (found["none"], found["kill"], found["segv"]) == ("done before", "done", "done")
    assert "retry_failed=true tries again: RuntimeError: on purpose" in found["raise"]
    code, text = sweeper.run(hows, "hydra.launcher.retry_failed=true")
    assert code == 0, text
    assert sweeper.endings()["exit"] == "done"


def test_nothing_is_started_with_a_config_that_cannot_be_used(sweeper):
    code, text = sweeper.run("trainer.batch_size=4,-1", "loss.how=none")
    assert code == 1
    assert "batch_size=-1 must be at least 1" in text
    assert len(list(sweeper.out.glob("bandit-*"))) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_what_runs_and_starts_nothing_more(sweeper, number):
    process = sweeper.start("loss.how=none", "loss.seconds=0.2", "trainer.max_steps=100", "seed=0,1,2",
                            "hydra.launcher.at_once=1")  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(sweeper.out.glob("*/progress.json")):
        assert process.poll() is None, process.err
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(180) == 75
    (begun,) = sweeper.out.glob("bandit-*")
    assert '"preempted"' in (begun / "status.json").read_text()
    assert list(begun.glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "two"])
def test_a_number_of_runs_at_a_time_that_cannot_be_is_refused(sweeper, count):
    code, text = sweeper.run("loss.how=none", f"hydra.launcher.at_once={count}")
    assert code == 2
    assert f"hydra.launcher.at_once={count} must be a whole number, at least 1" in text


def test_what_a_run_prints_is_kept(tmp_path):
    """Also what it has only begun to write when it ends."""
    script = "from cdpo.sweep import local; local.write_to(local.Path('out')); local.child({})"
    for work, words in (("lambda: print('last words') or 3", "last words"), ("lambda: 1 / 0", "ZeroDivisionError")):
        code = forking.run("-c", script.format(work), cwd=tmp_path).returncode
        assert words in (tmp_path / "out").read_text()
        assert code == (3 if "print" in work else 1)


def test_a_second_launch_in_a_directory_is_refused(sweeper):
    with locked(sweeper.out, "swept"):
        code, text = sweeper.run("loss.how=none")
    assert code == 2
    assert "is being swept by pid" in text
    assert "last sign of life" in text
