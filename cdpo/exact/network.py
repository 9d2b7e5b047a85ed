"""A policy that is a small model: its log-probs as a function of the change of its weights, by the model itself.

Start after start and micro-batch after micro-batch. What the backward pass needs is kept of so many tokens as one
micro-batch may have, and else computed again: the memory is that of one training step, however many starts there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from cdpo.batch import Batch
from cdpo.data.packing import Scored
from cdpo.exact.policy import Policy
from cdpo.exact.products import Product
from cdpo.model.change import Change
from cdpo.model.logps import Scorer


class Weight(NamedTuple):
    """A weight that can change: what the scorer calls it, where it started, whether adapters have its transpose."""

    name: str
    start: Tensor
    transposed: bool = False


class Portion(NamedTuple):
    """A micro-batch, and where its responses stand among all of them."""

    at: Tensor
    batch: Batch


@dataclass(frozen=True)
class Network(Policy):
    """A model under constraints, asked in place of its trained weights for other ones.

    It must stand where it started, adapters disabled (`Change.at_start`): an adapter's change is added to its weight.
    """

    scorer: Scorer
    weights: Sequence[Weight]
    portions: Sequence[Portion]
    room: int  # tokens that the backward pass may find ready
    pause: Callable[[], None]  # called before every pass; may raise

    quick = False
    linear = False

    @staticmethod
    def of(scorer: Scorer, change: Change, data: Scored, micro_batch: int, pause: Callable[[], None]) -> Network:
        """That of a run, whose micro-batches have so many tokens at most."""
        weights = weights_of(scorer, change)
        start = torch.cat([one.start.flatten() for one in weights])
        batch = data.batch(tuple(range(len(data.items))))
        ends = torch.bincount(batch.item).cumsum(0).tolist()
        portions = [
            Portion(torch.cat([torch.arange(ends[i] - len(data.items[i].responses), ends[i]) for i in indices]), one)
            for indices, one in data.batches(micro_batch)
        ]
        return Network(start, batch, scorer.eval(), weights, portions, micro_batch, pause)

    @property
    def matrices(self) -> Tensor:
        return torch.cat([torch.full((one.start.numel(),), one.start.ndim >= 2) for one in self.weights])

    def policy(self, change: Tensor) -> Tensor:
        found: Tensor = _Responses.apply(change, self)  # type: ignore[no-untyped-call]
        return found

    def products(self, rank: int, scaling: float) -> tuple[Product, ...]:
        shapes = [(len(one.start), one.start.shape[1]) for one in self.weights]
        return tuple(Product(shape, rank, scaling, one.transposed) for shape, one in zip(shapes, self.weights))

    def spread(self, drawn: Tensor) -> Tensor:
        return drawn

    def spread_factors(self, drawn: Tensor, products: Sequence[Product]) -> Tensor:
        """Every second start as peft begins: A of its size, and B zero, so that the change is zero."""
        parts = []
        for one, part in zip(products, drawn.split([one.size for one in products], dim=1)):
            wide, tall = (factor.clone() for factor in one.factors(part))
            wide[::2] *= 1 / (math.sqrt(3 * one.width) * wide[::2].square().mean().sqrt())
            tall[::2] = 0
            parts += [wide.flatten(1), tall.flatten(1)]
        return torch.cat(parts, dim=1)

    def passes(self, change: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Number of the start, its change as a leaf [n], where responses stand, and their log-probs."""
        for s, own in enumerate(change):
            for at, batch in self.portions:
                self.pause()
                leaf = own.detach().requires_grad_()
                yield s, leaf, at, self.scored(leaf, batch)

    def scored(self, change: Tensor, batch: Batch) -> Tensor:
        """Log-probs of the responses of a batch. [n] -> [responses]"""
        parts = change.split([one.start.numel() for one in self.weights])
        moved = {one.name: one.start + part.view_as(one.start) for one, part in zip(self.weights, parts)}
        found: Tensor = functional_call(self.scorer, moved, (batch,))[0]
        return found


class _Responses(torch.autograd.Function):
    """Log-probs of all responses of all starts."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, network: Network) -> Tensor:
        ctx.network, ctx.kept = network, []
        ctx.save_for_backward(change)
        found = change.new_empty(len(change), len(network.batch.length))
        keeps = ctx.needs_input_grad[0] and len(change) * network.batch.tokens <= network.room
        with torch.set_grad_enabled(keeps):
            for passed in network.passes(change):
                s, _, at, responses = passed
                found[s, at] = responses.detach()
                ctx.kept += [passed] * keeps
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (change,) = ctx.saved_tensors
        found, kept, ctx.kept = torch.zeros_like(change), ctx.kept, None
        with torch.enable_grad():
            for s, leaf, at, responses in kept or ctx.network.passes(change):
                found[s] += torch.autograd.grad(responses, leaf, gradient[s, at])[0]
        return found, None


def weights_of(scorer: Scorer, change: Change) -> list[Weight]:
    """The weights that can change, in the order of `Change`: those that are trained, and those under adapters."""
    names = {id(parameter): name for name, parameter in scorer.named_parameters()}
    found = [Weight(names[id(parameter)], start) for _, parameter, start in change.plain()]
    for layer in change.adapted.values():
        weight = layer.get_base_layer().weight
        transposed = bool(layer.lora_embedding_A) or getattr(layer, "fan_in_fan_out", False)
        found.append(Weight(names[id(weight)], weight.detach(), transposed))
    return found
