"""The gradient of a whole objective beside how far each weight has moved: what tells whether a policy is stationary.

Works on the gradients that lie on the parameters, in place. Of an adapted weight only the part within reach counts:
the gradient projected on the tangent space of the matrices of its rank, from the factors' gradients alone (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cdpo.model.change import Change, factors

LEAST = 1e-12  # relative: smaller singular values of a factor count as none


class Gradient:
    """d objective / d theta at theta = theta_0 + change, of every weight that is trained."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def plain(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, gradient, theta - theta_0) of the weights outside adapters; changes of the gradient stay."""
        for name, parameter, start in self.change.plain():
            if parameter.grad is not None:
                yield name, parameter.grad, parameter.detach() - start

    def norms(self) -> dict[str, float]:
        """L2 norm of the gradient of every weight, of adapted ones within reach of their rank."""
        found = {name: float(torch.linalg.vector_norm(gradient).double()) for name, gradient, _ in self.plain()}
        return found | {name: _tangent_norm(layer) for name, layer in self.change.adapted.items()}

    def norm(self) -> float:
        """L2 norm of all of it."""
        return math.hypot(*self.norms().values())

    def absolute(self) -> float:
        """L1 norm, of weights outside adapters."""
        return sum(float(gradient.abs().sum(dtype=torch.float64)) for _, gradient, _ in self.plain())

    def inner(self) -> dict[str, float]:
        """Inner product of gradient and change, of every weight."""
        found = {name: float((gradient * delta).sum(dtype=torch.float64)) for name, gradient, delta in self.plain()}
        for name, layer in self.change.adapted.items():
            tall, _ = factors(layer)
            found[name] = float((_grad(tall) * tall.detach()).sum(dtype=torch.float64))
        return found

    @torch.no_grad()
    def add_change(self, shares: dict[str, float]) -> None:
        """gradient <- gradient + share * (theta - theta_0) for the named weights."""
        for name, gradient, delta in self.plain():
            if share := shares.get(name):
                gradient += share * delta
        for name, layer in self.change.adapted.items():
            if share := shares.get(name):
                tall, wide = factors(layer)
                weight = share * layer.scaling[layer.active_adapters[0]] ** 2
                _grad(tall).add_(weight * tall @ (wide @ wide.mT))
                _grad(wide).add_(weight * (tall.mT @ tall) @ wide)

    @torch.no_grad()
    def keep(self, free: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Of weights outside adapters keep the gradient where free(gradient, change) says so."""
        for _, gradient, delta in self.plain():
            gradient *= free(gradient, delta)


def _grad(parameter: nn.Parameter | Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _tangent_norm(layer: object) -> float:
    """||P G|| for the gradient G of an adapted weight s B A, from those of its factors: s G A^T and s B^T G.

    P G = U U^T G + G V V^T - U U^T G V V^T with U, V bases of the columns of B and the rows of A.
    """
    tall, wide = factors(layer)
    scaling = layer.scaling[layer.active_adapters[0]]  # type: ignore[attr-defined]
    right = _basis_part(wide.detach().mT, _grad(tall).double() / scaling)
    left = _basis_part(tall.detach(), _grad(wide).mT.double() / scaling)
    rows = _basis_part(wide.detach().mT, wide.detach().mT.double())
    both = left.mT @ rows
    square = right.square().sum() + left.square().sum() - both.square().sum()
    return math.sqrt(max(float(square), 0.0))


def _basis_part(factor: Tensor, product: Tensor) -> Tensor:
    """G Q from G F, where F = Q R; directions that F has not are left out. [n, r], [m, r] -> [m, r]"""
    triangle = torch.linalg.qr(factor.double()).R
    return product @ torch.linalg.pinv(triangle, rtol=LEAST)
