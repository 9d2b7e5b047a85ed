"""What came out: shares recovered with their intervals, where they cross one half, how far that moves from DPO's."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from cdpo.compressive_sensing import wilson

Array = NDArray[np.float64]
Line = dict[str, float | str]  # of a CSV file
RESAMPLED = 1000  # of the draws, for intervals of transitions


@dataclass(frozen=True)
class Outcome:
    """What one method made of the S draws of one point."""

    recovered: NDArray[np.bool_]  # [S]
    separated: NDArray[np.bool_]  # [S]
    cosine: Array  # [S]
    gap: Array  # [S]; nats


@dataclass(frozen=True)
class Axis:
    """One axis of a phase diagram: its values, and what they are called."""

    values: Sequence[float]
    label: str


@dataclass(frozen=True)
class Diagram:
    """Outcomes of every method at every point; columns from easy to hard."""

    name: str
    rows: Axis
    columns: Axis
    outcomes: Mapping[tuple[str, int, int], Outcome]  # method, row, column

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _, _ in self.outcomes))

    def successes(self, method: str, row: int) -> Array:
        """Which draws a method recovered along a row. [columns, S]"""
        found = [self.outcomes[method, row, column].recovered for column in range(len(self.columns.values))]
        return np.stack(found).astype(float)

    def rates(self, method: str) -> Array:
        """[rows, columns]"""
        return np.stack([self.successes(method, row).mean(1) for row in range(len(self.rows.values))])


def transition(columns: Sequence[float], rates: Array) -> Array:
    """Where shares that fall along the columns cross one half, by lines through their logarithms. [B, columns] -> [B]

    The shares are made monotone first (isotonic regression). 0 where they start below one half, infinite where they end
    above it: the transition lies outside of the diagram.
    """
    falling = np.array(rates, float)
    for b in map(int, np.flatnonzero((np.diff(falling, axis=1) > 0).any(1))):
        falling[b] = isotonic_regression(falling[b], increasing=False).x
    x = np.log(np.asarray(columns, float))
    found = np.full(len(rates), math.inf)
    for b, one in enumerate(falling):
        if (below := np.flatnonzero(one < 0.5)).size:
            i = int(below[0])
            found[b] = 0.0 if i == 0 else math.exp(np.interp(0.5, one[[i, i - 1]], x[[i, i - 1]]))
    return found


def transitions(diagram: Diagram, baseline: str, seed: int) -> list[Line]:
    """For every row and method: its transition, and that over the baseline's, each with a 95 % interval.

    The interval is from resampled draws, the same ones for all methods, as all have seen the same. NaN where a
    transition lies outside of the diagram.
    """
    lines: list[Line] = []
    random = np.random.default_rng([seed, RESAMPLED])
    for row, value in enumerate(diagram.rows.values):
        draws = diagram.successes(baseline, row).shape[1]
        picked = random.integers(draws, size=(len(diagram.columns.values), RESAMPLED, draws))
        every = {name: _resampled(diagram, name, row, picked) for name in diagram.methods}
        for name, found in every.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                moved = found / every[baseline]
            line: Line = {"diagram": diagram.name, "row": value, "method": name}
            lines.append(line | _interval("transition", found) | _interval("moved", moved))
    return lines


def _resampled(diagram: Diagram, method: str, row: int, picked: NDArray[np.int64]) -> Array:
    """The transition of the draws, then those of resampled ones. [1 + RESAMPLED]"""
    success = diagram.successes(method, row)
    again = np.stack([one[index].mean(1) for one, index in zip(success, picked)], axis=1)
    return transition(diagram.columns.values, np.vstack([success.mean(1), again]))


def _interval(name: str, found: Array) -> Line:
    """The first value, and percentiles of the others; NaN where they are not finite."""
    known = np.where(np.isfinite(found) & (found > 0), found, math.nan)
    low, high = (math.nan, math.nan) if np.isnan(known).any() else np.percentile(known[1:], [2.5, 97.5])
    return {name: float(known[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def points(diagram: Diagram) -> list[Line]:
    """One line per point and method: shares with Wilson's 95 % intervals, the mean cosine, the worst gap."""
    lines = []
    for (method, row, column), found in diagram.outcomes.items():
        low, high = wilson(int(found.recovered.sum()), len(found.recovered))
        line: Line = {"diagram": diagram.name, "row": diagram.rows.values[row]}
        line |= {"column": diagram.columns.values[column], "method": method, "draws": len(found.recovered)}
        line |= {"recovered": float(found.recovered.mean()), "low": low, "high": high}
        line |= {"separated": float(found.separated.mean()), "cosine": float(found.cosine.mean())}
        lines.append(line | {"gap": float(found.gap.max())})
    return lines


def table(lines: Sequence[Line]) -> bytes:
    """CSV, six digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(lines[0])
    for line in lines:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in line.values()])
    return text.getvalue().encode()
