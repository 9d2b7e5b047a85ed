"""What a job of SLURM does when its time is up, without SLURM; on a real one in test_slurm.py."""

from __future__ import annotations

import pytest

from cdpo.config.task import Task, file_of, write_task
from cdpo.errors import RankLost
from cdpo.sweep.outcome import earlier
from cdpo.sweep.worker import SlurmJob
from cdpo.training.directory import RunDirectory


def reach(run, step):
    (run / "checkpoints" / f"checkpoint-{step:08d}").mkdir(parents=True)


def test_it_is_requeued_while_steps_advance_and_not_for_ever(tmp_path):
    """Two without a new step are allowed here; progress forgives them, and so does a new launch."""
    task = Task(tmp_path / "sweep" / "run", {}, "cdpo-train", sweep=tmp_path / "sweep")
    write_task(task)
    job = SlurmJob(str(file_of(task)), max_requeues=2)
    assert [job.may_requeue(task) for _ in range(3)] == [True, True, False]
    write_task(task)
    assert job.may_requeue(task)
    for step in (10, 20, 30):
        reach(task.directory, step)
        assert [job.may_requeue(task) for _ in range(3)] == [True, True, True]
    assert not job.may_requeue(task)


def test_a_run_that_lost_a_rank_goes_on_when_started_again(tmp_path):
    with pytest.raises(RankLost), RunDirectory(tmp_path).running({}):
        raise RankLost("gone")
    assert '"interrupted"' in (tmp_path / "status.json").read_text()
    assert earlier(Task(tmp_path, {}), retry_failed=False) is None
