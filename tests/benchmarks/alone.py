"""One side after the other, as a GPU has no room for two: each is warmed up, timed, and held against what cdpo did."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import Case, Setup, prepare
from benchmarks.compare import lengths
from benchmarks.floor import flops, utilisation
from benchmarks.same import Different, agree, tolerance
from benchmarks.sides import Ended, Side
from cdpo.batch import Item

WARM_UP = 6  # steps at most
IN_A_ROW = 2  # steps that are about as fast as the fastest, with nothing compiled, before the clock runs
SLACK = 1.2
Job = tuple[str, Setup]  # a side and what it trains


class Bench(NamedTuple):
    """What all cases share: the data, how much is timed, until when, and the speeds that times are held against."""

    data: Path
    rounds: int  # timed steps of the slowest to warm up; cdpo makes all there are
    until: float  # of time.monotonic
    speed: float  # operations per second of a large matrix product here
    peak: float | None = None  # what the maker states

    @property
    def steps(self) -> int:
        """Of each side, at most."""
        return WARM_UP + self.rounds


@dataclass
class Record:
    """What a side did, step by step; `warm` of them before the clock ran."""

    side: str
    folder: Path
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)  # graphs, before the first step and after each
    warm: int = WARM_UP
    steady: bool = False  # whether it was warm by then
    memory: int = 0

    @property
    def timed(self) -> range:
        """The steps that count."""
        return range(self.warm, len(self.seconds))

    def add(self, seconds: float, reply: dict[str, Any]) -> None:
        """One more step."""
        self.seconds.append(seconds)
        self.losses.append(reply["loss"])
        self.compiled.append(reply["compiled"])
        self.memory = reply["memory"]


def warmed(seconds: Sequence[float], work: Sequence[float], compiled: Sequence[int]) -> int | None:
    """After how many steps a side was warm, if it was. `work` are the operations of each step.

    A step is as fast as the fastest by its seconds, or by its seconds for equal work: either may be what stays.
    """
    paces = [s / w for s, w in zip(seconds, work)]
    for n in range(IN_A_ROW, min(len(seconds), WARM_UP) + 1):
        near = any(max(x[n - IN_A_ROW : n]) <= SLACK * min(x[:n]) for x in (seconds, paces))
        if near and compiled[n] == compiled[n - IN_A_ROW]:
            return n
    return None


def record(side: Side, work: list[float], rounds: int | None = None, least: int = 0) -> Record:
    """Warm a side up, for `least` steps at least, then let it make `rounds` steps, or all there are."""
    found = Record(side.name, side.folder, compiled=[side.reply["compiled"]])
    for k in range(len(work)):
        found.add(side.step("step" if k else "check"), side.reply)
        warm = warmed(found.seconds, work, found.compiled)
        found.warm, found.steady = max(warm or WARM_UP, least), warm is not None
        if rounds and len(found.seconds) == found.warm + rounds:
            break
    return found


def alone(found: Record, case: Case, work: list[float], bench: Bench) -> dict[str, Any]:
    """The numbers of one side."""
    seconds, operations = ([column[k] for k in found.timed] for column in (found.seconds, work))
    pace = statistics.median(seconds)
    mfu = {"mfu": utilisation(operations, seconds, bench.peak)} if bench.peak else {}
    return {
        "seconds": [pace, min(seconds), max(seconds)],
        "pairs_per_second": case.pairs / pace,
        "memory": found.memory,
        "floors": statistics.median(s * bench.speed / o for s, o in zip(seconds, operations)),
        **mfu,
        "warm_up": found.warm,
        "steady": found.steady,
        "every_step": {"seconds": found.seconds, "loss": found.losses, "compiled": found.compiled},
    }


def against(ours: Record, theirs: Record, device: str) -> dict[str, Any]:
    """How cdpo compares, in the steps that both timed. Raises Different unless all steps gave the same."""
    same = agree(ours.folder, theirs.folder, list(zip(ours.losses, theirs.losses)), tolerance(theirs.side, device))
    shared = sorted(set(ours.timed) & set(theirs.timed))
    ratios = [theirs.seconds[k] / ours.seconds[k] for k in shared]
    faster = [statistics.median(ratios), min(ratios), max(ratios)]
    return {"same": same, "faster": faster, "memory_share": ours.memory / theirs.memory}


@dataclass
class Runner:
    """Runs sides, cdpo first in each case, as it is what the others are held against."""

    bench: Bench
    ours: Record | None = None
    items: list[Item] = field(default_factory=list)
    longest: float = 0.0  # seconds that a side has taken

    def row(self, side: Side, setup: Setup) -> dict[str, Any]:
        """What a side came to; what is left out or fails says why."""
        began, found = time.monotonic(), {"case": setup.case.name, "side": side.name}
        self.ours = None if side.name == "cdpo" else self.ours
        if reason := self._skip(side.name):
            return found | {"skipped": reason}
        try:
            if side.name == "cdpo":
                self.items = prepare(setup, self.bench.data)
            found |= self._numbers(side, setup)
        except Different as error:
            found |= {"different": str(error)}
        except Ended as error:
            found |= {"failed": error.why, "output": str(error)}
        took = time.monotonic() - began
        self.longest = max(self.longest, took)
        return found | {"wall": took}

    def _skip(self, name: str) -> str:
        if self.bench.until - time.monotonic() < self.longest:
            return "no time left"
        return "" if self.ours or name == "cdpo" else "nothing to hold it against"

    def _numbers(self, side: Side, setup: Setup) -> dict[str, Any]:
        case, ours = setup.case, self.ours
        work = [flops(case, self.items[k : k + case.batch]) for k in range(0, len(self.items), case.batch)]
        with side:
            found = record(side, work, self.bench.rounds if ours else None, ours.warm if ours else 0)
        compared = against(ours, found, setup.device) if ours else {"lengths": lengths(self.items)}
        self.ours = ours or found
        return alone(found, case, work, self.bench) | compared


def run(jobs: list[Job], bench: Bench, start: Callable[..., Side] = Side) -> Iterator[dict[str, Any]]:
    """The rows of all sides, as they come. The next side imports meanwhile, which takes nothing of the GPU."""
    runner, started = Runner(bench), [start(*job, bench.until) for job in jobs[:1]]
    try:
        for k, (_, setup) in enumerate(jobs):
            started += [start(*job, bench.until) for job in jobs[k + 1 : k + 2]]
            yield runner.row(started[k], setup)
            started[k].close()
    finally:
        for side in started:
            side.close()
