"""Losses of whole distributions of pairs: sorted against each other, so a pair's partner depends on all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpo.batch import Logps
from cdpo.losses.loss import PairLoss


@dataclass(frozen=True)
class AOT(PairLoss):
    """Melnyk et al. 2024 (arXiv 2406.05882): the integral over t of -log sigmoid(beta [Q_u(t) - Q_v(t)]), Q quantiles.

    paired: u = log pi(w) - log pi(l) and v the same of pi_ref, over the pairs; else u = Δ(w) and v = Δ(l), whoever was
    compared with whom. The distribution of u is to lie above that of v. Where pairs weigh the same that is sorted u
    against sorted v; a weight is a share of both distributions, and a soft label splits it between the pair and the
    pair swapped. A pair's number is the mean over the quantiles that its u fills, so the weighted mean over pairs is
    the integral. The mean over parts of a step is not: a step must be one micro-batch.
    """

    paired: bool = True
    reads_preference: ClassVar[bool] = True
    whole_steps: ClassVar[bool] = True

    def __call__(self, logps: Logps) -> Tensor:
        p, weight = logps.preference, logps.weight
        if not logps.soft:
            return self.values(logps, weight)
        won, lost = self.values(logps.both_ways(), torch.cat([p * weight, (1 - p) * weight])).chunk(2)
        return torch.lerp(lost, won, p)

    def values(self, logps: Logps, share: Tensor) -> Tensor:
        """The mean cost of the quantiles that each pair's u fills; 0 where its share is 0. [P]"""
        if self.paired:
            u, v = (torch.sub(*logps.of_pairs(log_probs)) for log_probs in (logps.policy, logps.reference))
        else:
            u, v = logps.of_pairs(logps.log_ratio())
        i, j, mass = coupling(u.detach(), v.detach(), share)
        cost = -F.logsigmoid(self.beta * (u[i] - v[j]))
        return torch.zeros_like(u).index_add(0, i, mass.to(cost) / share[i].to(cost) * cost)


def coupling(u: Tensor, v: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal transport of two samples on a line whose points weigh `share`: from i to j goes `mass` > 0. [M] each"""
    there = share > 0
    by_u, by_v = (order[there[order]] for order in (u.argsort(stable=True), v.argsort(stable=True)))
    ends_u, ends_v = share[by_u].cumsum(0), share[by_v].cumsum(0)
    ends = torch.cat([ends_u, ends_v]).sort().values
    mass = ends.diff(prepend=ends.new_zeros(1))
    ends, mass = ends[mass > 0], mass[mass > 0]
    i, j = (torch.searchsorted(own, ends - mass / 2).clamp(max=len(own) - 1) for own in (ends_u, ends_v))
    return by_u[i], by_v[j], mass
