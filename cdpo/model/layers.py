"""The decoder layers of a model; trainer.gradient_checkpointing and trainer.compile, which act on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cdpo.config.schema import Trainer
from cdpo.errors import ConfigError
from cdpo.model.attention import register_for_compiled_layers


def decoder_layers(model: nn.Module, wanted: str = "this setting needs") -> nn.ModuleList:
    """The stack of decoder layers. ConfigError if the model has none, with what `wanted` them and what to change."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ConfigError(f"this model has no decoder layers, which {wanted}")
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def check_switches(policy: Any, trainer: Trainer) -> None:
    """ConfigError for what a model does not support."""
    if trainer.gradient_checkpointing and not getattr(policy, "supports_gradient_checkpointing", False):
        raise ConfigError("trainer.gradient_checkpointing: this model does not support it; set it to false")
    if trainer.compile:
        decoder_layers(policy, "trainer.compile needs; set it to false")


def checkpoint_layers(policy: Any) -> None:
    """Let each layer keep its input only, from which the backward pass computes the rest again."""
    policy.gradient_checkpointing_enable({"use_reentrant": False})


def switch(policy: Any, trainer: Trainer) -> None:
    """Turn on what saves memory or time. Raises ConfigError as `check_switches` does."""
    check_switches(policy, trainer)
    if trainer.gradient_checkpointing:
        checkpoint_layers(policy)
    if trainer.compile:  # layer by layer: one compilation serves all, and the head keeps to its slices
        register_for_compiled_layers()
        for layer in decoder_layers(policy):
            layer.compile(dynamic=True)


@contextmanager
def uncompiled(policy: Any) -> Iterator[None]:
    """Within the block layers run as they are: sampling would compile them anew for each length of its cache."""
    compiled = {module: module._compiled_call_impl for module in policy.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
