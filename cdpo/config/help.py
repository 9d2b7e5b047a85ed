"""cdpo-train --help: the config groups and their choices; of one group what each choice is, of one choice its file.

What a choice is stands in the first line of its file, and what its keys are beside them: nothing is written twice.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdpo.config.build import CONF, did_you_mean
from cdpo.errors import ConfigError

USAGE = """cdpo-train [-m] [GROUP=CHOICE ...] [KEY=VALUE ...]

Train a policy on preferences, with a loss, under constraints. Started again, a run goes on where it was.
"""
MORE = """
  --help GROUP          what the choices of a group are, such as --help loss
  --help GROUP=CHOICE   the keys of a choice, such as --help loss=gaussian
  --help trainer        the keys of the training loop; --help config: all that belong to no group
  constraint=[a,b]      several constraints at once
  -m KEY=a,b seed=0,1   a sweep: one run for every combination, each in its own directory
  --cfg job             print every key with its value, and train nothing
  --hydra-help          Hydra's own options"""


def help_text(arguments: Sequence[str]) -> str:
    """What --help prints: of all groups, or of what is named beside it. Raises ConfigError for an unknown name."""
    words, own = list(arguments), []
    while any(flag in words for flag in ("--config-dir", "-cd")):
        at = next(i for i, word in enumerate(words) if word in ("--config-dir", "-cd"))
        own += [Path(folder) for folder in words[at + 1 : at + 2]]
        del words[at : at + 2]
    known = groups(own)
    asked = [
        word
        for word in words
        if re.fullmatch(r"[\w/]+(=\w+)?", word) and (word.partition("=")[0] in known or "=" not in word)
    ]
    return "\n\n".join(_help_for(word, known) for word in asked) if asked else _overview(known)


def groups(own: Sequence[Path] = ()) -> dict[str, dict[str, Path]]:
    """The files of every config group, shipped and in folders of one's `own`: group -> choice -> file."""
    found: dict[str, dict[str, Path]] = {}
    for root in (CONF, *own):
        for file in sorted(root.rglob("*.yaml"), key=_natural):
            group = file.parent.relative_to(root).as_posix()
            if group != "." and (group == "hydra/launcher" or not group.startswith("hydra")):
                found.setdefault(group, {})[file.stem] = file
    return dict(sorted(found.items()))


def first_line(file: Path) -> str:
    """What a choice is: the first line of its file, but for Hydra's header."""
    with file.open(encoding="utf-8") as lines:
        return next((line for line in lines if not line.startswith("# @")), "").removeprefix("#").strip()


def _overview(known: dict[str, dict[str, Path]]) -> str:
    lines = (f"  {group}={', '.join(choices)}" for group, choices in known.items())
    wrapped = [textwrap.fill(line, 110, subsequent_indent="    ", break_on_hyphens=False) for line in lines]
    return "\n".join([USAGE, *wrapped, MORE])


def _help_for(word: str, known: dict[str, dict[str, Path]]) -> str:
    group, _, choice = word.partition("=")
    if word in ("config", "trainer"):
        return "\n".join(_section(word))
    if group not in known:
        raise ConfigError(
            f"no config group is called {group}{did_you_mean(group, known)}; there are {', '.join(known)}"
        )
    choices = known[group]
    if not choice:
        return _choices(group, choices)
    if choice not in choices:
        raise ConfigError(f"{word} does not exist{did_you_mean(choice, choices)}; there are {', '.join(choices)}")
    return "\n".join(_files(choice, choices))


def _choices(group: str, choices: dict[str, Path]) -> str:
    default = re.search(rf"^  - (?:override )?{group}: \[?(\w+)", (CONF / "config.yaml").read_text(), re.M)
    width = max(map(len, choices)) + 2
    lines = []
    for choice, file in choices.items():
        said = f"  {choice:{width}}{'default: ' * (default is not None and default[1] == choice)}{first_line(file)}"
        indent = " " * (width + 2)
        lines.append(textwrap.fill(said, 110, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False))
    return "\n".join([f"{group}=CHOICE", *lines])


def _files(choice: str, choices: dict[str, Path]) -> Iterator[str]:
    """The file of a choice, and those of the same group from which it inherits."""
    text = choices[choice].read_text(encoding="utf-8").rstrip()
    yield f"--- {choice}.yaml\n{text}"
    for base in re.findall(r"^defaults: \[(\w+)", text, re.M):
        yield from _files(base, choices)


def _section(name: str) -> Iterator[str]:
    """The keys of config.yaml that belong to no group, or those of the trainer."""
    inside = False
    for line in (CONF / "config.yaml").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith((" ", "#")):
            inside = line.startswith("trainer:") if name == "trainer" else "  #" in line
        if inside and line:
            yield line


def _natural(file: Path) -> list[object]:
    """lora_r2 before lora_r16."""
    return [file.parent.as_posix(), *(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.stem))]
