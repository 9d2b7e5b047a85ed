"""Every loss against something that cannot share its mistake: TRL's own code, mpmath, numbers worked out by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

from cdpo.batch import Logps
from cdpo.errors import ConfigError, NumericsError
from cdpo.losses.combined import WPO, Sum
from cdpo.losses.divergence import FDPO
from cdpo.losses.gaussian import Gaussian
from cdpo.losses.loss import check_finite, per_unit
from cdpo.losses.numerics import exp_or_tangent, log_odds
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

CONF = Path(__file__).parents[2] / "conf"
PRESETS = sorted(file.stem for file in (CONF / "loss").glob("*.yaml"))


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(overrides=["+beta=0.1", *overrides]).loss


def preset(name: str):
    return instantiate(composed(f"+loss={name}"), _convert_="all")


# what no preset covers: other branches of the same classes
VARIANTS = {
    "dpo smoothed": DPO(label_smoothing=0.2),
    "discopop wide": DiscoPOP(tau=3.0),
    "odpo rewards": ODPO(offset="rewards", scale=0.5),
    "sft sum": SFT(length_normalized=False),
    "wpo importance": WPO(FDPO(divergence="forward_kl"), weight="importance"),
    "gaussian linear schedule": Gaussian(noise_scale=50.0, noise_schedule="linear"),
    "gaussian constant linear": Gaussian(noise="constant", noise_scale=2.0, penalty="linear"),
}
LOSSES = {name: loss for name, loss in ((n, preset(n)) for n in PRESETS) if loss.unit == "pair"} | VARIANTS
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def logps_of(policy, reference, length, **more) -> Logps:
    """Pairs (0, 1), (2, 3), ... of the given responses, one pair per Item."""
    policy = torch.as_tensor(policy)
    pairs = torch.arange(len(policy)).view(-1, 2)
    like = {"dtype": policy.dtype}
    count = len(pairs)
    defaults = {"preference": torch.ones(count, **like), "weight": torch.ones(count, **like)}
    return Logps(
        policy=policy,
        reference=torch.as_tensor(reference, **like),
        length=torch.as_tensor(length, **like),
        item=torch.arange(len(policy)) // 2,
        pairs=pairs,
        sources=tuple(f"data.jsonl:{i + 1}" for i in range(count)),
        **(defaults | more),
    )


def random_logps(pairs: int = 8, seed: int = 0, dtype=torch.float64, **more) -> Logps:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 9, (2 * pairs,), generator=g)
    policy, reference = -2 * length * torch.rand(2, 2 * pairs, generator=g, dtype=torch.float64)
    rewards = torch.randn(2 * pairs, generator=g, dtype=torch.float64).to(dtype)
    return logps_of(policy.to(dtype), reference.to(dtype), length, rewards=rewards, progress=0.3, baseline=0.7, **more)


def gradient(loss, logps: Logps) -> torch.Tensor:
    policy = logps.policy.detach().requires_grad_()
    return torch.autograd.grad(per_unit(loss, replace(logps, policy=policy)).sum(), policy)[0]


# --- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_lists_the_keys_of_its_class_in_order(name):
    assert sorted(composed(f"+loss={name}")) == sorted(["_target_"] + [f.name for f in fields(preset(name))])


def test_wpo_takes_any_loss():
    config = composed("+loss=wpo", "loss@loss.loss=ipo", "loss.loss.tau=0.3")
    assert instantiate(config) == WPO(IPO(tau=0.3))


def test_a_part_of_a_sum_can_be_set():
    config = composed("+loss=dpo_sft", "loss.losses.dpo.beta=0.2", "loss.weights.sft=0.5")
    expected = Sum({"dpo": DPO(beta=0.2), "sft": SFT()}, {"dpo": 1.0, "sft": 0.5})
    assert instantiate(config, _convert_="all") == expected


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


# --- TRL's own code, fed with our log-probs ------------------------------------------------------------------------


def trl_dpo(logps: Logps, pair: int, loss_type: str, **settings) -> torch.Tensor:
    """What DPOTrainer computes for one pair: its real method, with a model that returns the given log-probs."""
    from trl import DPOTrainer

    rows = logps.pairs[pair]
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
    completion_mask = torch.cat([torch.zeros(2, 1), mask], dim=1).long()  # a prompt of one token
    inputs = {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": logps.reference[rows[:1]],
        "ref_rejected_logps": logps.reference[rows[1:]],
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


def test_simpo_equals_trl():
    from trl.experimental.cpo import CPOTrainer

    logps = random_logps()
    trainer = {"alpha": 0.0, "loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.4, "label_smoothing": 0.0}
    trainer["accelerator"] = SimpleNamespace(device="cpu")
    theirs = CPOTrainer.cpo_loss(SimpleNamespace(**trainer), *logps.of_pairs(logps.policy / logps.length))[0]
    torch.testing.assert_close(SimPO(beta=1.5, gamma=0.4)(logps), theirs, rtol=1e-6, atol=1e-6)


def test_orpo_equals_trl_in_the_odds_ratio():
    """The NLL differs on purpose: TRL's is a mean over all tokens of the batch, prompts included."""
    from trl.experimental.orpo import ORPOTrainer

    logps = random_logps(dtype=torch.float32)
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = logps.of_pairs(logps.policy / logps.length)
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(ORPO(beta=0.4)(logps), -chosen + theirs, rtol=1e-6, atol=1e-6)


# --- an oracle: the formulas as the papers print them, in 60 digits ------------------------------------------------


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def f_prime(loss, u):
    a = loss.alpha
    return {
        "reverse_kl": lambda: mp.log(u) + 1,
        "forward_kl": lambda: -1 / u,
        "jensen_shannon": lambda: mp.log(2 * u / (1 + u)),
        "alpha": lambda: (1 - u ** (-mp.mpf(a))) / a,
    }[loss.divergence]()


def gaussian(loss, r):
    """From the variances themselves; the variational bound by its closed form in them, which test_gaussian checks."""
    c0, t = mp.mpf(loss.noise_scale), mp.mpf(r.progress)
    c = {None: c0, "linear": c0 + (1 - c0) * t, "exponential": c0 ** (1 - t)}[loss.noise_schedule]
    signal = (r.l / r.w) ** loss.beta
    noise = c * ((r.ref_l / r.ref_w) ** loss.beta if loss.noise == "reference" else 1)
    x = mp.sqrt(signal)
    s = mp.sqrt(4 * noise + signal)
    penalty = {
        "log": lambda: mp.log(signal + noise) - mp.log(noise),
        "variational": lambda: 2 * x / (x + s) + mp.log((2 * noise + signal + x * s) / 2) - mp.log(noise),
        "linear": lambda: signal / noise,
        "power": lambda: (signal / noise) ** loss.power,
    }[loss.penalty]()
    return penalty + (0 if loss.observation is None else mp.mpf(loss.observation) ** 2 / (signal + noise))


def odds(p):
    return p / (1 - p)


ORACLES = {
    DPO: lambda L, r: (
        -(1 - L.label_smoothing) * mp.log(sigmoid(L.beta * r.m)) - L.label_smoothing * mp.log(sigmoid(-L.beta * r.m))
    ),
    IPO: lambda L, r: ((r.dw / r.nw - r.dl / r.nl if L.length_normalized else r.m) - 1 / (2 * mp.mpf(L.tau))) ** 2,
    Hinge: lambda L, r: max(0, 1 - L.beta * r.m),
    Robust: lambda L, r: (
        (-(1 - L.label_smoothing) * mp.log(sigmoid(L.beta * r.m)) + L.label_smoothing * mp.log(sigmoid(-L.beta * r.m)))
        / (1 - 2 * L.label_smoothing)
    ),
    EXO: lambda L, r: sum(
        q * mp.log(q / p)
        for q, p in [
            (sigmoid(L.beta * r.m), 1 - L.label_smoothing),
            (sigmoid(-L.beta * r.m), L.label_smoothing),
        ]
    ),
    NCA: lambda L, r: -mp.log(sigmoid(L.beta * r.dw)) - mp.log(sigmoid(-L.beta * r.dw) * sigmoid(-L.beta * r.dl)) / 2,
    BCO: lambda L, r: (
        -mp.log(sigmoid(L.beta * r.dw - L.beta * r.baseline)) - mp.log(sigmoid(L.beta * r.baseline - L.beta * r.dl))
    ),
    SPPO: lambda L, r: (r.dw - 1 / (2 * mp.mpf(L.beta))) ** 2 + (r.dl + 1 / (2 * mp.mpf(L.beta))) ** 2,
    APOZero: lambda L, r: 1 - sigmoid(L.beta * r.dw) + sigmoid(L.beta * r.dl),
    APODown: lambda L, r: sigmoid(L.beta * r.dw) + 1 - sigmoid(L.beta * r.m),
    DiscoPOP: lambda L, r: (
        -mp.log(sigmoid(L.beta * r.m)) * (1 - sigmoid(L.beta * r.m / L.tau))
        + mp.exp(-L.beta * r.m) * sigmoid(L.beta * r.m / L.tau)
    ),
    SimPO: lambda L, r: -mp.log(sigmoid(L.beta * (mp.log(r.w) / r.nw - mp.log(r.l) / r.nl) - L.gamma)),
    ORPO: lambda L, r: (
        -mp.log(r.w) / r.nw - L.beta * mp.log(sigmoid(mp.log(odds(r.w ** (1 / r.nw)) / odds(r.l ** (1 / r.nl)))))
    ),
    ODPO: lambda L, r: -mp.log(sigmoid(L.beta * r.m - L.scale * (1 if L.offset == "constant" else r.gap))),
    FDPO: lambda L, r: -mp.log(sigmoid(L.beta * (f_prime(L, mp.exp(r.dw)) - f_prime(L, mp.exp(r.dl))))),
    EXPO: lambda L, r: -mp.log(r.w / (r.w + r.l)) + L.beta / 2 * (r.w / r.ref_w + r.l / r.ref_l - 2 - r.dw - r.dl),
    SFT: lambda L, r: -mp.log(r.w) / (r.nw if L.length_normalized else 1),
    WPO: lambda L, r: (
        {
            "per_token": lambda: r.w ** (1 / r.nw) * r.l ** (1 / r.nl),
            "importance": lambda: r.w * r.l / (r.ref_w * r.ref_l),
            # on two candidates the policy is w / (w + l) and l / (w + l)
            "candidates": lambda: r.w * r.l / (r.w + r.l) ** 2 / (r.ref_w * r.ref_l / (r.ref_w + r.ref_l) ** 2),
        }[L.weight]()
        * ORACLES[type(L.loss)](L.loss, r)
    ),
    Sum: lambda L, r: sum(L.weights[name] * ORACLES[type(part)](part, r) for name, part in L.losses.items()),
    Gaussian: gaussian,
}


def oracle(loss, logps: Logps, pair: int, chosen=None, rejected=None):
    """The printed formula of one pair, at other log-probs of the policy if given."""
    w, l = logps.pairs[pair].tolist()  # noqa: E741
    at = lambda values, s: mp.mpf(float(values[s]))  # noqa: E731
    log_w = at(logps.policy, w) if chosen is None else chosen
    log_l = at(logps.policy, l) if rejected is None else rejected
    dw, dl = log_w - at(logps.reference, w), log_l - at(logps.reference, l)
    return ORACLES[type(loss)](
        loss,
        SimpleNamespace(
            w=mp.exp(log_w),
            l=mp.exp(log_l),
            ref_w=mp.exp(at(logps.reference, w)),
            ref_l=mp.exp(at(logps.reference, l)),
            dw=dw,
            dl=dl,
            m=dw - dl,
            nw=at(logps.length, w),
            nl=at(logps.length, l),
            gap=at(logps.rewards, w) - at(logps.rewards, l),
            progress=logps.progress,
            baseline=mp.mpf(logps.baseline),
        ),
    )


@every_loss
def test_value_equals_the_printed_formula(loss):
    logps = random_logps(pairs=12, seed=1)
    with mp.workdps(60):
        expected = torch.tensor([float(oracle(loss, logps, i)) for i in range(12)], dtype=torch.float64)
    torch.testing.assert_close(loss(logps), expected, rtol=1e-9, atol=1e-12)
    single = random_logps(pairs=12, seed=1, dtype=torch.float32)
    torch.testing.assert_close(loss(single).double(), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "loss", [v for v in LOSSES.values() if not isinstance(v, WPO)], ids=[k for k in LOSSES if "wpo" not in k]
)
def test_gradient_equals_that_of_the_printed_formula(loss):
    """Without WPO, whose weight has no gradient on purpose."""
    logps = random_logps(pairs=4, seed=2)
    expected = []
    with mp.workdps(60):
        for i, (w, l) in enumerate(logps.pairs.tolist()):  # noqa: E741
            f = lambda x, y, i=i: oracle(loss, logps, i, x, y)  # noqa: E731
            at = (mp.mpf(float(logps.policy[w])), mp.mpf(float(logps.policy[l])))
            expected += [float(mp.diff(f, at, (1, 0))), float(mp.diff(f, at, (0, 1)))]
    torch.testing.assert_close(
        gradient(loss, logps), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-12
    )


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


# --- what every loss promises --------------------------------------------------------------------------------------


def with_strength(loss, beta: float):
    """The same loss with another beta or tau, also in its parts."""
    if isinstance(loss, WPO):
        return replace(loss, loss=with_strength(loss.loss, beta))
    if isinstance(loss, Sum):
        return replace(loss, losses={name: with_strength(part, beta) for name, part in loss.losses.items()})
    known = {f.name for f in fields(loss)} if is_dataclass(loss) else set()
    return replace(loss, **{name: beta for name in ("beta", "tau") if name in known})


extreme = st.one_of(
    st.sampled_from([0.0, -1e-7, -1e6, 1e6]), st.floats(-1e6, 1e6, width=32), st.floats(-40, 0, width=32)
)
responses = st.lists(extreme, min_size=8, max_size=8)


@every_loss
@settings(max_examples=60, deadline=None)
@given(
    policy=responses,
    reference=responses,
    length=st.lists(st.integers(1, 50), min_size=8, max_size=8),
    preference=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4, max_size=4),
    beta=st.floats(-3, 1).map(lambda e: 10**e),
    progress=st.floats(0, 1, exclude_max=True),
    baseline=st.floats(-1e3, 1e3),
)
def test_extreme_log_probs_give_finite_values_and_gradients(
    loss, policy, reference, length, preference, beta, progress, baseline
):
    policy = torch.tensor(policy, dtype=torch.float32, requires_grad=True)
    more = {"rewards": torch.linspace(-2, 2, 8), "progress": progress, "baseline": baseline}
    logps = logps_of(policy, reference, length, preference=torch.tensor(preference), **more)
    values = per_unit(with_strength(loss, beta), logps)
    (slope,) = torch.autograd.grad(values.sum(), policy)
    assert values.shape == (4,)
    assert values.isfinite().all()
    assert slope.isfinite().all()


def value_and_slope(function, at: float) -> tuple[float, float]:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    y = function(x)
    return y.item(), torch.autograd.grad(y, x)[0].item()


def test_the_exponential_goes_on_as_its_tangent():
    for x in (-700.0, -1.0, 0.0, 29.9, 30.0):
        assert value_and_slope(exp_or_tangent, x) == pytest.approx((math.exp(x), math.exp(x)), rel=1e-12)
    for x in (30.1, 88.0, 1e6):
        assert value_and_slope(exp_or_tangent, x) == pytest.approx((math.exp(30) * (x - 29), math.exp(30)), rel=1e-12)


def test_log_odds_go_on_as_their_tangent():
    for p in (1e-300, 0.1, 0.5, 0.999, 1 - 2e-6):
        assert value_and_slope(log_odds, math.log(p)) == pytest.approx((math.log(p / (1 - p)), 1 / (1 - p)), rel=1e-9)
    for x in (-1e-7, 0.0, 3.0):
        expected = math.log(1e6) + 1e6 * (x + 1e-6), 1e6
        assert value_and_slope(log_odds, x) == pytest.approx(expected, rel=1e-6)


@every_loss
def test_soft_labels_are_two_terms(loss):
    p = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    logps = random_logps(pairs=4, preference=p)
    flipped = replace(logps, pairs=logps.pairs[:, [1, 0]])
    torch.testing.assert_close(per_unit(loss, logps), p * loss(logps) + (1 - p) * loss(flipped))


@every_loss
def test_a_pair_may_be_written_either_way_round(loss):
    logps = random_logps(pairs=4, preference=torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(per_unit(loss, logps.swapped()), per_unit(loss, logps))


@every_loss
@pytest.mark.parametrize("split", [(4, 4), (5, 3), (1,) * 8])
def test_gradient_does_not_depend_on_micro_batches(loss, split):
    weight = torch.arange(1.0, 9.0, dtype=torch.float64)
    whole = random_logps(preference=torch.linspace(0.3, 1.0, 8, dtype=torch.float64), weight=weight)
    policy = whole.policy.clone().requires_grad_()

    def backward(pairs: slice) -> torch.Tensor:
        rows = slice(2 * pairs.start, 2 * pairs.stop)
        per_response = ("reference", "length", "item", "rewards")
        part = {name: getattr(whole, name)[rows] for name in per_response}
        part |= {name: getattr(whole, name)[pairs] for name in ("preference", "weight")}
        logps = replace(whole, policy=policy[rows], pairs=whole.pairs[pairs] - rows.start, **part)
        return torch.autograd.grad((logps.weight * per_unit(loss, logps)).sum() / weight.sum(), policy)[0]

    ends = torch.tensor(split).cumsum(0).tolist()
    parts = sum(backward(slice(end - n, end)) for n, end in zip(split, ends))
    torch.testing.assert_close(parts, backward(slice(0, 8)), rtol=1e-12, atol=1e-14)


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_broken_log_probs_are_named(side, bad):
    logps = random_logps()
    getattr(logps, side)[5] = bad
    with pytest.raises(NumericsError, match=r"1 of 16 .*data\.jsonl:3, response row 5"):
        check_finite(logps)


def test_many_broken_log_probs_are_counted():
    logps = random_logps()
    logps.policy[2:] = math.nan
    with pytest.raises(NumericsError, match=r"14 of 16 .*data\.jsonl:2, response row 2 .*; \.\.\."):
        check_finite(logps)
    with pytest.raises(NumericsError, match="item 1, response row 2"):
        check_finite(replace(logps, sources=()))


def test_hard_labels_are_evaluated_once_and_item_losses_as_they_are():
    calls = []

    class Counting:
        unit = "pair"

        def __call__(self, logps):
            calls.append(logps)
            return logps.margin()

    class PerItem:
        unit = "item"

        def __call__(self, logps):
            return torch.arange(3.0)

    hard = random_logps(pairs=4)
    soft = replace(hard, preference=torch.full((4,), 0.5))
    torch.testing.assert_close(per_unit(Counting(), hard), hard.margin())
    torch.testing.assert_close(per_unit(Counting(), replace(hard, soft=False)), hard.margin())
    assert [len(one.pairs) for one in calls] == [8, 4]  # both ways, unless known to be hard
    assert per_unit(PerItem(), soft).tolist() == [0, 1, 2]


# --- what single losses promise ------------------------------------------------------------------------------------


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


def test_the_weight_of_wpo_has_no_gradient():
    logps = random_logps()
    weight = (logps.policy / logps.length).view(-1, 2).sum(1).exp()
    torch.testing.assert_close(gradient(WPO(DPO()), logps), weight.repeat_interleave(2) * gradient(DPO(), logps))


def test_importance_weights_move_pairs_of_the_reference_onto_the_policy():
    """The mean over pairs drawn from the reference equals the mean over pairs drawn from the policy."""
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, generator=g, dtype=torch.float64).log_softmax(-1)
    logps = all_pairs(policy, reference)
    of = lambda log_pi: log_pi.exp()[logps.pairs].prod(1)  # noqa: E731
    weighted = of(reference) @ WPO(DPO(), weight="importance")(logps)
    torch.testing.assert_close(weighted, of(policy) @ DPO()(logps))


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_candidate_weights_move_pairs_onto_the_policy_wherever_they_were_drawn(p):
    """Drawn from the reference or uniformly: the mean is that over pairs from the policy, less the labels' entropy."""
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, generator=g, dtype=torch.float64)  # not normalised on the four
    logps = all_pairs(policy, reference)
    logps = replace(logps, preference=torch.full_like(logps.preference, p))
    of = lambda log_pi: log_pi.softmax(-1)[logps.pairs].prod(1)  # noqa: E731
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p) if p < 1 else 0.0
    expected = of(policy) @ (per_unit(DPO(), logps) - entropy)
    for drawn, mass in (("reference", of(reference)), ("uniform", torch.full((16,), 1 / 16, dtype=torch.float64))):
        found = mass @ per_unit(WPO(DPO(), weight="candidates", drawn=drawn), logps)
        torch.testing.assert_close(found, expected)


def test_the_value_of_wpo_is_zero_where_every_pair_is_fitted():
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    logps = all_pairs(rewards / 0.1, torch.zeros_like(rewards))
    logps = replace(logps, preference=(rewards[logps.pairs[:, 0]] - rewards[logps.pairs[:, 1]]).sigmoid())
    found = per_unit(WPO(DPO(beta=0.1), weight="candidates", drawn="uniform"), logps)
    torch.testing.assert_close(found, torch.zeros_like(found))


def all_pairs(policy: torch.Tensor, reference: torch.Tensor) -> Logps:
    """One prompt, K one-token responses, all K^2 ordered pairs."""
    pairs = torch.cartesian_prod(torch.arange(len(policy)), torch.arange(len(policy)))
    ones = torch.ones(len(pairs), dtype=policy.dtype)
    item = torch.zeros(len(policy), dtype=torch.long)
    return Logps(policy, reference, torch.ones_like(policy), item, pairs, ones, ones)


def test_expo_is_bradley_terry_plus_the_exact_kl_when_the_reference_wrote_the_pairs():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=g, dtype=torch.float64).log_softmax(-1)
    logps = all_pairs(policy, reference)
    mass = reference.exp()[logps.pairs].prod(1)
    winner, loser = policy.exp()[logps.pairs].unbind(1)
    kl = torch.nn.functional.kl_div(policy, reference, reduction="sum", log_target=True)
    expected = mass @ -(winner / (winner + loser)).log() + 0.3 * kl
    torch.testing.assert_close(mass @ EXPO(beta=0.3)(logps), expected)


def test_a_sum_is_linear():
    logps = random_logps()
    both = Sum({"a": DPO(), "b": SFT()}, {"a": 2.0, "b": 0.5})
    torch.testing.assert_close(both(logps), 2 * DPO()(logps) + 0.5 * SFT()(logps))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_reads_the_baseline_says_so(name):
    """The engine keeps it only for those; others are given None."""
    loss, logps = LOSSES[name], random_logps()
    reads = not torch.equal(per_unit(loss, logps), per_unit(loss, replace(logps, baseline=0.5)))
    assert getattr(loss, "reads_baseline", False) == reads


def test_a_loss_with_one_within_that_reads_the_baseline_reads_it():
    assert Sum({"a": DPO(), "b": BCO()}, {"a": 1.0, "b": 1.0}).reads_baseline
    assert WPO(BCO()).reads_baseline
    assert not WPO(DPO()).reads_baseline
