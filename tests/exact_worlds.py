"""Worlds of other shapes than the shipped ones, and runs of optimizer=exact on them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from composing import composed, train

from cdpo.training import solve

EXACT = ("model=tabular", "logger=none", "optimizer=exact")
SIZES = {"ragged": [4, 3, 5], "wide": [3, 7], "tall": [3, 2, 3, 4, 3, 2]}  # responses per prompt


def world(name: str, folder: Path) -> Path:
    """A world file; prompts share their first responses, so that the low rank of a change means something."""
    sizes, random = SIZES[name], np.random.default_rng(sorted(SIZES).index(name))
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps(
            {
                "prompts": [f"question {x} " for x in range(len(sizes))],
                "responses": [[f"answer {chr(97 + k)}" for k in range(size)] for size in sizes],
                "rewards": [random.normal(0, 1.2, size).tolist() for size in sizes],
                "reference_logits": [random.normal(0, 0.8, size).tolist() for size in sizes],
            }
        )
    )
    return path


def solved(path: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """The summary of a run of optimizer=exact on a world file."""
    return train(composed(*EXACT, f"dataset.path={path}", *overrides), folder)


def limited(kind: str, size: float) -> list[str]:
    """Overrides for the constraints of `independent_gap.optimum`."""
    return {
        "none": ["constraint=none"],
        "ball": ["constraint=l2_ball", f"constraint.l2_ball.radius={size}"],
        "box": ["constraint=linf_ball", f"constraint.linf_ball.radius={size}"],
        "kl": ["constraint=kl_budget", f"constraint.kl_budget.budget={size}"],
        "penalty": ["constraint=l2_to_start", f"constraint.l2_to_start.strength={size}"],
        "rank": [f"constraint=lora_r{int(size)}"],
    }[kind]


def problem(folder: Path, *overrides: str) -> tuple[Any, ...]:
    """What `cdpo.exact.search.search` is asked by a run of optimizer=exact: table, loss, setting, effort, starts."""
    asked: list[tuple[Any, ...]] = []

    def stop(*question: Any) -> None:
        asked.append(question)
        raise InterruptedError

    with patch.object(solve, "search", stop), suppress(InterruptedError):
        train(composed(*EXACT, *overrides), folder)
    return asked[0]
