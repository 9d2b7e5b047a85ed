"""A report is written whole, and twice the same; it says what the runs say, holds no secret, and wandb gets it once."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import forking
import pandas as pd
import pytest
from report_files import Page, written
from written_runs import change, write_run

from cdpo.errors import ConfigError
from cdpo.report import runs
from cdpo.report import write as module
from cdpo.report.write import figure_files, main, report


def test_everything_is_written(made):
    files = written(made)
    assert {"report.md", "report.html", "runs.csv", "runs.parquet", "gap.csv"} <= set(files)
    figures = {Path(name).stem for name in files if name.startswith("figures/")}
    assert figures == {"gap", "quality", "levels", "frontier", "training-attained", "training-training-loss", "path",
                       "tightness", "distributions", "penalties"}  # fmt: skip
    for name in figures:
        assert files[f"figures/{name}.png"].startswith(b"\x89PNG")
        drawn = ElementTree.fromstring(files[f"figures/{name}.svg"])
        assert len(list(drawn.iter())) > 20
    assert [path.stem for path in figure_files(made)][:3] == ["gap", "quality", "levels"]
    assert not list(made.rglob("*.tmp"))


def test_twice_gives_the_same_bytes(made):
    before, runs_before = written(made), (made / "sweep.json").read_bytes()
    report(made)
    assert written(made) == before
    assert (made / "sweep.json").read_bytes() == runs_before


def test_the_gap_is_that_of_the_runs(made):
    table = pd.read_csv(made / "gap.csv").set_index(["loss", "constraint"])
    for constraint in ("none", "lora_r1", "lora_r4"):
        assert table.loc[("dpo", constraint), "gap"] == pytest.approx(0.9 * (0.9 - 0.6))
        assert table.loc[("gaussian_power", constraint), "gap"] == pytest.approx(0.9 * (0.9 - 0.5))
    assert table.loc[("dpo", "lora_r1"), "seeds"] == 3  # with the nested one, which has no partner
    assert table.loc[("dpo", "lora_r1"), "gap_n"] == 2
    assert table.loc[("dpo", "l2_to_start"), "gap"] == pytest.approx(0.27)  # the same norm
    page = Page((made / "report.html").read_text())
    assert "the largest is 0.360 ± 0.000 (2), gaussian_power under " in page.text
    assert "0.270 ± 0.000 (2)†" in page.text
    assert "| lora_r4 | 0.270 ± 0.000 (2) | 0.360 ± 0.000 (2) |" in (made / "report.md").read_text()


def test_a_single_run_is_a_directory_of_runs(tmp_path):
    path = write_run(tmp_path, "dpo")
    assert report(path) == path / "report.html"
    page = Page((path / "report.html").read_text())
    assert "1 run: 1 finished" in page.text
    assert "add loss=rlhf" in page.text
    assert "gap.svg" not in "".join(written(path))
    assert runs.table(path)["directory"].tolist() == ["."]
    assert "training-training-loss" in {figure.stem for figure in figure_files(path)}


def test_the_package_is_a_command(tmp_path):
    write_run(tmp_path)
    forking.run("-m", "cdpo.report", tmp_path, check=True)
    assert (tmp_path / "report.html").is_file()


def test_secrets_are_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_<secret>&9")
    path = write_run(tmp_path, "dpo")
    change(path, "status", state="failed", cause="HTTPError: hf_<secret>&9 was refused")
    (path / "command.txt").write_text("cdpo-train model.token='hf_<secret>&9'")
    report(tmp_path)
    secret = "hf_<secret>&9"
    assert not any(form.encode() in raw for raw in written(tmp_path).values() for form in (secret, html.escape(secret)))
    assert "&lt;redacted&gt; was refused" in (tmp_path / "report.html").read_text()


def called(monkeypatch, capsys, *arguments):
    """Exit code and message of cdpo-report."""
    monkeypatch.setattr(sys, "argv", ["cdpo-report", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


def test_a_directory_without_runs_is_refused(tmp_path, monkeypatch, capsys):
    code, message = called(monkeypatch, capsys, tmp_path)
    assert (code, message) == (2, f"cdpo-report: {tmp_path} has no run: no folder in it holds the config.json of one\n")
    code, message = called(monkeypatch, capsys, tmp_path / "nowhere")
    assert code == 2
    assert "is no directory" in message
    with pytest.raises(ConfigError):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick():
    code = "import sys; sys.argv = ['cdpo-report', '--help']\nfrom cdpo.report.write import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "assert not {'pandas', 'matplotlib', 'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "directory" in done.stdout


def test_a_sweep_ends_with_its_report(tmp_path):
    words = ["model=tabular", "logger=none", "trainer.max_steps=3", "trainer.batch_size=null", "optimizer=sgd"]
    words += ["name=s", "loss=rlhf,dpo", "dataset.prompts=4", "trainer.threads=1", f"output_root={tmp_path}"]
    done = forking.run("-m", "cdpo.train", "-m", *words)
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 's' / 'report.html'}" in done.stdout
    table = pd.read_csv(tmp_path / "s" / "gap.csv").set_index("loss")
    saved = {path.parent.name: json.loads(path.read_text())["metrics"] for path in tmp_path.glob("s/*/summary.json")}
    attained = {name.split("-")[2]: metrics["objective/attained"] for name, metrics in saved.items()}
    assert table.loc["dpo", "gap"] == pytest.approx(attained["rlhf"] - attained["dpo"], rel=1e-12)


def test_the_figures_are_copied_to_wandb_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = {
        "_target_": "cdpo.system.logger.Wandb",
        "project": "p",
        "entity": None,
        "mode": "auto",
        "init_timeout": 20.0,
    }
    write_run(tmp_path, "rlhf", logger=logger)
    report(tmp_path)
    [copy] = tmp_path.glob("wandb/offline-run-*")
    images = {path.name.split("_")[0] for path in copy.glob("files/media/images/report/*.png")}
    assert images == {path.stem for path in figure_files(tmp_path)}
    assert list(copy.glob("files/media/table/report/cells*"))
    report(tmp_path)  # nothing new
    assert list(tmp_path.glob("wandb/offline-run-*")) == [copy]
    assert len(runs.find(tmp_path)[0]) == 1


def test_wandb_cannot_stop_a_report(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_copy", lambda folder, settings: 1 / 0)
    write_run(tmp_path, "dpo", logger={"_target_": "cdpo.system.logger.Wandb"})
    assert report(tmp_path).is_file()
    assert "not on wandb (ZeroDivisionError" in caplog.text
