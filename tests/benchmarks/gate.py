"""cdpo's side: `cdpo-train` itself, with a constraint that restrains nothing but stands at a gate after every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import save_file
from torch import nn

from benchmarks.channel import channel, plain
from cdpo.constraints.constraint import Constraint
from cdpo.model.change import Change


@dataclass
class Gate(Constraint):
    """Waits for the parent's word before every step. The time from one gate to the next is a whole turn of the loop."""

    def __post_init__(self) -> None:
        self.channel = channel()

    def begin(self, model: nn.Module, change: Change) -> None:
        """Adapters start at random: TRL's side takes over the very same."""
        start = {plain(n): p.detach() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        save_file(start, self.channel.folder.parent / "adapters.safetensors")
        self.channel.wait()

    def before_step(self, model: nn.Module, learning_rate: float) -> None:
        self.channel.gradients(model)

    def after_step(self, model: nn.Module, metrics: Mapping[str, float]) -> None:
        self.channel.wait(loss=metrics["loss"])
