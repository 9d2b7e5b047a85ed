"""Losses on pairs against TRL's own code, in values and gradients."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pair_losses import gradient, preset, random_logps

from cdpo.batch import Logps
from cdpo.losses import (
    AOT,
    BCO,
    DPO,
    EXO,
    FDPO,
    IPO,
    KTO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    WPO,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Robust,
    SimPO,
)  # fmt: skip
from cdpo.losses.loss import per_unit


def trl_dpo(logps: Logps, pair: int | slice, loss_type: str, **settings) -> torch.Tensor:
    """What DPOTrainer computes for one pair, or the mean of several: its real method, with a model that returns the
    given log-probs.
    """
    from trl import DPOTrainer

    rows = torch.atleast_2d(logps.pairs[pair]).T.flatten()  # all chosen, then all rejected
    length = logps.length[rows].long()
    mask = torch.arange(1, int(length.max()) + 1) <= length[:, None]  # [2, T]
    log_probs = mask * (logps.policy[rows] / logps.length[rows])[:, None]
    blank = torch.zeros_like(log_probs)
    outputs = {"entropy": blank, "mean_logits": blank, "is_top1": blank.bool(), "log_sum_sq_probs": blank}
    trainer = {
        "model": SimpleNamespace(training=False),
        "accelerator": SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "use_weighting": False,
        "ld_alpha": None,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "args": SimpleNamespace(discopop_tau=0.05),
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    completion_mask = torch.cat([torch.zeros(len(rows), 1), mask], dim=1).long()  # a prompt of one token
    inputs = {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": logps.reference[rows].chunk(2)[0],
        "ref_rejected_logps": logps.reference[rows].chunk(2)[1],
    }
    model = lambda **_: SimpleNamespace(log_probs=log_probs, **outputs)  # noqa: E731
    return DPOTrainer._compute_loss(SimpleNamespace(**(trainer | settings)), model, inputs, return_outputs=False)


# Ours and theirs, with the same meaning. On purpose not the same:
#   dpo with label_smoothing: TRL's sigmoid ignores it (test_label_smoothing_is_a_soft_label)
#   alpha: TRL counts from forward KL at 0 to reverse KL at 1, the paper and we the other way
#   bco: TRL leaves the shift out, so the baseline is 0 here
#   wpo: TRL aligns the weight with every token's sum of squared probabilities, which is set to 1 here
SAME_AS_TRL = {
    "dpo": (DPO(beta=0.3), "sigmoid", {"beta": 0.3}),
    "dpo per token": (DPO(beta=0.3, length_normalized=True), "sigmoid_norm", {"beta": 0.3}),
    "ipo": (IPO(tau=0.2, length_normalized=True), "ipo", {"beta": 0.2}),
    "hinge": (Hinge(beta=0.3), "hinge", {"beta": 0.3}),
    "robust": (Robust(beta=0.3, label_smoothing=0.2), "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    "exo": (EXO(beta=0.3, label_smoothing=0.01), "exo_pair", {"beta": 0.3, "label_smoothing": 0.01}),
    "nca": (NCA(beta=0.3), "nca_pair", {"beta": 0.3}),
    "bco": (BCO(beta=0.3), "bco_pair", {"beta": 0.3}),
    "sppo": (SPPO(beta=0.3), "sppo_hard", {"beta": 0.3}),
    "apo_zero": (APOZero(beta=0.3), "apo_zero", {"beta": 0.3}),
    "apo_down": (APODown(beta=0.3), "apo_down", {"beta": 0.3}),
    "discopop": (DiscoPOP(beta=0.3), "discopop", {"beta": 0.3}),
    "sft": (SFT(), "sft", {"beta": 0.3}),
    "forward_kl": (FDPO(0.3, "forward_kl"), "sigmoid", {"beta": 0.3, "f_divergence_type": "forward_kl"}),
    "jensen_shannon": (FDPO(0.3, "jensen_shannon"), "sigmoid", {"beta": 0.3, "f_divergence_type": "js_divergence"}),
    "alpha": (
        FDPO(0.3, "alpha", alpha=0.7),
        "sigmoid",
        {"beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "wpo": (WPO(DPO(beta=0.3)), "sigmoid", {"beta": 0.3, "use_weighting": True}),
}


@pytest.mark.parametrize(("loss", "loss_type", "settings"), SAME_AS_TRL.values(), ids=SAME_AS_TRL.keys())
def test_equals_trl_in_value_and_gradient(loss, loss_type, settings):
    dtype = torch.float32 if isinstance(loss, FDPO) and loss.divergence == "alpha" else torch.float64  # TRL's limit
    logps = replace(random_logps(seed=3, dtype=dtype), baseline=0.0)
    policy = logps.policy.clone().requires_grad_()
    theirs = torch.stack([trl_dpo(replace(logps, policy=policy), i, loss_type, **settings) for i in range(8)])
    torch.testing.assert_close(per_unit(loss, logps), theirs.detach(), rtol=1e-6, atol=1e-6)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), policy)
    torch.testing.assert_close(gradient(loss, logps), their_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("paired", "loss_type"), [(True, "aot"), (False, "aot_unpaired")])
def test_aot_equals_trl_on_a_batch(paired, loss_type):
    logps = random_logps(seed=3)
    policy = logps.policy.clone().requires_grad_()
    theirs = trl_dpo(replace(logps, policy=policy), slice(None), loss_type, beta=0.3)
    torch.testing.assert_close(AOT(0.3, paired)(logps).mean(), theirs.detach(), rtol=1e-6, atol=1e-6)
    (their_gradient,) = torch.autograd.grad(theirs, policy)
    torch.testing.assert_close(gradient(AOT(0.3, paired), logps) / 8, their_gradient, rtol=1e-6, atol=1e-6)


def trl_cpo(chosen, rejected, loss_type: str, **settings) -> torch.Tensor:
    """What CPOTrainer computes from the policy's log-probs, before its NLL."""
    from trl.experimental.cpo import CPOTrainer

    trainer = {"alpha": 0.0, "simpo_gamma": 0.4, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    trainer |= {"loss_type": loss_type} | settings
    return CPOTrainer.cpo_loss(SimpleNamespace(**trainer), chosen, rejected)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
def test_simpo_and_alphapo_equal_trl(alpha):
    logps = random_logps()
    theirs = trl_cpo(*logps.of_pairs(logps.policy / logps.length), "simpo", beta=1.5, alpha=alpha)
    torch.testing.assert_close(SimPO(beta=1.5, gamma=0.4, alpha=alpha)(logps), theirs, rtol=1e-6, atol=1e-6)


def test_cpo_equals_trl_in_the_preference():
    """The NLL differs on purpose: TRL's is a mean over all tokens of the batch."""
    logps = random_logps()
    theirs = trl_cpo(*logps.of_pairs(logps.policy), "sigmoid", beta=0.1)
    torch.testing.assert_close(preset("cpo")(logps) - SFT()(logps), theirs, rtol=1e-6, atol=1e-6)


def trl_kto(logps: Logps, kl: float, **settings) -> torch.Tensor:
    """What KTOTrainer computes for the responses of all pairs, whose KL it is told: a mean over responses."""
    from trl import KTOTrainer

    rows = logps.pairs.flatten()
    trainer = {
        "model": SimpleNamespace(training=False),
        "accelerator": SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        "aux_loss_enabled": False, "precompute_ref_logps": True, "calculate_KL": True, "loss_type": "kto",
        "_metrics": {"eval": defaultdict(list)}, "_total_train_tokens": 0,
        "_compute_kl_logps": lambda *_: torch.tensor([kl, kl]),
    }  # fmt: skip
    inputs = {
        "input_ids": torch.ones(len(rows), 2, dtype=torch.long),
        "completion_mask": torch.ones(len(rows), 2, dtype=torch.long),
        "label": torch.tensor([True, False]).repeat(len(logps.pairs)),
        "ref_logps": logps.reference[rows],
        "ref_KL_logps": torch.zeros(2),
    }
    log_probs = logps.policy[rows][:, None]
    outputs = dict.fromkeys(("entropy", "mean_logits", "is_top1"), torch.zeros_like(log_probs))
    model = lambda **_: SimpleNamespace(log_probs=log_probs, **outputs)  # noqa: E731
    return KTOTrainer._compute_loss(SimpleNamespace(**(trainer | settings)), model, inputs, return_outputs=False)


@pytest.mark.parametrize("kl", [0.7, -0.7])
def test_kto_equals_trl(kl):
    """Of a pair we take the sum of both responses, TRL the mean."""
    logps = replace(random_logps(), baseline=kl)
    theirs = trl_kto(logps, kl, beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    ours = KTO(beta=0.3, desirable=1.3, undesirable=0.8)(logps).mean() / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_orpo_equals_trl_in_the_odds_ratio():
    """The NLL differs on purpose: TRL's is a mean over all tokens of the batch, prompts included."""
    from trl.experimental.orpo import ORPOTrainer

    logps = random_logps(dtype=torch.float32)
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = logps.of_pairs(logps.policy / logps.length)
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(ORPO(beta=0.4)(logps), -chosen + theirs, rtol=1e-6, atol=1e-6)
