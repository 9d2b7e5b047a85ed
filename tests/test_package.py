"""What is installed: a wheel that carries conf/ and works from any directory, and a command that answers at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ANSWER = 20.0  # seconds; an idle core needs under one, but tests share their cores


def run(*command, cwd=ROOT, **env):
    """The finished process, with its output as text; it must succeed."""
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=whole, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_entry_module_imports_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'wandb', 'numpy', 'pandas'}"
    done = run(sys.executable, "-c", f"import cdpo.train, sys; print(sorted({heavy} & sys.modules.keys()))")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("question", [["--help"], ["--cfg", "job"]])
def test_the_command_line_answers_soon(question, tmp_path):
    began = time.monotonic()
    done = run(sys.executable, "-X", "importtime", "-m", "cdpo.train", *question, cwd=tmp_path)
    seconds = time.monotonic() - began
    print(f"cdpo-train {' '.join(question)}: {seconds:.2f} s")
    assert "gaussian" in done.stdout.lower()
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.M)
    assert seconds < ANSWER
    assert not list(tmp_path.iterdir())  # a question leaves nothing behind


def test_pins_cover_what_is_declared():
    """Every requirement of pyproject.toml has a pin for every supported Python, and the pin satisfies it."""
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    declared = re.findall(
        r'"([a-z][\w-]*[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text().partition("[project.s")[0]
    )
    assert len(declared) > 20
    for text in declared:
        wanted = Requirement(text)
        for python in ("3.10", "3.11", "3.12", "3.13"):
            found = [
                pin for pin in pins
                if pin.name == wanted.name and (not pin.marker or pin.marker.evaluate({"python_version": python}))
            ]  # fmt: skip
            assert len(found) == 1 or wanted.name == "hatchling", (text, python)
            for pin in found:
                assert wanted.specifier.contains(str(pin.specifier).removeprefix("=="))


def test_pins_are_exact_and_portable():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r'[a-z0-9-]+==[\w.]+( ; python_version (>=|<) "3\.1\d")?', line), (
            line
        )


def test_shell_scripts_parse():
    for script in (ROOT / ".ci/run", *sorted((ROOT / "launch").glob("*.sh"))):
        run("bash", "-n", script)
        assert os.access(script, os.X_OK)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.mark.slow
def test_the_wheel_carries_every_config(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*") if path.is_file()}
    assert {f"cdpo/{name}" for name in files} == {name for name in names if name.startswith("cdpo/conf/")}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "cdpo").rglob("*.py")} <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "launch/"))]


@pytest.mark.slow
def test_the_sdist_carries_what_people_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("README.md", "LICENSE", "requirements.lock", "launch/hh_tiny.sh", "conf/config.yaml"):
        assert needed in names
    assert any(name.startswith("tests/test_") for name in names)


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment_from_another_directory(built, tmp_path):
    """With hydra-core and what it needs alone, so nothing heavy is imported to compose; compared with the checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / "bin"
    (wheel,) = built.glob("*.whl")
    run(scripts / "pip", "install", "-q", "--no-deps", wheel, PYTHONPATH="")
    run(scripts / "pip", "install", "-q", "-c", ROOT / "requirements.lock", "hydra-core", PYTHONPATH="")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    question = ["--cfg", "job", "loss=ipo", "constraint=[lora_r8,weight_decay]"]
    answer = run(scripts / "cdpo-train", *question, cwd=elsewhere, PYTHONPATH="")
    expected = run(sys.executable, "-m", "cdpo.train", *question)
    assert yaml.safe_load(answer.stdout) == yaml.safe_load(expected.stdout)
    assert yaml.safe_load(answer.stdout)["constraint"]["lora_r8"]["rank"] == 8
    code = "from cdpo.config.build import CONF; print(CONF)"
    where = run(scripts / "python", "-c", code, cwd=elsewhere, PYTHONPATH="")
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "venv")
    wrong = subprocess.run([scripts / "cdpo-train", "loss=gausian", "--cfg", "job"], cwd=elsewhere, capture_output=True)
    assert (wrong.returncode, b"did you mean gaussian?" in wrong.stderr) == (2, True)
