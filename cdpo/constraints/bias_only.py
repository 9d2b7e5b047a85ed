"""Training only the biases."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.freeze import train_only
from cdpo.constraints.lora import LoRA
from cdpo.errors import ConfigError


@dataclass
class BiasOnly(Constraint):
    """Only bias vectors, those of norms included, are trained; everything else keeps its value exactly.

    BitFit, Ben Zaken et al. 2022 (arXiv 2106.10199). With freeze, only the biases that freeze leaves are trained.
    """

    def conflict(self, other: Constraint) -> str:
        return "LoRA freezes the biases, which bias_only trains; choose one" if isinstance(other, LoRA) else ""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The same model. ConfigError for a model without biases, such as Llama."""
        biases = {name for name, _ in model.named_parameters() if name.split(".")[-1] == "bias"}
        if not biases:
            raise ConfigError(f"bias_only: {type(model).__name__} has no bias parameters, so nothing would be trained")
        self.frozen = train_only(model, biases)
        return model

    def report(self) -> dict[str, float]:
        """`frozen`: numbers that this constraint keeps from being trained."""
        return {"binds": 1.0, "frozen": float(self.frozen)}
