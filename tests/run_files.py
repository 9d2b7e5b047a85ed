"""What a run leaves in its directory and in the cache, read back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

TIMES = {"tokens_per_second", "pairs_per_second"}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(folder / "model" / name for name in names if (folder / "model" / name).exists()))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def key_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["key"])
