"""Sweeps on a real SLURM, which the fixture brings up on this machine; skipped where SLURM is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from sweeping import Sweeper, trajectory

from cdpo.sweep import queue, status

CLUSTER = Path(__file__).parent / "slurm_cluster"
pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1)]  # the output says RERUN


@contextmanager
def cluster(folder, **options):
    """A SLURM of two nodes with two cores each; `options` as slurm-up.sh says."""
    programs = ("slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd")
    if lacking := [name for name in programs if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]:
        if os.environ.get("CDPO_REQUIRE_SLURM"):
            pytest.fail(f"{', '.join(lacking)} not installed, and CDPO_REQUIRE_SLURM is set")
        pytest.skip(f"no {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client slurmdbd mariadb-server-core)")
    before = dict(os.environ)
    subprocess.run([CLUSTER / "slurm-up.sh", folder, "2", "2", "2"], check=True, timeout=90, env=before | options)
    os.environ.update(SLURM_CONF=str(folder / "slurm.conf"), PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
    try:
        yield
    finally:
        subprocess.run([CLUSTER / "slurm-down.sh", folder], timeout=90)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture
def austere_slurm(tmp_path_factory):
    """Without accounting, and only SIGTERM tells a job that it is preempted; the other cluster is aside meanwhile."""
    with cluster(tmp_path_factory.mktemp("slurm"), CDPO_SLURM_ACCT="none", CDPO_SLURM_PREEMPT_USR="0"):
        yield


SITE = ("poll_s=0.5", "cpus_per_task=1", "gpus_per_node=null", "timeout_min=5", "signal_delay_s=30")
OPTIONS = ("hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in SITE))


@pytest.fixture
def sweeper(slurm, tmp_path):
    return Sweeper(tmp_path, *OPTIONS)


def states(sweeper) -> list[str]:
    """What accounting, which lags a little behind, says of all jobs of a sweep."""
    jobs = [job["job_id"] for job in json.loads((sweeper.out / "jobs.json").read_text()).values()]
    return sorted(account.split()[0] for account in queue.settled(jobs).values())


def until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def reached(folder: Path, step: int) -> bool:
    """Whether the only run below a folder has done so many steps."""
    return any(len(trajectory(path.parent)) > step for path in folder.glob("*/metrics.jsonl"))


@pytest.mark.timeout(900)
def test_a_dozen_runs_of_which_three_fail_and_the_same_command_does_the_rest(sweeper):
    """12 jobs, at a site that allows 6 in an array: nine finish, one raises, one is killed, one runs out of time."""
    grid = ("loss.how=a,b,c,d,e,f,g,h,i,raise,kill,hang", "hydra.launcher.timeout_min=2")
    code, text = sweeper.run(*grid)
    assert code == 1, text
    assert states(sweeper) == ["COMPLETED"] * 9 + ["FAILED"] * 2 + ["TIMEOUT"], text
    found = sweeper.endings()
    assert [found[how] for how in "abcdefghi"] == ["done"] * 9
    assert "on purpose" in found["raise"]
    assert "was ended by SLURM (FAILED" in found["kill"]
    assert "was ended by SLURM (TIMEOUT" in found["hang"]
    assert "on purpose" in (sweeper.out / "report.md").read_text()
    sweeper.marker.unlink()
    code, text = sweeper.run(*grid, "hydra.launcher.retry_failed=true")
    assert code == 0, text
    assert "3 jobs submitted" in text
    assert text.count("done before") == 9


LOW = ("loss.how=none", "loss.seconds=0.1", "constraint=[lora_r1,dropout]", "seed=3", "hydra.launcher.partition=low")


def preempt(sweeper, times: int, steps: int) -> Path:
    """Run LOW, preempted so many times by a job of a higher partition; returns the run's directory once it is done."""
    process = sweeper.start(*LOW, f"trainer.max_steps={steps}")  # 0.1 s a step, so it outlasts a slow preemption
    until(lambda: reached(sweeper.out, 8))
    (run,) = sweeper.out.glob("bandit-*")
    for done in range(times):
        other = ["sbatch", "-p", "high", "-N2", "--exclusive", "-W", "--wrap", "sleep 1"]
        subprocess.run(other, check=True, cwd=sweeper.folder)
        until(lambda done=done: resumed(run) > done)
        begun = len(trajectory(run))
        until(lambda begun=begun: reached(sweeper.out, min(begun + 5, steps - 5)))
    assert process.wait(180) == 0
    assert resumed(run) == times
    return run


def resumed(run: Path) -> int:
    """How often a run went on from a checkpoint."""
    return (run / "train.log").read_text().count("resumed from step")


def same_as_uninterrupted(run: Path, folder: Path, marker: Path, *options: str) -> None:
    """Metrics, each step once, and all tensors of the last checkpoint, bit for bit."""
    folder.mkdir()
    plain = Sweeper(folder, "trainer.threads=1")
    fast = [option for option in options if not option.startswith("loss.seconds=")]
    code, text = plain.run(*fast, f"loss.marker={marker}")
    assert code == 0, text
    (other,) = plain.out.glob("bandit-*")
    assert trajectory(run) == trajectory(other)
    ends = [max(one.glob("checkpoints/*/tensors.safetensors")).read_bytes() for one in (run, other)]
    assert ends[0] == ends[1]


def test_a_run_preempted_three_times_ends_as_one_that_was_not(sweeper, tmp_path):
    run = preempt(sweeper, 3, 300)
    same_as_uninterrupted(run, tmp_path / "plain", sweeper.marker, *LOW[:-1], "trainer.max_steps=300")


@pytest.mark.timeout(900)
def test_a_run_that_needs_more_than_its_time_is_requeued_and_ends_the_same(sweeper, tmp_path):
    options = (*LOW[:-1], "trainer.max_steps=100", "loss.seconds=1")  # 100 s and more; saved after 30 to 90 s
    code, text = sweeper.run(*options, "hydra.launcher.timeout_min=2")
    assert code == 0, text
    (run,) = sweeper.out.glob("bandit-*")
    assert json.loads(next(sweeper.out.glob(".jobs/*.requeues.json")).read_text())["total"] >= 1
    same_as_uninterrupted(run, tmp_path / "plain", sweeper.marker, *options)


def test_a_cancelled_run_is_saved_and_not_restarted(sweeper):
    process = sweeper.start("loss.how=none", "loss.seconds=0.1", "trainer.max_steps=400")
    until(lambda: reached(sweeper.out, 3))
    (waiting,) = status.rows(sweeper.out)
    assert (waiting.state, waiting.step.split("/")[1]) == ("running", "400")
    (job,) = json.loads((sweeper.out / "jobs.json").read_text()).values()
    subprocess.run(["scancel", job["job_id"]], check=True)
    assert process.wait(180) == 1
    assert states(sweeper) == ["CANCELLED"]
    (row,) = status.rows(sweeper.out)
    assert (row.state, "SIGTERM" in row.cause) == ("preempted", True)
    (run,) = sweeper.out.glob("bandit-*")
    assert list(run.glob("checkpoints/checkpoint-*"))
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"


def test_detached_jobs_are_seen_and_not_submitted_twice_from_within_a_job_too(sweeper, tmp_path):
    site = ("wait=false", "mem_gb=1", f"setup=[touch {tmp_path}/setup]")
    grid = ("loss.how=none", "loss.seconds=0.2", "trainer.max_steps=150", "seed=0,1")
    grid += tuple(f"hydra.launcher.{option}" for option in site)
    grid += ("+hydra.launcher.additional_parameters.comment=ours",)
    within = subprocess.run(  # the job's own SLURM_* would make the new jobs' srun fail
        ["srun", "-n1", "--cpus-per-task=1", sys.executable, *sweeper.command(*grid)],
        capture_output=True, text=True, env=sweeper.environment(),
    )  # fmt: skip
    assert "2 jobs submitted, 0 in the queue before" in within.stdout, within.stderr
    assert {row.state for row in status.rows(sweeper.out)} <= {"waiting", "running"}
    assert "0 jobs submitted, 2 in the queue before" in sweeper.run(*grid)[1]
    (job, _) = (job["job_id"] for job in json.loads((sweeper.out / "jobs.json").read_text()).values())
    shown = subprocess.check_output(["scontrol", "show", "job", "-o", job], text=True)
    assert "MinMemoryNode=1G" in shown
    assert "Comment=ours" in shown
    until(lambda: {row.state for row in status.rows(sweeper.out)} == {"finished"})
    assert (tmp_path / "setup").exists()


def test_a_job_that_ends_before_it_begins_is_failed_and_its_log_named(sweeper):
    code, text = sweeper.run("loss.how=none", "hydra.launcher.setup=[exit 7]")
    assert code == 1, text
    assert "was ended by SLURM (FAILED 7:0)" in sweeper.endings()["none"]
    (row,) = status.rows(sweeper.out)
    assert row.state == "failed"
    assert "ended by SLURM (FAILED 7:0) before it began: see" in row.cause


def test_without_accounting_preempted_killed_and_unreadable_runs_are_told_apart(austere_slurm, tmp_path):
    sweeper = Sweeper(tmp_path, *OPTIONS)
    preempt(sweeper, 1, 150)
    faults = Sweeper(tmp_path / "faults", *OPTIONS)
    (tmp_path / "bad.json").write_text('{"prompts": ["a"], "responses": ["b", "b"], "rewards": [[0, 1]]}')
    code, text = faults.run("loss.how=kill,raise,none", "dataset=bandit", f"dataset.path=null,{tmp_path}/bad.json")
    assert code == 1, text
    runs = json.loads((faults.out / "sweep.json").read_text())["runs"]
    bad, good = ([run for run in runs if ("bad.json" in run["command"]) == is_bad] for is_bad in (True, False))
    assert len(bad) == 3
    assert all("holds 'b' twice" in run["ending"] for run in bad)
    found = {run["command"].partition("loss.how=")[2].split()[0]: run["ending"] for run in good}
    assert "there is no accounting" in found["kill"]
    assert "on purpose" in found["raise"]
    assert found["none"] == "done"


def test_two_nodes_do_one_run_preempted_with_the_numbers_of_one_process(sweeper, tmp_path):
    options = ("loss.how=none", "loss.seconds=0.1", "trainer.max_steps=150", "trainer.batch_size=3", "seed=3")
    refused, text = sweeper.run(*options, "hydra.launcher.nodes=2")
    assert refused == 1, text
    assert "set trainer.distributed=ddp or fsdp" in sweeper.endings()["none"]
    two = ("hydra.launcher.nodes=2", "hydra.launcher.partition=low", "trainer.distributed=ddp")
    process = sweeper.start(*options, *two)
    until(lambda: reached(sweeper.out, 8))
    subprocess.run(["sbatch", "-p", "high", "-N2", "--exclusive", "-W", "--wrap", "sleep 1"], check=True, cwd=tmp_path)
    assert process.wait(180) == 0
    assert states(sweeper) == ["COMPLETED"]
    (run,) = sweeper.out.glob("bandit-*")
    assert json.loads((run / "status.json").read_text())["ranks"] == 2
    assert "resumed from step" in (run / "train.log").read_text()
    (tmp_path / "plain").mkdir()
    plain = Sweeper(tmp_path / "plain", "trainer.threads=1")
    code, text = plain.run(*(options[0], *options[2:]), f"loss.marker={sweeper.marker}")
    assert code == 0, text
    (other,) = plain.out.glob("bandit-*")
    ours, theirs = trajectory(run), trajectory(other)
    assert len(ours) == len(theirs)
    for one, two_ranks in zip(theirs, ours):
        assert one.keys() == two_ranks.keys()
        assert two_ranks == pytest.approx(one, rel=1e-6, abs=1e-9)
