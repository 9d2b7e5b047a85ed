"""python -m benchmarks.compare: check that both sides compute the same, time them in turns, write what was found."""

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
from safetensors.torch import load_file

from benchmarks.cases import CASES, FOR_GPUS, HH, Case, prepare
from benchmarks.floor import flops, peak, speed
from benchmarks.sides import Side
from cdpo.batch import Item

BFLOAT16 = 3e-2  # of losses and gradients, where a side computes in bfloat16: TRL's default, and all on a GPU
FLOAT32 = 1e-4
VARIANTS = ["default", "best", "compact"]  # of TRL; see theirs.py
WARM = 1  # steps before the clock runs


class Different(Exception):
    """The two sides do not compute the same, so their times say nothing."""


def check(ours: Side, theirs: Side, tolerance: float) -> dict[str, float]:
    """The loss of two steps, and the gradient of the first. Raises Different."""
    losses = []
    for command in ("check", "step"):
        for side in (ours, theirs):
            side.step(command)
        losses.append([side.reply["loss"] for side in (ours, theirs)])
    one, other = (load_file(side.folder / "gradients.safetensors") for side in (ours, theirs))
    if one.keys() != other.keys():
        raise Different(f"gradients of other parameters: {sorted(one.keys() ^ other.keys())[:4]}")
    norm = sum(float(g.norm()) ** 2 for g in other.values()) ** 0.5
    off = sum(float((one[name] - other[name]).norm()) ** 2 for name in one) ** 0.5 / norm
    loss = max(abs(a - b) for a, b in losses)
    if not (off <= tolerance and all(abs(a - b) <= tolerance for a, b in losses)):
        raise Different(f"{theirs.name}: losses {losses}, gradients {off:.1e} apart; at most {tolerance:g} is allowed")
    return {"loss": loss, "gradient": off, "second_loss": losses[1][0]}


def compare(case: Case, variants: list[str], rounds: int, data: Path, work: Path, device: str, threads: int) -> dict:
    """One case: checked against every variant, then timed in turns."""
    steps = WARM + rounds
    items = prepare(case, data, work, steps)
    options = (case, work, steps, device, threads)
    checked = {}
    for variant in variants:
        with Side("cdpo", *options) as ours, Side(variant, *options) as theirs:
            checked[variant] = check(ours, theirs, _tolerance(variant, device))
            print(f"{case.name}: {variant} computes the same: {checked[variant]}", flush=True)
    found = {variant: _turns(case, variant, items, rounds, options) for variant in variants}
    return {"case": vars(case), "lengths": _lengths(items), "same": checked, "against": found}


def _tolerance(variant: str, device: str) -> float:
    return BFLOAT16 if variant == "default" or device == "cuda" else FLOAT32


def _turns(case: Case, variant: str, items: list[Item], rounds: int, options: Any) -> dict[str, Any]:
    """Steps of the two processes in turns, so that a noisy machine is noisy for both."""
    seconds: dict[str, list[float]] = {"cdpo": [], variant: []}
    floors, operations = [], []
    with Side("cdpo", *options) as ours, Side(variant, *options) as theirs:
        for step in range(WARM + rounds):
            took = {side.name: side.step() for side in (ours, theirs)}
            losses = [side.reply["loss"] for side in (ours, theirs)]
            if not abs(losses[0] - losses[1]) <= _tolerance(variant, options[3]):
                raise Different(f"{variant}: losses {losses} of step {step + 1}")
            part = items[step * case.batch : (step + 1) * case.batch]
            fastest = flops(case, part) / speed(options[3])
            if step >= WARM:
                floors.append(fastest)
                operations.append(flops(case, part))
                for name, value in took.items():
                    seconds[name].append(value)
        memory = {side.name: side.reply["memory"] for side in (ours, theirs)}
    found = summary(case, items, seconds, floors, memory)
    if options[3] == "cuda" and (most := peak(torch.cuda.get_device_name())):
        found["mfu"] = {name: utilisation(operations, values, most) for name, values in seconds.items()}
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


def utilisation(operations: list[float], seconds: list[float], peak: float) -> float:
    """MFU: the share of the stated peak at which the operations were done that a step needs at least."""
    return statistics.median(o / s for o, s in zip(operations, seconds)) / peak


def _lengths(items: list[Item]) -> dict[str, float]:
    lengths = [[len(item.prompt), *map(len, item.responses)] for item in items]
    means = [statistics.mean(column) for column in zip(*lengths)]
    return {"prompt" if k == 0 else f"response {k}": mean for k, mean in enumerate(means)}


def _line(case: Case, variant: str, found: dict[str, Any]) -> str:
    ours, theirs = found["pairs_per_second"].values()
    ratio, least, most = found["faster"]
    megabytes = [value / 1e6 for value in found["memory"].values()]
    return (
        f"{case.name:16} {variant:8} {ours:8.2f} {theirs:8.2f} pairs/s  {ratio:5.1f}x ({least:.1f} to {most:.1f})  "
        f"{megabytes[0]:6.0f} {megabytes[1]:6.0f} MB  {found['memory_share']:.2f}x  "
        f"{found['times_the_floor']:.2f} floors of {found['floor_seconds']:.3f} s"
        + "".join(f"  MFU {name} {value:.3f}" for name, value in found.get("mfu", {}).items())
    )


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where the numbers come from."""
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"python": platform.python_version(), "threads": threads, "device": device, **packages, **gpu}


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/benchmark.sh", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all but tiny; 1b and 1b-lora on a GPU only")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for both sides")
    parser.add_argument("--data", type=Path, default=HH, help="an HH file of transcripts")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(options.device, options.threads), "cases": {}}
    fit = [name for name in CASES if name != "tiny" and (options.device == "cuda" or name not in FOR_GPUS)]
    for name in options.cases or fit:
        with tempfile.TemporaryDirectory() as work:
            try:
                place = (options.data, Path(work), options.device, options.threads)
                found = compare(CASES[name], options.variants, options.rounds, *place)
            except Different as error:
                sys.exit(f"{name}: not timed, as the two sides differ. {error}")
        results["cases"][name] = found
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    from benchmarks.figure import draw

    draw(results, options.out / "results.png")
    print(f"{options.out}/results.json and results.png")


if __name__ == "__main__":
    main()
