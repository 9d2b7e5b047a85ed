"""The pages of a report: well formed, nothing from elsewhere, text kept as text, and something to say in every case."""

from __future__ import annotations

import json
import re

from report_files import Page
from written_runs import change, write_run

from cdpo.report.write import figure_files, report


def test_the_page_is_well_formed_and_needs_nothing_else(made):
    text = (made / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert all(source.startswith(("#", "data:image/svg+xml;base64,")) for source in page.sources)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert page.tags.count("figure") == 11
    assert all(f'href="#{name}"' in text for name in ("gap", "attained", "unfinished", "runs"))


def test_markdown_keeps_text_as_text(made):
    text = (made / "report.md").read_text()
    assert "<script" not in text
    assert "[x](http" not in text
    rows = [line for line in text.splitlines() if "NumericsError" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6]  # five cells
    for path in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (made / path).is_file()


def test_markdown_renders_as_tables(made):
    import markdown

    page = Page(markdown.markdown((made / "report.md").read_text(), extensions=["tables"]))
    assert page.tags.count("table") >= 2


def test_the_recovery_of_compressive_sensing_is_shown(made):
    assert "Compressive sensing" in Page((made / "report.html").read_text()).text
    assert "recovery.svg)" in (made / "report.md").read_text()


def test_without_rewards_the_report_shows_accuracy_margin_and_loss(tmp_path):
    for loss in ("dpo", "gaussian_power"):
        write_run(tmp_path, loss, rewards=False)
    page = Page(report(tmp_path).read_text())
    assert "J needs data with rewards" in page.text
    assert "constraintlossklaccuracymargineval lossnorm" in page.text  # the head of the first table
    assert "nonedpo0.135 (1)0.77 (1)0.54 (1)0.46 (1)5 (1)" in page.text
    assert {"quality", "training-held-out-loss"} <= {path.stem for path in figure_files(tmp_path)}
    assert not {"gap", "frontier", "path"} & {path.stem for path in figure_files(tmp_path)}


def test_nothing_has_finished(tmp_path):
    path = write_run(tmp_path)
    change(path, "status", state="running")
    (path / "summary.json").unlink()
    page = Page(report(tmp_path).read_text())
    assert "No run has finished yet" in page.text
    assert "training-attained" in {path.stem for path in figure_files(tmp_path)}  # its curve so far
    assert "still running" in page.text


def test_every_run_was_refused(tmp_path):
    entry = {"directory": "a", "command": "c", "choices": {}, "ending": "ConfigError: no", "exit_code": 2}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [entry]}))
    page = Page(report(tmp_path).read_text())
    assert "1 run: 1 missing" in page.text
    assert "ConfigError: no" in page.text
    assert figure_files(tmp_path) == []


def test_only_rlhf_and_only_tasks(tmp_path):
    write_run(tmp_path / "a", "rlhf")
    assert "add other losses" in Page(report(tmp_path / "a").read_text()).text
    path = write_run(tmp_path / "b", study={"_target_": "cdpo.compressive_sensing.Recovery"})
    (path / "recovery.svg").write_text("<svg/>")
    assert "1 run: 1 finished" in Page(report(tmp_path / "b").read_text()).text
