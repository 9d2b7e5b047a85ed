"""Training only a part of the parameters, chosen by name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from torch import nn

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.lora import LoRA
from cdpo.errors import ConfigError
from cdpo.model.layers import decoder_layers


def train_only(model: nn.Module, names: set[str]) -> int:
    """Freeze every parameter not in `names`; how many numbers were frozen. ConfigError if nothing is left to train."""
    frozen = [p for name, p in model.named_parameters() if name not in names and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("every parameter is frozen; nothing is left to train")
    return sum(parameter.numel() for parameter in frozen)


@dataclass
class Freeze(Constraint):
    """Parameters whose name matches a pattern, and all outside the last n decoder layers, keep their value exactly.

    Patterns are regular expressions, searched anywhere in the name. One that matches nothing is a ConfigError.
    """

    patterns: list[str] = field(default_factory=list)
    train_last_layers: int | None = None  # freezes all other layers, embeddings, final norm and head

    def __post_init__(self) -> None:
        if not self.patterns and self.train_last_layers is None:
            raise ValueError("freeze needs patterns or train_last_layers")
        if self.train_last_layers is not None and self.train_last_layers < 1:
            raise ValueError(f"train_last_layers={self.train_last_layers}; choose at least 1")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"pattern {pattern!r} is no regular expression ({error}); use .* for any text"
                ) from error

    def conflict(self, other: Constraint) -> str:
        if isinstance(other, LoRA):
            return "LoRA freezes all but its adapters; choose what it adapts with target_modules"
        return ""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The same model. ConfigError for a pattern without a match, too many layers, or nothing left to train."""
        names = {name for name, _ in model.named_parameters()}
        frozen = {name for pattern in self.patterns for name in self._matches(pattern, names)}
        if self.train_last_layers is not None:
            frozen |= names - self._last_layers(model, self.train_last_layers)
        self.frozen = train_only(model, names - frozen)
        return model

    def report(self) -> dict[str, float]:
        """`frozen`: numbers that this constraint keeps from being trained."""
        return {"binds": float(self.frozen > 0), "frozen": float(self.frozen)}

    @staticmethod
    def _matches(pattern: str, names: set[str]) -> set[str]:
        if found := {name for name in names if re.search(pattern, name)}:
            return found
        near = difflib.get_close_matches(pattern, sorted(names), n=5, cutoff=0.3) or sorted(names)[:5]
        raise ConfigError(f"pattern {pattern!r} matches no parameter; near names: {', '.join(near)}")

    @staticmethod
    def _last_layers(model: nn.Module, count: int) -> set[str]:
        layers = decoder_layers(model, "train_last_layers needs; use patterns")
        if count > len(layers):
            raise ConfigError(f"train_last_layers={count}, but the model has {len(layers)} layers")
        trained = {id(parameter) for layer in layers[-count:] for parameter in layer.parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in trained}
