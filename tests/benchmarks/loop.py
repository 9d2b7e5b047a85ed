"""python -m benchmarks.loop: steps per second of small models, and what the loop costs beside forward and backward."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = {
    "tabular": ["model=tabular", "optimizer=sgd", "trainer.batch_size=null"],
    "tiny": ["model=tiny"],
    "tiny lora_r8": ["model=tiny", "constraint=lora_r8"],
}
START_UP = (["--help"], ["--cfg", "job"])


class Clock:
    """Seconds within the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def measure(options: list[str], steps: int, log_every: int) -> dict[str, float]:
    """One run of cdpo-train, in this process: its loop alone, without any evaluation but the first and last."""
    import torch
    from composing import composed, train

    from cdpo.model.logps import Scorer
    from cdpo.training import loop
    from cdpo.training.journal import Journal

    whole, inner, gradient, stepping = Clock(), Clock(), Clock(), Clock()
    optimizer = torch.optim.SGD if "optimizer=sgd" in options else torch.optim.AdamW
    settings = [f"trainer.max_steps={steps}", f"trainer.log_every={log_every}", "logger=none", "trainer.threads=1"]
    settings += [f"trainer.{name}={10 * steps}" for name in ("eval_every", "checkpoint_every")]
    wrapped = [(whole, loop, "take_step"), (whole, Journal, "step"), (gradient, loop, "gradient")]
    wrapped += [(inner, Scorer, "forward"), (inner, loop, "per_unit"), (inner, torch.Tensor, "backward")]
    wrapped += [(stepping, optimizer, "step")]
    kept = [(place, name, getattr(place, name)) for _, place, name in wrapped]
    for clock, place, name in wrapped:
        setattr(place, name, clock.around(getattr(place, name)))
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(composed(*options, *settings), Path(folder) / "run")
    finally:
        for place, name, function in kept:
            setattr(place, name, function)
    update = stepping.seconds - gradient.seconds  # the optimizer calls for the gradient
    return {
        "steps_per_second": steps / whole.seconds,
        "optimizer": update / whole.seconds,
        "beside": 1 - (inner.seconds + update) / whole.seconds,
    }


def start_up(arguments: list[str], times: int) -> float:
    """Median seconds of a command that trains nothing."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cdpo.train", *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for name, options in CASES.items():
        for log_every in (1, 10, 1000):
            steps = given.steps if name == "tabular" else max(1, given.steps // 15)
            found = [measure(options, steps, log_every) for _ in range(given.rounds)]
            row = {key: sorted(one[key] for one in found)[len(found) // 2] for key in found[0]}
            print(json.dumps({"case": name, "log_every": log_every, **{k: round(v, 3) for k, v in row.items()}}))
    for arguments in START_UP:
        print(json.dumps({"case": " ".join(arguments), "seconds": round(start_up(arguments, given.rounds), 2)}))


if __name__ == "__main__":
    main()
