"""cdpo-train --help: the config groups with their choices, and of one group what each choice is.

What a choice is, is the first line of its file. Ours, as Hydra takes over a second to list the groups.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from cdpo.config.build import CONF, nearest
from cdpo.errors import ConfigError

USAGE = """cdpo-train [-m] [GROUP=CHOICE ...] [KEY=VALUE ...]

Train a policy on preferences, with a loss, under constraints. Started again, a run goes on where it was.
"""
MORE = """
  --help GROUP          what the choices of a group are, such as --help loss
  constraint=[a,b]      several constraints at once
  -m KEY=a,b seed=0,1   a sweep: one run for every combination, each in its own directory
  --cfg job             print every key with its value, and train nothing
  --hydra-help          Hydra's own options"""


def groups() -> dict[str, list[Path]]:
    """The files of every config group, by the group's name."""
    folders = [path for path in CONF.rglob("*") if path.is_dir() and any(path.glob("*.yaml"))]
    found = {path.relative_to(CONF).as_posix(): sorted(path.glob("*.yaml")) for path in sorted(folders)}
    return {name: files for name, files in found.items() if name == "hydra/launcher" or not name.startswith("hydra")}


def sentence(file: Path) -> str:
    """What a choice is: the first line of its file, but for Hydra's header."""
    with file.open(encoding="utf-8") as lines:
        return next((line for line in lines if not line.startswith("# @")), "").removeprefix("#").strip()


def answer(arguments: Sequence[str]) -> str:
    """What --help prints: of all groups, or of those that are named beside it. Raises ConfigError for no group."""
    asked = [argument for argument in arguments if not argument.startswith("-") and "=" not in argument]
    known = groups()
    for name in asked:
        if name not in known:
            raise ConfigError(f"no config group is called {name}{nearest(name, known)}; there are {', '.join(known)}")
    if asked:
        return "\n\n".join(_choices(name, known[name]) for name in asked)
    lines = (f"  {name}={', '.join(file.stem for file in files)}" for name, files in known.items())
    wrapped = [textwrap.fill(line, 110, subsequent_indent="    ", break_on_hyphens=False) for line in lines]
    return "\n".join([USAGE, *wrapped, MORE])


def _choices(group: str, files: Sequence[Path]) -> str:
    width = max(len(file.stem) for file in files) + 2
    lines = (f"  {file.stem:{width}}{sentence(file)}" for file in files)
    wrapped = (textwrap.fill(line, 110, subsequent_indent=" " * (width + 2), break_on_hyphens=False) for line in lines)
    return "\n".join([f"{group}=CHOICE", *wrapped])
