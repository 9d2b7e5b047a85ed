"""What training keeps in memory, by a model's shapes; how large micro-batches may be beside it, measured on the GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cdpo.config.schema import Config
from cdpo.data.packing import Scored, by_tokens, pack
from cdpo.errors import DeviceFull
from cdpo.model.change import Change
from cdpo.model.layers import check_switches
from cdpo.model.logps import Scorer
from cdpo.system.ranks import Ranks
from cdpo.system.rng import rng_state, set_rng_state

log = logging.getLogger(__name__)

LEAST, MOST = 256, 32_768  # tokens of a micro-batch on a GPU; with more its matrix products would be no faster
SHARE = 0.7  # of the free memory; the rest for dropout, for Items that take more than the longest, and for gaps


def outline(spec: Config, tokenizer: Any, data: Any) -> Any:
    """The policy's shapes, without weights where the model can do so, with everything that wraps it.

    Raises ConfigError for a switch that the model does not support.
    """
    policy = getattr(spec.model, "skeleton", spec.model.load)(tokenizer, data)
    for constraint in spec.constraint.values():
        policy = constraint.wrap(policy)
    check_switches(policy, spec.trainer)
    return policy


def persistent_bytes(policy: Any, states: int) -> int:
    """Bytes: weights; gradients and `states` more numbers for each that is trained; the copy of where it started."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    start = sum(start.numel() * start.element_size() for _, _, start in Change(policy).plain())
    return weights + (1 + states) * trained + start


def tokens_that_fit(
    taken: Callable[[int], float], free: float, start: int = LEAST, most_tokens: int = MOST
) -> tuple[int, float]:
    """The largest micro-batch that takes its share of the free bytes: `start` tokens, doubled up to a most; its bytes.

    Twice as many are tried only where twice the bytes are free: so growth in proportion never runs out of memory.
    """
    tokens, most = start, taken(start)
    while tokens < most_tokens and 2 * most <= free and (more := taken(2 * tokens)) <= SHARE * free:
        tokens, most = 2 * tokens, more
    return tokens, most


@dataclass(frozen=True)
class Probe:
    """Real passes of a policy on a GPU, forward and backward, over the longest Items. Nothing of them stays."""

    scorer: Scorer
    scored: Scored
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ranks: Ranks = field(default_factory=Ranks)
    most: int = MOST  # tokens, beyond which none are tried: no step has more

    def tokens(self, states: int) -> int:
        """Tokens of a micro-batch for which every rank has room, beside `states` numbers for each that is trained."""
        start = self._start()
        with self._untouched():
            self.taken(start)  # from here on there are gradients, and what torch makes once
            free = min(self.ranks.all_gather(free_bytes(self.scored.device) - bytes_to_come(self.scorer, states)))
            tokens, taken = tokens_that_fit(self.taken, free, start, min(self.most, MOST))
        told = (tokens, taken / 2**30, taken / tokens / 1e3, free / 2**30)
        log.info("measured: %d tokens take %.3g GiB, %.3g kB a token, where %.3g GiB are free", *told)
        if taken > SHARE * free:
            log.warning("this GPU may be too small: a micro-batch of %d tokens takes more than its share", tokens)
        return tokens

    def taken(self, tokens: int) -> float:
        """Bytes that a pass over so many tokens takes, on the rank where it takes most; infinite if there are too few.

        Raises DeviceFull where weights are sharded, as the other ranks wait within the pass.
        """
        device = self.scored.device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            with explained(tokens):
                passed = self._pass(tokens)
            own = (torch.cuda.max_memory_allocated(device) - before) * max(1.0, tokens / passed)
        except DeviceFull:
            if self.ranks.sharded:
                raise
            log.warning("this GPU has no room for %d tokens", tokens)
            own = math.inf
        return max(self.ranks.all_gather(own))

    def _pass(self, tokens: int) -> int:
        """Go through the model; returns with how many tokens, which whole Items seldom fill."""
        sizes = [item.tokens for item in self.scored.items]
        longest = by_tokens(sizes, range(len(sizes)), tokens)[0]
        batch = pack([self.scored.items[i] for i in longest], padded=self.scored.padded).to(self.scored.device)
        with self.autocast():
            policy, _ = self.scorer(batch, statistics=True)
        policy.sum().backward()
        return sum(sizes[i] for i in longest)

    def _start(self) -> int:
        """A power of two that is no more than the longest Item, which must have room anyway."""
        longest = max(item.tokens for item in self.scored.items)
        return min(MOST, max(LEAST, 1 << longest.bit_length() - 1))

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        generators = rng_state()
        self.scorer.train()
        try:
            yield
        finally:
            self.scorer.eval().zero_grad()
            set_rng_state(generators)
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that torch may still give out: those of nobody, and those that it holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def bytes_to_come(model: nn.Module, states: int) -> int:
    """Bytes, on this rank, of `states` numbers for each that is trained and of where it started (`Change`)."""
    trained = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad]
    return (states + 1) * sum(p.numel() * p.element_size() for p in trained)


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
