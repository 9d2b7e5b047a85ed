"""Items with their reference log-probs: computed once, before training, by the model before any constraint wraps it.

The policy never runs twice per step, and the reference needs no second model in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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

    Compares numbers on two Items; an architecture is not trusted by name. `wanted` is the model's `attention`.
    """
    if wanted != "trees":
        return True, f"model.attention={wanted}"
    attention.register()
    before = getattr(model.config, "_attn_implementation", None)
    probe = _probe(items)
    with torch.no_grad():
        expected = one_by_one(model, probe)
        try:
            model.set_attn_implementation(attention.NAME)
            batch = pack(probe).to(expected.device)
            agree = (score(model, batch) - expected).abs() <= _rounding(model.dtype, batch.length)
            reason = "" if bool(agree.all()) else "its packed log-probs differ from the plain ones"
            if model.config._attn_implementation != attention.NAME:
                reason = "its attention cannot be replaced"
        except Exception as error:  # whatever an architecture makes of the layout, padded rows are right
            reason = (str(error) or type(error).__name__).splitlines()[0]
    if reason:
        model.set_attn_implementation(before or "eager")
    return bool(reason), reason


def _probe(items: Sequence[Item]) -> list[Item]:
    """The shortest Item, then the longest of those with two responses of several tokens, for these can see each other.

    The longest, because a window or chunk of attention shows only beyond its size; with at most four responses each.
    """

    def branches(item: Item) -> bool:
        return sum(len(response) > 1 for response in item.responses) > 1

    chosen = min(items, key=lambda item: item.tokens), max(items, key=lambda item: (branches(item), item.tokens))
    return [replace(item, responses=sorted(item.responses, key=len)[-4:], pairs=[], rewards=None) for item in chosen]


def _rounding(dtype: torch.dtype, length: Tensor) -> Tensor:
    """How far two ways to score the same response with the same weights may differ, in nats, at most. [S] -> [S]

    The error of one token's logit is a few roundings of a logit of size 10; those of many tokens mostly cancel. The
    norms of many architectures compute in float32 whatever the dtype is.
    """
    token = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.3)
    return token * (length.sqrt() + length / 10)


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
            metadata, reference = file.metadata() or {}, file.get_tensor("reference")
        if metadata.get("key") != key:
            log.info("%s belongs to other data; computed anew", cache.name)
        elif metadata.get("sha256") != _sha256(reference):
            log.warning("%s is damaged and computed anew: its sha256 is another", cache.name)
        else:
            return reference
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged and computed anew: %s", cache.name, error)
    return None


def _write(cache: Path, key: str, reference: Tensor) -> None:
    from safetensors.torch import save

    from cdpo.files import write_atomic

    write_atomic(cache, save({"reference": reference}, {"key": key, "sha256": _sha256(reference)}))


def _sha256(reference: Tensor) -> str:
    return hashlib.sha256(reference.numpy().tobytes()).hexdigest()


def check_start(policy: nn.Module, scored: Scored) -> float:
    """Score a few Items with the wrapped policy against the reference, before any step. Returns the largest difference.

    Raises ConfigError where policy and reference differ by more than rounding: another base model, an adapter that does
    not start at zero, a cache of other weights. All numbers of such a run would be wrong.
    """
    policy.eval()
    budget = sum(item.tokens for item in scored.items[:CHECKED])
    first = Scored(scored.items[:CHECKED], scored.padded, scored.device, scored.reference[:CHECKED])
    dtype = _least_precise(policy, scored.device)
    worst = 0.0
    for _, batch in first.batches(budget):
        with torch.no_grad():
            logps = logps_of(policy, batch)
        off = logps.log_ratio().abs()
        allowed = _rounding(dtype, logps.length)
        worst = max(worst, float(off.max()))
        if not bool((off <= allowed).all()):
            i = int((off - allowed).argmax())
            raise ConfigError(
                f"at step 0 the policy must equal the reference, but {batch.sources[int(logps.item[i])]} scores "
                f"{logps.policy[i]:.6f} instead of {logps.reference[i]:.6f} nats; was the base model changed?"
            )
    return worst


def _least_precise(policy: nn.Module, device: torch.device) -> torch.dtype:
    """Of the dtypes that the policy computes in: its parameters', and autocast's."""
    dtypes = {parameter.dtype for parameter in policy.parameters()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
