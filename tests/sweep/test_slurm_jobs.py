"""What is kept of the jobs of a sweep, without a SLURM."""

from __future__ import annotations

import json

from cdpo.sweep import slurm


def test_jobs_are_kept_in_the_sweep_of_their_run(tmp_path):
    known = {tmp_path / "a" / "one": {"job_id": "1"}, tmp_path / "b" / "one": {"job_id": "2"}}
    for sweep in ("a", "b"):
        (tmp_path / sweep).mkdir()
    slurm.keep_jobs(known)
    assert json.loads((tmp_path / "b" / "jobs.json").read_text()) == {"one": {"job_id": "2"}}
    assert slurm.known_jobs([tmp_path / "a", tmp_path / "b", tmp_path / "c"]) == known
