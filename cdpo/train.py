"""The command line, cdpo-train: Hydra's main, exit codes, the table after a sweep. Only here is there a DictConfig.

torch and transformers are imported inside functions, so that --help and --cfg job answer at once.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import textwrap
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

from cdpo.config import read as config
from cdpo.config.compose import composed_of, task_of
from cdpo.errors import CdpoError, ConfigError, DiskError, Preempted, rank_0_says
from cdpo.sweep.tasks import ALONE, OUTCOMES, Outcome, Task, done, end, failure, forget, sweeps
from cdpo.system.rendezvous import place


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def _job(cfg: DictConfig) -> None:
    """One run in this process: alone, or of a sweep with hydra/launcher=basic. Others do as cdpo.work does."""
    task = task_of(cfg)
    here = place()
    if here.rank:
        logging.disable()  # rank 0 says it
    if any(outcome.exit_code == Preempted.exit_code for outcome in OUTCOMES):
        raise Preempted("the sweep was asked to stop")
    try:
        composed = composed_of(cfg)
        if task.sweep and here.size > 1:
            raise ConfigError(ALONE)
        if cfg.dry_run:
            _dry_run(task, composed)
            return
        from cdpo.training.job import run

        summary = run(composed, task.directory, task.command, task.group, task.choices)
    except Exception as error:
        OUTCOMES.append(failure(task, error) if here.rank == 0 else Outcome(task, str(error), 1))
        raise error.with_traceback(None) if task.sweep else error  # noqa: B904
    OUTCOMES.append(done(task))
    if here.rank == 0:
        _show(summary, task.directory)


def _dry_run(task: Task, composed: dict[str, Any]) -> None:
    from cdpo.sweep.estimate import estimate, show, state_of

    show([(task, estimate(composed, {}), state_of(task.directory))])
    forget(task.directory)


def _show(summary: dict[str, Any], folder: Path) -> None:
    from cdpo.system.progress import summary_table

    names = (
        "objective/attained",
        "eval/loss",
        "eval/rewards/accuracies",
        "eval/rewards/accuracies_stderr",
        "eval/rewards/margins",
    )
    common = ("state", "step", "reference", "trainable", "change/norm", "change/effective_rank")
    rows = {key: summary[key] for key in common if key in summary}  # a task has no more than its metrics
    rows |= summary["metrics"] if "step" not in summary else {}
    rows |= {name: value for name in names if (value := summary["metrics"].get(name, math.nan)) == value}
    rows |= {
        f"constraint/{c}/{key}": v for c, report in summary.get("constraint", {}).items() for key, v in report.items()
    }
    summary_table(rows | {"directory": str(folder)}, title=folder.name)


def main() -> None:
    """The console script. Exit codes: 0 done, 2 config, 3 data, 4 numerics, 74 disk, 75 preempted, 1 anything else.

    A sweep returns 1 if any of its runs failed. CDPO_DEBUG=1 shows tracebacks.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, and they are shown here in a few lines
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(_help())
        return
    sys.argv[1:] = _with_model_group(sys.argv[1:])
    try:
        _job()
    except Exception as error:
        if os.environ.get("CDPO_DEBUG") == "1":
            raise
        code = _explain(error, quiet=bool(sweeps()))
        sys.exit(end() if sweeps() else code)
    if sweeps():
        sys.exit(end())


def _help() -> str:
    """Groups with their choices. Ours, as Hydra takes over a second to list them."""
    groups = sorted(path for path in config.CONF.iterdir() if path.name != "hydra" and any(path.glob("*.yaml")))
    choices = (f"  {group.name}={', '.join(sorted(path.stem for path in group.glob('*.yaml')))}" for group in groups)
    return "\n".join(
        [
            "cdpo-train [-m] [GROUP=CHOICE ...] [KEY=VALUE ...]",
            "",
            "Train a policy on preferences, with a loss, under constraints. Started again, a run goes on where it was.",
            "",
            *(textwrap.fill(line, 110, subsequent_indent="    ", break_on_hyphens=False) for line in choices),
            "",
            "  constraint=[a,b]      several constraints at once",
            "  -m KEY=a,b seed=0,1   a sweep: one run for every combination, each in its own directory",
            "  --cfg job             print every key with its value, and train nothing",
            "  --hydra-help          Hydra's own options",
        ]
    )


def _with_model_group(arguments: list[str]) -> list[str]:
    """`model.name_or_path=X` alone means `model=hf model.name_or_path=X`: the tiny default has no such key."""
    chosen = any(argument.startswith("model=") for argument in arguments)
    named = [i for i, argument in enumerate(arguments) if argument.startswith("model.name_or_path=")]
    return [*arguments[: named[0]], "model=hf", *arguments[named[0] :]] if named and not chosen else arguments


def _explain(error: Exception, quiet: bool) -> int:
    """Print what, where and what to do, in a few lines; returns the exit code."""
    if isinstance(error, CdpoError):
        message, code = str(error), error.exit_code
    elif isinstance(error, (HydraException, OmegaConfBaseException)):
        message, code = _composition(error), ConfigError.exit_code
    elif isinstance(error, OSError):
        message, code = str(error), DiskError.exit_code
    elif not OUTCOMES:  # no run was begun: Hydra could not compose
        message, code = str(error), ConfigError.exit_code
    else:
        message, code = f"{type(error).__name__}: {error} (CDPO_DEBUG=1 shows the traceback)", 1
    rank = place().rank
    if not quiet and not (rank and rank_0_says(error)):
        print(f"cdpo-train: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return code


def _composition(error: Exception) -> str:
    """Hydra's message, with the nearest valid name where a key or a choice is unknown."""
    if isinstance(error, MissingConfigException) or "Could not load" in str(error):
        group, _, choice = (re.findall(r"'([^']+/[^']+)'", str(error)) or ["/"])[-1].rpartition("/")
        options = sorted(path.stem for path in (config.CONF / group).glob("*.yaml"))
        return f"{group}={choice} does not exist{config.nearest(choice, options)}; there are {', '.join(options)}"
    if isinstance(error, InterpolationResolutionError):
        return str(error).splitlines()[0].rpartition("interpolation: ")[2]
    inner = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key, parent = getattr(inner, "full_key", None), getattr(inner, "parent_node", None)
    if isinstance(inner, MissingMandatoryValue):
        return f"{key} has no default: set {key}=..."
    if isinstance(inner, ConfigAttributeError) and key and parent is not None:
        known = [str(name) for name in parent]
        return f"unknown key {key}{config.nearest(str(inner.key), known)}; there are {', '.join(known)}"
    if absent := re.match(r"Could not override '(constraint\.(\w+)\.[\w.]+)'", str(error)):
        key, choice = absent.groups()
        options = sorted(path.stem for path in (config.CONF / "constraint").glob("*.yaml"))
        if choice in options:
            return f"{key} is set, but constraint={choice} is not chosen: add constraint={choice}, or leave the key out"
        near = config.nearest(choice, options)
        return f"{key} is set, but no constraint is called {choice}{near}; there are {', '.join(options)}"
    return str(error).strip().splitlines()[0]


if __name__ == "__main__":
    main()
