"""What a person sees of a run: a live bar in a terminal, plain lines in a log file, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from cdpo.system.files import write_json


class Progress:
    """How far a run of `total` steps is, on stderr. `quiet` shows nothing, for ranks other than 0.

    Without a terminal it prints one line every `interval` seconds, and one for the first and the last step.
    """

    def __init__(
        self, total: int, start: int = 0, description: str = "train", interval: float = 30.0, quiet: bool = False
    ) -> None:
        self.total, self.start, self.description, self.interval = total, start, description, interval
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live = self._console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task(description, total=total, completed=start, numbers="")
        self._began = time.monotonic()
        self._printed = float("-inf")

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._bar.stop()

    def update(self, step: int, **numbers: float | None) -> None:
        """Step `step` is done; show `numbers` (loss, margin, accuracy), those that are None left out."""
        shown = "  ".join(f"{name} {shown_number(value)}" for name, value in numbers.items() if value is not None)
        self._bar.update(self._task, completed=step, numbers=shown)
        now = time.monotonic()
        if not self._live and (now - self._printed >= self.interval or step == self.total):
            self._printed = now
            self.note(f"{self.description} {step}/{self.total}  {shown}  {self._left(step, now)}")

    def note(self, text: str) -> None:
        """Print a message above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _left(self, step: int, now: float) -> str:
        if step <= self.start:
            return ""
        seconds = round((now - self._began) / (step - self.start) * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


class Heartbeat:
    """A file that says how far a run is, for people elsewhere: step, steps, seconds per step, when (Unix time)."""

    def __init__(self, path: Path, steps: int, start: int, interval: float = 5.0) -> None:
        self.path, self.steps, self.start, self.interval = path, steps, start, interval
        self._began, self._written = time.time(), 0.0

    def beat(self, step: int) -> None:
        """Step `step` is done; the file is written at most every `interval` seconds. Raises DiskError."""
        now = time.time()
        if now - self._written >= self.interval:
            self._written = now
            pace = (now - self._began) / (step - self.start) if step > self.start else None
            write_json(self.path, {"step": step, "steps": self.steps, "seconds_per_step": pace, "time": now})


def summary_table(rows: Mapping[str, Any], title: str = "") -> None:
    """Print names and values as a table on stdout, floats with four digits, None as a dash."""
    table = Table(title=title or None, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for name, value in rows.items():
        table.add_row(str(name), shown_number(value))
    console().print(table)


def console() -> Console:
    """Of stdout. In a file or a pipe it folds nothing, so that a path stays one word."""
    plain = Console(file=sys.stdout, highlight=False, markup=False)
    if not plain.is_terminal:
        plain.width = 10_000
    return plain


def shown_number(value: Any) -> str:
    """A value for people: four significant digits of a float, a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
