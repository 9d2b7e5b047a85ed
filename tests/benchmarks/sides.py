"""Starts a side in a process of its own, and hands it the word, step by step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

ROOT = Path(__file__).parents[2]
LEARNING_RATE = 1e-4  # large enough that the second step's loss is not log 2 any more


class Side:
    """A training process that stands at the gate."""

    def __init__(self, name: str, case: Case, work: Path, steps: int, device: str, threads: int) -> None:
        self.name, self.folder, self.reply = name, work / name, {}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        options = options_of(case, steps, device, threads)
        theirs, ours = os.pipe(), os.pipe()  # commands, replies
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch"), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": str(threads),
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "BENCHMARK_FOLDER": str(self.folder),
            "BENCHMARK_PIPES": f"{theirs[0]},{ours[1]}",
            "BENCHMARK_OPTIONS": json.dumps(options),
        }
        command = _ours(work, self.folder, options) if name == "cdpo" else ["-m", "benchmarks.theirs", name]
        self._log = (self.folder / "output.txt").open("w")
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=environment, cwd=ROOT, stdout=self._log, stderr=self._log, pass_fds=(theirs[0], ours[1]),
        )  # fmt: skip
        os.close(theirs[0])
        os.close(ours[1])
        self._commands, self._replies = os.fdopen(theirs[1], "w", buffering=1), os.fdopen(ours[0])
        self._hear()

    def step(self, command: str = "step") -> float:
        """Let it make one step. Returns the seconds; `reply` holds its loss and its peak of memory."""
        began = time.perf_counter()
        print(command, file=self._commands)
        self._hear()
        return time.perf_counter() - began

    def _hear(self) -> None:
        line = self._replies.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: " + (self.folder / "output.txt").read_text()[-2000:])
        self.reply: dict[str, Any] = json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._commands, self._replies, self._log):
            end.close()
        self._process.kill()
        self._process.wait()


def options_of(case: Case, steps: int, device: str, threads: int) -> dict[str, Any]:
    """What both sides are told."""
    told = {"steps": steps, "device": device, "threads": threads, "learning_rate": LEARNING_RATE}
    return told | {"lora": case.lora, "pairs": case.pairs, "batch": case.batch}


def settings(work: Path, folder: Path, options: dict[str, Any], constraint: str = "none") -> list[str]:
    """What a user would type to train on the same, with one more constraint."""
    chosen = {
        "model": "hf",
        "model.name_or_path": work / "model",
        "dataset": "jsonl",
        "dataset.path": work / "cdpo.jsonl",
        "dataset.eval_size": 0,
        "dataset.labels": "hard",  # as TRL has them
        "loss": "dpo",
        "constraint": f"[{'lora_r8,' if options['lora'] else ''}{constraint}]",
        "logger": "none",
        "output_root": folder,
        "dataset.max_prompt_tokens": 4096,
        "dataset.max_response_tokens": 4096,
        "trainer.max_grad_norm": "null",  # so that gradients show their scale
        "trainer.batch_size": options["batch"],
        "trainer.max_steps": options["steps"],
        "trainer.checkpoint_every": 10**9,
        "trainer.device": options["device"],
        "trainer.threads": options["threads"],
        "trainer.autocast": str(options["device"] == "cuda").lower(),
        "optimizer.learning_rate": options["learning_rate"],
    }
    return [f"{key}={value}" for key, value in chosen.items()]


def _ours(work: Path, folder: Path, options: dict[str, Any]) -> list[str]:
    """The command, with the gate."""
    config = ["--config-dir", str(ROOT / "tests/benchmarks/conf")]
    return ["-m", "cdpo.train", *config, *settings(work, folder, options, "gate"), "allow_targets=[benchmarks.]"]
