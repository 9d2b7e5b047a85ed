"""The study: phase diagrams of recovery over flipped labels, sparsity, and the accuracy of the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdpo.errors import ConfigError
from cdpo.policy_recovery.draws import Setting, draw
from cdpo.policy_recovery.methods import ALL, BASELINE, Knobs, methods
from cdpo.policy_recovery.pictures import forms, picture
from cdpo.policy_recovery.results import Axis, Diagram, Line, Outcome, points, table, transitions
from cdpo.system.files import write_atomic
from cdpo.system.progress import Progress

COMPARED = ("log", "linear", "log, reference right", "linear, reference right")  # in the diagram of the reference


@dataclass(frozen=True)
class Plan:
    """A phase diagram before it is computed: the setting of every row and column, and which methods it compares."""

    name: str
    rows: Axis
    columns: Axis
    settings: list[list[Setting]]  # [rows][columns]
    methods: Sequence[str]

    @property
    def points(self) -> int:
        return len(self.rows.values) * len(self.columns.values)


@dataclass(frozen=True, kw_only=True)
class PolicyRecovery:
    """How often each penalty finds the direction w* that labelled the pairs, when some labels are flipped.

    A log-linear policy a·θ, a ~ N(0, 1), in the ball of `radius`; all penalties see the same draws.
    """

    draws: int = 100  # problems per point
    cosine: float = 0.99  # recovered: cos(θ, w*) is above it
    radius: float = 10.0  # τ of |θ| <= τ, so of the margins' standard deviation, nats
    strength: float = 3.0  # nats by which a reference prefers a response; constant λ are exp(-strength), exp(strength)
    power: float = 0.5  # of the penalty power
    fall_from: float = 100.0  # λ at first where it falls, to 1
    pairs: int = 400  # n, of the diagrams of errors and reference
    features: list[int] = field(default_factory=lambda: [2, 3, 4, 6, 8, 12, 16, 24, 32, 48])  # d, rising: their columns
    flipped: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3])  # shares: rows of errors
    accuracy: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])  # shares: rows of reference
    accuracy_flipped: float = 0.2  # share of flipped labels in the diagram of the reference
    dimension: int = 40  # d of the sparse diagram
    nonzeros: list[int] = field(default_factory=lambda: [2, 4, 6, 8])  # k, rising: its rows
    pairs_per_feature: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1])  # n/d, falling: its columns
    sparse_flipped: float = 0.05  # share of flipped labels in the sparse diagram

    def __post_init__(self) -> None:
        for name in ("draws", "pairs", "dimension", "radius", "strength", "fall_from"):
            self._require(name, 0 < getattr(self, name) < math.inf, "choose a finite number above 0")
        self._require("fall_from", self.fall_from > 1, "choose more than 1")
        self._require("power", 0 < self.power <= 1, "choose it in (0, 1]")
        self._require("cosine", 0 < self.cosine < 1, "choose it in (0, 1)")
        for name in ("features", "nonzeros", "flipped", "accuracy"):
            self._require(name, _rising(getattr(self, name)), "choose one or more, rising")
        self._require("pairs_per_feature", _rising(self.pairs_per_feature[::-1]), "choose one or more, falling")
        self._require("features", self.features[0] >= 2, "choose 2 or more")
        self._require("nonzeros", self.nonzeros[0] >= 1, "choose 1 or more")
        self._require("nonzeros", self.nonzeros[-1] <= self.dimension, "choose at most study.dimension")
        self._require("pairs_per_feature", self.pairs_per_feature[-1] >= 1, "choose 1 or more")
        for name in ("accuracy_flipped", "sparse_flipped"):
            self._require(name, 0 <= getattr(self, name) < 0.5, "choose a share in [0, 0.5)")
        self._require("flipped", self.flipped[0] >= 0 and self.flipped[-1] < 0.5, "choose shares in [0, 0.5)")
        self._require("accuracy", self.accuracy[0] >= 0 and self.accuracy[-1] <= 1, "choose shares in [0, 1]")

    def _require(self, name: str, holds: bool, advice: str) -> None:
        if not holds:
            raise ConfigError(f"study.{name}={getattr(self, name)}: {advice}")

    def run(self, folder: Path, seed: int, pause: Callable[[], None]) -> dict[str, float]:
        """Transitions such as {"transition/errors/log/0.1": 0.02}; also `folder`/*.csv, .png, .svg, once all is done.

        Problems depend on seed and setting only. Raises what `pause` raises, NumericsError, DiskError.
        """
        plans = self.plans()
        with Progress(sum(plan.points for plan in plans), description="recover") as progress:
            done = itertools.count(1)

            def step() -> None:
                pause()
                progress.update(next(done))

            found = [self._solved(plan, seed, step) for plan in plans]
        moved = [line for diagram in found for line in transitions(diagram, BASELINE, seed)]
        self._write(folder, found, moved)
        known = [one for one in moved if one["transition"] == one["transition"]]  # inside of its diagram
        return {
            f"transition/{one['diagram']}/{one['method']}/{one['row']:g}": float(one["transition"]) for one in known
        }

    def plans(self) -> list[Plan]:
        """Errors: flipped labels by d/n; reference: its accuracy by d/n; sparse: k/d by d/n."""
        n, d = self.pairs, self.dimension
        across = Axis([one / n for one in self.features], "features per pair, d/n")
        lengths = [d * one for one in self.pairs_per_feature]
        errors = [[Setting(one, n, share) for one in self.features] for share in self.flipped]
        wrong = self.accuracy_flipped
        reference = [[Setting(one, n, wrong, None, share) for one in self.features] for share in self.accuracy]
        sparse = [[Setting(d, one, self.sparse_flipped, k) for one in lengths] for k in self.nonzeros]
        shorter = Axis([d / one for one in lengths], across.label)
        return [
            Plan("errors", Axis(self.flipped, "share of flipped labels, ε"), across, errors, ALL),
            Plan("reference", Axis(self.accuracy, "accuracy of the reference"), across, reference, COMPARED),
            Plan("sparse", Axis([k / d for k in self.nonzeros], "non-zeros per feature, k/d"), shorter, sparse, ALL),
        ]

    def _solved(self, plan: Plan, seed: int, step: Callable[[], None]) -> Diagram:
        """Every point of a diagram, all methods on the same draws."""
        knobs = Knobs(self.radius, self.strength, self.power, self.fall_from)
        asked = {name: one for name, one in methods(knobs).items() if name in plan.methods}
        outcomes: dict[tuple[str, int, int], Outcome] = {}
        for row, column in itertools.product(range(len(plan.rows.values)), range(len(plan.columns.values))):
            step()
            problem = draw(plan.settings[row][column], self.draws, seed)
            for name, method in asked.items():
                theta, gap = method.solve(problem, knobs)
                cosine = problem.cosine(theta)
                tensors = (cosine > self.cosine, problem.separates(theta), cosine, gap)
                outcomes[name, row, column] = Outcome(*(tensor.numpy() for tensor in tensors))
        ordered = {key: outcomes[key] for key in sorted(outcomes, key=lambda key: list(asked).index(key[0]))}
        return Diagram(plan.name, plan.rows, plan.columns, ordered)

    def _write(self, folder: Path, diagrams: list[Diagram], moved: list[Line]) -> None:
        write_atomic(folder / "points.csv", table([line for diagram in diagrams for line in points(diagram)]))
        write_atomic(folder / "transitions.csv", table(moved))
        title = f"Share of {self.draws} draws with cos(θ, w*) > {self.cosine:g}"
        for diagram in diagrams:
            for extension, content in forms(picture(diagram, BASELINE, title)).items():
                write_atomic(folder / f"recovery-{diagram.name}.{extension}", content)


def _rising(values: Sequence[float]) -> bool:
    return len(values) > 0 and all(one < other for one, other in itertools.pairwise(values))
