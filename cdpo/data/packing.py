"""Items to Batches, and the order in which training sees them.

A plan depends on the seed and the step only, so a resume replays nothing. Nothing here knows of models or losses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cdpo.batch import Batch, Item

KEPT = 64  # batches that are kept for the next time they are asked for


def pack(items: Sequence[Item], reference: Sequence[Tensor] | None = None, padded: bool = False) -> Batch:
    """One batch of these Items, as packed trees (default) or as padded rows; `reference` holds [K] nats per Item.

    Without `reference` it is zero, which is what the pass that computes the reference itself wants.
    """
    tokens = _padded_rows(items) if padded else _packed_trees(items)
    sizes = [len(item.responses) for item in items]
    first = [sum(sizes[:i]) for i in range(len(sizes))]  # index of each Item's first response
    known = torch.cat(list(reference)) if reference is not None else torch.zeros(sum(sizes), dtype=torch.float64)
    pairs = [(f + p.winner, f + p.loser, p.preference, p.weight) for f, item in zip(first, items) for p in item.pairs]
    responses = [response for item in items for response in item.responses]
    real = torch.float64  # kept exact here; scores and losses choose their own precision
    return Batch(
        **tokens,
        target=torch.tensor([token for response in responses for token in response]),
        length=torch.tensor([len(response) for response in responses]),
        reference=known,
        item=torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)]),
        rewards=_column([item.rewards for item in items]),
        fitted_rewards=_column([item.fitted_rewards for item in items]),
        base=_base(items, known),
        pairs=torch.tensor([p[:2] for p in pairs], dtype=torch.long).reshape(-1, 2),
        preference=torch.tensor([p[2] for p in pairs], dtype=real),
        weight=torch.tensor([p[3] for p in pairs], dtype=real),
        soft=any(p[2] != 1 for p in pairs),
        sources=tuple(item.source for item in items),
    )


def _column(values: list[list[float] | None]) -> Tensor | None:
    """Numbers of all responses, response after response; None if no Item has them."""
    known = [value for value in values if value is not None]
    assert len(known) in (0, len(values)), "some Items of a batch have rewards and some have none"
    return torch.tensor([x for value in known for x in value], dtype=torch.float64) if known else None


def _base(items: Sequence[Item], reference: Tensor) -> Tensor | None:
    """`Logps.base` of all responses: the reference's own, or 1/K. [S] -> [S]; None if no Item has one."""
    kinds = {item.base for item in items}
    assert len(kinds) == 1, f"the Items of a batch have several bases: {kinds}"
    if kinds == {None}:
        return None
    return reference if kinds == {"enumerated"} else torch.zeros_like(reference)


def _packed_trees(items: Sequence[Item]) -> dict[str, Tensor]:
    """All trees in one row. The last token of a response is not encoded: nothing is predicted from it."""
    ids: list[int] = []
    positions: list[int] = []
    tree: list[int] = []
    branch: list[int] = []
    at: list[int] = []  # for every response token, the flat position that predicts it
    for t, item in enumerate(items):
        n = len(item.prompt)
        last = len(ids) + n - 1  # the prompt's last token predicts the first token of every response
        ids += item.prompt
        positions += range(n)
        branch += [0] * n
        for k, response in enumerate(item.responses):
            at += [last, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response[:-1]
            positions += range(n, n + len(response) - 1)
            branch += [k + 1] * (len(response) - 1)
        tree += [t] * item.tokens
    predict_at, position = torch.unique(torch.tensor(at), return_inverse=True)
    rows = {"input_ids": ids, "position_ids": positions, "tree": tree, "branch": branch}
    tokens = {name: torch.tensor(values)[None] for name, values in rows.items()}
    return tokens | {"predict_at": predict_at, "position": position}


def _padded_rows(items: Sequence[Item]) -> dict[str, Tensor]:
    """One right-padded row per response, for architectures whose attention we cannot replace."""
    rows = [(t, k, item.prompt, r) for t, item in enumerate(items) for k, r in enumerate(item.responses)]
    width = max(len(prompt) + len(r) - 1 for _, _, prompt, r in rows)
    ids, mask, tree, branch = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(4))
    at: list[int] = []
    for i, (t, k, prompt, response) in enumerate(rows):
        n, end = len(prompt), len(prompt) + len(response) - 1
        ids[i, :end] = torch.tensor(prompt + response[:-1])
        mask[i, :end], tree[i], branch[i, n:] = 1, t, k + 1
        at += range(i * width + n - 1, i * width + end)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(width).expand(len(rows), width),
        "tree": tree,
        "branch": branch,
        "predict_at": torch.tensor(at),
        "position": torch.arange(len(at)),
        "attention_mask": mask,
    }


@dataclass(eq=False)
class Scored:
    """Items, as batches on a device, with the log-probs of the reference once these are known."""

    items: list[Item]
    padded: bool  # layout: padded rows, for models that cannot attend over trees
    device: torch.device
    reference: Sequence[Tensor | None] = ()  # per Item: [K] nats, float64; None where nobody has asked for it

    def __post_init__(self) -> None:
        # a run on the full batch asks for the same batches at every step
        self.batch: Callable[[tuple[int, ...]], Batch] = lru_cache(maxsize=KEPT)(self._batch)

    def _batch(self, indices: tuple[int, ...]) -> Batch:
        reference = [self._known(i) for i in indices] if self.reference else None
        return pack([self.items[i] for i in indices], reference, self.padded).to(self.device)

    def _known(self, i: int) -> Tensor:
        found = self.reference[i]
        assert found is not None, f"{self.items[i].source}: its reference was not asked for"
        return found

    def known(self) -> list[int]:
        """The Items whose reference is known, as indices."""
        return [i for i, found in enumerate(self.reference) if found is not None]

    def fingerprint(self) -> str:
        """sha256 of every Item's tokens, pairs, rewards and base."""
        digest = hashlib.sha256()
        for item in self.items:
            known = [item.prompt, item.responses, item.pairs, item.rewards, item.base]
            digest.update(json.dumps(known).encode())
        return digest.hexdigest()

    def portions(self, budget: int) -> list[tuple[int, ...]]:
        """All Items once, as indices, in micro-batches of at most `budget` tokens."""
        sizes = [item.tokens for item in self.items]
        return [tuple(indices) for indices in by_tokens(sizes, range(len(sizes)), budget)]

    def batches(self, budget: int) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """The same with their batches."""
        for indices in self.portions(budget):
            yield indices, self.batch(indices)


def by_tokens(sizes: Sequence[int] | Mapping[int, int], indices: Sequence[int], budget: int) -> list[list[int]]:
    """Split `indices` into micro-batches of at most `budget` tokens; a larger Item stands alone.

    Longest first, so that peak memory comes at once and not hours later, and equal trees stand together.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(indices, key=lambda i: (-sizes[i], i)):
        if not batches or sizes[i] > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= sizes[i]
    return batches


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch: a permutation that depends on seed and epoch only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


@dataclass(frozen=True)
class Plan:
    """Which Items each optimizer step sees, in which micro-batches: `plan[step]`, whatever came before.

    Every epoch is a fresh permutation; its last step may be smaller, no Item is left out.
    """

    sizes: Sequence[int]  # tokens of each Item
    batch_size: int  # Items per optimizer step
    steps: int
    seed: int
    micro_batch: int  # tokens, at most

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the Items."""
        return -(-len(self.sizes) // self.batch_size)

    def largest_step(self) -> int:
        """Tokens of the largest step of the first epoch."""
        steps = range(min(self.steps, self.steps_per_epoch))
        return max(sum(self.sizes[i] for i in self.step_items(step)) for step in steps)

    def visited(self, first: int = 0, count: int | None = None) -> set[int]:
        """The Items that some step sees, of `count` steps from `first` on (default: all to the end), as indices."""
        end = self.steps if count is None else min(first + count, self.steps)
        found = set[int]()
        for step in range(first, end):
            found.update(self.step_items(step))
            if len(found) == len(self.sizes):
                break
        return found

    def step_items(self, step: int) -> list[int]:
        """The Items of a step, as indices."""
        if self.batch_size >= len(self.sizes):  # all of them, whose order changes nothing
            return list(range(len(self.sizes)))
        epoch, k = divmod(step, self.steps_per_epoch)
        return _order(len(self.sizes), self.seed, epoch)[k * self.batch_size : (k + 1) * self.batch_size]

    def __getitem__(self, step: int) -> list[list[int]]:
        """The micro-batches of a step, as indices of Items."""
        return by_tokens(self.sizes, self.step_items(step), self.micro_batch)

    def shares(self, step: int, ranks: int) -> list[list[list[int]]]:
        """The same Items dealt to ranks, longest first to whom has fewest tokens; each share in its micro-batches.

        With one rank it is the step itself. A rank may get nothing.
        """
        return _dealt(tuple((i, self.sizes[i]) for i in self.step_items(step)), ranks, self.micro_batch)


@lru_cache(maxsize=2)
def _dealt(sizes: tuple[tuple[int, int], ...], ranks: int, budget: int) -> list[list[list[int]]]:
    """Items, as (index, tokens), dealt to ranks. A full batch asks for the same at every step."""
    shares: list[dict[int, int]] = [{} for _ in range(ranks)]
    sums = [0] * ranks
    for i, tokens in sorted(sizes, key=lambda one: (-one[1], one[0])):
        least = sums.index(min(sums))
        shares[least][i] = tokens
        sums[least] += tokens
    return [by_tokens(share, list(share), budget) for share in shares]
