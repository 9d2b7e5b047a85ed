"""How far a policy has moved, theta - theta_0: the one place that knows that an adapter's change is its product.

Measures and scales the change; it knows nothing of losses, constraints or optimizers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cdpo.data.packing import by_tokens
from cdpo.errors import ConfigError
from cdpo.system.ranks import full_tensor

PART = {"cpu": 1 << 20, "cuda": 1 << 26}  # numbers of differences that are held at once


def _wide(tensor: Tensor) -> Tensor:
    """Differences and norms are taken in float32 or better: bf16 weights hold far fewer digits than their change."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _original_name(name: str) -> str:
    """The name that a parameter had before peft wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """The factors B [out, r] and A [r, in] of a LoRA layer; scaling * B @ A (or its transpose) is its change."""
    adapter = layer.active_adapters[0]
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def _delta(layer: Any) -> Tensor:
    """The change of an adapted weight, in its full size. A DoRA layer is no plain product: a copy of it is merged."""
    if not layer.lora_magnitude_vector:
        return _wide(layer.get_delta_weight(layer.active_adapters[0]))
    weight = _wide(layer.get_base_layer().weight)
    merged = copy.deepcopy(layer).to(weight.dtype)
    merged.merge()
    return merged.get_base_layer().weight - weight


def _core(layer: Any) -> Tensor:
    """A matrix with the singular values of the change: r x r for LoRA, so that no large SVD is ever needed."""
    if layer.lora_magnitude_vector:
        return _delta(layer)
    tall, wide = map(_wide, factors(layer))
    scaling = layer.scaling[layer.active_adapters[0]]
    return scaling * torch.linalg.qr(tall).R @ torch.linalg.qr(wide.mT).R.mT


def _effective_rank(matrices: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of every matrix; zero matrices give 0. [..., n, m] -> [...]"""
    values = torch.linalg.svdvals(matrices)
    total = values.sum(-1, keepdim=True)
    share = values / total.where(total > 0, 1)
    return torch.special.entr(share).sum(-1).exp() * (total[..., 0] > 0)


def _distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """L2 norms of differences, many in one call; copies of PART numbers at most. [...], [...] -> [] each"""
    if pairs and isinstance(pairs[0][0], DTensor):
        return [torch.linalg.vector_norm(full_tensor(_wide(now) - _wide(then))).double() for now, then in pairs]
    room = PART[pairs[0][0].device.type] if pairs else 0
    pieces = [(i, *piece) for i, pair in enumerate(pairs) for piece in zip(*(x.reshape(-1).split(room) for x in pair))]
    squares: list[list[Tensor]] = [[] for _ in pairs]
    for group in by_tokens([len(now) for _, now, _ in pieces], range(len(pieces)), room):
        owner, now, then = zip(*(pieces[k] for k in group))
        apart = torch._foreach_sub([_wide(x) for x in now], [_wide(x) for x in then])
        for i, norm in zip(owner, torch._foreach_norm(apart)):
            squares[i].append(norm.double().square())
    return [torch.stack(parts).sum().sqrt() for parts in squares]


def _product_square(tall: Tensor, wide: Tensor) -> Tensor:
    """||B A||^2 by r x r products, of one pair of factors or of many. [..., out, r], [..., r, in] -> [...]"""
    return ((tall.mT @ tall) * (wide @ wide.mT)).sum((-2, -1))


def _product_norms(layers: Sequence[Any]) -> list[Tensor]:
    """||scaling B A|| of adapted layers: alike ones at once, from copies of their factors in float64.

    Its rounding is below 1e-7 of ||B|| ||A||. The norm of a DoRA layer, no plain product, is that of its change.
    """
    alike: dict[Any, list[int]] = {}
    norms = [torch.empty(0)] * len(layers)
    for i, layer in enumerate(layers):
        if layer.lora_magnitude_vector:
            norms[i] = torch.linalg.vector_norm(_delta(layer)).double()
        else:
            alike.setdefault(tuple(factor.shape for factor in factors(layer)), []).append(i)
    for group in alike.values():
        tall, wide = (torch.stack(factor).double() for factor in zip(*(factors(layers[i]) for i in group)))
        square = _product_square(tall, wide).clamp(min=0)
        scaling = square.new_tensor([layers[i].scaling[layers[i].active_adapters[0]] for i in group])
        for i, norm in zip(group, square.sqrt() * scaling.abs()):
            norms[i] = norm
    return norms


class Change:
    """theta - theta_0 of a policy: create it on the wrapped policy, before anything is restored or trained.

    It keeps one copy of the trainable plain parameters. A LoRA-adapted weight needs none, since its change is the
    adapter's product; peft's Linear, Embedding and GPT-2's Conv1D layers are covered, rslora and DoRA included.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        #: adapted layers by the name of the weight that they adapt
        self.adapted: dict[str, Any] = {
            _original_name(f"{name}.weight"): layer
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        factors = {
            id(parameter)
            for layer in self.adapted.values()
            for name, parameter in layer.named_parameters()
            if not name.startswith("base_layer.")
        }
        self._plain = {
            _original_name(name): (parameter, parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in factors
        }

    @property
    def names(self) -> list[str]:
        """Names of the weights that can change, in the order of every list and iterator here."""
        return [*self._plain, *self.adapted]

    @property
    def dora(self) -> bool:
        """Whether some adapter is a DoRA, whose change is not linear in its factors."""
        return any(layer.lora_magnitude_vector for layer in self.adapted.values())

    def trainable(self) -> int:
        """How many numbers are trained, adapter factors included."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def plain(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(name, parameter, where it started) of every trainable parameter that is not part of an adapter."""
        for name, (parameter, start) in self._plain.items():
            yield name, parameter, start

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(name, theta - theta_0) of every weight that can change, adapted ones in full size; float32 or better."""
        for name, parameter, start in self.plain():
            yield name, full_tensor(_wide(parameter) - _wide(start))
        for name, layer in self.adapted.items():
            yield name, _delta(layer)

    @torch.no_grad()
    def _cores(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter, start in self.plain():
            yield name, full_tensor(_wide(parameter) - _wide(start))
        for name, layer in self.adapted.items():
            yield name, _core(layer)

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """L2 norm of the change of every weight; one wait for the GPU."""
        norms = _distances([(parameter.detach(), start) for _, parameter, start in self.plain()])
        norms += _product_norms(list(self.adapted.values()))
        return dict(zip(self.names, torch.stack(norms).tolist())) if norms else {}

    def norm(self) -> float:
        """L2 norm of the whole change, ||theta - theta_0||."""
        return math.hypot(*self.norms().values())

    def square_norm(self) -> Tensor:
        """||theta - theta_0||^2, differentiable; of adapters by r x r products of their factors. []"""
        parts = [(parameter - start).square().sum() for _, parameter, start in self.plain()]
        for layer in self.adapted.values():
            parts.append(layer.scaling[layer.active_adapters[0]] ** 2 * _product_square(*factors(layer)))
        return torch.stack(parts).sum()

    def max_abs(self) -> float:
        """Largest absolute change of a single weight."""
        largest = [delta.abs().max().double() for _, delta in self.deltas()]
        return float(torch.stack(largest).max()) if largest else 0.0

    def effective_rank(self) -> float:
        """Effective rank of the change, averaged over the matrices that changed; 0 before any did.

        Roy and Vetterli 2007: exp of the entropy of the normalised singular values. One SVD per matrix, of r x r for
        LoRA; of full size otherwise, so ask for it at the end of a run and not at every step.
        """
        ranks = [_effective_rank(core).flatten().double() for _, core in self._cores() if core.ndim >= 2]
        changed = torch.cat([rank[rank > 0] for rank in ranks]) if ranks else torch.empty(0)
        return float(changed.mean()) if len(changed) else 0.0

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Within the block the policy is the reference, bit for bit: its changed weights are put aside."""
        adapters = [layer for layer in self.adapted.values() if not layer.disable_adapters]
        trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        try:
            for layer in adapters:
                layer.enable_adapters(False)
            with self.at({name: start for name, _, start in self.plain()}):
                yield
        finally:
            for layer in adapters:
                layer.enable_adapters(True)  # which makes all its factors trainable
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in trained)

    @contextmanager
    def at(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block these plain weights, by name, take the place of the policy's, which are put aside."""
        kept = [(parameter, parameter.detach().clone()) for name, parameter, _ in self.plain() if name in weights]
        try:
            with torch.no_grad():
                for name, parameter, _ in self.plain():
                    if name in weights:
                        parameter.copy_(weights[name])
            yield
        finally:
            with torch.no_grad():
                for parameter, changed in kept:
                    parameter.copy_(changed)

    @torch.no_grad()
    def scale(self, share: Mapping[str, float]) -> None:
        """theta <- theta_0 + share * (theta - theta_0) for the named weights; by one of its factors for LoRA."""
        if self.dora:
            raise ConfigError("the change of a DoRA layer cannot be scaled; set dora=false")
        for name, parameter, start in self.plain():
            if name in share:
                parameter.copy_(torch.lerp(start, parameter, share[name]))
        for name, layer in self.adapted.items():
            if name in share:
                tall, wide = factors(layer)
                started_at_zero = wide if layer.lora_embedding_A else tall  # the other keeps its size, and so its step
                started_at_zero.mul_(share[name])
