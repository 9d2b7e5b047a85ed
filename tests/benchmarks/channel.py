"""Between the benchmark and a training process: it may go on when told to, and reports after every step."""

from __future__ import annotations

import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before memory is measured
from safetensors.torch import save_file
from torch import Tensor, nn

COMPARED = 2**18  # numbers of each gradient, evenly spread


@lru_cache(maxsize=1)
def channel() -> Channel:
    """This process's only one."""
    return Channel()


class Channel:
    """The training process's end. Memory is counted from here on: everything is imported, nothing is loaded."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["BENCHMARK_FOLDER"])
        self.options = json.loads(os.environ["BENCHMARK_OPTIONS"])
        read, write = map(int, os.environ["BENCHMARK_PIPES"].split(","))
        self._commands, self._replies = os.fdopen(read), os.fdopen(write, "w", buffering=1)
        Path("/proc/self/clear_refs").write_text("5")  # a child starts with its parent's peak
        self._imports = _kilobytes("VmRSS")
        self.command = ""

    def wait(self, **reply: Any) -> None:
        """Report, then stand still until the next command. Ends the process when the parent has gone.

        It does not wait for the GPU: what a step leaves to it counts in the next, as in any training.
        """
        print(json.dumps({**reply, "memory": self._peak(), "compiled": _compiled()}), file=self._replies)
        self.command = self._commands.readline().strip()
        if not self.command:
            os._exit(0)

    def _peak(self) -> int:
        """Bytes at most, above the imports; on a GPU those of the tensors there."""
        if self.options["device"] == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * (_kilobytes("VmHWM") - self._imports)

    def gradients(self, model: nn.Module) -> None:
        """If the parent asked to check: write the gradients down, under their names in a checkpoint."""
        if self.command == "check":
            found = {plain(n): sampled(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            save_file(found, self.folder / "gradients.safetensors")


def sampled(gradient: Tensor) -> Tensor:
    """Every n-th number of a large one, scaled so that its norm stays about what it was."""
    stride = (gradient.numel() // COMPARED) | 1  # odd, so that it meets all columns
    return gradient.flatten()[::stride].float().cpu() * stride**0.5


def _compiled() -> int:
    """Graphs that torch has compiled so far in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def plain(name: str) -> str:
    """A parameter's name without what wrappers put in front."""
    return name.removeprefix("module.").removeprefix("base_model.model.")


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
