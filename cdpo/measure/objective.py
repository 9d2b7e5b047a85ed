"""The RLHF objective J of a policy, exactly, on Items whose candidate responses have known rewards.

J(pi) = E_pi[r] - beta * KL(pi || pi_ref), policy and reference as distributions on each Item's K responses
(`Logps.renormalised`): exact where these are all responses, an estimate where they were drawn from the reference, and
where they are from elsewhere the J of a choice among K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cdpo.batch import Logps


def objective(logps: Logps, beta: float) -> dict[str, Tensor]:
    """J, its value at the reference and at the optimum pi* ~ pi_ref exp(r / beta), and what it is made of. name -> [I]

    Rewards in their own units; kl (policy to reference) and kl_to_optimum (policy to pi*) in nats; tv_to_optimum in
    [0, 1]. J_optimum - J = beta * kl_to_optimum. Needs logps.rewards.
    """
    assert logps.rewards is not None
    rewards, sums = logps.rewards.double(), logps.sum_by_item
    on_item = replace(logps, policy=logps.policy.detach().double()).renormalised()
    policy, reference = on_item.policy, on_item.reference
    optimum = logps.log_softmax_by_item(reference + rewards / beta)
    pi = policy.exp()
    expected, kl = (sums(pi * value) for value in (rewards, policy - reference))
    return {
        "J": expected - beta * kl,
        "J_reference": sums(reference.exp() * rewards),
        # log Z = log(ref(k) exp(r_k / beta) / pi*(k)) for every k; the mean under pi* is the stable way to say it
        "J_optimum": sums(optimum.exp() * (rewards - beta * (optimum - reference))),
        "kl": kl,
        "expected_reward": expected,
        "kl_to_optimum": sums(pi * (policy - optimum)),
        "tv_to_optimum": sums((pi - optimum.exp()).abs()) / 2,
    }


def to_bradley_terry(logps: Logps) -> dict[str, Tensor]:
    """Distances to the policy that explains the preferences, pi(k) ~ exp(r_k) on the candidates. name -> [I]

    Enumerated: the Bradley-Terry policy, which no reference and no beta enter. Uniform: that of a choice among the K.
    Of draws of the reference exp(r_k) makes pi_ref exp(r), another policy, so ask it of none. kl_to: KL(policy || it),
    at most max -log it(k); kl_from: KL(it || policy), which grows without end as a response is given up; nats.
    """
    assert logps.rewards is not None
    policy = replace(logps, policy=logps.policy.detach().double()).renormalised().policy
    right = logps.log_softmax_by_item(logps.rewards.double())
    return {
        "kl_to_bradley_terry": logps.sum_by_item(policy.exp() * (policy - right)),
        "kl_from_bradley_terry": logps.sum_by_item(right.exp() * (right - policy)),
        "tv_to_bradley_terry": logps.sum_by_item((policy.exp() - right.exp()).abs()) / 2,
    }


def effective_sample_size(logps: Logps) -> Tensor:
    """Of K draws of the reference, how many they are worth as draws of the policy: 1 / sum_k pi(k)^2, in [1, K]. [I]

    Kong 1992 (technical report 348, Department of Statistics, University of Chicago), for self-normalised weights.
    """
    return 1 / logps.sum_by_item((2 * logps.renormalised().policy.detach()).exp())


def attained(values: Mapping[str, float]) -> float:
    """(J - J_reference) / (J_optimum - J_reference): 0 for the reference, 1 for the optimum; NaN if these are equal."""
    best = values["J_optimum"] - values["J_reference"]
    rounding = 1e-12 * max(1.0, abs(values["J_optimum"]), abs(values["J_reference"]))
    return (values["J"] - values["J_reference"]) / best if best > rounding else float("nan")


def means(table: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the Items of what `objective` returned, and the share of the possible gain that is `attained`."""
    values = dict(zip(table, torch.stack([column.mean() for column in table.values()]).tolist()))
    return values | {"attained": attained(values)}
