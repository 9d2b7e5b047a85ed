"""What training keeps in memory, worked out from a model's shapes; and how large micro-batches may be beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from cdpo.config.read import ENOUGH, Config, Trainer
from cdpo.constraints.freeze import decoder_layers
from cdpo.errors import ConfigError, DeviceFull
from cdpo.model.change import Change
from cdpo.model.head import CHUNK
from cdpo.model.layers import check_switches, checkpoint_layers
from cdpo.system.files import read_json, write_json
from cdpo.system.ranks import Ranks

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


def lasting(policy: Any, states: int) -> int:
    """Bytes: weights; gradients and `states` more numbers for each that is trained; the copy of where it started."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    start = sum(start.numel() * start.element_size() for _, _, start in Change(policy).plain())
    return weights + (1 + states) * trained + start


def per_token(policy: Any) -> float:
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
    """Tokens of a micro-batch on a device of so many bytes: the largest power of two, up to ENOUGH and at least LEAST.

    With `autocast` the weights in 32 bits have copies in 16.
    """
    copies = sum(2 * p.numel() for p in policy.parameters() if p.dtype == torch.float32) if autocast else 0
    free = SHARE * (memory - (lasting(policy, states) + copies) / shards - 2 * CHUNK)
    each, tokens = per_token(policy), ENOUGH
    while tokens > LEAST and tokens * each > free:
        tokens //= 2
    return tokens


def sized(spec: Config, tokenizer: Any, data: Any, room: Path, device: torch.device, ranks: Ranks) -> Trainer:
    """`spec.trainer` with micro-batches for which the GPU has room; elsewhere, and where a number is set, as it is.

    The same on all ranks and, by the file `room`, after a resume.
    """
    trainer = spec.trainer
    if trainer.tokens_per_micro_batch or device.type != "cuda":
        return trainer
    known = ranks.from_first(lambda: read_json(room)["tokens"] if room.is_file() else None)
    tokens = known or min(ranks.gather(_room(spec, tokenizer, data, device, ranks.size if ranks.sharded else 1)))
    ranks.from_first(lambda: write_json(room, {"tokens": tokens}))
    log.info("micro-batches of at most %d tokens, by the GPU's memory", tokens)
    return replace(trainer, tokens_per_micro_batch=tokens)


def _room(spec: Config, tokenizer: Any, data: Any, device: torch.device, shards: int) -> int:
    """Tokens for which this GPU has room; ENOUGH, with a warning, where a model cannot be asked without weights."""
    memory = torch.cuda.get_device_properties(device).total_memory
    try:
        policy = outline(spec, tokenizer, data)
        return tokens_that_fit(policy, spec.optimizer.states, memory, shards, spec.trainer.autocast)
    except ConfigError:
        raise
    except Exception as error:  # whatever an architecture cannot do without weights, it can with them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("this model does not say what a token takes (%s): micro-batches of %d tokens", reason, ENOUGH)
        return ENOUGH


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
