"""The table of runs says what the run directories say, whatever is in them."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from report_files import Page
from written_runs import change, write_run

from cdpo.report import runs
from cdpo.report.write import report


def test_csv_and_parquet_hold_the_same_table(made):
    parquet = pd.read_parquet(made / "runs.parquet")
    csv = pd.read_csv(made / "runs.csv", dtype=dict(parquet.dtypes.astype(str)), float_precision="round_trip")
    assert_frame_equal(csv, parquet, check_dtype=False)
    assert len(csv) == 30
    one = csv.set_index("directory").loc["bandit-tabular-rlhf-lora_r4-s1-0005"]
    names = ["loss", "constraint", "seed", "config.constraint.lora_r4.rank"]
    assert list(one[names]) == ["rlhf", "lora_r4", 1, 4]
    assert one["metric/objective/attained"] == pytest.approx(0.82)
    assert one["command"] == "cdpo-train loss=rlhf constraint=lora_r4 seed=1"


def test_runs_that_did_not_go_through_have_cause_and_command(made):
    table = runs.table(made).set_index("directory")
    states = {"finished": 26, "failed": 1, "running": 1, "unknown": 1, "missing": 1}
    assert table["state"].value_counts().to_dict() == states
    failed = table[table["state"] == "failed"].iloc[0]
    assert failed["cause"].startswith("NumericsError: <script>")
    assert (failed["step"], failed["command"]) == (4, "cdpo-train loss=dpo constraint=none seed=2")
    running = table[table["state"] == "running"].iloc[0]
    assert "still running, or killed" in running["cause"]
    assert "summary.json cannot be read" in running["cause"]
    assert "config.json cannot be read" in table.loc["broken", "cause"]
    refused = table.loc["refused"]
    assert list(refused[["cause", "command", "loss", "constraint"]]) == [
        "ConfigError: loss.tau=-1 must be positive", "cdpo-train loss=x", "ipo", "a"]  # fmt: skip
    text = Page((made / "report.html").read_text()).text
    for cause in table["cause"].dropna():
        assert cause in text


def test_an_old_run_is_named_by_its_classes(made):
    old = runs.table(made).set_index("directory").filter(like="nested/", axis=0)
    assert len(old) == 1
    assert list(old.iloc[0][["state", "loss", "model", "constraint"]]) == ["finished", "dpo", "tabular", "lora_r1"]


def test_torn_lines_are_left_out_and_the_others_read(tmp_path):
    lines = ['{"step": 1, "a": 2}', "[]", '{"step": 2, "a": "x"}', "", '{"step": 3, "a": 4}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert runs.history(tmp_path, ["a", "b"]) == {"a": [(1, 2.0), (3, 4.0)], "b": []}
    assert runs.history(tmp_path / "none", ["a"]) == {"a": []}
    assert runs.histograms(tmp_path) == {}


def test_a_run_in_the_directory_of_a_sweep_does_not_hide_it(tmp_path):
    path = write_run(tmp_path, "dpo").rename(tmp_path / "both")
    inner = write_run(path, "rlhf")
    assert runs.table(path)["directory"].tolist() == ["."]
    (path / "sweep.json").write_text(json.dumps({"runs": [{"directory": "no", "ending": "done", "exit_code": 0}]}))
    assert runs.table(path)[["directory", "state"]].to_numpy().tolist() == [
        [".", "finished"], [inner.name, "finished"], ["no", "missing"]]  # fmt: skip
    assert runs.table(tmp_path)["directory"].tolist() == ["both", f"both/{inner.name}", "both/no"]


@pytest.mark.parametrize("part", ["config", "summary"])
@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_damaged_run_is_listed_with_the_true_cause(tmp_path, part, text):
    write_run(tmp_path, "rlhf")
    file = write_run(tmp_path, "dpo") / f"{part}.json"
    file.unlink() if text is None else file.write_text(text)
    found = runs.table(tmp_path).iloc[0]
    assert found["state"] == "damaged"
    why = {None: "is missing", "{": "cannot be read", "[]": "holds no object", "{}": "is missing, or not that of"}[text]
    assert found["cause"].startswith(f"{part}.json {why}")
    report(tmp_path)
    for page in ((tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()):
        assert "Runs that did not go through" in page
        assert html.escape(f"{part}.json {why}") in page
        assert "no rewards" not in page


def test_a_directory_that_is_left_without_its_files_is_not_called_gone(tmp_path):
    path = write_run(tmp_path)
    for name in ("config", "status"):
        (path / f"{name}.json").unlink()
    entry = {"directory": path.name, "ending": "done before", "exit_code": 0}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [entry, entry | {"directory": "x" * 300}]}))
    report(tmp_path)  # no system can hold a name of 300 letters
    assert runs.table(tmp_path)["cause"].tolist() == [
        "its config.json and status.json are gone",
        "its directory is gone",
    ]


def test_a_directory_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    write_run(tmp_path)
    shut, real = tmp_path / "shut", os.scandir
    shut.mkdir()

    def scandir(path):
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert runs.table(tmp_path)[["directory", "state"]].to_numpy().tolist()[1] == ["shut", "unknown"]


def test_numbers_that_no_float_holds_are_no_numbers(tmp_path):
    path = write_run(tmp_path)
    huge = "1" + "0" * 400
    metrics = f'{{"a": Infinity, "b": {huge}, "objective/attained": NaN, "c": 2}}'
    (path / "summary.json").write_text(f'{{"state": "finished", "step": {huge}, "metrics": {metrics}}}')
    (path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {huge}}}\n{{"step": 2, "loss": 0.5}}\n')
    report(tmp_path)
    row = runs.table(tmp_path).iloc[0]
    assert row[["metric/a", "metric/b", "metric/objective/attained"]].isna().all()
    assert row["metric/c"] == 2
    assert runs.history(path, ["loss"]) == {"loss": [(2, 0.5)]}


def test_a_study_is_not_called_by_the_choices_that_it_does_not_use(tmp_path):
    path = write_run(tmp_path, study={"_target_": "cdpo.compressive_sensing.Recovery"})
    change(path, "choices", experiment="compressive_sensing")
    row = runs.table(tmp_path).iloc[0]
    assert row["experiment"] == "compressive_sensing"
    assert row[["model", "dataset", "loss", "optimizer", "constraint"]].isna().all()
    assert "1 run: 1 finished.\n" in Page(report(tmp_path).read_text()).text


def test_runs_that_wait_to_begin_are_listed(tmp_path):
    write_run(tmp_path)
    (tmp_path / ".jobs").mkdir()
    task = {"directory": "elsewhere/waits", "command": "cdpo-train seed=9", "choices": {"loss": "dpo"}}
    for kind in ("", ".ending", ".requeues"):
        (tmp_path / ".jobs" / f"waits{kind}.json").write_text(json.dumps(task))
    (row,) = runs.table(tmp_path).query("state == 'missing'").to_dict("records")
    assert [row[name] for name in ("directory", "cause", "command", "loss")] == [
        "waits", "not begun yet", "cdpo-train seed=9", "dpo"]  # fmt: skip


def test_runs_written_under_earlier_names_are_read_as_before(tmp_path):
    """Until 2026-11-26 loss.rewards=data was 'true', and a study was a task."""
    for loss in ("rlhf", "dpo"):
        path = write_run(tmp_path, loss)
        config = json.loads((path / "config.json").read_text())
        config["loss"] |= {"rewards": "true"} if loss == "rlhf" else {}
        config["task"] = config.pop("study")
        (path / "config.json").write_text(json.dumps(config))
    path = write_run(tmp_path, "gaussian_power")
    change(path, "config", task={"_target_": "cdpo.compressive_sensing.Recovery"})
    assert "1 gap is certified" in Page(report(tmp_path).read_text()).text
    assert runs.table(tmp_path).set_index("directory").loc[path.name, ["loss", "model"]].isna().all()
