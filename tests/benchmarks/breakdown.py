"""python -m benchmarks.breakdown: where the time of a training step goes, by torch's profiler; cdpo's side alone."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CASES, HH, Setup, prepare
from benchmarks.floor import flops, speed
from benchmarks.sides import settings

KINDS = {  # of operators, the first that matches
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|addmv|linear|matmul)$",
    "attention": r"scaled_dot_product|flash",
    "optimizer": r"adamw",
    "exp, log, tanh": r"aten::(exp|log|tanh|logsumexp|_log_softmax|_softmax|xlogy|special)",
    "copies and fills": r"aten::(copy_|fill_|zero_|clone|cat|index|gather|embedding|new_|zeros|empty|_to_copy|stack)",
}


def kind(name: str) -> str:
    """Of an operator, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other operators")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__)
    parser.add_argument("--case", choices=CASES, default="hh")
    parser.add_argument("--steps", type=int, default=5, help="after the first, which is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=HH)
    given = parser.parse_args()
    case, steps, seconds = CASES[given.case], given.steps + 1, []
    from composing import composed, train

    from cdpo.training import loop

    recorder, step = profile(activities=[ProfilerActivity.CPU], acc_events=True), loop.take_step

    def timed(run: Any) -> None:
        if len(seconds) == 1:
            recorder.start()
        began = time.perf_counter()
        step(run)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == steps:
            recorder.stop()

    loop.take_step = timed
    with tempfile.TemporaryDirectory() as work:
        setup = Setup(case, Path(work), steps, threads=given.threads)
        items = prepare(setup, given.data)
        overrides = settings(setup, Path(work) / "out")
        train(composed(*overrides), Path(work) / "out" / "run")
    spent: dict[str, float] = defaultdict(float)
    for event in recorder.key_averages():
        spent[kind(event.key)] += event.self_cpu_time_total / 1e6 / given.steps
    whole, own = sum(seconds[1:]) / given.steps, sum(spent.values())
    floor = flops(case, items[case.batch :]) / given.steps / speed("cpu")
    rows = {**spent, "Python and the rest": whole - own, "a step, profiled": whole, "floor": floor}
    print(json.dumps({name: round(value, 4) for name, value in rows.items()}, indent=1))


if __name__ == "__main__":
    main()
