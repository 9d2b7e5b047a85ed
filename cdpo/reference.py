"""Items with their reference log-probs: computed once, before training, by the model before any constraint wraps it.

The policy never runs twice per step, and the reference needs no second model in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdpo import attention
from cdpo.batch import Batch, Item, Logps
from cdpo.errors import ConfigError, NumericsError
from cdpo.logps import one_by_one, score
from cdpo.packing import by_tokens, pack

log = logging.getLogger(__name__)

CHECKED = 16  # Items that are scored again before training starts


@dataclass(eq=False)
class Scored:
    """Items and, response by response, what the reference says of them."""

    items: list[Item]
    padded: bool  # layout: padded rows, for models that cannot attend over trees
    device: torch.device
    reference: list[Tensor] = field(default_factory=list)  # per Item: [K] nats, float64

    def __post_init__(self) -> None:
        # a full-batch run asks for the same batches at every step
        self.batch: Callable[[tuple[int, ...]], Batch] = lru_cache(maxsize=64)(self._batch)

    def _batch(self, indices: tuple[int, ...]) -> Batch:
        reference = [self.reference[i] for i in indices] if self.reference else None
        return pack([self.items[i] for i in indices], reference, self.padded).to(self.device)

    def fingerprint(self) -> str:
        """sha256 of every Item's tokens, pairs and rewards."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([item.prompt, item.responses, item.pairs, item.rewards]).encode())
        return digest.hexdigest()

    def batches(self, budget: int) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """All Items once, in micro-batches of at most `budget` tokens, with their indices."""
        sizes = [item.tokens for item in self.items]
        for indices in by_tokens(sizes, range(len(sizes)), budget):
            yield tuple(indices), self.batch(tuple(indices))


def logps_of(model: nn.Module, batch: Batch, progress: float = 0.0, baseline: float = 0.0) -> Logps:
    """Score a batch and put the constants beside: what a loss is given."""
    return with_constants(score(model, batch), batch, progress, baseline)


def with_constants(policy: Tensor, batch: Batch, progress: float = 0.0, baseline: float = 0.0) -> Logps:
    """Policy log-probs [S] and everything else that a loss may read, in float64 from here on."""
    names = ("reference", "length", "item", "pairs", "preference", "weight", "rewards", "sources")
    return Logps(
        policy.double(), **{name: getattr(batch, name) for name in names}, progress=progress, baseline=baseline
    )


def layout_for(model: Any, items: Sequence[Item], wanted: str) -> tuple[bool, str]:
    """Whether rows must be padded, and why: packed trees are used where they give the numbers of the plain forward.

    Compares numbers on one Item; an architecture is not trusted by name. `wanted` is the model's `attention`.
    """
    if wanted != "trees":
        return True, f"model.attention={wanted}"
    attention.register()
    before = getattr(model.config, "_attn_implementation", None)
    item = min(items, key=lambda item: item.tokens)
    with torch.no_grad():
        expected = one_by_one(model, [item])
        try:
            model.set_attn_implementation(attention.NAME)
            found = score(model, pack([item, item]).to(expected.device))[: len(expected)]
            reason = "" if _agree(found, expected, model.dtype, item) else "its packed log-probs differ"
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
    if reason:
        model.set_attn_implementation(before or "eager")
    return bool(reason), reason


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype, item: Item) -> bool:
    length = torch.tensor([len(response) for response in item.responses], device=found.device)
    tolerance = max(1e-5, 4 * torch.finfo(dtype).eps) * (1 + length)  # nats; rounding grows with the tokens
    return bool(((found - expected).abs() <= tolerance).all())


def add_reference(
    model: nn.Module, scored: Scored, budget: int, cache: Path, on_batch: Callable[[int], None] = lambda done: None
) -> None:
    """Fill `scored.reference` from `cache` if it is of these Items, else by one pass, in eval mode, and write it there.

    `on_batch` is told how many Items are done; it may raise to interrupt. Raises NumericsError, naming the rows.
    """
    # all that the numbers depend on but the weights, which the step-0 check looks after
    key = f"{scored.fingerprint()} {next(model.parameters()).dtype} {'rows' if scored.padded else 'trees'}"
    found = _read(cache, key)
    if found is None:
        found = _one_pass(model, scored, budget, on_batch)
        _write(cache, key, found)
    sizes = [len(item.responses) for item in scored.items]
    scored.reference = list(found.split(sizes))
    scored.__post_init__()  # forget batches without reference


def _one_pass(model: nn.Module, scored: Scored, budget: int, on_batch: Callable[[int], None]) -> Tensor:
    parts: list[Tensor] = [torch.empty(0)] * len(scored.items)
    done = 0
    model.eval()
    for indices, batch in scored.batches(budget):
        with torch.inference_mode():
            sums = score(model, batch).double().cpu().clone()
        bad = sorted({batch.sources[i] for i in batch.item[~sums.isfinite().to(batch.item.device)].tolist()})
        if bad:
            raise NumericsError(f"the reference gives NaN or infinite log-probs to {', '.join(bad[:5])}")
        for i, part in zip(indices, sums.split([len(scored.items[i].responses) for i in indices])):
            parts[i] = part
        done += len(indices)
        on_batch(done)
    return torch.cat([part.clone() for part in parts])


def _read(cache: Path, key: str) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    if not cache.is_file():
        return None
    try:
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("reference")
        log.info("%s belongs to other data; computed anew", cache.name)
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged and computed anew: %s", cache.name, error)
    return None


def _write(cache: Path, key: str, reference: Tensor) -> None:
    from safetensors.torch import save

    from cdpo.files import write_atomic

    write_atomic(cache, save({"reference": reference}, {"key": key}))


def check_start(policy: nn.Module, scored: Scored) -> float:
    """Score a few Items with the wrapped policy against the reference, before any step. Returns the largest difference.

    Raises ConfigError where policy and reference differ by more than rounding: another base model, an adapter that does
    not start at zero, a cache of other weights. All numbers of such a run would be wrong.
    """
    policy.eval()
    budget = sum(item.tokens for item in scored.items[:CHECKED])
    first = Scored(scored.items[:CHECKED], scored.padded, scored.device, scored.reference[:CHECKED])
    worst = 0.0
    for _, batch in first.batches(budget):
        with torch.no_grad():
            logps = logps_of(policy, batch)
        off = logps.log_ratio().abs()
        eps = torch.finfo(next(policy.parameters()).dtype).eps
        allowed = max(1e-9, 64 * eps) * (1 + logps.reference.abs()) + 4 * eps * logps.length
        worst = max(worst, float(off.max()))
        if not bool((off <= allowed).all()):
            i = int((off - allowed).argmax())
            raise ConfigError(
                f"at step 0 the policy must equal the reference, but {batch.sources[int(logps.item[i])]} scores "
                f"{logps.policy[i]:.6f} instead of {logps.reference[i]:.6f} nats; was the base model changed?"
            )
    return worst
