"""Losses on pairs one by one: their settings, numbers worked out by hand, and what each of them promises."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from pair_losses import PRESETS, all_pairs, composed, gradient, logps_of, preset, random_logps

from cdpo.errors import ConfigError
from cdpo.losses import (
    BCO,
    DPO,
    EXO,
    EXPO,
    FDPO,
    IPO,
    KTO,
    NCA,
    ODPO,
    ORPO,
    REBEL,
    SFT,
    SPPO,
    WPO,
    APODown,
    APOZero,
    CalDPO,
    DiscoPOP,
    DPOPositive,
    EXPORegression,
    Gaussian,
    Hinge,
    Robust,
    SimPO,
    Sum,
)  # fmt: skip
from cdpo.losses.loss import per_unit


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
    (SimPO, {"alpha": math.inf}, "alpha"),
    (EXPO, {"kl": "all"}, "kl"),
    (DPOPositive, {"penalty": 0.0}, "penalty"),
    (CalDPO, {"weight": -1.0}, "weight"),
    (KTO, {"desirable": 0.0}, "desirable"),
    (KTO, {"undesirable": math.nan}, "undesirable"),
    (KTO, {"kl": "batch"}, "kl"),
    (FDPO, {"max_reward": 1.0}, "max_reward"),
    (FDPO, {"divergence": "chi_squared", "max_reward": 0.0}, "max_reward"),
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
    with pytest.raises(ConfigError, match="rewards"):
        REBEL()(replace(random_logps(), rewards=None))


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
    (EXPORegression(), 0.25),
    (DPO(length_normalized=True), math.log(2)),
    (FDPO(divergence="chi_squared"), math.log(2)),
    (SimPO(beta=2.0, gamma=0.0, alpha=-1.0), math.log(1 + math.exp(2 * (math.exp(-1) - math.exp(-1.5))))),
    (DPOPositive(), math.log(2)),
    (CalDPO(beta=0.1), math.log(2) + 50),
    (KTO(desirable=1.0, undesirable=3.0, kl="candidates"), 2.0),
    (SFT(), 1.5),
    (SFT(length_normalized=False), 3.0),
    (Gaussian(), math.log(2)),
]


@pytest.mark.parametrize(("loss", "expected"), AT_ZERO_MARGIN)
def test_numbers_worked_out_by_hand_where_policy_is_reference(loss, expected):
    logps = logps_of([-3.0, -3.0], [-3.0, -3.0], [2, 3])
    torch.testing.assert_close(loss(logps), torch.tensor([expected]), rtol=1e-6, atol=1e-6)


MONOTONE = [DPO(), Hinge(beta=0.01), Robust(), BCO(), APOZero(), SimPO(), ORPO(), ODPO(), Gaussian()]
MONOTONE += [FDPO(divergence=name) for name in ("reverse_kl", "forward_kl", "jensen_shannon", "chi_squared")]
MONOTONE += [DPO(length_normalized=True), DPOPositive(penalty=3.0), SimPO(alpha=0.25), KTO(kl="candidates")]
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


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_exo_with_soft_labels_has_its_minimum_at_their_log_odds(p):
    e, beta = 0.1, 0.5
    q = e + (1 - 2 * e) * p
    at = torch.tensor([math.log(q / (1 - q)) / beta, 0.0], dtype=torch.float64)
    logps = logps_of(at, [0.0, 0.0], [1, 1], preference=torch.tensor([p], dtype=torch.float64))
    loss, zero = EXO(beta=beta, label_smoothing=e), torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(per_unit(loss, logps), zero[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(loss, logps), zero, rtol=0, atol=1e-12)


def test_dpo_positive_is_dpo_while_the_chosen_response_is_above_the_reference():
    above = logps_of([-2.0, -5.0], [-3.0, -3.0], [1, 1])
    below = logps_of([-4.0, -7.0], [-3.0, -3.0], [1, 1])  # the same margin of 3, a nat below
    torch.testing.assert_close(DPOPositive()(above), DPO()(above))
    expected = torch.tensor([math.log(1 + math.exp(-0.1 * (3 - 50 * 1)))])
    torch.testing.assert_close(DPOPositive()(below), expected)


def test_rebel_on_all_pairs_has_its_minimum_at_the_optimal_policy():
    """pi_ref exp(r / beta), which leaves no error."""
    rewards = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    logps = replace(all_pairs(reference + rewards / 0.7 - 1.1, reference), rewards=rewards)
    torch.testing.assert_close(REBEL(beta=0.7)(logps), torch.zeros(9, dtype=torch.float64))


def test_kto_without_a_kl_is_apo_zero():
    logps = replace(random_logps(), baseline=-0.3)  # a KL is not negative
    torch.testing.assert_close(KTO()(logps), APOZero()(logps))


def test_cpo_is_reference_free_dpo_and_sft():
    logps = random_logps()
    chosen, rejected = logps.of_pairs(logps.policy)
    expected = -(0.1 * (chosen - rejected)).sigmoid().log() - logps.of_pairs(logps.policy / logps.length)[0]
    torch.testing.assert_close(preset("cpo")(logps), expected)
