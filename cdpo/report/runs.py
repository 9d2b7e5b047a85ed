"""Run directories to one table, a row per run. Reads whatever is there: a broken file becomes a cause, not an error.

A run is a folder with a config.json of ours, or a status.json; what lies below it (checkpoints, the model) is not
looked at, unless a sweep was started in it too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdpo.config.identity import flat
from cdpo.config.task import JOBS, tasks_in
from cdpo.errors import ConfigError
from cdpo.system.files import json_object, json_rows, redact
from cdpo.training.directory import DONE, RunDirectory

if TYPE_CHECKING:
    import pandas as pd

CONFIG, METRIC, CERTIFICATE = "config.", "metric/", "certificate."  # how columns of the table begin
GROUPS = ("experiment", "model", "dataset", "loss", "optimizer")
LABELS = ("directory", "state", "cause", "step", *GROUPS, "constraint", "seed", "restart", "labels")
SAYINGS = ("status", "says", "mend", "ranked_by")  # of a certificate; its numbers are metrics
DAMAGED = "damaged"  # finished, but its config or its numbers cannot be read
NUMBERS = ("steps", "trainable", "change/norm", "change/max_abs", "change/effective_rank")  # beside summary's metrics
KILLED = "still running, or killed: the same command goes on from the newest checkpoint"


def table(folder: Path) -> pd.DataFrame:
    """One row per run below `folder`: labels, state, config.*, the newest value of every metric/*, the command.

    Runs that a sweep lists but that have no directory come last, as "missing". ConfigError if there is no run.
    """
    folder = Path(folder)
    found, sweeps = find(folder)
    listed = {sweep / name: entry for sweep in sweeps for name, entry in _listed(sweep).items()}
    rows = [_row(path, listed.get(path, {})) for path in found]
    rows += [_missing(path, listed[path]) for path in sorted(listed.keys() - set(found))]
    for row in rows:
        row["directory"] = row["directory"].relative_to(folder).as_posix()
    if not rows:
        raise ConfigError(f"{folder} has no run: no folder in it holds the config.json of one")
    return _frame([_printable(redact(row)) for row in rows])


def find(folder: Path) -> tuple[list[Path], list[Path]]:
    """The run directories in `folder` (itself included), and the folders that hold a sweep.json; links not followed.

    A folder that cannot be read is taken for a run's.
    """
    found: list[Path] = []
    sweeps: list[Path] = []
    denied: list[OSError] = []
    for place, inner, files in os.walk(folder, onerror=denied.append):
        is_run = RunDirectory(Path(place)).holds_run(files)
        is_sweep = "sweep.json" in files or JOBS in inner
        found += [Path(place)] * is_run
        sweeps += [Path(place)] * is_sweep
        go_on = is_sweep or not is_run
        inner[:] = sorted(name for name in inner if go_on and name != "wandb" and not name.startswith("."))
    return found + [Path(fault.filename) for fault in denied], sweeps


def history(folder: Path, names: list[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric in a run's metrics.jsonl, in the file's order; torn lines are left out."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for row in json_rows(RunDirectory(folder).metrics):
        for name in names:
            if _is_number(row.get(name)) and isinstance(row.get("step"), int):
                found[name].append((row["step"], float(row[name])))
    return found


def histograms(folder: Path) -> dict[str, Any]:
    """The newest row of a run's histograms.jsonl: name -> edges [bins + 1], shares [bins]; {} if there is none."""
    rows = list(json_rows(RunDirectory(folder).histograms))
    found = rows[-1] if rows else {}
    return {name: one for name, one in found.items() if isinstance(one, dict) and {"edges", "shares"} <= set(one)}


def _listed(sweep: Path) -> dict[str, dict[str, Any]]:
    """What a sweep's files say of each run, by the name of its directory: of those to do, and of those that ended."""
    runs = json_object(sweep / "sweep.json")[0].get("runs")
    entries = [entry for entry in runs if isinstance(entry, dict)] if isinstance(runs, list) else []
    tasks = {path.stem: json_object(path)[0] | {"ending": "not begun yet"} for path in tasks_in(sweep)}
    return tasks | {str(entry["directory"]): entry for entry in entries if entry.get("directory")}


def _row(path: Path, listed: Mapping[str, Any]) -> dict[str, Any]:
    directory = RunDirectory(path)
    trees = {part: json_object(getattr(directory, part)) for part in ("config", "choices", "status", "summary")}
    config, saved, status, summary = (trees[part][0] for part in ("config", "choices", "status", "summary"))
    config = _as_called_now(config)
    state = str(status.get("state") or summary.get("state") or "unknown")
    faults = {part: fault for part, (_, fault) in trees.items() if fault}
    needed = [("config", "trainer"), *([("summary", "metrics")] if state in DONE else [])]
    for part in [part for part, key in needed if key not in trees[part][0]]:
        faults.setdefault(part, f"{part}.json is missing, or not that of a run")
        state = DAMAGED if state in DONE else state
    causes = [cause for cause in (_cause(state, status, summary, listed), *faults.values()) if cause]
    row: dict[str, Any] = {"directory": path, "state": state, "cause": "; ".join(causes) or None}
    row["step"] = summary.get("step") if state in DONE else _last_step(path)
    row["labels"] = summary.get("labels")  # hard, soft, where the run knows
    row["reference"] = summary.get("reference")  # computed, or where it was read
    row |= _choices(config, saved or listed.get("choices") or {})
    row |= {"seed": config.get("seed"), "restart": config.get("restart")}
    row |= {f"{CONFIG}{key}": value for key, value in flat(config).items() if key and key != "hydra"}
    certificate = summary.get("certificate")
    row |= {f"{CERTIFICATE}{key}": certificate.get(key) or None for key in SAYINGS if isinstance(certificate, Mapping)}
    row |= {f"{METRIC}{key}": value for key, value in _metrics(summary).items()}
    return row | {"command": _command(path) or listed.get("command")}


def _as_called_now(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a run that was written before 2026-11-26, under the names since then."""
    config = {"study" if key == "task" else key: value for key, value in config.items()}
    loss = config.get("loss")
    if isinstance(loss, dict) and loss.get("rewards") == "true":
        config["loss"] = loss | {"rewards": "data"}
    return config


def _missing(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A run that was refused before it began, or whose directory, or all that makes it one, is gone."""
    ending = str(entry.get("ending"))
    gone = "its config.json and status.json are gone" if os.path.isdir(path) else "its directory is gone"
    cause = gone if ending.startswith("done") else ending
    labels = _choices({}, entry.get("choices") or {})
    return {"directory": path, "state": "missing", "cause": cause, **labels, "command": entry.get("command")}


def _cause(state: str, status: Mapping[str, Any], summary: Mapping[str, Any], listed: Mapping[str, Any]) -> str:
    """Why a run ended where it did, in words; "" for one that went through."""
    if state == "stopped_early":
        return str(summary.get("stopped") or "")
    if state in DONE:
        return ""
    ending = listed.get("ending") if listed.get("exit_code") else None
    return str(status.get("cause") or ending or (KILLED if state == "running" else ""))


def _choices(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen in each group; the name of the class where an old run has not written it down.

    A study, which does not train, has chosen its experiment only.
    """
    if config.get("study"):
        return dict.fromkeys((*GROUPS, "constraint")) | {"experiment": saved.get("experiment")}
    constraints = config.get("constraint", saved.get("constraint"))
    listed = [str(name) for name in constraints] if isinstance(constraints, (Mapping, list)) else []
    chosen = {group: saved.get(group) or _class(config.get(group)) for group in GROUPS}
    return {group: name and str(name) for group, name in chosen.items()} | {"constraint": "+".join(listed) or "none"}


def _class(node: Any) -> str | None:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return str(target).rpartition(".")[2].lower() if target else None


def _metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    found = summary.get("metrics")
    metrics = {str(k): v for k, v in found.items()} if isinstance(found, Mapping) else {}
    metrics |= {name: summary[name] for name in NUMBERS if name in summary}
    proof = summary.get("certificate")
    for name, value in proof.items() if isinstance(proof, Mapping) else ():
        if name not in SAYINGS:
            metrics[f"certificate/{name}"] = float(value) if isinstance(value, bool) else value
    return {name: value if _is_number(value) else None for name, value in metrics.items()}


def _is_number(value: Any) -> bool:
    """Finite, and a float can hold it: Python's JSON knows Infinity, and integers without end."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def _last_step(path: Path) -> int | None:
    steps = [row["step"] for row in json_rows(RunDirectory(path).metrics) if isinstance(row.get("step"), int)]
    return steps[-1] if steps else None


def _command(path: Path) -> str | None:
    with suppress(OSError):
        return RunDirectory(path).command.read_text(encoding="utf-8", errors="replace").strip() or None
    return None


def _printable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Text that UTF-8 can hold, and lists as JSON: what every file of a report can hold."""

    def one(value: Any) -> Any:
        value = json.dumps(value) if isinstance(value, (list, dict)) else value
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    return {one(name): one(value) for name, value in row.items()}


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Columns in the order: labels, config.*, metric/*, command; each of one type."""
    import pandas as pd

    names = sorted({name for row in rows for name in row})
    parts = [[name for name in names if name.startswith(prefix)] for prefix in (CONFIG, CERTIFICATE, METRIC)]
    order = [*LABELS, *(name for part in parts for name in part), "command"]
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in order})


def _column(values: list[Any]) -> pd.Series:
    """Numbers and truth values as such, where all are; else text, so that CSV and Parquet agree."""
    import pandas as pd

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean")
    if kinds == {int} and all(abs(value) < 2**63 for value in values if value is not None):
        return pd.Series(values, dtype="Int64")
    if kinds and kinds <= {int, float} and all(_is_number(value) for value in values if value is not None):
        return pd.Series([math.nan if value is None else float(value) for value in values], dtype="float64")
    return pd.Series([value if value is None else str(value) for value in values], dtype="string")
