"""The log-probs of the reference: computed once, before training, by the model before any constraint wraps it.

The policy never runs twice per step, and the reference needs no second model in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from cdpo.batch import Batch, Item, Logps
from cdpo.data.packing import Scored
from cdpo.errors import ConfigError, NumericsError
from cdpo.model.layout import rounding_tolerance
from cdpo.model.logps import Scorer
from cdpo.system import cache
from cdpo.system.ranks import Ranks

log = logging.getLogger(__name__)

CHECKED = 16  # Items that are scored again before training starts
RESCORED = 8  # Items that are scored again when numbers of another run are read


@dataclass(frozen=True)
class ReferencePass:
    """One pass of the untouched model over all Items: where its numbers are looked for first, and who computes them."""

    micro_batch: int  # tokens
    own: Path  # the run's file, by which it resumes
    shared: Path | None = None  # folder for all runs of these weights and tokens; None: shared with no other run
    ranks: Ranks = field(default_factory=Ranks)  # they share the work; only the first reads and writes files
    tell: cache.Tell = lambda done: None  # hears how many Items are done, and may raise to interrupt

    def fill(self, scorer: Scorer, scored: Scored) -> str:
        """Fill `scored.reference`; returns where it is from: "computed", "cache" or "run directory".

        In eval mode, in an order that depends on the tokens only: every split of the same Items finds the same numbers,
        bit for bit, whichever run computed them. Raises NumericsError, naming the rows.
        """
        digests = [item_digest(item) for item in scored.items]
        order = sorted(range(len(digests)), key=digests.__getitem__)
        ordered = Scored([scored.items[i] for i in order], scored.padded, scored.device)
        key = self._key(scorer.model, scored, sorted(digests))
        # without the weights: on resume the step-0 check refuses other ones, which new numbers would hide
        found, reason = self.ranks.from_first(lambda: cache.read(self.own, key))
        source = "run directory"
        if reason:
            log.warning("%s: %s; not used", self.own, reason)
        if found is None:
            found, source = self._elsewhere(scorer, ordered, key)
        parts = dict(zip(order, found.split([len(item.responses) for item in ordered.items])))
        scored.reference = [parts[i] for i in range(len(order))]
        scored.__post_init__()  # forget batches without reference
        return source

    def _elsewhere(self, scorer: Scorer, ordered: Scored, key: dict[str, Any]) -> tuple[Tensor, str]:
        """Out of the shared folder, or computed; and written into the run directory."""
        if self.shared is None or self.ranks.sharded:  # a shard does not show all weights: nothing to know them by
            found, source = self._computed(scorer, ordered, self.tell), "computed"
        else:
            key |= {"weights": weights_digest(scorer.model)}
            found, source = self._shared(scorer, ordered, cache.Entry(self.shared, key))
        self.ranks.from_first(lambda: cache.write(self.own, key, found))
        return found, source

    def _shared(self, scorer: Scorer, ordered: Scored, entry: cache.Entry) -> tuple[Tensor, str]:
        """Out of the shared folder, if another run has left the numbers or is about to; else left there for others."""

        def fault(numbers: Tensor) -> str:
            return _fault(scorer, ordered, numbers)

        if self.ranks.size > 1:  # nobody waits for another run: who computes is many already
            known = self.ranks.from_first(lambda: entry.read(fault))
            if known is not None:
                return known, "cache"
            found = self._computed(scorer, ordered, self.tell)
            if self.ranks.first:
                entry.keep(found)
            return found, "computed"
        with entry.claimed(self.tell, fault) as known:
            if known is not None:
                return known, "cache"
            return entry.keep(self._computed(scorer, ordered, entry.telling(self.tell, len(ordered.items)))), "computed"

    def _key(self, model: Any, scored: Scored, digests: list[bytes]) -> dict[str, Any]:
        """All that the numbers depend on but the weights; micro-batches too, as another grouping rounds otherwise."""
        device = scored.device.type
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        return {
            "format": 1,
            "tokens": hashlib.sha256(b"".join(digests)).hexdigest(),
            "dtype": str(next(model.parameters()).dtype),
            "autocast": autocast,
            "attention": ["rows" if scored.padded else "trees", getattr(model.config, "_attn_implementation", None)],
            "device": device,
            "tokens_per_micro_batch": self.micro_batch,
        }

    def _computed(self, scorer: Scorer, scored: Scored, tell: cache.Tell) -> Tensor:
        """Log-probs of all responses, Item after Item. [responses], nats"""
        return torch.cat(log_probs(scorer, scored, self.micro_batch, self.ranks, tell))


def log_probs(scorer: Scorer, scored: Scored, micro_batch: int, ranks: Ranks, tell: cache.Tell) -> list[Tensor]:
    """Of the responses of every Item, in eval mode, in micro-batches of so many tokens. [K] each, nats, on the CPU

    Raises NumericsError, naming the rows.
    """
    parts: list[Tensor] = [torch.empty(0)] * len(scored.items)
    done = 0
    scorer.eval()

    def work(indices: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return scorer(scored.batch(indices))[0].cpu()

    portions = scored.portions(micro_batch)
    for indices, sums in zip(portions, ranks.mapped(portions, work)):
        _check_finite(sums, scored.batch(indices))
        for i, part in zip(indices, sums.split([len(scored.items[i].responses) for i in indices])):
            parts[i] = part.clone()
        done += len(indices)
        tell(done)
    return parts


def _check_finite(sums: Tensor, batch: Batch) -> None:
    if not bool(sums.isfinite().all()):
        bad = sorted({batch.sources[i] for i in batch.item.cpu()[~sums.isfinite()].tolist()})
        raise NumericsError(f"the reference gives NaN or infinite log-probs to {', '.join(bad[:5])}")


def _fault(scorer: Scorer, scored: Scored, found: Tensor) -> str:
    """Score a few Items, others each time, and say where numbers that were read differ by more than rounding."""
    parts = found.split([len(item.responses) for item in scored.items])
    some = Random().sample(range(len(parts)), min(RESCORED, len(parts)))
    few = Scored([scored.items[i] for i in some], scored.padded, scored.device, [parts[i] for i in some])
    for _, logps, off, allowed in _differences(scorer.eval(), few):
        if not bool((off <= allowed).all()):
            i = int((off - allowed).argmax())
            return f"stale: {logps.reference[i]:.6f} nats for a response that scores {logps.policy[i]:.6f}"
    return ""


def _differences(scorer: Scorer, scored: Scored) -> Iterator[tuple[Batch, Logps, Tensor, Tensor]]:
    """Batches scored again, how far each response is from its reference, and how far rounding may take it, in nats."""
    dtype = _least_precise(scorer, scored.device)
    for _, batch in scored.batches(sum(item.tokens for item in scored.items)):
        with torch.no_grad():
            logps = batch.logps(scorer(batch)[0])
        yield batch, logps, logps.log_ratio().abs(), rounding_tolerance(dtype, logps.length)


def check_start(scorer: Scorer, scored: Scored) -> float:
    """Score a few Items with the wrapped policy against the reference, before any step. Returns the largest difference.

    Raises ConfigError where policy and reference differ by more than rounding: another base model, an adapter that does
    not start at zero, a cache of other weights. All numbers of such a run would be wrong.
    """
    some = scored.known()[:CHECKED]
    first = Scored([scored.items[i] for i in some], scored.padded, scored.device, [scored.reference[i] for i in some])
    worst = 0.0
    for batch, logps, off, allowed in _differences(scorer.eval(), first):
        worst = max(worst, float(off.max()))
        if not bool((off <= allowed).all()):
            i = int((off - allowed).argmax())
            raise ConfigError(
                f"at step 0 the policy must equal the reference, but {batch.sources[int(logps.item[i])]} scores "
                f"{logps.policy[i]:.6f} instead of {logps.reference[i]:.6f} nats; was the base model changed?"
            )
    return worst


def check_loaded(scorer: Scorer, witness: Item, before: Tensor, scored: Scored) -> None:
    """ConfigError unless the reference of one Item, computed on shards, is `before`, that of the model as loaded."""
    found = next(one for item, one in zip(scored.items, scored.reference) if item is witness and one is not None)
    length = torch.tensor([len(response) for response in witness.responses])
    off = (found - before.cpu()).abs()
    if not bool((off <= rounding_tolerance(_least_precise(scorer, scored.device), length)).all()):
        raise ConfigError(
            f"sharded, the policy scores {witness.source} {float(off.max()):.6f} nats off the model as it was loaded: "
            "does a constraint change the policy before the first step?"
        )


def _least_precise(scorer: Scorer, device: torch.device) -> torch.dtype:
    """Of the dtypes that the model computes in: its parameters', and autocast's."""
    dtypes = {parameter.dtype for parameter in scorer.parameters()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


# ---------------------------------------------------------------------------------- what tells tokens and weights apart


def item_digest(item: Item) -> bytes:
    """sha256 of what a model is shown of an Item: its token ids, after any truncation."""
    return hashlib.sha256(json.dumps([item.prompt, item.responses]).encode()).digest()


def weights_digest(model: Any) -> str:
    """sha256 of a model's class, config, parameters and buffers; not of where it was loaded from."""
    passing = ("name_or_path", "transformers_version")
    config = {k: v for k, v in model.config.to_dict().items() if k not in passing and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashlib lets other threads go on
        for part in pool.map(_tensor_digest, [*model.named_parameters(), *model.named_buffers()]):
            digest.update(part)
    return digest.hexdigest()


def _tensor_digest(named: tuple[str, Any]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
