"""README and docs/ cannot rot: their commands compose and build, their tables list what there is, examples run."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forking
import pytest
import yaml
from composing import composed
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from cdpo import errors
from cdpo.config import build as config
from cdpo.config.build import CONF
from cdpo.config.help import first_line
from cdpo.data.bandit import Bandit
from cdpo.data.sources import Jsonl
from cdpo.train import with_model_group

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README = PAGES["README.md"]
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S)]
FILES = {m[1]: text for _, text in BLOCKS if (m := re.match(r"(?:# @package.*\n)?# (?:[^\n]*; )?(mine/[\w/.]+)", text))}
LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({line for line in LINES if "cdpo-train" in line and "--help" not in line})


def section(title, page="README.md"):
    """The text below a heading, up to the next heading."""
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGES[page], re.M | re.S)[1]


def table(title, page="README.md"):
    """The cells of the table below a heading, without its head."""
    rows = [line.strip("|").split("|") for line in section(title, page).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def quoted(cell):
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def jobs(line):
    """The overrides of every job that a command line starts, and its --config-dir."""
    words = shlex.split(line.partition("cdpo-train")[2], comments=True)
    folder = words.pop(words.index("--config-dir") + 1) if "--config-dir" in words else None
    overrides = [word for word in words if not word.startswith("-")]
    if "-m" not in words:
        return [with_model_group(overrides)], folder
    return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)[0], folder


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The folder of the examples, as the pages write it, importable."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pairs = [f"{i} + 1 =,{i + 1},{i}" for i in range(20)]
    (tmp_path / "pairs.csv").write_text("\n".join(["prompt,chosen,rejected", *pairs]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_the_examples_are_there():
    assert sorted(FILES) == [
        "mine/constraint/norm_cap.yaml",
        "mine/csv_file.py",
        "mine/dataset/csv_file.yaml",
        "mine/dataset/sums.yaml",
        "mine/hydra/launcher/mysite.yaml",
        "mine/loss/squared.yaml",
        "mine/norm_cap.py",
        "mine/squared.py",
        "mine/sums.py",
        "mine/test_csv_file.py",
        "mine/test_norm_cap.py",
        "mine/test_squared.py",
        "mine/test_sums.py",
    ]
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_composes_and_builds(line, mine):
    overrides, folder = jobs(line)
    search = [f"hydra.searchpath=[file://{mine.parent / folder}]"] if folder else []
    for job in overrides:
        spec = config.build(composed(*job, *search))
        wanted = dict(override.split("=", 1) for override in job)
        if "constraint" in wanted:
            assert sorted(spec.constraint) == sorted(set(wanted["constraint"].strip("[]").split(",")) - {"none"})
        if "seed" in wanted:
            assert spec.seed == int(wanted["seed"])


HELP = sorted({line.partition("#")[0].strip() for line in LINES if "cdpo-train --help" in line})


@pytest.mark.parametrize("line", HELP)
def test_help_answers_what_the_pages_ask(line):
    done = forking.run("-m", "cdpo.train", *shlex.split(line.partition("cdpo-train")[2]))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2


def test_the_sweep_has_as_many_runs_as_it_says():
    said = {int(m[1]): line for line in COMMANDS if (m := re.search(r"# (\d+) runs", line))}
    assert said
    for count, line in said.items():
        assert len(jobs(line)[0]) == count


def test_the_first_screen_has_the_two_commands():
    first, second = [line for line in LINES if "-m venv" in line]
    assert README.index(second) < README.index("\n## ")
    assert "-m venv .venv" in first
    assert first.endswith("-e . && .venv/bin/cdpo-train")
    assert second.endswith("-e '.[test]' && .venv/bin/pytest -n 2 -m \"not slow\"")
    for line in (first, second):
        assert "-c requirements.lock" in line


def test_the_first_screen_names_the_run_that_its_command_makes():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        name = Path(compose("config", return_hydra_config=True).hydra.run.dir).name
    assert README.count(name) == 2, f"the default run is {name} now"


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_000


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        folder = ROOT / "docs" if name != "README.md" else ROOT
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
            assert (folder / target).is_file(), f"{name} links to {target}"


def test_the_examples_pass_their_own_tests(mine, tmp_path):
    for path in sorted(mine.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        test = getattr(module, path.stem)
        test(*[tmp_path] * len(inspect.signature(test).parameters))


def test_the_python_of_the_api_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES["api.md"], re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "api.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert (tmp_path / "outputs/from_python/summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if "--config-dir" in line])
def test_the_examples_train(line, mine):
    command = f"{line} trainer.max_steps=3 logger=none name=example"
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, cwd=mine.parent, env={**os.environ, **paths}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    rows = [yaml.safe_load(row) for row in (mine.parent / "outputs/example/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 3
    if "norm_cap" in line:
        assert all(row["constraint/norm_cap/boundary_distance"] > -1e-6 for row in rows if "eval/loss" in row)
    elif "squared" in line:
        assert rows[0]["eval/loss"] == pytest.approx(1.0)  # at the reference every margin is 0
    else:
        assert "eval/loss" in rows[0]


# ---------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(("name", "nodes"), [("slurm_node", 1), ("slurm_nodes", 2)])
def test_presets_of_whole_nodes(name, nodes):
    asked = ["-m", "cdpo.train", f"hydra/launcher={name}", "--cfg", "hydra", "-p", "hydra.launcher"]
    shown = yaml.safe_load(forking.run(*asked).stdout)
    assert (shown["nodes"], shown["tasks_per_node"], shown["gpus_per_node"], shown["partition"]) == (nodes, 8, 8, None)
    assert f"`{name}`" in PAGES["sweeps.md"] or f"hydra/launcher={name}" in PAGES["sweeps.md"]


def test_a_launcher_of_your_own_site(mine):
    command = ["-m", "cdpo.train", "--config-dir", "mine", "hydra/launcher=mysite", "--cfg", "hydra"]
    done = forking.run(*command, "-p", "hydra.launcher")
    shown = yaml.safe_load(done.stdout)
    assert (shown["partition"], shown["timeout_min"], len(shown["setup"])) == ("gpu", 240, 2)


def test_the_number_of_losses():
    there = len(list((ROOT / "conf/loss").glob("*.yaml")))
    assert f"one of {there} losses" in README, f"README.md tells another number than the {there} of conf/loss"


def test_every_loss_is_named():
    """By its name, or as one of a family, `fdpo_...`."""
    named = [name for row in table("Losses and metrics", "losses.md") for name in quoted(row[1])]
    for loss in (path.stem for path in (ROOT / "conf/loss").glob("*.yaml")):
        assert any(loss == name or (name.endswith("...") and loss.startswith(name[:-3])) for name in named), loss


def test_the_map_of_folders_is_complete():
    told = {quoted(row[0])[0].rstrip("/") for row in table("How it flows")}
    there = {f"cdpo/{path.name}" for path in (ROOT / "cdpo").iterdir() if not path.name.startswith("__")}
    assert {name for name in told if name.startswith("cdpo/")} == there
    assert told - there == {"conf", "launch", "tests"}


def test_the_hooks_are_those_of_the_class():
    from cdpo.constraints import Constraint

    told = [re.sub(r"\(.*", "", quoted(row[0])[0]) for row in table("The hooks", "constraints.md")]
    hooks = [name for name, value in vars(Constraint).items() if callable(value) and not name.startswith("_")]
    assert told == [name for name in hooks if name != "load_state_dict"]


def test_every_constraint_is_told_of():
    told = {name for row in table("Constraints", "constraints.md") for name in quoted(row[1])}
    presets = {path.stem for path in CONF.glob("constraint/*.yaml") if "\ndefaults:" in path.read_text()}
    assert told - presets == {path.stem for path in CONF.glob("constraint/*.yaml")} - presets - {"none"}


def test_a_choice_of_ones_own_says_what_it_is(mine):
    said = {path.stem: first_line(path) for path in mine.glob("*/*.yaml")}
    assert said.pop("norm_cap").startswith("No tensor moves by more than")
    assert said.pop("squared").startswith("The squared hinge")
    assert all(" " in line for line in said.values())


def test_exit_codes():
    told = {int(row[0]): row[1] for row in table("Exit codes", "run_directory.md")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CdpoError)]
    assert set(told) == {0} | {kind.exit_code for kind in kinds}
    for kind, word in ((errors.ConfigError, "config"), (errors.DataError, "data"), (errors.DiskError, "disk")):
        assert told[kind.exit_code].startswith(word)


# ---------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("form", ["columns", "transcripts", "messages", "scored"])
def test_an_example_row_is_read_as_its_format(form, tmp_path, caplog):
    row = re.search(rf"^`{form}`:.*?```json\n(.*?)```", PAGES["data.md"], re.M | re.S)[1]
    path = tmp_path / "rows.jsonl"
    path.write_text(row)
    with caplog.at_level("INFO"):
        rows = Jsonl(path=str(path), eval_size=0).load(0).train
    assert f"format {form} " in caplog.text
    best, worst = (rows[0].responses[i] for i in (rows[0].pairs[0].winner, rows[0].pairs[-1].loser))
    assert (best.strip(), worst.strip()) == ("7", "8")
    assert len(rows[0].pairs) == (3 if form == "scored" else 1)


def test_the_example_world_is_read(tmp_path):
    world = next(text for kind, text in BLOCKS if kind == "json" and '"prompts"' in text)
    (tmp_path / "world.json").write_text(world)
    data = Bandit(path=str(tmp_path / "world.json")).load(0)
    assert data.train[0].rewards == [1.0, 0.0, -1.0]


@pytest.mark.slow
def test_a_run_leaves_what_the_page_says(tmp_path):
    """All files of the table but those of failed runs, of sweeps and of GPUs: one run trains, another one searches."""
    trains = ["trainer.max_steps=2", "trainer.samples=1", "trainer.sample_tokens=4", "name=trains"]
    for options in (trains, ["model=tabular", "optimizer=exact", "name=searches"]):
        command = [sys.executable, "-m", "cdpo.train", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    told = {quoted(row[0])[0].rstrip("/") for row in table("What a run leaves behind", "run_directory.md")}
    elsewhere = {"nonfinite.json", "output.log", "micro_batch.json", "starts.safetensors"}
    left = {path.name for run in ("trains", "searches") for path in (tmp_path / "outputs" / run).iterdir()}
    assert left == told - elsewhere
