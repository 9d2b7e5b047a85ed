"""What training keeps in memory, worked out from a model's shapes; and how large micro-batches may be beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from cdpo.change import Change
from cdpo.config import ENOUGH, Config
from cdpo.errors import ConfigError
from cdpo.head import CHUNK
from cdpo.switches import check_switches, switched

LEAST = 256  # tokens of a micro-batch
SHARE = 0.7  # of the memory that is free beside what lasts; the rest for what backward passes make and give back
PROBE = 16  # tokens of the forward pass that is measured: few, as a skeleton attends the long way, with all weights


def outline(spec: Config, tokenizer: Any, data: Any) -> Any:
    """The policy's shapes, without weights where the model can do so, with everything that wraps it.

    Raises ConfigError for a switch that the model does not support.
    """
    policy = getattr(spec.model, "skeleton", spec.model.load)(tokenizer, data)
    for constraint in spec.constraint.values():
        policy = constraint.wrap(policy)
    check_switches(policy, spec.trainer)
    return switched(policy, replace(spec.trainer, compile=False))


def lasting(policy: Any, states: int) -> int:
    """Bytes: weights; gradients and `states` more numbers for each that is trained; the copy of where it started."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    start = sum(start.numel() * start.element_size() for _, _, start in Change(policy).plain())
    return weights + (1 + states) * trained + start


def per_token(policy: Any) -> float:
    """Bytes that a forward pass keeps of each token for the backward pass, all but the head's logits.

    Measured, not looked up: `policy` may be a skeleton without weights, and adapters or checkpointing count as they do.
    """
    lasts = {StorageWeakRef(p.untyped_storage()) for p in (*policy.parameters(), *policy.buffers())}
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := StorageWeakRef(tensor.untyped_storage())) not in lasts:
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(1, PROBE, dtype=torch.long, device=next(policy.parameters()).device)
    mask = ids.new_ones(1, 1, PROBE, PROBE, dtype=torch.bool)  # given, as a skeleton cannot look for one
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = policy(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    del output
    return sum(kept.values()) / PROBE


def tokens_that_fit(policy: Any, states: int, memory: int, shards: int = 1) -> int:
    """Tokens of a micro-batch on a device of so many bytes: the largest power of two, up to ENOUGH and at least LEAST.

    Depends on shapes and sizes only, so a run that resumes on the same kind of device finds the same.
    """
    free = SHARE * (memory - lasting(policy, states) / shards - 2 * CHUNK)
    tokens = ENOUGH
    while tokens > LEAST and tokens * per_token(policy) > free:
        tokens //= 2
    return tokens


@contextmanager
def explained(tokens: int) -> Iterator[None]:
    """Turns a full device into a ConfigError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device's memory is full, with micro-batches of {tokens} tokens: lower "
            "trainer.tokens_per_micro_batch, set trainer.gradient_checkpointing=true, train a LoRA, or share the "
            f"weights among ranks (trainer.distributed=fsdp). {str(error).splitlines()[0]}"
        ) from error
