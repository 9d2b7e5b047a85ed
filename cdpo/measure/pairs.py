"""What is measured on pairs, in training and on held-out Items alike, under the names that the field knows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdpo.system.metrics import Means

if TYPE_CHECKING:
    from cdpo.batch import Logps
    from cdpo.model.logps import Statistics


def add_pair_metrics(means: Means, logps: Logps, statistics: Statistics, beta: float) -> None:
    """Add the metrics of a batch to `means`, in the field's names; log-probs and log-ratios are sums, in nats.

    `chosen` is the response preferred with p >= 1/2; where p is 1/2, and for logits, the order is the data's. Logits
    and the entropy of the next-token distribution (nats) are averaged over response tokens, then pairs.
    """
    logps = replace(logps, policy=logps.policy.detach())  # nothing here is for a gradient
    of_response = torch.stack([beta * logps.log_ratio(), logps.policy, logps.policy / logps.length])
    chosen, rejected = of_response[:, logps.chosen_first().pairs].unbind(2)  # [3, P] each
    per_pair = {
        "rewards/chosen": chosen[0],
        "rewards/rejected": rejected[0],
        "rewards/margins": chosen[0] - rejected[0],
        "rewards/accuracies": correct(logps),
        "logps/chosen": chosen[1],
        "logps/rejected": rejected[1],
        "logps_mean/chosen": chosen[2],
        "logps_mean/rejected": rejected[2],
    }
    per_pair |= dict(zip(("logits/chosen", "logits/rejected"), logps.of_pairs(statistics.logit)))
    means.add_all(per_pair, logps.weight)
    means.add("entropy", statistics.entropy, logps.length)


def add_kl(means: Means, logps: Logps) -> None:
    """Add the KL of the policy to the reference on the responses of each prompt, nats, where `base` is known."""
    logps = replace(logps, policy=logps.policy.detach())
    if logps.base is not None:
        means.add("kl/candidates", logps.candidate_kl())


def add_log_ratio(means: Means, logps: Logps, name: str) -> None:
    """Add the mean log-ratio over all responses of all pairs, nats: what Logps.baseline averages over the steps."""
    chosen, rejected = logps.of_pairs(logps.log_ratio().detach())
    means.add(name, (chosen + rejected) / 2, logps.weight)


def correct(logps: Logps) -> Tensor:
    """Whether each pair's margin has the sign of its preference; a tie of either counts one half. [P]

    Margins tie up to float32 rounding of the log-probs.
    """
    margin = logps.margin().detach()
    scale = sum(side.abs() for side in logps.of_pairs(logps.policy.detach()))
    tie = margin.abs() <= 4 * torch.finfo(torch.float32).eps * scale
    right = torch.where(logps.preference < 0.5, -margin, margin) > 0
    return torch.where(tie | (logps.preference == 0.5), 0.5, right.double())
