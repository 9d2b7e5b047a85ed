"""How long `cdpo-train` takes from its start to the first step, with kernels to be compiled and with kernels kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.sides import ROOT, stop

KEPT = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # where torch keeps kernels


def first_steps(device: str, limit: float) -> tuple[float, float]:
    """Seconds of the default job, twice, with one folder of kernels that is empty at first."""
    until = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as kernels:
        environment = os.environ | {name: str(Path(kernels) / name) for name in KEPT}
        cold, warm = (first_step(device, environment, until) for _ in range(2))
    return cold, warm


def first_step(device: str, environment: dict[str, str], until: float) -> float:
    """Seconds until the row of step 1 is written. Raises RuntimeError if that never comes."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output.txt").open("w") as output:
        told = [f"trainer.device={device}", "logger=none", f"output_root={folder}", "name=run"]
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "cdpo.train", *told],
            env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            while not stepped(Path(folder) / "run/metrics.jsonl"):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("no first step: " + Path(output.name).read_text()[-500:])
                time.sleep(0.01)
            return time.monotonic() - began
        finally:
            stop(process)


def stepped(path: Path) -> bool:
    """Whether a whole row of a step after the start is there."""
    rows = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return any(row.endswith("\n") and json.loads(row)["step"] > 0 for row in rows)
