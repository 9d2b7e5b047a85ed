"""The least that a step can cost: its matrix products, at the speed of a large one on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.cases import Case
from cdpo.batch import Item

STATED = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # of the SXM boards; what MFU is counted against


def flops(case: Case, items: Sequence[Item]) -> float:
    """Operations of the matrix products of one step on `items`, forward and backward.

    Every prompt once, logits at response tokens only, the reference known. Frozen matrices have no weight gradient;
    adapters count as nothing.
    """
    width, inner = case.width, 8 * case.width // 3 // 8 * 8
    decoder = case.layers * (4 * width**2 + 3 * width * inner)
    tokens = sum(item.tokens for item in items)
    predicted = sum(1 + sum(len(response) - 1 for response in item.responses) for item in items)
    times = 2 if case.lora else 3  # forward and one or two products backward
    matrices = 2 * times * (tokens * decoder + predicted * width * case.vocabulary)
    return matrices + 3 * 4 * width * case.layers * sum(map(_seen, items))


def _seen(item: Item) -> int:
    """How many (query, key) there are: a token sees its prompt and its own branch."""
    n = len(item.prompt)
    branches = [len(response) - 1 for response in item.responses]
    return n * (n + 1) // 2 + sum(m * n + m * (m + 1) // 2 for m in branches)


def peak(gpu: str) -> float | None:
    """Operations per second in bfloat16, dense, that the maker states for a GPU of this name; None if unknown here."""
    return next((value for name, value in STATED.items() if name in gpu), None)


def speed(device: str) -> float:
    """Operations per second of a square matrix product, the best of five: float32 on the CPU, bfloat16 on a GPU."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def utilisation(operations: list[float], seconds: list[float], peak: float) -> float:
    """MFU: the share of the stated peak at which the operations were done that a step needs at least."""
    return statistics.median(o / s for o, s in zip(operations, seconds)) / peak
