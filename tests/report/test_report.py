"""A report says what the run directories say, whatever is in them, and looks right in a browser, light and dark."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from cdpo.errors import ConfigError
from cdpo.report import runs
from cdpo.report import write as module
from cdpo.report.write import figure_files, main, report

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle", "line"}
TARGETS = {"rlhf": "candidates.RLHF", "dpo": "pairwise.DPO", "gaussian_power": "gaussian.Gaussian"}
ATTAINED = {"rlhf": 0.9, "dpo": 0.6, "gaussian_power": 0.5}
FAMILIES = {
    "lora_r1": ("lora.LoRA", {"rank": 1}),
    "lora_r4": ("lora.LoRA", {"rank": 4}),
    "l2_to_start": ("l2_to_start.L2ToStart", {"strength": 1.0}),
}


def write_run(folder: Path, loss="dpo", constraint="none", seed=0, rewards=True, **config) -> Path:
    """A finished run as a run directory holds it, with five evaluations; `config` overrides keys of config.json."""
    made = composed(loss, constraint, seed) | config
    path = folder / f"bandit-tabular-{loss}-{constraint}-s{seed}-{len(list(folder.glob('*'))):04d}"
    path.mkdir(parents=True)
    choices = {"experiment": None, "model": "tabular", "dataset": "bandit", "loss": loss, "optimizer": "sgd"}
    last = 0.9 * ATTAINED[loss] + 0.01 * seed
    rows = [row for step in range(5) for row in measured(step, last * step / 4, constraint, rewards)]
    metrics = rows[-1] | {"objective": 1.0}
    summary = {"state": "finished", "stopped": None, "step": 4, "steps": 4, "change/norm": 5.0, "metrics": metrics}
    for name, tree in {
        "config": made,
        "choices": choices | {"constraint": list(made["constraint"])},
        "status": {"state": "finished"},
        "summary": summary,
    }.items():
        (path / f"{name}.json").write_text(json.dumps(tree))
    (path / "command.txt").write_text(f"cdpo-train loss={loss} constraint={constraint} seed={seed}\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bins = {"edges": [-1.0, 0.0, 1.0 + seed], "shares": [0.25, 0.75]}
    table = {"step": 4, "log_gamma": bins, "log_lambda": bins, "effective_weight": bins, "concavity": bins}
    (path / "histograms.jsonl").write_text(json.dumps(table) + "\n")
    return path


def composed(loss, constraint, seed):
    target, values = FAMILIES.get(constraint, ("", {}))
    power = {"penalty": "power", "power": 0.5} if loss == "gaussian_power" else {}
    true = {"rewards": "true"} if loss == "rlhf" else {}
    return {
        "model": {"_target_": "cdpo.model.tabular.Tabular"},
        "dataset": {"_target_": "cdpo.data.bandit.Bandit", "world_seed": seed},
        "loss": {"_target_": f"cdpo.losses.{TARGETS[loss]}", "beta": 1.0} | power | true,
        "constraint": {constraint: {"_target_": f"cdpo.constraints.{target}"} | values} if target else {},
        "optimizer": {"_target_": "cdpo.optim.SGD", "learning_rate": 1.0},
        "trainer": {"max_steps": 4, "eval_every": 1},
        "logger": {"_target_": "cdpo.system.logger.Nothing"},
        "beta": 1.0,
        "seed": seed,
        "restart": 0,
        "task": None,
    }


def measured(step, attained, constraint, rewards):
    """The rows of one step: of training, and of an evaluation."""
    quality = {
        "eval/loss": 1 - attained,
        "eval/rewards/margins": attained,
        "eval/rewards/accuracies": 0.5 + attained / 2,
    }
    known = {"J": attained, "J_reference": 0.0, "J_optimum": 1.0, "attained": attained, "kl_to_optimum": 1 - attained}
    known |= {"kl": attained / 4, "expected_reward": 1.25 * attained}
    objective = {f"objective/{name}": value for name, value in known.items()} if rewards else {}
    binds = {f"constraint/{constraint}/binds": 1.0, f"constraint/{constraint}/boundary_distance": 0.0}
    evaluation = quality | {"eval/kl/candidates": attained / 4} | objective | (binds if constraint != "none" else {})
    return [{"step": step, "loss": 1 - attained, "grad_norm": 1.0}, {"step": step} | evaluation]


def change(path: Path, name: str, **values):
    """Change keys of a JSON file of a run; None removes the file."""
    file = path / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def written(folder: Path) -> dict[str, bytes]:
    """Every file of a report, by its path."""
    files = [*folder.glob("report.*"), *folder.glob("*.csv"), *folder.glob("*.parquet"), *folder.glob("figures/*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


class Page(HTMLParser):
    """What a browser would see: open tags matched, links and sources collected, text joined."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
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
    recovery = write_run(folder, "dpo", "none", 5, task={"_target_": "cdpo.compressive_sensing.Recovery"})
    change(recovery, "summary", metrics={"recovery/l1/k=8": 0.9})
    (recovery / "recovery.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="90pt" height="60pt"/>')
    refused = {"directory": "refused", "command": "cdpo-train loss=x", "choices": {"loss": "ipo", "constraint": ["a"]}}
    ending = {"ending": "ConfigError: loss.tau=-1 must be positive", "exit_code": 2}
    sweep = [refused | ending, {"directory": failed.name, "ending": "done", "exit_code": 0}]
    (folder / "sweep.json").write_text(json.dumps({"runs": sweep}))
    assert report(folder) == folder / "report.html"
    return folder


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
    assert table.loc[("dpo", "lora_r1"), "gaps"] == 2
    assert table.loc[("dpo", "l2_to_start"), "gap"] == pytest.approx(0.27)  # the same norm
    page = Page((made / "report.html").read_text())
    assert "The largest gap is 0.360 ± 0.000 (gaussian_power under " in page.text
    assert "0.270 ± 0.000†" in page.text
    assert "| lora_r4 | 0.270 ± 0.000 | 0.360 ± 0.000 |" in (made / "report.md").read_text()


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


def test_a_single_run_is_a_directory_of_runs(tmp_path):
    path = write_run(tmp_path, "dpo")
    assert report(path) == path / "report.html"
    page = Page((path / "report.html").read_text())
    assert "1 run: 1 finished" in page.text
    assert "add loss=rlhf" in page.text
    assert "gap.svg" not in "".join(written(path))
    assert runs.table(path)["directory"].tolist() == ["."]
    assert "training-training-loss" in {figure.stem for figure in figure_files(path)}


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


def test_a_task_is_not_called_by_the_choices_that_it_does_not_use(tmp_path):
    path = write_run(tmp_path, task={"_target_": "cdpo.compressive_sensing.Recovery"})
    change(path, "choices", experiment="compressive_sensing")
    row = runs.table(tmp_path).iloc[0]
    assert row["experiment"] == "compressive_sensing"
    assert row[["model", "dataset", "loss", "optimizer", "constraint"]].isna().all()
    assert "1 run: 1 finished.\n" in Page(report(tmp_path).read_text()).text


def test_the_package_is_a_command(tmp_path):
    write_run(tmp_path)
    subprocess.run([sys.executable, "-m", "cdpo.report", str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "report.html").is_file()


def test_without_rewards_the_report_shows_accuracy_margin_and_loss(tmp_path):
    for loss in ("dpo", "gaussian_power"):
        write_run(tmp_path, loss, rewards=False)
    page = Page(report(tmp_path).read_text())
    assert "J needs data with rewards" in page.text
    assert "constraintlossseedsklaccuracymargineval lossnorm" in page.text  # the head of the first table
    assert "nonedpo10.1350.770.540.465" in page.text
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
    path = write_run(tmp_path / "b", task={"_target_": "cdpo.compressive_sensing.Recovery"})
    (path / "recovery.svg").write_text("<svg/>")
    assert "1 run: 1 finished" in Page(report(tmp_path / "b").read_text()).text


def test_settings_become_a_column_and_figures(tmp_path):
    for loss in ("rlhf", "dpo"):
        for beta in (0.5, 1.0):
            path = write_run(tmp_path, loss, beta=beta)
            change(path, "config", loss=composed(loss, "none", 0)["loss"] | {"beta": beta})
    text = Page(report(tmp_path).read_text()).text
    assert "beta 0.5" in text
    assert (tmp_path / "figures" / "setting-beta.svg").is_file()
    assert list(pd.read_csv(tmp_path / "gap.csv")["beta"]) == [0.5, 0.5, 1.0, 1.0]


def test_runs_that_wait_to_begin_are_listed(tmp_path):
    write_run(tmp_path)
    (tmp_path / ".jobs").mkdir()
    task = {"directory": "elsewhere/waits", "command": "cdpo-train seed=9", "choices": {"loss": "dpo"}}
    for kind in ("", ".ending", ".requeues"):
        (tmp_path / ".jobs" / f"waits{kind}.json").write_text(json.dumps(task))
    (row,) = runs.table(tmp_path).query("state == 'missing'").to_dict("records")
    assert [row[name] for name in ("directory", "cause", "command", "loss")] == [
        "waits", "not begun yet", "cdpo-train seed=9", "dpo"]  # fmt: skip


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


def test_secrets_are_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_<secret>&9")
    path = write_run(tmp_path, "dpo")
    change(path, "status", state="failed", cause="HTTPError: hf_<secret>&9 was refused")
    (path / "command.txt").write_text("cdpo-train model.token='hf_<secret>&9'")
    report(tmp_path)
    secret = "hf_<secret>&9"
    assert not any(form.encode() in raw for raw in written(tmp_path).values() for form in (secret, html.escape(secret)))
    assert "&lt;redacted&gt; was refused" in (tmp_path / "report.html").read_text()


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
    command = [sys.executable, "-m", "cdpo.train", "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 's' / 'report.html'}" in done.stdout.replace("\n", "")
    table = pd.read_csv(tmp_path / "s" / "gap.csv").set_index("loss")
    saved = {path.parent.name: json.loads(path.read_text())["metrics"] for path in tmp_path.glob("s/*/summary.json")}
    attained = {name.split("-")[2]: metrics["objective/attained"] for name, metrics in saved.items()}
    assert table.loc["dpo", "gap"] == pytest.approx(attained["rlhf"] - attained["dpo"], rel=1e-12)


# wandb


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


# a browser

PROBE = """<script>addEventListener("load", () => {
  const seen = [...document.querySelectorAll("figure svg, figure img")].map(e => {
    const box = e.getBoundingClientRect(), text = e.querySelector("text");
    return [box.width, box.height, e.naturalWidth ?? 1, text ? getComputedStyle(text).fill : null] });
  const style = getComputedStyle(document.body), wide = document.documentElement.scrollWidth - innerWidth;
  const probe = JSON.stringify({seen, page: [style.backgroundColor, style.color], wide});
  document.body.replaceChildren(document.querySelector("table"), probe) })</script>"""
THEMES = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}


def chromium(folder: Path, *flags: str) -> str:
    """Standard output of headless Chromium. The test is skipped without it, unless CDPO_REQUIRE_CHROMIUM=1."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        wanted = os.environ.get("CDPO_REQUIRE_CHROMIUM") == "1"
        (pytest.fail if wanted else pytest.skip)("no chromium on PATH: apt-get install chromium")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [found, *quiet, f"--user-data-dir={folder / 'profile'}", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def contrast(one: str, other: str) -> float:
    """Of two colours as rgb(r, g, b), by WCAG 2."""
    light = []
    for color in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("theme", THEMES)
def test_a_browser_shows_it(made, theme, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text((made / "report.html").read_text().replace("</body>", f"{PROBE}</body>"))
    dom = chromium(tmp_path, THEMES[theme], "--window-size=500,900", "--dump-dom", probe.as_uri())
    assert "<td>0.270 ± 0.000</td>" in dom
    seen = json.loads(re.search(r'\{"seen".*"wide":-?\d+\}', html.unescape(dom))[0])
    assert len(seen["seen"]) == 11
    assert all(width > 50 and height > 50 and natural > 0 for width, height, natural, _ in seen["seen"])
    background, ink = seen["page"]
    assert (contrast(background, "rgb(0, 0, 0)") < 2) == (theme == "dark")
    for color in (ink, *(color for *_, color in seen["seen"] if color)):
        assert contrast(background, color) > 7
    assert seen["wide"] <= 0  # wide tables and figures scroll, the page does not


@pytest.mark.parametrize("theme", THEMES)
def test_a_screenshot_is_not_blank(made, theme, tmp_path):
    from PIL import Image

    shot = tmp_path / "shot.png"
    page = (made / "report.html").as_uri()
    chromium(tmp_path, THEMES[theme], "--window-size=1200,2400", f"--screenshot={shot}", page)
    colors = Image.open(shot).convert("RGB").getcolors(1 << 24)
    total, common = sum(n for n, _ in colors), max(colors)
    assert (sum(common[1]) < 200) == (theme == "dark")  # the paper
    assert 0.02 < 1 - common[0] / total < 0.7
    assert len(colors) > 100
