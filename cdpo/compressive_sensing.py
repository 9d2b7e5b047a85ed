"""Compressive sensing: the penalty log(γ + λ) of DPO's Gaussian reading, where the right answer is known.

Which x of A x = b does a penalty return: the sparse one that made b? Against sum |x_i|: sum log(|x_i| + λ), by
majorise-minimise, which is iteratively reweighted l1 (Candès, Wakin, Boyd 2008, J. Fourier Anal. Appl. 14:877-905).
A large λ is l1-like, a small one l0-like and full of local minima; λ that falls is graduated non-convexity.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.stats import binomtest

from cdpo.errors import ConfigError, NumericsError
from cdpo.system.files import write_atomic
from cdpo.system.progress import Progress

Array = NDArray[np.float64]
LOOKS = {"l1": ("#0072b2", "o"), "fixed": ("#d55e00", "s"), "annealed": ("#009e73", "^")}  # safe for colour-blind eyes


@dataclass(frozen=True)
class Point:
    """One point of a recovery curve."""

    sparsity: int
    method: str  # l1, fixed or annealed
    trials: int
    recovered: int

    @property
    def rate(self) -> float:
        return self.recovered / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson(self.recovered, self.trials)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How often l1, log with fixed λ and log with falling λ find a sparse signal, over its number of non-zeros.

    Columns of A have norm 1 on average, non-zeros of x are N(0, 1). Both log methods start from the l1 solution.
    """

    unknowns: int = 64  # n, entries of x
    measurements: int = 32  # m, rows of A
    sparsities: list[int] = field(default_factory=lambda: [8, 10, 12, 14, 16, 18])  # non-zeros of x, a curve's points
    trials: int = 100  # problems per sparsity; all methods see the same ones
    noise: float = 0.1  # λ: the fixed one, and where the falling one ends; in standard deviations of a non-zero
    anneal_from: float = 10.0  # λ of the first reweighting when it falls, geometrically
    iterations: int = 6  # reweightings, each a linear programme; at least 2
    tolerance: float = 1e-3  # recovered: the error's norm is at most this share of the signal's

    def __post_init__(self) -> None:
        for name, least in {"unknowns": 2, "measurements": 1, "trials": 1, "iterations": 2}.items():
            self._require(name, getattr(self, name) >= least, f"choose at least {least}")
        self._require("measurements", self.measurements < self.unknowns, "choose fewer than study.unknowns")
        valid = set(self.sparsities) & set(range(1, self.unknowns + 1))
        self._require("sparsities", 0 < len(valid) == len(self.sparsities), "choose distinct ones, 1 to study.unknowns")
        self._require("noise", 1e-6 <= self.noise < math.inf, "choose 1e-6 or more; the solver knows 1e-7")
        self._require("anneal_from", self.noise <= self.anneal_from < math.inf, "choose at least study.noise")
        self._require("tolerance", 0 < self.tolerance < 1, "choose a share between 0 and 1")

    def _require(self, name: str, holds: bool, advice: str) -> None:
        if not holds:
            raise ConfigError(f"study.{name}={getattr(self, name)}: {advice}")

    def run(self, folder: Path, seed: int, pause: Callable[[], None]) -> dict[str, float]:
        """Rates such as {"recovery/l1/k=8": 0.92}; also `folder`/recovery.csv, .png and .svg, once all is solved.

        Problems depend on seed, sparsity and trial only. Raises what `pause` raises, NumericsError, DiskError.
        """
        recovered: Counter[tuple[int, str]] = Counter()
        problems = list(itertools.product(self.sparsities, range(self.trials)))
        with Progress(len(problems), description="recover") as progress:
            for done, (sparsity, trial) in enumerate(problems, start=1):
                pause()
                matrix, signal = draw(self.measurements, self.unknowns, sparsity, (seed, sparsity, trial))
                for method, estimate in self.estimates(matrix, matrix @ signal).items():
                    recovered[sparsity, method] += relative_error(estimate, signal) <= self.tolerance
                progress.update(done)
        points = [Point(k, method, self.trials, recovered[k, method]) for k in self.sparsities for method in LOOKS]
        self._write(folder, points)
        return {f"recovery/{point.method}/k={point.sparsity}": point.rate for point in points}

    def estimates(self, matrix: Array, data: Array) -> dict[str, Array]:
        """What each method takes for x, from A [m, n] and b [m]. Raises NumericsError."""
        start = weighted_l1(matrix, data, np.ones(matrix.shape[1]))
        falling = np.geomspace(self.anneal_from, self.noise, self.iterations)
        fixed = [self.noise] * self.iterations
        return {
            "l1": start,
            "fixed": reweighted(matrix, data, start, fixed)[-1],
            "annealed": reweighted(matrix, data, start, falling)[-1],
        }

    def _write(self, folder: Path, points: list[Point]) -> None:
        write_atomic(folder / "recovery.csv", table(points))
        for extension in ("png", "svg"):
            image = io.BytesIO()
            self._figure(points).savefig(image, format=extension, dpi=200)
            write_atomic(folder / f"recovery.{extension}", image.getvalue())

    def _figure(self, points: list[Point]) -> Figure:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=f"non-zeros among {self.unknowns} unknowns", ylabel="share recovered")
        log = "log(|x| + λ), λ"
        labels = (f"{log} from {self.anneal_from:g} to {self.noise:g}", f"{log} = {self.noise:g}", "|x|")
        for method, label in zip(reversed(LOOKS), labels):  # in the order in which the curves lie
            curve(axes, [point for point in points if point.method == method], label)
        axes.set_title(f"{self.measurements} measurements, {self.trials} signals per point, 95 % intervals")
        axes.legend(title="penalty", frameon=False, alignment="left")
        return figure


def wilson(recovered: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    low, high = binomtest(recovered, trials).proportion_ci(method="wilson")
    return float(low), float(high)


def curve(axes: Axes, points: list[Point], label: str) -> None:
    """Rates with their intervals, of the points of one method."""
    points = sorted(points, key=lambda point: point.sparsity)
    color, marker = LOOKS[points[0].method]
    x, (low, high) = [point.sparsity for point in points], zip(*(point.interval for point in points))
    axes.plot(x, [point.rate for point in points], color=color, marker=marker, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw(measurements: int, unknowns: int, sparsity: int, seed: Iterable[int]) -> tuple[Array, Array]:
    """A [m, n] of N(0, 1/m), and x [n] with `sparsity` non-zeros of N(0, 1) at random places."""
    random = np.random.default_rng(list(seed))
    matrix = random.standard_normal((measurements, unknowns)) / math.sqrt(measurements)
    signal = np.zeros(unknowns)
    signal[random.choice(unknowns, sparsity, replace=False)] = random.standard_normal(sparsity)
    return matrix, signal


def reweighted(matrix: Array, data: Array, start: Array, noises: Iterable[float]) -> list[Array]:
    """Iterates x [n] after `start`, one for each λ: weighted l1 with weights 1 / (|x_i| + λ).

    That majorises sum log(|x_i| + λ) at the iterate before, so the sum never rises while λ stays.
    """
    iterates = [start]
    for noise in noises:
        iterates.append(weighted_l1(matrix, data, noise / (np.abs(iterates[-1]) + noise)))  # times λ: at most 1
    return iterates[1:]


def weighted_l1(matrix: Array, data: Array, weights: Array) -> Array:
    """argmin of sum w_i |x_i| subject to A x = b, a vertex; [m, n], [m], [n] -> [n]. Raises NumericsError.

    A linear programme in x = p - q, p, q >= 0, without presolve, which finds nothing in a dense matrix.
    """
    costs, columns = np.concatenate([weights, weights]), np.hstack([matrix, -matrix])
    solution = linprog(costs, A_eq=columns, b_eq=data, bounds=(0, None), method="highs-ds", options={"presolve": False})
    if not solution.success:
        raise NumericsError(f"a linear programme was not solved ({solution.message}); choose a larger study.noise")
    positive, negative = np.split(solution.x, 2)
    return positive - negative


def relative_error(estimate: Array, signal: Array) -> float:
    """The norm of the error over the norm of the signal."""
    return float(np.linalg.norm(estimate - signal) / np.linalg.norm(signal))


def table(points: list[Point]) -> bytes:
    """CSV, one line per point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sparsity", "method", "trials", "recovered", "rate", "low", "high"])
    for point in points:
        numbers = (f"{number:.6g}" for number in (point.rate, *point.interval))
        writer.writerow([point.sparsity, point.method, point.trials, point.recovered, *numbers])
    return text.getvalue().encode()
