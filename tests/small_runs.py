"""Settings of small runs on generated data and on a file, and a signal that comes after a given step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdpo.training import loop

SMALL = ["logger=none", "model.hidden_size=16", "model.heads=2", "trainer.eval_every=4", "dataset.prompts=5",
         "dataset.alphabet=4", "trainer.batch_size=2", "trainer.max_steps=8", "trainer.checkpoint_every=3"]  # fmt: skip
OWN = [s for s in SMALL if "dataset." not in s]


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop see a signal once it has done `step` steps."""
    real = loop.take_step

    def stepping(run):
        real(run)
        if run.state.step == step:
            run.session.signals.request("SIGTERM")

    monkeypatch.setattr(loop, "take_step", stepping)


def jsonl(path: Path, count: int, chosen: str = "yes") -> Path:
    rows = [{"prompt": f"question {i}", "chosen": f"{chosen} {i}", "rejected": "no"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
