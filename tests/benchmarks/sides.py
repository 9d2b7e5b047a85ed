"""Starts a side in a process of its own, and hands it the word, step by step."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cases import Setup

ROOT = Path(__file__).parents[2]
OURS = ("cdpo", "apart")
FULL = r"OutOfMemoryError|CUDA out of memory|device's memory is full"


class Ended(RuntimeError):
    """A side is gone before its time; `why` in a few words: "out of memory", "out of time", or its last line."""

    def __init__(self, name: str, output: str, why: str = "") -> None:
        self.why = why or ("out of memory" if re.search(FULL, output) else (output.split("\n") or [""])[-1])
        super().__init__(f"{name} ended, {self.why}: {output[-2000:]}")


class Side:
    """A training process. Once started it imports; within the block it stands at the gate, ready for its steps."""

    def __init__(self, name: str, setup: Setup, until: float | None = None) -> None:
        self.name, self.folder, self.until, self.reply = name, setup.folder / name, until, {}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        theirs, ours = os.pipe(), os.pipe()  # commands, replies
        environment = _environment(self.folder, setup) | {"BENCHMARK_PIPES": f"{theirs[0]},{ours[1]}"}
        self._log = (self.folder / "output.txt").open("w")
        self._process = subprocess.Popen(
            [sys.executable, *command(name, setup)],
            env=environment, cwd=ROOT, stdout=self._log, stderr=self._log, pass_fds=(theirs[0], ours[1]),
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs[0])
        os.close(ours[1])
        self._commands, self._replies = os.fdopen(theirs[1], "w", buffering=1), os.fdopen(ours[0])

    def step(self, command: str = "step") -> float:
        """Let it make one step. Returns the seconds; `reply` holds its loss and its peak of memory."""
        began = time.perf_counter()
        print(command, file=self._commands)
        self._hear()
        return time.perf_counter() - began

    def _hear(self) -> None:
        left = None if self.until is None else max(0.0, self.until - time.monotonic())
        if not select.select([self._replies], [], [], left)[0]:
            raise Ended(self.name, self._output(), "out of time")
        line = self._replies.readline()
        if not line:
            self._process.wait()
            raise Ended(self.name, self._output())
        self.reply: dict[str, Any] = json.loads(line)

    def _output(self) -> str:
        return (self.folder / "output.txt").read_text().strip()

    def __enter__(self) -> Side:
        try:
            self._hear()  # it has imported everything
            self.step("begin")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if it is there yet."""
        stop(self._process)
        self._log.close()
        self._replies.close()
        self._commands.close()


def stop(process: subprocess.Popen) -> None:
    """End a process that leads a session of its own, with those that compile for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(folder: Path, setup: Setup) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "launch"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(setup.threads),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "BENCHMARK_FOLDER": str(folder),
        "BENCHMARK_OPTIONS": json.dumps(options_of(setup)),
    }


def options_of(setup: Setup) -> dict[str, Any]:
    """What both sides are told."""
    case, place = setup.case, {"steps": setup.steps, "device": setup.device, "threads": setup.threads}
    return place | {name: getattr(case, name) for name in ("learning_rate", "lora", "pairs", "batch")}


def settings(setup: Setup, folder: Path, constraint: str = "none") -> list[str]:
    """What a user would type to train on the same, with one more constraint."""
    case, on_gpu = setup.case, str(setup.device == "cuda").lower()
    chosen = {
        "model": "hf",
        "model.name_or_path": setup.folder / "model",
        "dataset": "jsonl",
        "dataset.path": setup.folder / "cdpo.jsonl",
        "dataset.eval_size": 0,
        "dataset.labels": "hard",  # as TRL has them
        "loss": "dpo",
        "constraint": f"[{'lora_r8,' if case.lora else ''}{constraint}]",
        "logger": "none",
        "output_root": folder,
        "dataset.max_prompt_tokens": 4096,
        "dataset.max_response_tokens": 4096,
        "trainer.max_grad_norm": "null",  # so that gradients show their scale
        "trainer.batch_size": case.batch,
        "trainer.max_steps": setup.steps,
        "trainer.checkpoint_every": 10**9,
        "trainer.device": setup.device,
        "trainer.threads": setup.threads,
        "trainer.autocast": on_gpu,
        "trainer.compile": on_gpu,
        "optimizer.learning_rate": case.learning_rate,
    }
    return [*(f"{key}={value}" for key, value in chosen.items()), *setup.own]


def command(name: str, setup: Setup) -> list[str]:
    """What python is given: cdpo-train with the gate, or TRL."""
    if name not in OURS:
        return ["-m", "benchmarks.theirs", name]
    config = ["--config-dir", str(ROOT / "tests/benchmarks/conf")]
    chosen = [*settings(setup, setup.folder / name, "gate"), "allow_targets=[benchmarks.]"]
    return ["-m", "benchmarks.ours", name, *config, *chosen]
