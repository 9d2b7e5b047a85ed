"""Made-up states for checkpoints, and whether two states are the same to the last bit."""

from __future__ import annotations

import torch


def state_of(step: int) -> dict:
    return {"weights": torch.full((7, 3), float(step)), "step": step, "names": ["a", ("b", None)]}


def same(left, right) -> bool:
    """Equal in type, order and every bit."""
    if isinstance(left, torch.Tensor):
        whole = isinstance(right, torch.Tensor) and (left.dtype, left.shape) == (right.dtype, right.shape)
        raw = [t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)] if whole else []
        return whole and torch.equal(*raw)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)
