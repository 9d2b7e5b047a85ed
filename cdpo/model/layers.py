"""The decoder layers of a model; trainer.gradient_checkpointing and trainer.compile, which act on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from cdpo.config.schema import Trainer
from cdpo.errors import ConfigError
from cdpo.model.attention import register_for_compiled_layers
from cdpo.system.threads import start_compile_workers


def stacks_of(model: nn.Module) -> list[nn.ModuleList]:
    """Every list of modules in the model; its decoder layers are the largest."""
    return [module for module in model.modules() if isinstance(module, nn.ModuleList)]


def decoder_layers(model: nn.Module, wanted: str = "this setting needs") -> nn.ModuleList:
    """The stack of decoder layers. ConfigError if the model has none, with what `wanted` them and what to change."""
    stacks = stacks_of(model)
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
    if trainer.autocast and trainer.distributed != "fsdp":
        round_frozen(policy)
    if trainer.compile:  # layer by layer: one compilation serves all, and the head keeps to its slices
        start_compile_workers()
        register_for_compiled_layers()
        for layer in decoder_layers(policy):
            layer.compile(dynamic=True)


def round_frozen(policy: Any) -> None:
    """Keep in bfloat16 what autocast would turn into it in every pass: the frozen matrices under adapters.

    No number changes. Not where they are wanted in full: in float64, which autocast leaves alone, shared with an
    embedding, normed by DoRA, or saved with the adapter, as a base that nobody else has.
    """
    adapters = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    base = policy.get_base_model() if adapters else None
    if base is None or not base.config.name_or_path or any(layer.lora_magnitude_vector for layer in adapters):
        return
    for layer in adapters:  # whose input is not cast to the factors' float32 before bfloat16; dropout would see it
        dropped = any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        layer.cast_input_dtype_enabled = dropped
    embedding = base.get_input_embeddings().weight
    for module in policy.modules():
        own = [*module.parameters(recurse=False)] if isinstance(module, (nn.Linear, Conv1D)) else []
        if own and all(p.dtype == torch.float32 and not p.requires_grad and p is not embedding for p in own):
            module.to(torch.bfloat16)


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
