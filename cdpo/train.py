"""The command line, cdpo-train: Hydra's main, exit codes, the table after a sweep. Only here is there a DictConfig.

torch and transformers are imported inside functions, so that --help and --cfg job answer at once.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import traceback
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from cdpo import config
from cdpo.errors import CdpoError, ConfigError, DiskError, Preempted

log = logging.getLogger(__name__)
OUTCOMES: list[tuple[Path, str, int]] = []  # every run of this process: directory, what ended it, exit code


def _choices(root: Any) -> dict[str, Any]:
    return dict(OmegaConf.select(root, "hydra.runtime.choices") or {})


def _plain(root: Any) -> dict[str, Any]:
    """The job's part of a config, unresolved, as plain dictionaries."""
    node = OmegaConf.masked_copy(root, [key for key in root if key != "hydra"])
    return OmegaConf.to_container(node, resolve=False)  # type: ignore[return-value]


def _run_name(*, _root_: DictConfig) -> str:
    return config.run_name(_plain(_root_), _choices(_root_))


def _run_dir(*, _root_: DictConfig) -> str:
    config.check_name(_root_.name)  # before Hydra makes the directory
    return str(Path(str(_root_.output_root)) / str(_root_.name or _run_name(_root_=_root_)))


def _sweep_dir(*, _root_: DictConfig) -> str:
    config.check_name(_root_.name)
    return str(Path(str(_root_.output_root), *([str(_root_.name)] if _root_.name else [])))


for _name, _resolver in {"run_name": _run_name, "run_dir": _run_dir, "sweep_dir": _sweep_dir}.items():
    OmegaConf.register_new_resolver(f"cdpo.{_name}", _resolver, replace=True)


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def _job(cfg: DictConfig) -> None:
    """One job of Hydra: alone, or one of a sweep."""
    settings = HydraConfig.get()
    folder, sweep = Path(settings.runtime.output_dir), settings.mode == RunMode.MULTIRUN
    overrides = list(settings.overrides.task)
    if any(code == Preempted.exit_code for _, _, code in OUTCOMES):
        raise Preempted("the sweep was asked to stop")
    try:
        composed: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        _only_from_the_command_line(composed, overrides)
        _quiet_libraries()
        from cdpo.job import run

        group = Path(settings.sweep.dir).resolve().name if sweep else None
        summary = run(composed, folder, shlex.join(["cdpo-train", *overrides]), group)
    except Exception as error:
        # not the exception itself: its traceback would keep the model in memory through the rest of a sweep
        OUTCOMES.append((folder, f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1)))
        if not any(path.name != "train.log" for path in folder.iterdir()):
            shutil.rmtree(folder)  # nothing was begun
        elif not isinstance(error, CdpoError):
            log.error("%s", "".join(traceback.format_exception(error)))
        raise error.with_traceback(None) if sweep else error  # noqa: B904
    OUTCOMES.append((folder, "done", 0))
    _show(summary, folder)


def _quiet_libraries() -> None:
    """Their progress bars and notices of deprecation are not for our users; warnings of cdpo itself are."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _only_from_the_command_line(composed: dict[str, Any], overrides: list[str]) -> None:
    """Remote code may be trusted by the person at the command line, never by a file."""
    trusted = composed["model"].get("trust_remote_code")
    if trusted and not any(override.lstrip("+").startswith("model.trust_remote_code=") for override in overrides):
        raise ConfigError("model.trust_remote_code can only be set on the command line")


def _show(summary: dict[str, Any], folder: Path) -> None:
    from cdpo.progress import summary_table

    names = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/accuracies_stderr", "eval/rewards/margins")
    rows = {key: summary[key] for key in ("state", "step", "trainable", "change/norm", "change/effective_rank")}
    rows |= {name: summary["metrics"][name] for name in names if name in summary["metrics"]}
    rows |= {f"constraint/{c}/{key}": v for c, report in summary["constraint"].items() for key, v in report.items()}
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
    sweep = bool({"-m", "--multirun"} & set(sys.argv[1:]))
    try:
        _job()
    except Exception as error:
        if os.environ.get("CDPO_DEBUG") == "1":
            raise
        code = _explain(error, quiet=sweep and bool(OUTCOMES))
        sys.exit(_sweep_table() if sweep and OUTCOMES else code)
    if sweep and OUTCOMES:
        sys.exit(_sweep_table())


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
    if not quiet:
        print(f"cdpo-train: {message}", file=sys.stderr)
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
    return str(error).strip().splitlines()[0]


def _sweep_table() -> int:
    """One line per run; returns 0 if all are done, 75 if the sweep was asked to stop, else 1."""
    from cdpo.progress import summary_table

    summary_table({folder.name: ending[:100] for folder, ending, _ in OUTCOMES}, title=f"{len(OUTCOMES)} runs")
    failures = {code for _, _, code in OUTCOMES if code}
    return Preempted.exit_code if failures == {Preempted.exit_code} else int(bool(failures))


if __name__ == "__main__":
    main()
