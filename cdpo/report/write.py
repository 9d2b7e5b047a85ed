"""cdpo-report: a directory of runs to report.md, report.html, runs.csv, runs.parquet, gap.csv and figures/.

Reads whatever is there, and trains nothing. Written again from the same runs, every file has the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdpo.errors import CdpoError, ConfigError
from cdpo.report.pages import ORDER, Picture, pages
from cdpo.system.files import read_json, remove, write_atomic, write_json

if TYPE_CHECKING:
    import pandas as pd

    from cdpo.report.figures import Study

log = logging.getLogger(__name__)

FIGURES = "figures"


def report(folder: Path) -> Path:
    """Write the report of every run below `folder`; returns the path of report.html.

    Raises ConfigError if there is no run, and DiskError.
    """
    from cdpo.report import gap, labels, runs
    from cdpo.report.figures import Study

    folder = Path(folder)
    table = runs.table(folder)
    labelled = labels.label(table)
    found = gap.with_gaps(gap.best(labelled))
    settings = [labels.shown(name) for name in labelled.settings]
    cells, runs_shown = gap.cells(found, labelled.settings), found if len(found) else labelled.runs
    study = Study(folder, runs_shown, cells, settings, labelled.runs.assign(optimizer=table["optimizer"]))
    pictures, problems = draw(study)
    _write_tables(folder, table, study.cells)
    page = pages(study, table, labelled.runs, [*pictures, *_recoveries(folder, table)], problems)
    for name, content in page.items():
        write_atomic(folder / name, content)
    log_to_wandb(folder, _wandb_settings(table))
    return folder / "report.html"


def figure_files(folder: Path) -> list[Path]:
    """The figures of a report as PNG, in the order in which they stand there."""
    found = [path for path in (Path(folder) / FIGURES).glob("*.png") if path.stem.split("-")[0] in ORDER]
    return sorted(found, key=lambda path: (ORDER.index(path.stem.split("-")[0]), path.stem))


def draw(study: Study) -> tuple[list[Picture], list[str]]:
    """Make every figure that has data, write it, remove those of an earlier report; also what could not be drawn."""
    from cdpo.report import curves, desiderata, errors, figures, levels, plotting

    makers = (
        figures.gap_map,
        figures.quality,
        desiderata.probabilities,
        desiderata.preserved,
        levels.levels,
        levels.by_setting,
        errors.errors,
        figures.frontier,
        curves.training,
    )
    makers += (curves.path, figures.tightness, curves.distributions, curves.penalties)  # type: ignore[assignment]
    pictures, problems = [], []
    with plotting.style():
        for make in makers:
            try:
                made = make(study)
                drawings = made if isinstance(made, list) else [made] if made else []
                forms = [(drawing, plotting.forms(drawing.figure)) for drawing in drawings]
            except Exception as fault:  # a report without one figure is better than no report
                log.warning("figure %s: %s: %s", make.__name__, type(fault).__name__, fault)
                problems.append(f"The figure {make.__name__} could not be drawn ({type(fault).__name__}: {fault}).")
                continue
            for drawing, files in forms:
                pictures.append(_written(study.folder, drawing, files))
    _forget(study.folder, {picture.name for picture in pictures})
    return pictures, problems


def main() -> None:
    """The console script. Exit codes: 0 done, 2 no such directory or no run in it, 74 disk."""
    parser = argparse.ArgumentParser(
        prog="cdpo-report", description="Write report.html, report.md, tables and figures."
    )
    parser.add_argument("directory", type=Path, help="a directory of runs, such as outputs/constraint_gap")
    folder = parser.parse_args().directory
    try:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no directory; name one that holds runs, such as outputs")
        print(report(folder))
    except CdpoError as error:
        print(f"cdpo-report: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _written(folder: Path, drawing: Any, files: Mapping[str, bytes]) -> Picture:
    from cdpo.report.plotting import inline

    for extension, content in files.items():
        write_atomic(folder / FIGURES / f"{drawing.name}.{extension}", content)
    element = inline(files["svg"].decode(), drawing.name, drawing.alt)
    return Picture(drawing.name, drawing.caption, drawing.alt, f"{FIGURES}/{drawing.name}.png", element)


def _forget(folder: Path, kept: set[str]) -> None:
    """Remove figures of an earlier report that are not in this one; other files stay."""
    for path in (folder / FIGURES).glob("*"):
        ours = path.suffix in (".png", ".svg") and path.stem.split("-")[0] in ORDER
        if ours and path.stem not in kept:
            remove(path)


def _write_tables(folder: Path, table: pd.DataFrame, cells: pd.DataFrame) -> None:
    write_atomic(folder / "runs.csv", table.to_csv(index=False, lineterminator="\n"))
    parquet = io.BytesIO()
    table.to_parquet(parquet, index=False)
    write_atomic(folder / "runs.parquet", parquet.getvalue())
    write_atomic(folder / "gap.csv", cells.to_csv(index=False, lineterminator="\n"))


def _recoveries(folder: Path, table: pd.DataFrame) -> list[Picture]:
    """The figures of runs of compressive sensing, on signals or on policies, as images of their own."""
    found: list[Picture] = []
    for name in filter(lambda name: os.path.isdir(folder / name), table["directory"]):  # False where it may not be seen
        for path in sorted((folder / name).glob("recovery*.svg")):
            what = f"{path.stem.removeprefix('recovery').strip('-') or 'sparse signals'} ({name})"
            data = base64.b64encode(path.read_bytes()).decode()
            alt = f"Shares recovered by every penalty: {what}."
            element = f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}">'
            place = path.relative_to(folder).as_posix()
            caption = f"Recovery by the penalties: {what}."
            found.append(Picture(f"recovery-{len(found) + 1}", caption, alt, place, element))
    return found


def _wandb_settings(table: pd.DataFrame) -> dict[str, Any] | None:
    """The logger's settings of the first run that is copied to wandb; None if there is none."""
    import pandas as pd

    target = table.get("config.logger._target_", [])
    chosen = [i for i, name in enumerate(target) if isinstance(name, str) and name.endswith(".Wandb")]
    if not chosen:
        return None
    row = table.iloc[chosen[0]]
    keys = ("project", "entity", "mode", "init_timeout", "finish_timeout")
    found = {key: row.get(f"config.logger.{key}") for key in keys}
    return {key: value for key, value in found.items() if not pd.isna(value)}


def log_to_wandb(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Copy figures and gap.csv to a run of job type report, unless that was done; None: do not. Raises nothing."""
    if settings is None:
        return
    try:
        _copy(folder, settings)
    except Exception as fault:
        log.warning("the report is not on wandb (%s: %s)", type(fault).__name__, fault)


def _copy(folder: Path, settings: Mapping[str, Any]) -> None:
    """By the logger's own thread, with its timeouts. What was copied is remembered in wandb/report.json."""
    from cdpo.system.logger import Wandb

    memory, digest = folder / "wandb" / "report.json", _digest([*figure_files(folder), folder / "gap.csv"])
    if memory.is_file() and read_json(memory).get("sha256") == digest:
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # as the logger does; read when wandb is imported
    os.environ.setdefault("WANDB_SILENT", "true")
    import pandas as pd
    import wandb

    times = read_json(memory)["times"] + 1 if memory.is_file() else 0
    row: dict[str, Any] = {"step": times, "report/cells": wandb.Table(dataframe=pd.read_csv(folder / "gap.csv"))}
    row |= {f"report/{path.stem}": wandb.Image(str(path)) for path in figure_files(folder)}
    copy = Wandb(**settings, job_type="report")
    copy.start(folder, {}, folder.resolve().name, after=times - 1)
    copy.log(row)
    copy.finish()
    write_json(memory, {"sha256": digest, "times": times})


def _digest(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest()
