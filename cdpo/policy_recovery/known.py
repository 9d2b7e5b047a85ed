"""The two known ways to a direction from labels, by l1 norms: what the penalties are held against.

Decoding by l1 (Candès, Tao 2005, IEEE Trans. Inf. Theory 51:4203-4215) recovers θ from y = A θ + e, e sparse, exactly.
Labels are the signs of A θ only: neither its scale nor any θ exactly can be had from them, so its threshold is none
here. What is left of it is its relaxation: instead of the fewest pairs that θ violates, the least sum of violations.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from cdpo.errors import NumericsError
from cdpo.policy_recovery.draws import Problem

Array = NDArray[np.float64]
BISECTIONS = 60


def l1(problem: Problem) -> Tensor:
    """θ by `decoded`, or by `one_bit` where it is k-sparse. [S, d]"""
    if problem.nonzeros is not None:
        return one_bit(problem.chosen.mean(1), problem.nonzeros)
    return torch.from_numpy(np.stack([decoded(chosen.numpy()) for chosen in problem.chosen]))


def decoded(chosen: Array) -> Array:
    """argmin of sum_i max(0, -a_i·θ) subject to a mean a_i·θ of 1, the scale that Plan and Vershynin 2013 choose.

    [n, d] -> [d]. (Comm. Pure Appl. Math. 66:1275-1297, for labels without errors.) Solved as its dual, which has d
    equations: max t subject to sum_i ν_i a_i + t mean_i a_i = 0, 0 <= ν <= 1. Raises NumericsError.
    """
    mean = chosen.mean(0)
    columns = np.vstack([chosen, mean]).T
    costs = np.append(np.zeros(len(chosen)), -1.0)
    bounds = [*[(0.0, 1.0)] * len(chosen), (None, None)]
    solution = linprog(costs, A_eq=columns, b_eq=np.zeros(len(mean)), bounds=bounds, method="highs-ds")
    if not solution.success:
        raise NumericsError(f"a linear programme was not solved ({solution.message})")
    theta = np.asarray(solution.eqlin.marginals)
    return theta / (mean @ theta)


def one_bit(mean: Tensor, k: int) -> Tensor:
    """argmax of θ·mean subject to |θ|_2 <= 1, |θ|_1 <= √k: Plan, Vershynin 2013, IEEE Trans. Inf. Theory 59:482-494.

    [S, d] -> [S, d]. The mean with its entries shrunk by the least u >= 0 for which the norms have that ratio.
    """
    low, high = torch.zeros(len(mean), 1).to(mean), mean.abs().amax(1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        dense = shrunk(mean, middle).abs().sum(1, keepdim=True) > k**0.5
        low, high = torch.where(dense, middle, low), torch.where(dense, high, middle)
    return shrunk(mean, torch.where(shrunk(mean, 0 * low).abs().sum(1, keepdim=True) > k**0.5, low, 0 * low))


def shrunk(mean: Tensor, by: Tensor) -> Tensor:
    """Soft thresholding, scaled to norm 1."""
    return torch.nn.functional.normalize(mean.sign() * (mean.abs() - by).clamp(min=0), dim=1)
