"""python -m benchmarks.gpu: everything that is to be known of cdpo on a GPU, in one table. launch/gpu.sh runs it."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.alone import Bench, Job, run
from benchmarks.cases import FOR_GPUS, HH, Setup
from benchmarks.compare import machine
from benchmarks.first_step import first_steps
from benchmarks.floor import peak, speed
from benchmarks.sides import ROOT
from benchmarks.table import line, table

SIDES = {  # of each case, in the order of what matters most, should time run out
    "1b-lora-64": ("cdpo", "apart", "best"),
    "1b-64": ("cdpo", "best"),
    "1b-lora-16": ("cdpo", "best", "checkpointed"),
    "1b-lora-k8": ("cdpo", "best"),
    "1b-16": ("cdpo", "best", "checkpointed"),
    "tiny": ("cdpo", "apart", "best", "checkpointed"),
}
NO_TESTS = 5  # exit code of pytest
NO_ROOM = ("out of memory", "out of time")  # results, not mistakes


def card() -> str:
    """nvidia-smi's line of the GPU."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def tests(given: argparse.Namespace) -> dict[str, Any]:
    """pytest -m cuda, on the files that have such tests; no plugin is needed."""
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
    if not files:
        return {"says": "there are none", "failed": False}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-o", "addopts=--import-mode=importlib", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left(given))
    except subprocess.TimeoutExpired:
        return {"says": "out of time", "failed": True}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"]
    output = {"output": done.stdout[-8000:] + done.stderr[-2000:]} if done.returncode else {}
    return {"says": lines[-1], "failed": done.returncode not in (0, NO_TESTS), **output}


def start(given: argparse.Namespace) -> dict[str, Any]:
    """From the command to the first step, with kernels yet to be compiled, and again."""
    cold, warm = first_steps(given.device, left(given))
    says = f"first step after {cold:.1f} s with a cold kernel cache, {warm:.1f} s with a warm one"
    return {"says": says, "cold": cold, "warm": warm, "failed": False}


def benchmark(given: argparse.Namespace) -> dict[str, Any]:
    """cdpo and TRL, one after the other."""
    rows: list[dict[str, Any]] = []
    given.found["benchmark"] = {"rows": rows}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(given.data, given.rounds, given.until, speed(given.device), most(given.device))
        for row in run(jobs(given, Path(work), bench.steps), bench):
            print(f"{line(row)} {row.get('wall', 0):.0f} s", flush=True)
            rows.append(row)
            write(given)
    wrong = sum("different" in row or row.get("failed", NO_ROOM[0]) not in NO_ROOM for row in rows)
    absent = sum("skipped" in row for row in rows)
    says = f"{len(rows)} sides, {absent} left out, {wrong} wrong; products at {bench.speed / 1e12:.3g}e12 operations/s"
    return {"says": says, "speed": bench.speed, "rows": rows, "failed": bool(wrong)}


PARTS = {"tests": tests, "start": start, "benchmark": benchmark}


def jobs(given: argparse.Namespace, work: Path, steps: int) -> list[Job]:
    """All sides of all cases that are asked for."""
    place = (work, steps, given.device, given.threads, tuple(given.ours))
    cases = given.cases or [name for name in SIDES if name != "tiny"]
    wanted = given.sides or {side for sides in SIDES.values() for side in sides}
    return [(side, Setup(FOR_GPUS[name], *place)) for name in cases for side in SIDES[name] if side in wanted]


def most(device: str) -> float | None:
    """The stated peak of the GPU, where it is known."""
    return peak(torch.cuda.get_device_name()) if device == "cuda" else None


def left(given: argparse.Namespace) -> float:
    """Seconds until the limit."""
    return max(1.0, given.until - time.monotonic())


def write(given: argparse.Namespace) -> None:
    """All that is known so far."""
    (given.out / "gpu.json").write_text(json.dumps(given.found, indent=1))


def carry_out(name: str, given: argparse.Namespace) -> None:
    """One part, with the time it took; what goes wrong in it leaves the others to be done."""
    began, found = time.monotonic(), given.found
    try:
        part = PARTS[name](given)
    except Exception as error:
        part = {"says": f"{type(error).__name__}: {error}", "failed": True}
    found[name] = found.get(name, {}) | part | {"wall": time.monotonic() - began}
    print(f"{name}: {part['says']} ({found[name]['wall']:.0f} s)", flush=True)
    write(given)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="at most; what is left out then is named")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=FOR_GPUS, help="default: all but tiny")
    parser.add_argument("--sides", nargs="+", choices=SIDES["tiny"], help="default: all; cdpo is needed for the others")
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="more for cdpo's command line")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=HH, help="an HH file of transcripts")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --cases tiny runs the same without one")
    if not given.data.is_file():
        parser.error(f"--data {given.data}: no such file; name an HH file of transcripts, .jsonl or .jsonl.gz")
    return given


def main() -> None:
    began, given = time.monotonic(), options()
    given.until = began + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    given.found = {"card": card(), "machine": machine(given.device, given.threads)}
    print(given.found["card"], flush=True)
    for name in given.parts:
        carry_out(name, given)
    print(table(given.found))
    print(f"{time.monotonic() - began:.0f} s in all; {given.out}/gpu.json")
    sys.exit(int(any(given.found[name]["failed"] for name in given.parts)))


if __name__ == "__main__":
    main()
