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
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from cdpo.batch import Batch, Item, Logps
from cdpo.data.packing import by_tokens, pack
from cdpo.errors import ConfigError, NumericsError
from cdpo.model import attention
from cdpo.model.fingerprint import item_print, weights_print
from cdpo.model.head import distrust
from cdpo.model.logps import one_by_one, score
from cdpo.system import cache
from cdpo.system.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

KEPT = 64  # batches
CHECKED = 16  # Items that are scored again before training starts
RESCORED = 8  # Items that are scored again when numbers of another run are read


@dataclass(eq=False)
class Scored:
    """Items and, response by response, what the reference says of them."""

    items: list[Item]
    padded: bool  # layout: padded rows, for models that cannot attend over trees
    device: torch.device
    reference: list[Tensor] = field(default_factory=list)  # per Item: [K] nats, float64

    def __post_init__(self) -> None:
        # a full-batch run asks for the same batches at every step
        self.batch: Callable[[tuple[int, ...]], Batch] = lru_cache(maxsize=KEPT)(self._batch)

    def _batch(self, indices: tuple[int, ...]) -> Batch:
        reference = [self.reference[i] for i in indices] if self.reference else None
        return pack([self.items[i] for i in indices], reference, self.padded).to(self.device)

    def fingerprint(self) -> str:
        """sha256 of every Item's tokens, pairs and rewards."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([item.prompt, item.responses, item.pairs, item.rewards]).encode())
        return digest.hexdigest()

    def tasks(self, budget: int) -> list[tuple[int, ...]]:
        """All Items once, in micro-batches of at most `budget` tokens, as indices."""
        sizes = [item.tokens for item in self.items]
        return [tuple(indices) for indices in by_tokens(sizes, range(len(sizes)), budget)]

    def batches(self, budget: int) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """The same with their batches."""
        for indices in self.tasks(budget):
            yield indices, self.batch(indices)


def logps_of(model: nn.Module, batch: Batch, **context: Any) -> Logps:
    """Score a batch and put the constants beside: what a loss is given."""
    return with_constants(score(model, batch), batch, **context)


def with_constants(policy: Tensor, batch: Batch, **context: Any) -> Logps:
    """Policy log-probs [S] and everything else that a loss may read, in float64 from here on.

    `context` is the training state, progress and baseline.
    """
    names = ("reference", "length", "item", "pairs", "preference", "weight", "rewards", "fitted", "sources", "soft")
    return Logps(policy.double(), **{name: getattr(batch, name) for name in names}, **context)


def layout_for(model: Any, items: Sequence[Item], wanted: str) -> tuple[bool, str]:
    """Whether rows must be padded, and why: packed trees are used where they give the numbers of the plain forward.

    Compares numbers on two Items; an architecture is not trusted by name. `wanted` is the model's `attention`.
    Raises ConfigError for a model whose padded rows do not give those numbers either.
    """
    probe = _probe(items)
    with torch.no_grad():
        expected = one_by_one(model, probe)

    def agrees(padded: bool) -> bool:
        with torch.no_grad():
            batch = pack(probe, padded=padded).to(expected.device)
            return bool(((score(model, batch) - expected).abs() <= _rounding(model.dtype, batch.length)).all())

    if not agrees(padded=True):
        distrust(model)
        if not agrees(padded=True):
            raise ConfigError("padded rows give other log-probs than single ones: this model takes no batches")
    if wanted != "trees":
        return True, f"model.attention={wanted}"
    attention.register()
    before = getattr(model.config, "_attn_implementation", None)
    with torch.no_grad():
        try:
            model.set_attn_implementation(attention.NAME)
            reason = "" if agrees(padded=False) else "its packed log-probs differ from the plain ones"
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
    return [
        replace(item, responses=sorted(item.responses, key=len)[-4:], pairs=[], rewards=None, fitted=None)
        for item in chosen
    ]


def _rounding(dtype: torch.dtype, length: Tensor) -> Tensor:
    """How far two ways to score the same response with the same weights may differ, in nats, at most. [S] -> [S]

    The error of one token's logit is a few roundings of a logit of size 10; those of many tokens mostly cancel. The
    norms of many architectures compute in float32 whatever the dtype is.
    """
    token = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.3)
    return token * (length.sqrt() + length / 10)


def add_reference(
    model: nn.Module,
    scored: Scored,
    budget: int,
    own: Path,
    on_batch: Callable[[int], None] = lambda done: None,
    shared: Path | None = None,
    ranks: Ranks = ALONE,
) -> str:
    """Fill `scored.reference`; returns where it is from: "computed", "cache" (`shared`) or "run directory" (`own`).

    `own` is the run's file, by which it resumes; `shared` a folder for all runs of these weights and tokens. One pass,
    in eval mode, in an order that depends on the tokens only: every split of the same Items finds the same numbers, bit
    for bit, whichever run computed them. `on_batch` is told how many Items are done; it may raise to interrupt.
    The micro-batches are dealt to the ranks; only the first reads and writes files.

    Raises NumericsError, naming the rows.
    """
    prints = [item_print(item) for item in scored.items]
    order = sorted(range(len(prints)), key=prints.__getitem__)
    ordered = Scored([scored.items[i] for i in order], scored.padded, scored.device)
    key = _key(model, scored, sorted(prints), budget)
    # without the weights: on resume the step-0 check refuses other ones, which new numbers would hide
    found, reason = ranks.from_first(lambda: cache.read(own, key))
    source = "run directory"
    if reason:
        log.warning("%s: %s; not used", own, reason)
    if found is None:
        found, source = _from_elsewhere(model, ordered, budget, own, key, on_batch, shared, ranks)
    sizes = [len(item.responses) for item in ordered.items]
    parts = dict(zip(order, found.split(sizes)))
    scored.reference = [parts[i] for i in range(len(order))]
    scored.__post_init__()  # forget batches without reference
    return source


def _from_elsewhere(
    model: nn.Module, ordered: Scored, budget: int, own: Path, key: dict[str, Any],
    on_batch: Callable[[int], None], shared: Path | None, ranks: Ranks,
) -> tuple[Tensor, str]:  # fmt: skip
    """Out of the cache or computed, and written into the run directory. Shards do not show all weights: not shared."""

    def compute(tell: Callable[[int], None]) -> Tensor:
        return _one_pass(model, ordered, budget, tell, ranks)

    def fault(found: Tensor) -> str:
        return _fault(model, ordered, found)

    if shared is None or ranks.sharded:
        found, here = compute(on_batch), True
    else:
        key |= {"weights": weights_print(model)}
        if ranks.size == 1:
            found, here = cache.once(shared, key, len(ordered.items), compute, fault, on_batch)
        else:  # nobody waits for the others: who computes is many already
            there = ranks.from_first(lambda: cache.look(shared, key, fault))
            found, here = (compute(on_batch), True) if there is None else (there, False)
            ranks.from_first(lambda: cache.keep(shared, key, found) if here else None)
    ranks.from_first(lambda: cache.write(own, key, found))
    return found, "computed" if here else "cache"


def _key(model: Any, scored: Scored, prints: list[bytes], budget: int) -> dict[str, Any]:
    """All that the numbers depend on but the weights; the budget because another grouping rounds otherwise."""
    device = scored.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    return {
        "format": 1,
        "tokens": hashlib.sha256(b"".join(prints)).hexdigest(),
        "dtype": str(next(model.parameters()).dtype),
        "autocast": autocast,
        "attention": ["rows" if scored.padded else "trees", getattr(model.config, "_attn_implementation", None)],
        "device": device,
        "tokens_per_micro_batch": budget,
    }


def _one_pass(model: nn.Module, scored: Scored, budget: int, on_batch: Callable[[int], None], ranks: Ranks) -> Tensor:
    parts: list[Tensor] = [torch.empty(0)] * len(scored.items)
    done = 0
    model.eval()

    def work(indices: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return score(model, scored.batch(indices)).double().cpu()

    tasks = scored.tasks(budget)
    for indices, sums in zip(tasks, ranks.dealt(tasks, work)):
        if not bool(sums.isfinite().all()):
            batch = scored.batch(indices)
            bad = sorted({batch.sources[i] for i in batch.item.cpu()[~sums.isfinite()].tolist()})

            raise NumericsError(f"the reference gives NaN or infinite log-probs to {', '.join(bad[:5])}")
        for i, part in zip(indices, sums.split([len(scored.items[i].responses) for i in indices])):
            parts[i] = part
        done += len(indices)
        on_batch(done)
    return torch.cat([part.clone() for part in parts])


def _fault(model: nn.Module, scored: Scored, found: Tensor) -> str:
    """Score a few Items, others each time, and say where numbers that were read differ by more than rounding."""
    parts = found.split([len(item.responses) for item in scored.items])
    some = Random().sample(range(len(parts)), min(RESCORED, len(parts)))
    few = Scored([scored.items[i] for i in some], scored.padded, scored.device, [parts[i] for i in some])
    for _, logps, off, allowed in _differences(model.eval(), few):
        if not bool((off <= allowed).all()):
            i = int((off - allowed).argmax())
            return f"stale: {logps.reference[i]:.6f} nats for a response that scores {logps.policy[i]:.6f}"
    return ""


def _differences(model: nn.Module, scored: Scored) -> Iterator[tuple[Batch, Logps, Tensor, Tensor]]:
    """Batches scored again, how far each response is from its reference, and how far rounding may take it, in nats."""
    dtype = _least_precise(model, scored.device)
    for _, batch in scored.batches(sum(item.tokens for item in scored.items)):
        with torch.no_grad():
            logps = logps_of(model, batch)
        yield batch, logps, logps.log_ratio().abs(), _rounding(dtype, logps.length)


def check_start(policy: nn.Module, scored: Scored) -> float:
    """Score a few Items with the wrapped policy against the reference, before any step. Returns the largest difference.

    Raises ConfigError where policy and reference differ by more than rounding: another base model, an adapter that does
    not start at zero, a cache of other weights. All numbers of such a run would be wrong.
    """
    first = Scored(scored.items[:CHECKED], scored.padded, scored.device, scored.reference[:CHECKED])
    worst = 0.0
    for batch, logps, off, allowed in _differences(policy.eval(), first):
        worst = max(worst, float(off.max()))
        if not bool((off <= allowed).all()):
            i = int((off - allowed).argmax())
            raise ConfigError(
                f"at step 0 the policy must equal the reference, but {batch.sources[int(logps.item[i])]} scores "
                f"{logps.policy[i]:.6f} instead of {logps.reference[i]:.6f} nats; was the base model changed?"
            )
    return worst


def check_loaded(policy: nn.Module, witness: Item, before: Tensor, scored: Scored) -> None:
    """ConfigError unless the reference of one Item, computed on shards, is `before`, that of the model as loaded."""
    found = next(one for item, one in zip(scored.items, scored.reference) if item is witness)
    length = torch.tensor([len(response) for response in witness.responses])
    off = (found - before.cpu()).abs()
    if not bool((off <= _rounding(_least_precise(policy, scored.device), length)).all()):
        raise ConfigError(
            f"sharded, the policy scores {witness.source} {float(off.max()):.6f} nats off the model as it was loaded: "
            "does a constraint change the policy before the first step?"
        )


def _least_precise(policy: nn.Module, device: torch.device) -> torch.dtype:
    """Of the dtypes that the policy computes in: its parameters', and autocast's."""
    dtypes = {parameter.dtype for parameter in policy.parameters()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
