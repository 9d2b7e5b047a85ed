"""Sweeps in which runs fail on purpose: a loss that kills, exits or raises while a marker file is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import forking

FAULTS = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch.nn.functional as F

@dataclass(frozen=True)
class Faulty:
    how: str = "none"
    marker: str = ""
    seconds: float = 0.0
    unit: ClassVar[str] = "pair"

    def __call__(self, logps):
        time.sleep(self.seconds)
        if Path(self.marker).exists():
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            if self.how == "exit":
                sys.exit(3)
            if self.how == "hang":
                time.sleep(1000)
            if self.how == "raise":
                raise RuntimeError("on purpose")
        return F.softplus(-0.1 * logps.margin())
"""


class Sweeper:
    """Runs cdpo-train with that loss; everything lies below one folder."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.out, self.more = folder, folder / "out", more
        self.marker = folder / "marker"
        (folder / "loss").mkdir(parents=True)
        self.marker.touch()
        (folder / "faults.py").write_text(FAULTS)
        (folder / "loss" / "faulty.yaml").write_text(
            f"_target_: faults.Faulty\nhow: none\nmarker: {self.marker}\nseconds: 0.0\n"
        )

    def command(self, *overrides: str) -> list[str]:
        usual = ["loss=faulty", "allow_targets=[faults.]", "model=tabular", "dataset.prompts=4", "logger=none"]
        usual += [f"output_root={self.out}", "trainer.max_steps=3", "trainer.log_every=1"]
        given = {word.split("=")[0] for word in overrides}
        usual = [word for word in usual if given.isdisjoint((word.split("=")[0], word.split(".")[0]))]
        command = ["-m", "cdpo.train", "-m", "--config-dir", str(self.folder)]
        return [*command, *usual, *self.more, *overrides]

    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "CDPO_DEBUG": ""}

    def start(self, *overrides: str) -> forking.Program:
        return forking.Program(*self.command(*overrides), env=self.environment())

    def run(self, *overrides: str) -> tuple[int, str]:
        done = forking.run(*self.command(*overrides), env=self.environment())
        return done.returncode, done.stdout + done.stderr

    def endings(self) -> dict[str, str]:
        """How each run ended, by the `how` of its loss."""
        found = {}
        for run in json.loads((self.out / "sweep.json").read_text())["runs"]:
            how = next(word.split("=")[1] for word in run["command"].split() if word.startswith("loss.how="))
            found[how] = run["ending"]
        return found


def trajectory(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock; each step once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows]
