"""What training keeps in memory, worked out from a model's shapes; and how large micro-batches may be beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from cdpo.config.schema import MICRO_BATCH, Config
from cdpo.errors import ConfigError, DeviceFull
from cdpo.model.change import Change
from cdpo.model.head import CHUNK
from cdpo.model.layers import check_switches, checkpoint_layers, decoder_layers

log = logging.getLogger(__name__)

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
    if spec.trainer.gradient_checkpointing:
        checkpoint_layers(policy)
    return policy


def persistent_bytes(policy: Any, states: int) -> int:
    """Bytes: weights; gradients and `states` more numbers for each that is trained; the copy of where it started."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    start = sum(start.numel() * start.element_size() for _, _, start in Change(policy).plain())
    return weights + (1 + states) * trained + start


def bytes_per_token(policy: Any) -> float:
    """Bytes that a forward pass keeps of each token for the backward pass, all but the head's logits.

    Measured, not looked up: `policy` may be a skeleton without weights, and adapters count as they do. Where layers are
    checkpointed, what one of them keeps comes on top: the backward pass computes it again.
    """
    kept = _kept(policy)
    if not getattr(policy, "is_gradient_checkpointing", False):
        return kept
    policy.gradient_checkpointing_disable()
    again = _kept(policy) / len(decoder_layers(policy))
    checkpoint_layers(policy)
    return kept + again


def _kept(policy: Any) -> float:
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


def tokens_that_fit(policy: Any, states: int, memory: int, shards: int = 1, autocast: bool = False) -> int:
    """Tokens of a micro-batch on a device of so many bytes: a power of two, up to MICRO_BATCH and at least LEAST.

    With `autocast` the weights in 32 bits have copies in 16.
    """
    copies = sum(2 * p.numel() for p in policy.parameters() if p.dtype == torch.float32) if autocast else 0
    free = SHARE * (memory - (persistent_bytes(policy, states) + copies) / shards - 2 * CHUNK)
    each, tokens = bytes_per_token(policy), MICRO_BATCH
    while tokens > LEAST and tokens * each > free:
        tokens //= 2
    return tokens


def room(spec: Config, outlined: Callable[[], Any], device: torch.device, shards: int) -> int:
    """Tokens of a micro-batch for which a GPU has room, beside the policy whose shapes `outlined` makes.

    MICRO_BATCH, with a warning, where a model cannot be asked without weights. Raises ConfigError as `outline` does.
    """
    memory = torch.cuda.get_device_properties(device).total_memory
    try:
        return tokens_that_fit(outlined(), spec.optimizer.states, memory, shards, spec.trainer.autocast)
    except ConfigError:
        raise
    except Exception as error:  # whatever an architecture cannot do without weights, it can with them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("this model does not say what a token takes (%s): micro-batches of %d tokens", reason, MICRO_BATCH)
        return MICRO_BATCH


@contextmanager
def explained(tokens: int) -> Iterator[None]:
    """Turns torch's OutOfMemoryError into a DeviceFull that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceFull(
            f"the device's memory is full, with micro-batches of {tokens} tokens: lower "
            "trainer.tokens_per_micro_batch, set trainer.gradient_checkpointing=true, train a LoRA, or share the "
            f"weights among ranks (trainer.distributed=fsdp). {str(error).partition(chr(10))[0]}"
        ) from error
