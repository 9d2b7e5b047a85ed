"""Numbers of a run: exact means over pairs and ranks, and `metrics.jsonl`, which is the truth about it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdpo.system.files import disk_errors, to_json, write_atomic

log = logging.getLogger(__name__)


class Means:
    """Weighted means over rows that arrive in parts; however they are split, the result is equal to float64 rounding.

    Nothing waits for the device until `reduce`, which needs one transfer for all names together.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}  # n names -> [n + 1]: sums of weight * value, sum of weight

    def add(self, name: str, values: Tensor, weight: Tensor | None = None) -> None:
        """Add rows `values` [n] with their `weight` [n], 1 each by default."""
        self.add_all({name: values}, torch.ones_like(values, dtype=torch.float64) if weight is None else weight)

    def add_all(self, columns: Mapping[str, Tensor], weight: Tensor) -> None:
        """The same for several columns [n] of one `weight` [n]."""
        table, weight = torch.stack([values.detach().double() for values in columns.values()]), weight.detach().double()
        names, part = tuple(columns), torch.cat([table @ weight, weight.sum()[None]])
        self._sums[names] = self._sums[names] + part if names in self._sums else part

    def reduce(self, gather: Callable[[Any], list[Any]] | None = None) -> dict[str, float]:
        """The mean of each name, NaN where the weights sum to 0; then start over.

        `gather` returns what every rank passes to it; a rank that has seen no row of a name adds nothing to it.
        """
        sums, self._sums = self._sums, {}
        numbers = torch.cat(list(sums.values())).tolist() if sums else []
        own: list[tuple[str, float, float]] = []  # name, sum of weight * value, sum of weight
        for names in sums:
            (*values, weight), numbers = numbers[: len(names) + 1], numbers[len(names) + 1 :]
            own += [(name, value, weight) for name, value in zip(names, values)]
        totals: dict[str, tuple[float, float]] = {}
        for name, value, weight in (row for part in (gather(own) if gather else [own]) for row in part):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + value, before[1] + weight
        return {name: value / weight if weight else math.nan for name, (value, weight) in sorted(totals.items())}


class MetricsFile:
    """Rows with a `step`, one JSON object a line, appended as they come. NaN and infinities are written as null."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; call `truncate` before the first row. Raises DiskError."""
        self.path = Path(path)
        self._file = _appending(self.path)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row. Raises DiskError, and ValueError if it has no int `step`."""
        if not isinstance(row.get("step"), int):
            raise ValueError(f"a row of {self.path.name} needs an int 'step': {dict(row)}")
        line = (to_json(row) + "\n").encode()
        with disk_errors(self.path, len(line)):
            while line:
                line = line[self._file.write(line) :]

    def truncate(self, step: int) -> int:
        """Drop rows after `step` (-1: all) and lines that a kill has torn. Returns the last step there was, or -1.

        Raises DiskError; then the file is as it was.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        steps = [_step(line) for line in lines]
        kept = [line for line, at in zip(lines, steps) if at is not None and at <= step]
        if kept != lines:
            log.info("%s: %d rows after step %d dropped", self.path, len(lines) - len(kept), step)
            write_atomic(self.path, b"".join(kept))
            self._file.close()
            self._file = _appending(self.path)  # the name now belongs to another file
        return max((at for at in steps if at is not None), default=-1)

    def sync(self) -> None:
        """Force the rows to the disk, before a checkpoint that counts on them. Raises DiskError."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; rows are on their way to the disk already."""
        self._file.close()


def _appending(path: Path) -> FileIO:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "ab", buffering=0)


def _step(line: bytes) -> int | None:
    """The step of a row, or None for a line that is not a whole row."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
