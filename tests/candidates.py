"""Log-probs of made-up candidate sets, for tests of what is computed on them."""

from __future__ import annotations

import torch

from cdpo.batch import Logps

SIZES = (2, 5, 3)  # candidates of each Item


def logps(policy, reference, item, **options):
    """Log-probs without pairs, of all the responses that there are."""
    none = torch.zeros(0)
    item = torch.tensor(item)
    options = {"base": reference, **options}
    return Logps(policy, reference, torch.ones(len(item)), item, none.view(0, 2).long(), none, none, **options)


def logps_of(seed: int = 0, **more) -> Logps:
    """Three Items of unequal size, whose log-probs are not normalised on their candidates."""
    g = torch.Generator().manual_seed(seed)
    total = sum(SIZES)
    policy, reference, rewards = 2 * torch.randn(3, total, generator=g, dtype=torch.float64)
    item = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    first = torch.tensor([0, 2, 7])
    pairs = torch.stack([first, first + 1], 1)
    ones = torch.ones(3, dtype=torch.float64)
    lengths = torch.ones(total, dtype=torch.float64)
    more = {"base": reference, "sources": ("a", "b", "c"), **more}
    return Logps(policy, reference, lengths, item, pairs, ones, ones, rewards, **more)
