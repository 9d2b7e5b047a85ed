"""The command line, cdpo-train: Hydra's main, messages and exit codes. Only here and in config/ is there a DictConfig.

torch and transformers are imported inside functions, so that --help and --cfg job answer at once.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from cdpo.config.build import CONF, did_you_mean
from cdpo.config.compose import composed_of, task_of
from cdpo.config.help import help_text
from cdpo.config.task import Task
from cdpo.errors import CdpoError, ConfigError, DiskError, rank_0_says
from cdpo.system.rendezvous import place
from cdpo.system.threads import wait_in_turns

SHOWN = (  # metrics in the table at the end of a run
    "objective/attained",
    "frank_wolfe/gap",
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/accuracies_stderr",
    "eval/rewards/margins",
)
ASIDE = ("bound", "starts", "hits", "mend")  # of a certificate, there too, where it is not certain


def main() -> None:
    """The console script. Exit codes: 0 done, 2 config, 3 data, 4 numerics, 74 disk, 75 preempted, 1 anything else.

    Each error of cdpo.errors has its own. A sweep returns 1 if any of its runs failed. CDPO_DEBUG=1 shows tracebacks.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, and they are shown here in a few lines
    wait_in_turns()
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(sys.argv[1:]))
            return
        sys.argv[1:] = with_model_group(sys.argv[1:])
        _job()
    except Exception as error:
        if os.environ.get("CDPO_DEBUG") == "1":
            raise
        sys.exit(_explain(error))


def with_model_group(arguments: list[str]) -> list[str]:
    """`model.name_or_path=X` alone means `model=hf model.name_or_path=X`: the tiny default has no such key."""
    chosen = any(argument.startswith("model=") for argument in arguments)
    named = [i for i, argument in enumerate(arguments) if argument.startswith("model.name_or_path=")]
    return [*arguments[: named[0]], "model=hf", *arguments[named[0] :]] if named and not chosen else arguments


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(cfg: DictConfig) -> None:
    """One run in this process. The runs of a sweep are carried out by cdpo.sweep."""
    task = task_of(cfg)
    if place().rank:
        logging.disable()  # rank 0 says it
    try:
        if task.sweep:
            raise ConfigError("a sweep needs hydra/launcher=local or slurm: with others its runs would share a process")
        task = replace(task, composed=composed_of(cfg))
        _dry_run(task) if cfg.dry_run else _run(task)
    except Exception as error:
        from cdpo.sweep.outcome import failure

        if place().rank == 0:
            failure(task, error)  # leaves no directory in which nothing was begun
        if isinstance(error, (CdpoError, OSError, HydraException, OmegaConfBaseException)):
            raise
        named = CdpoError(f"{type(error).__name__}: {error} (CDPO_DEBUG=1 shows the traceback)")
        named.told = getattr(error, "told", False)
        raise named from error


def _run(task: Task) -> None:
    from cdpo.training.job import run

    summary = run(task)
    if place().rank == 0:
        _show(summary, task.directory)


def _dry_run(task: Task) -> None:
    from cdpo.sweep.estimate import estimate, show, state_of
    from cdpo.training.directory import RunDirectory

    show([(task, estimate(task.composed, {}), state_of(task))])
    RunDirectory(task.directory).remove_if_bare()


def _show(summary: dict[str, Any], folder: Path) -> None:
    """The table at the end of a run."""
    from cdpo.system.progress import summary_table

    common = ("state", "step", "reference", "trainable", "change/norm", "change/effective_rank")
    rows = {key: summary[key] for key in common if key in summary}  # a study has metrics only
    rows |= summary["metrics"] if "step" not in summary else {}
    rows |= {name: value for name in SHOWN if (value := summary["metrics"].get(name, math.nan)) == value}
    rows |= _certificate_rows(summary.get("certificate") or {})
    reports = summary.get("constraint", {}).items()
    rows |= {f"constraint/{name}/{key}": value for name, report in reports for key, value in report.items()}
    summary_table(rows | {"directory": str(folder)}, title=folder.name)


def _certificate_rows(found: dict[str, Any]) -> dict[str, Any]:
    """What the table says of the end: whether it is an optimum; if that is not certain, how it was searched for."""
    if not found:
        return {}
    rows = {"certificate": f"{found['status'].replace('_', ' ')}: {found['says']}"}
    if found["status"] in ("searched", "not_reached"):
        rows |= {f"certificate/{key}": found[key] for key in ASIDE if found.get(key, "") != ""}
    return rows


# ------------------------------------------------------------------------------------------------------------ messages


def _explain(error: Exception) -> int:
    """Print what, where and what to do, in a few lines; returns the exit code."""
    if isinstance(error, CdpoError):
        message, code = str(error), error.exit_code
    elif isinstance(error, (HydraException, OmegaConfBaseException)):
        message, code = _composition_message(error), ConfigError.exit_code
    elif isinstance(error, OSError):
        message, code = str(error), DiskError.exit_code
    else:  # no run was begun: Hydra could not compose
        message, code = str(error), ConfigError.exit_code
    rank = place().rank
    if not (rank and rank_0_says(error)):
        print(f"cdpo-train: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return code


def _composition_message(error: Exception) -> str:
    """Hydra's message, with the nearest valid name where a key or a choice is unknown."""
    if isinstance(error, MissingConfigException) or "Could not load" in str(error):
        group, _, choice = (re.findall(r"'([^']+/[^']+)'", str(error)) or ["/"])[-1].rpartition("/")
        options = _options(group)
        return f"{group}={choice} does not exist{did_you_mean(choice, options)}; there are {', '.join(options)}"
    if isinstance(error, InterpolationResolutionError):
        return str(error).splitlines()[0].rpartition("interpolation: ")[2]
    inner = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key, parent = getattr(inner, "full_key", None), getattr(inner, "parent_node", None)
    if isinstance(inner, MissingMandatoryValue):
        return f"{key} has no default: set {key}=..."
    if isinstance(inner, ConfigAttributeError) and key and parent is not None:
        known = [str(name) for name in parent]
        return f"unknown key {key}{did_you_mean(str(inner.key), known)}; there are {', '.join(known)}"
    if absent := re.match(r"Could not override '(constraint\.(\w+)\.[\w.]+)'", str(error)):
        return _no_such_constraint(*absent.groups())
    return str(error).strip().splitlines()[0]


def _no_such_constraint(key: str, choice: str) -> str:
    options = _options("constraint")
    if choice in options:
        return f"{key} is set, but constraint={choice} is not chosen: add constraint={choice}, or leave the key out"
    known = f"{did_you_mean(choice, options)}; there are {', '.join(options)}"
    return f"{key} is set, but no constraint is called {choice}{known}"


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


if __name__ == "__main__":
    main()
