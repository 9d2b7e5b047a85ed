"""Shared by the tests of reports: one report of a sweep in which everything has happened."""

from __future__ import annotations

import json

import pytest
from written_runs import ATTAINED, FAMILIES, change, write_run

from cdpo.report.write import report


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The report of a sweep in which everything has happened."""
    folder = tmp_path_factory.mktemp("outputs") / "sweep"
    for loss in ATTAINED:
        for constraint in ("none", *FAMILIES):
            for seed in (0, 1):
                write_run(folder, loss, constraint, seed)
    failed = write_run(folder, "dpo", "none", 2)
    change(failed, "status", state="failed", cause="NumericsError: <script>alert(1)</script> | [x](http://a.b) & `c`")
    (failed / "summary.json").unlink()
    running = write_run(folder, "dpo", "none", 3)
    change(running, "status", state="running")
    with open(running / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0.1, "objective/attai')
    (running / "summary.json").write_text('{"state": "fin')
    old = write_run(folder / "nested" / "deeper", "dpo", "lora_r1", 4)
    for name in ("choices", "status"):
        (old / f"{name}.json").unlink()
    (old / "model").mkdir()
    (old / "model" / "config.json").write_text('{"model_type": "llama"}')  # of the exported model: no run
    (folder / "copy" / "model").mkdir(parents=True)
    (folder / "copy" / "model" / "config.json").write_text('{"model_type": "llama"}')
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    recovery = write_run(folder, "dpo", "none", 5, study={"_target_": "cdpo.compressive_sensing.Recovery"})
    change(recovery, "summary", metrics={"recovery/l1/k=8": 0.9})
    (recovery / "recovery.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="90pt" height="60pt"/>')
    refused = {"directory": "refused", "command": "cdpo-train loss=x", "choices": {"loss": "ipo", "constraint": ["a"]}}
    ending = {"ending": "ConfigError: loss.tau=-1 must be positive", "exit_code": 2}
    sweep = [refused | ending, {"directory": failed.name, "ending": "done", "exit_code": 0}]
    (folder / "sweep.json").write_text(json.dumps({"runs": sweep}))
    assert report(folder) == folder / "report.html"
    return folder
