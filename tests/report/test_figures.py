"""Figures of a report: none fails on odd runs, one that cannot be drawn is said, old ones go and others stay."""

from __future__ import annotations

import json
import logging
import shutil

import pandas as pd
from report_files import Page
from written_runs import change, composed, write_run

from cdpo.report import runs
from cdpo.report.write import figure_files, report


def test_settings_become_a_column_and_figures(tmp_path):
    for loss in ("rlhf", "dpo"):
        for beta in (0.5, 1.0):
            path = write_run(tmp_path, loss, beta=beta)
            change(path, "config", loss=composed(loss, "none", 0)["loss"] | {"beta": beta})
    text = Page(report(tmp_path).read_text()).text
    assert "beta 0.5" in text
    assert (tmp_path / "figures" / "setting-beta.svg").is_file()
    assert list(pd.read_csv(tmp_path / "gap.csv")["beta"]) == [0.5, 0.5, 1.0, 1.0]


def test_seeds_logged_at_other_steps_and_worlds_without_gain_keep_their_figures(tmp_path):
    write_run(tmp_path)
    odd = write_run(tmp_path, seed=1)
    rows = [json.loads(line) for line in (odd / "metrics.jsonl").read_text().splitlines()]
    (odd / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": 7 * row["step"] + 1}) + "\n" for row in rows))
    flat = write_run(tmp_path, seed=2)
    summary = json.loads((flat / "summary.json").read_text())
    summary["metrics"]["objective/J_optimum"] = summary["metrics"]["objective/J_reference"]
    (flat / "summary.json").write_text(json.dumps(summary))
    page = report(tmp_path).read_text()
    assert "could not be drawn" not in page
    assert {"frontier", "training-attained"} <= {path.stem for path in figure_files(tmp_path)}


def test_a_search_has_no_curve_and_one_seed_no_bars(tmp_path):
    """It takes one step: a line from the reference to its optimum is no path that it went."""
    trained, found = write_run(tmp_path, "rlhf"), write_run(tmp_path, "dpo")
    lines = (found / "metrics.jsonl").read_text().splitlines(keepends=True)
    (found / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 1))
    text = Page(report(tmp_path).read_text()).text
    assert "at each evaluation: of one seed. Searches, which take one step, are left out." in text
    assert "Of one seed, so there are no bars." in text
    drawn = (tmp_path / "figures" / "training-attained.svg").read_text()
    assert "rlhf" in drawn
    assert "dpo" not in drawn
    shutil.rmtree(trained)
    report(tmp_path)
    assert "training-attained" not in {path.stem for path in figure_files(tmp_path)}


def test_a_figure_of_ones_own_is_not_in_the_way(tmp_path):
    write_run(tmp_path)
    report(tmp_path)
    before = figure_files(tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    assert figure_files(tmp_path) == before


def test_figures_of_an_earlier_report_go_and_other_files_stay(tmp_path):
    path = write_run(tmp_path, "dpo")
    report(tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"1")
    (path / "histograms.jsonl").unlink()
    report(tmp_path)
    assert not (tmp_path / "figures" / "distributions.png").exists()
    assert (tmp_path / "figures" / "mine.png").exists()


def test_a_figure_that_cannot_be_drawn_is_said(tmp_path, monkeypatch, caplog):
    def fails(study):
        raise ValueError("<b>no</b>")

    monkeypatch.setattr("cdpo.report.figures.quality", fails)
    write_run(tmp_path, "dpo")
    text = report(tmp_path).read_text()
    assert "could not be drawn (ValueError: &lt;b&gt;no&lt;/b&gt;)" in text
    assert "ValueError" in caplog.text


def test_no_figure_fails(made, caplog):
    with caplog.at_level(logging.WARNING):
        table = runs.table(made)
        assert len(table)
    assert "could not be drawn" not in (made / "report.html").read_text()
