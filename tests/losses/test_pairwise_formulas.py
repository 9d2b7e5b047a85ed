"""Every loss on pairs against the formula that its paper prints, by mpmath in 60 digits, in values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mpmath import mp
from pair_losses import LOSSES, every_loss, gradient, random_logps

from cdpo.batch import Logps
from cdpo.losses.combined import WPO, Sum
from cdpo.losses.divergence import FDPO
from cdpo.losses.gaussian import Gaussian
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


def test_every_class_has_a_formula():
    missing = {type(loss).__name__ for loss in LOSSES.values()} - {kind.__name__ for kind in ORACLES}
    assert not missing, f"write the printed formula of {missing} into ORACLES"


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
