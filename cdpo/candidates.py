"""The policy renormalised on each Item's K candidate responses: pi(k) = softmax_k log pi_theta(y_k|x); likewise ref.

Margins do not change, since the normaliser cancels; expectations over the candidates become exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdpo.batch import Logps


def count_items(logps: Logps) -> int:
    """I, the number of Items; known without waiting for the GPU where the Items are named."""
    return len(logps.sources) or int(logps.item.max()) + 1


def sum_by_item(values: Tensor, item: Tensor, items: int) -> Tensor:
    """[S], [S] -> [I]"""
    return values.new_zeros(items).index_add(0, item, values)


def log_softmax_by_item(values: Tensor, item: Tensor, items: int) -> Tensor:
    """Log-probs of every response among the responses of its own Item, in float32 or better. [S], [S] -> [S]"""
    values = values if values.dtype == torch.float64 else values.float()
    largest = values.detach().new_full((items,), -torch.inf).scatter_reduce(0, item, values.detach(), "amax")
    shifted = values - largest[item]  # the largest is 0, so exp cannot overflow and the sum is at least 1
    return shifted - sum_by_item(shifted.exp(), item, items).log()[item]


def candidate_log_ratio(logps: Logps) -> Tensor:
    """log pi(k) - log pi_ref(k), both renormalised on each Item's candidates, nats. [S]"""
    items = count_items(logps)
    policy, reference = (log_softmax_by_item(one, logps.item, items) for one in (logps.policy, logps.reference))
    return policy - reference


def candidate_kl(logps: Logps) -> Tensor:
    """KL(policy || reference) in nats, both renormalised on each Item's candidates; exact, differentiable. [I]

    sum_k pi(k) (log pi(k) - log ref(k)). On the K = 2 responses of a pair it is the KL between two coins.
    """
    items = count_items(logps)
    policy, reference = (log_softmax_by_item(one, logps.item, items) for one in (logps.policy, logps.reference))
    return sum_by_item(policy.exp() * (policy - reference), logps.item, items)
