"""python -m benchmarks.compare: check that both sides compute the same, time them in turns, write what was found.

On a CPU; benchmarks.gpu does so on a GPU, one side after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, HH, Case, Setup, prepare
from benchmarks.floor import flops, speed
from benchmarks.same import Different, agree, tolerance
from benchmarks.sides import Side
from cdpo.batch import Item

VARIANTS = ["default", "best", "compact"]  # of TRL; see theirs.py
WARM = 1  # steps before the clock runs


def check(ours: Side, theirs: Side, allowed: float) -> dict[str, float]:
    """The loss of two steps, and the gradient of the first. Raises Different."""
    losses = []
    for command in ("check", "step"):
        for side in (ours, theirs):
            side.step(command)
        losses.append((ours.reply["loss"], theirs.reply["loss"]))
    return agree(ours.folder, theirs.folder, losses, allowed)


def compare(setup: Setup, variants: list[str], rounds: int, data: Path) -> dict:
    """One case: checked against every variant, then timed in turns."""
    items, checked = prepare(setup, data), {}
    for variant in variants:
        with Side("cdpo", setup) as ours, Side(variant, setup) as theirs:
            checked[variant] = check(ours, theirs, tolerance(variant, setup.device))
            print(f"{setup.case.name}: {variant} computes the same: {checked[variant]}", flush=True)
    found = {variant: _turns(setup, variant, items, rounds) for variant in variants}
    return {"case": vars(setup.case), "lengths": lengths(items), "same": checked, "against": found}


def _turns(setup: Setup, variant: str, items: list[Item], rounds: int) -> dict[str, Any]:
    """Steps of the two processes in turns, so that a noisy machine is noisy for both."""
    case, floors = setup.case, []
    seconds: dict[str, list[float]] = {"cdpo": [], variant: []}
    with Side("cdpo", setup) as ours, Side(variant, setup) as theirs:
        for step in range(WARM + rounds):
            took = {side.name: side.step() for side in (ours, theirs)}
            losses = [side.reply["loss"] for side in (ours, theirs)]
            if not abs(losses[0] - losses[1]) <= tolerance(variant, setup.device):
                raise Different(f"{variant}: losses {losses} of step {step + 1}")
            part = items[step * case.batch : (step + 1) * case.batch]
            fastest = flops(case, part) / speed(setup.device)
            if step >= WARM:
                floors.append(fastest)
                for name, value in took.items():
                    seconds[name].append(value)
        memory = {side.name: side.reply["memory"] for side in (ours, theirs)}
    found = summary(case, items, seconds, floors, memory)
    print(_line(case, variant, found), flush=True)
    return found


def summary(case: Case, items: list[Item], seconds: dict, floors: list[float], memory: dict) -> dict[str, Any]:
    """Medians, and the median ratio with its least and greatest value."""
    ours, theirs = seconds.values()
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    tokens = statistics.mean(item.tokens for item in items) * case.batch
    pace = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "pairs_per_second": {name: case.pairs / value for name, value in pace.items()},
        "tokens_per_second": {name: tokens / value for name, value in pace.items()},
        "memory": memory,
        "faster": [statistics.median(ratios), ratios[0], ratios[-1]],
        "memory_share": memory["cdpo"] / next(value for name, value in memory.items() if name != "cdpo"),
        "times_the_floor": statistics.median(a / b for a, b in zip(ours, floors)),
        "floor_seconds": statistics.median(floors),
    }


def lengths(items: list[Item]) -> dict[str, float]:
    """Mean tokens of prompts and responses."""
    rows = [[len(item.prompt), *map(len, item.responses)] for item in items]
    means = [statistics.mean(column) for column in zip(*rows)]
    return {"prompt" if k == 0 else f"response {k}": mean for k, mean in enumerate(means)}


def _line(case: Case, variant: str, found: dict[str, Any]) -> str:
    ours, theirs = found["pairs_per_second"].values()
    ratio, least, most = found["faster"]
    megabytes = [value / 1e6 for value in found["memory"].values()]
    return (
        f"{case.name:16} {variant:8} {ours:8.2f} {theirs:8.2f} pairs/s  {ratio:5.1f}x ({least:.1f} to {most:.1f})  "
        f"{megabytes[0]:6.0f} {megabytes[1]:6.0f} MB  {found['memory_share']:.2f}x  "
        f"{found['times_the_floor']:.2f} floors of {found['floor_seconds']:.3f} s"
    )


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where the numbers come from."""
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"python": platform.python_version(), "threads": threads, "device": device, **packages, **gpu}


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/benchmark.sh", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all but tiny")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for both sides")
    parser.add_argument("--data", type=Path, default=HH, help="an HH file of transcripts")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine("cpu", options.threads), "cases": {}}
    for name in options.cases or [name for name in CASES if name != "tiny"]:
        with tempfile.TemporaryDirectory() as work:
            try:
                setup = Setup(CASES[name], Path(work), WARM + options.rounds, threads=options.threads)
                found = compare(setup, options.variants, options.rounds, options.data)
            except Different as error:
                sys.exit(f"{name}: not timed, as the two sides differ. {error}")
        results["cases"][name] = found
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    from benchmarks.figure import draw

    draw(results, options.out / "results.png")
    print(f"{options.out}/results.json and results.png")


if __name__ == "__main__":
    main()
