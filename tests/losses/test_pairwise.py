"""Losses on pairs one by one: their settings, numbers worked out by hand, and what each of them promises."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from pair_losses import PRESETS, all_pairs, composed, gradient, logps_of, preset, random_logps

from cdpo.errors import ConfigError
from cdpo.losses.combined import WPO, Sum
from cdpo.losses.divergence import FDPO
from cdpo.losses.gaussian import Gaussian
from cdpo.losses.loss import per_unit
from cdpo.losses.pairwise import (
    BCO,
    DPO,
    EXO,
    EXPO,
    IPO,
    NCA,
    ODPO,
    ORPO,
    SFT,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Robust,
    SimPO,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_lists_the_keys_of_its_class(name):
    assert sorted(composed(f"+loss={name}")) == sorted(["_target_"] + [f.name for f in fields(preset(name))])


WRONG = [
    (DPO, {"beta": 0.0}, "beta"),
    (DPO, {"beta": math.nan}, "beta"),
    (DPO, {"label_smoothing": 0.5}, "label_smoothing"),
    (IPO, {"tau": -1.0}, "tau"),
    (Robust, {"label_smoothing": 0.7}, "label_smoothing"),
    (EXO, {"label_smoothing": 0.0}, "label_smoothing"),
    (DiscoPOP, {"tau": 0.0}, "tau"),
    (SimPO, {"gamma": -0.1}, "gamma"),
    (ODPO, {"scale": math.inf}, "scale"),
    (ODPO, {"offset": "reward"}, "offset"),
    (FDPO, {"divergence": "kl"}, "divergence"),
    (FDPO, {"alpha": 0.5}, "alpha"),
    (FDPO, {"divergence": "alpha"}, "alpha"),
    (FDPO, {"divergence": "alpha", "alpha": 1.0}, "alpha"),
    (WPO, {"loss": DPO(), "weight": "sequence"}, "weight"),
    (WPO, {"loss": DPO(), "weight": "candidates"}, "drawn"),
    (WPO, {"loss": DPO(), "drawn": "uniform"}, "drawn"),
    (WPO, {"loss": SimpleNamespace(unit="item")}, "loss"),
    (Sum, {"losses": {}, "weights": {}}, "losses"),
    (Sum, {"losses": {"dpo": DPO()}, "weights": {"sft": 1.0}}, "weights"),
    (Sum, {"losses": {"dpo": DPO()}, "weights": {"dpo": -1.0}}, "weights.dpo"),
    (Sum, {"losses": {"rlhf": SimpleNamespace(unit="item")}, "weights": {"rlhf": 1.0}}, "losses.rlhf"),
]


@pytest.mark.parametrize(("cls", "settings", "named"), WRONG)
def test_an_unusable_setting_is_an_error_that_names_it(cls, settings, named):
    with pytest.raises(ValueError, match=named):
        cls(**settings)


def test_an_offset_from_rewards_needs_rewards():
    with pytest.raises(ConfigError, match="offset=constant"):
        ODPO(offset="rewards")(replace(random_logps(), rewards=None))


AT_ZERO_MARGIN = [
    (DPO(), math.log(2)),
    (IPO(tau=0.1), 25.0),
    (Hinge(), 1.0),
    (Robust(), math.log(2)),
    (EXO(label_smoothing=0.1), math.log(0.5 / 0.3)),  # sqrt(0.1 * 0.9) = 0.3
    (NCA(), 2 * math.log(2)),
    (BCO(), 2 * math.log(2)),
    (SPPO(beta=0.1), 50.0),
    (APOZero(), 1.0),
    (APODown(), 1.0),
    (DiscoPOP(), (math.log(2) + 1) / 2),
    (FDPO(divergence="jensen_shannon"), math.log(2)),
    (SimPO(beta=2.0, gamma=0.0), math.log(1 + math.e)),  # means are -1.5 and -1 per token
    (ODPO(scale=math.log(3)), math.log(4)),
    (EXPO(), math.log(2)),
    (SFT(), 1.5),
    (SFT(length_normalized=False), 3.0),
    (Gaussian(), math.log(2)),
]


@pytest.mark.parametrize(("loss", "expected"), AT_ZERO_MARGIN)
def test_numbers_worked_out_by_hand_where_policy_is_reference(loss, expected):
    logps = logps_of([-3.0, -3.0], [-3.0, -3.0], [2, 3])
    torch.testing.assert_close(loss(logps), torch.tensor([expected]), rtol=1e-6, atol=1e-6)


MONOTONE = [DPO(), Hinge(beta=0.01), Robust(), BCO(), APOZero(), SimPO(), ORPO(), ODPO(), Gaussian()]
MONOTONE += [FDPO(divergence=name) for name in ("reverse_kl", "forward_kl", "jensen_shannon")]
MONOTONE += [FDPO(divergence="alpha", alpha=0.4), Gaussian(penalty="linear"), Gaussian(penalty="variational")]


@pytest.mark.parametrize("loss", MONOTONE, ids=repr)
def test_chosen_is_pushed_up_and_rejected_down(loss):
    near = random_logps(pairs=50, seed=5)
    near = replace(near, reference=near.policy + 0.2 * near.rewards)
    chosen, rejected = gradient(loss, near).view(-1, 2).unbind(1)
    assert (chosen < 0).all()
    assert (rejected > 0).all()
    far = replace(near, policy=1e5 * near.policy, reference=1e5 * near.reference.flip(0))
    chosen, rejected = gradient(loss, far).view(-1, 2).unbind(1)
    assert (chosen <= 0).all()  # where exp underflows, 0
    assert (rejected >= 0).all()


def test_label_smoothing_is_a_soft_label():
    logps = random_logps()
    soft = replace(logps, preference=torch.full((8,), 0.8, dtype=torch.float64))
    torch.testing.assert_close(DPO(label_smoothing=0.2)(logps), per_unit(DPO(), soft))


def test_robust_is_unbiased_under_flipped_labels():
    """E over labels, of which a share e is flipped, is the DPO loss of the clean labels."""
    logps = random_logps()
    flipping = replace(logps, preference=torch.full((8,), 0.8, dtype=torch.float64))
    torch.testing.assert_close(per_unit(Robust(label_smoothing=0.2), flipping), DPO()(logps))


def test_sppo_with_soft_labels_has_its_minimum_at_the_win_rate():
    logps = logps_of([3.5, -2.5], [1.0, 0.0], [1, 1], preference=torch.tensor([0.75]))  # log-ratios +-(p - 1/2) / beta
    torch.testing.assert_close(gradient(SPPO(beta=0.1), logps), torch.zeros(2))


def test_expo_is_bradley_terry_plus_the_exact_kl_when_the_reference_wrote_the_pairs():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=g, dtype=torch.float64).log_softmax(-1)
    logps = all_pairs(policy, reference)
    mass = reference.exp()[logps.pairs].prod(1)
    winner, loser = policy.exp()[logps.pairs].unbind(1)
    kl = torch.nn.functional.kl_div(policy, reference, reduction="sum", log_target=True)
    expected = mass @ -(winner / (winner + loser)).log() + 0.3 * kl
    torch.testing.assert_close(mass @ EXPO(beta=0.3)(logps), expected)
