"""cdpo-status says of every run what its files say; jobs of a real SLURM are asked about in test_slurm.py."""

from __future__ import annotations

import json
import sys

import pytest

from cdpo.errors import ConfigError
from cdpo.sweep import status
from cdpo.system.locks import locked


def put(path, **tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


@pytest.fixture
def sweep(tmp_path):
    """Runs in all states, one of them in a sweep below, and two that have no directory yet."""
    for state in ("finished", "stopped_early", "failed", "preempted", "interrupted", "running"):
        put(tmp_path / state / "status.json", state=state, cause=f"why {state}")
    put(tmp_path / "running" / "progress.json", step=5, steps=20, seconds_per_step=10.0, time=0.0)
    put(tmp_path / ".jobs" / "qwen2.5.json")
    put(tmp_path / "named" / ".jobs" / "refused.json")
    put(tmp_path / "named" / ".jobs" / "refused.ending.json", ending="ConfigError: no", exit_code=2)
    put(tmp_path / "named" / ".jobs" / "refused.requeues.json")
    return tmp_path


def test_every_run_is_there_with_state_and_cause(sweep):
    found = {row.run: (row.state, row.step, row.cause) for row in status.rows(sweep)}
    assert found == {
        "finished": ("finished", "", ""),
        "stopped_early": ("stopped_early", "", ""),
        "failed": ("failed", "", "why failed"),
        "preempted": ("preempted", "", "why preempted"),
        "interrupted": ("interrupted", "", "why interrupted"),
        "running": ("interrupted", "5/20", "killed; the same command goes on"),  # nobody holds its lock
        "qwen2.5": ("not started", "", ""),
        "named/refused": ("failed", "", "ConfigError: no"),
    }


def test_a_run_whose_lock_is_held_is_running(sweep):
    with locked(sweep / "running"):
        (row,) = [row for row in status.rows(sweep) if row.run == "running"]
    assert (row.state, row.step) == ("running", "5/20")


def test_the_command_counts_them_and_lists_what_is_not_finished(sweep, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cdpo-status", str(sweep)])
    status.main()
    text = capsys.readouterr().out
    assert "1 finished" in text
    assert "why failed" in text
    assert text.count("finished") == 1  # as a number only


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no run"):
        status.rows(tmp_path)


def test_where_the_queue_cannot_be_asked_nothing_is_made_up(sweep, monkeypatch, capsys):
    put(sweep / "jobs.json", **{"qwen2.5": {"job_id": "7_0", "stderr": "log"}, "running": {"job_id": "7_1"}})
    monkeypatch.setenv("PATH", str(sweep))
    found = {row.run: row for row in status.rows(sweep)}
    assert (found["qwen2.5"].state, found["qwen2.5"].cause) == (
        "not started",
        "whether its job waits is not known here",
    )
    assert "whether its job runs is not known here" in found["running"].cause
    assert "no squeue" in capsys.readouterr().err
