"""Random number generators: seeded, saved and put back, all together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch


def seed_all(seed: int) -> None:
    """Seed python, numpy, torch and all CUDA devices."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # CUDA too


def rng_state() -> dict[str, Any]:
    """The state of every generator, as a tree for `checkpoint.save`: python, numpy, torch, all CUDA devices."""
    legacy: Any = numpy.random.get_state(legacy=False)
    key = legacy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": list(cuda),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Continue the random numbers where `rng_state` left them; a CUDA device that is not here is left out."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, saved in zip(_cuda_devices(), state["cuda"]):
        torch.cuda.set_rng_state(saved, device)


def _cuda_devices() -> Iterator[int]:
    yield from range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
