"""What a job of SLURM does when its time is up, without SLURM; on a real one in test_slurm.py."""

from __future__ import annotations

import pytest

from cdpo.training.directory import status
from cdpo.system.ranks import Ranks
from cdpo.errors import RankLost
from cdpo.system.logger import Nothing
from cdpo.sweep.tasks import Task, earlier, write_task
from cdpo.sweep.worker import SlurmTask


def reach(run, step):
    (run / "checkpoints" / f"checkpoint-{step:08d}").mkdir(parents=True)


def test_it_is_requeued_while_steps_advance_and_not_for_ever(tmp_path):
    """Two without a new step are allowed here; progress forgives them, and so does a new launch."""
    task = Task(tmp_path / "sweep" / "run", tmp_path / "sweep", "cdpo-train", {})
    job = SlurmTask(str(write_task(task, {})), max_requeues=2)
    assert [job._may_requeue(task) for _ in range(3)] == [True, True, False]
    write_task(task, {})
    assert job._may_requeue(task)
    for step in (10, 20, 30):
        reach(task.directory, step)
        assert [job._may_requeue(task) for _ in range(3)] == [True, True, True]
    assert not job._may_requeue(task)


def test_a_run_that_lost_a_rank_goes_on_when_started_again(tmp_path):
    with pytest.raises(RankLost), status(tmp_path, Nothing(), Ranks()):
        raise RankLost("gone")
    assert '"interrupted"' in (tmp_path / "status.json").read_text()
    assert earlier(Task(tmp_path, None, "", {}), retry_failed=False) is None
