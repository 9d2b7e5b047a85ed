"""What a policy is to recover: a direction, from pairs that are labelled by it, some of them wrongly.

A log-linear policy prefers one response of pair i to the other by a_i·θ nats, a_i the difference of their features.
S draws, n pairs, d features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """One point of a phase diagram."""

    features: int  # d
    pairs: int  # n
    flipped: float  # share of the labels that are wrong
    nonzeros: int | None = None  # k, of the true direction and of the policy; None: neither is sparse
    accuracy: float = 1.0  # share of the pairs about which the reference thinks what a method says it does


@dataclass(frozen=True)
class Problem:
    """S draws of one setting."""

    truth: Tensor  # [S, d]; w*, of norm 1
    chosen: Tensor  # [S, n, d]; features of the response that the label calls chosen, less those of the other one
    flipped: Tensor  # [S, n]; whether the label is wrong
    misread: Tensor  # [S, n]; whether the reference thinks the opposite of what a method says it does
    nonzeros: int | None

    def cosine(self, theta: Tensor) -> Tensor:
        """cos(θ, w*). [S, d] -> [S]"""
        return torch.cosine_similarity(theta, self.truth, dim=1)

    def separates(self, theta: Tensor) -> Tensor:
        """Whether θ prefers the better response in every pair whose label is right. [S, d] -> [S]"""
        margins = torch.einsum("snd,sd->sn", self.chosen, theta)
        return ((margins > 0) | self.flipped).all(1)

    def reference(self, right: float, wrong: float) -> Tensor:
        """By how much the reference prefers what is called chosen, where the label is right and where wrong. [S, n]"""
        meant = torch.where(self.flipped, wrong, right).to(self.truth)
        return torch.where(self.misread, -meant, meant)


def draw(setting: Setting, draws: int, seed: int) -> Problem:
    """Features of N(0, 1); w* uniform on the sphere of its support; exact shares of flipped labels and misread pairs.

    Drawn by seed, n, d and k, so that a larger share flips more labels of the same pairs.
    """
    n, d, k = setting.pairs, setting.features, setting.nonzeros
    random = np.random.default_rng([seed, n, d, k or 0])
    features, truth = (torch.from_numpy(random.standard_normal(shape)) for shape in ((draws, n, d), (draws, d)))
    places, order, doubt = (torch.from_numpy(random.random((draws, size))) for size in (d, n, n))
    truth = truth * largest(places, k or d)
    truth /= torch.linalg.vector_norm(truth, dim=1, keepdim=True)
    flipped = largest(order, round(setting.flipped * n))
    right = torch.einsum("snd,sd->sn", features, truth) > 0
    chosen = features * torch.where(right ^ flipped, 1.0, -1.0)[..., None]
    return Problem(truth, chosen, flipped, largest(doubt, round((1 - setting.accuracy) * n)), k)


def largest(sizes: Tensor, k: int) -> Tensor:
    """Which entries of each row are among its k largest. [S, d] -> [S, d] truth values"""
    return torch.zeros_like(sizes, dtype=torch.bool).scatter(1, sizes.topk(k, dim=1).indices, True)
