"""The shared vocabulary: a prompt with its responses (Item), many of them packed (Batch), and their log-probs (Logps).

Holds data only. Every other module imports from here; this one imports nothing of cdpo but its errors.

Sizes, here and everywhere: R rows of T tokens; I Items (prompts) with K responses each, S responses in all, N tokens of
responses, predicted at M positions; P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cdpo.errors import ConfigError

#: what stands for the reference on an Item's responses. enumerated: its own probabilities, as they are all responses
#: there are; empirical: 1/K, as they were drawn from it, a response drawn twice standing there twice; uniform: 1/K, a
#: choice, as they are from elsewhere
Base = Literal["enumerated", "empirical", "uniform"]


class Pair(NamedTuple):
    """Response `winner` was preferred to response `loser` with probability `preference` (1 for a hard label).

    `weight` is the pair's share in every mean over pairs: a count, or a sampling mass; only ratios matter.
    """

    winner: int
    loser: int
    preference: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class Item:
    """One prompt, tokenised, with its K >= 2 responses. A preference pair is K = 2."""

    prompt: list[int]  # token ids, non-empty
    responses: list[list[int]]  # K lists of token ids, each non-empty, EOS included where the response is complete
    pairs: list[Pair]  # indices into responses
    rewards: list[float] | None = None  # [K] true rewards, where the data set knows them
    source: str = ""  # where it came from, "data.jsonl:4", for messages
    fitted_rewards: list[float] | None = None  # [K] rewards fitted to the pairs, for a loss that asks for them
    base: Base | None = None  # None: nothing stands for the reference, so J and KL are not known on the responses

    @property
    def tokens(self) -> int:
        """Tokens to encode: the prompt once, every response once, save its last token, which predicts nothing."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)


@dataclass(frozen=True)
class Batch:
    """S responses of I Items as token rows, with the constants that a loss needs.

    Packed: one row of T tokens, trees one after another, no padding; a token sees its own prompt and its own branch.
    Padded (for architectures that cannot): one row per response, prompt repeated, `attention_mask` set.
    """

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T]; every response continues its prompt's positions
    tree: Tensor  # [R, T]; index of the Item within the batch
    branch: Tensor  # [R, T]; 0 = prompt, k + 1 = response k
    predict_at: Tensor  # [M]; flat positions whose outputs predict response tokens, each once
    position: Tensor  # [N]; for every response token, response after response: where in predict_at it is predicted
    target: Tensor  # [N]; that token
    length: Tensor  # [S]; tokens of each response, so N = length.sum()
    reference: Tensor  # [S]; summed reference log-probs, nats
    item: Tensor  # [S]; index of the Item within the batch
    rewards: Tensor | None  # [S]
    fitted_rewards: Tensor | None  # [S]
    base: Tensor | None  # [S]; as in Logps
    pairs: Tensor  # [P, 2]; winner and loser, as indices of responses
    preference: Tensor  # [P]
    weight: Tensor  # [P]
    sources: tuple[str, ...]  # [I]; names of the Items
    soft: bool = True  # whether some preference is not 1
    attention_mask: Tensor | None = None  # [R, T]; padded rows only

    @property
    def tokens(self) -> int:
        """Tokens that are really encoded, padding excluded."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def logps(self, policy: Tensor, **state: Any) -> Logps:
        """What a loss is given: the policy's log-probs [S] beside the batch's constants, in float64 from here on.

        `state` is what else a loss may read: `progress` and `baseline` of `Logps`.
        """
        constants = {name: getattr(self, name) for name in CONSTANTS}
        return Logps(policy.double(), **constants, **state)


CONSTANTS = (
    "reference", "length", "item", "pairs", "preference", "weight", "rewards", "fitted_rewards", "base", "sources",
    "soft",
)  # fmt: skip


@dataclass(frozen=True)
class Logps:
    """Log-probs of S responses, each summed over its tokens, in nats, float32 or better; what a loss is given.

    `progress` and `baseline` are the only training state a loss may read: both come from reduced metrics, so every
    rank and every micro-batch sees the same values.
    """

    policy: Tensor  # [S]
    reference: Tensor  # [S]
    length: Tensor  # [S]; tokens
    item: Tensor  # [S]; index of the Item that a response belongs to
    pairs: Tensor  # [P, 2]
    preference: Tensor  # [P]; p in [0, 1]
    weight: Tensor  # [P]
    rewards: Tensor | None = None  # [S]; true rewards, where known
    fitted_rewards: Tensor | None = None  # [S]; rewards fitted to the pairs
    base: Tensor | None = None  # [S]; log m, the measure that stands for the reference, up to a constant per Item
    next_token_kl: Tensor | None = None  # [S]; of the policy's draws, one per Item, of which only this is known; nats
    progress: float = 0.0  # through training: 0 in the first step, 1 in the last one and after it
    baseline: float | None = 0.0  # mean log-ratio of all pairs of earlier steps, nats; None if no loss `reads_baseline`
    soft: bool = True  # False only if every preference is known to be 1
    sources: tuple[str, ...] = field(default=())  # [I]; names of the Items, for messages

    def log_ratio(self) -> Tensor:
        """log pi_theta(y|x) - log pi_ref(y|x), nats. [S]"""
        return self.policy - self.reference

    def of_pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the winners and of the losers. [S] -> [P], [P]"""
        winner, loser = values[self.pairs].unbind(1)
        return winner, loser

    def margin(self) -> Tensor:
        """Log-ratio of the winner minus log-ratio of the loser, nats. [P]"""
        winner, loser = self.of_pairs(self.log_ratio())
        return winner - loser

    def with_reference(self, reference: Tensor, baseline: float) -> Logps:
        """The same by another reference, and the mean log-ratio to that.

        `base` moves along, so that the policy on an Item's responses (`renormalised`) stays what it is. [S]
        """
        base = None if self.base is None else self.base + (reference - self.reference)
        return replace(self, reference=reference, base=base, baseline=None if self.baseline is None else baseline)

    @property
    def items(self) -> int:
        """I, the number of Items; known without waiting for a GPU where the Items are named."""
        return len(self.sources) or int(self.item.max()) + 1

    def sum_by_item(self, values: Tensor) -> Tensor:
        """Sums over the responses of each Item. [S] -> [I]"""
        return values.new_zeros(self.items).index_add(0, self.item, values)

    def log_softmax_by_item(self, values: Tensor) -> Tensor:
        """Log-probs of every response among the responses of its own Item, in float32 or better. [S] -> [S]"""
        values = values if values.dtype == torch.float64 else values.float()
        detached = values.detach()
        largest = detached.new_full((self.items,), -torch.inf).scatter_reduce(0, self.item, detached, "amax")
        shifted = values - largest[self.item]  # the largest is 0, so exp cannot overflow and the sum is at least 1
        return shifted - self.sum_by_item(shifted.exp()).log()[self.item]

    def renormalised(self) -> Logps:
        """Policy and reference as distributions over each Item's K responses, by `base` and the log-ratios Δ (ours).

        The reference is m(k), the policy m(k) exp(Δ_k) up to its normaliser, which cancels in margins. Enumerated, m is
        the reference's own and the policy its own renormalised: the expectations are exact. On draws of the reference
        they are self-normalised importance sampling. ConfigError without a base.
        """
        if self.base is None:
            raise ConfigError(
                f"{', '.join(self.sources[:3]) or 'these Items'}: pairs without rewards stand for no other responses, "
                "so no KL or expectation is known on them; use data with rewards"
            )
        policy = self.policy + (self.base - self.reference)  # exactly the policy where all responses are enumerated
        base = self.log_softmax_by_item(self.base)
        return replace(self, policy=self.log_softmax_by_item(policy), reference=base, base=base)

    def candidate_kl(self) -> Tensor:
        """KL(policy || reference) in nats, both `renormalised` on each Item's responses; differentiable. [I]"""
        on_item = self.renormalised()
        return self.sum_by_item(on_item.policy.exp() * on_item.log_ratio())

    @staticmethod
    def joined(parts: Sequence[Logps]) -> Logps:
        """One of many, response after response; what is no tensor is that of the first."""
        names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        columns: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        before = [0, *accumulate(len(part.policy) for part in parts)]
        items = [0, *accumulate(part.items for part in parts)]
        columns["pairs"] = torch.cat([part.pairs + n for part, n in zip(parts, before)])
        columns["item"] = torch.cat([part.item + n for part, n in zip(parts, items)])
        sources = tuple(name for part in parts for name in part.sources)
        return replace(parts[0], **columns, soft=any(part.soft for part in parts), sources=sources)

    def chosen_first(self) -> Logps:
        """Every pair turned so that its winner is preferred with p >= 1/2; where p is 1/2 the order is the data's."""
        flip = self.preference < 0.5
        pairs = torch.where(flip[:, None], self.pairs.flip(1), self.pairs)
        return replace(self, pairs=pairs, preference=torch.where(flip, 1 - self.preference, self.preference), soft=True)

    def both_ways(self) -> Logps:
        """Every pair as it is, then every pair swapped: 2 P pairs; without their weights, which no loss reads."""
        pairs, p = self.pairs, self.preference
        return replace(
            self,
            pairs=torch.cat([pairs, pairs.flip(1)]),
            preference=torch.cat([p, 1 - p]),
            soft=True,
        )
