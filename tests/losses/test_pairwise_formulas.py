"""Every loss on pairs against the formula that its paper prints, by mpmath in 60 digits, in values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mpmath import mp
from pair_losses import LOSSES, every_loss, gradient, random_logps

from cdpo.batch import Logps
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


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def f_prime(loss, u):
    a = loss.alpha
    return {
        "reverse_kl": lambda: mp.log(u) + 1,
        "forward_kl": lambda: -1 / u,
        "jensen_shannon": lambda: mp.log(2 * u / (1 + u)),
        "alpha": lambda: (1 - u ** (-mp.mpf(a))) / a,
        "chi_squared": lambda: u + mp.log(u),
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


def cut(x, bound):
    return x if bound is None else max(-2 * bound, min(2 * bound, x))


def coins_kl(p, q):
    """KL(p || q) of two coins."""
    return p * mp.log(p / q) + (1 - p) * mp.log((1 - p) / (1 - q))


def of_two(x, y):
    return x / (x + y)


def expo(loss, r):
    kl = {
        "candidates": lambda: coins_kl(of_two(r.ref_w, r.ref_l), of_two(r.w, r.l)),
        "pair": lambda: (r.w / r.ref_w + r.l / r.ref_l - 2 - r.dw - r.dl) / 2,
    }[loss.kl]()
    return -mp.log(of_two(r.w, r.l)) + loss.beta * kl


def kto(loss, r):
    z = {
        "candidates": lambda: coins_kl(of_two(r.w, r.l), of_two(r.ref_w, r.ref_l)),
        "baseline": lambda: max(0, r.baseline),
    }[loss.kl]()
    return loss.desirable * (1 - sigmoid(loss.beta * (r.dw - z))) + loss.undesirable * (
        1 - sigmoid(loss.beta * (z - r.dl))
    )


def simpo(loss, r):
    w, l = r.w ** (1 / r.nw), r.l ** (1 / r.nl)  # noqa: E741
    a = mp.mpf(loss.alpha)
    gap = mp.log(w / l) if a == 0 else (1 - w**-a) / a - (1 - l**-a) / a
    return -mp.log(sigmoid(loss.beta * gap - loss.gamma))


ORACLES = {
    DPO: lambda L, r: (
        -(1 - L.label_smoothing) * mp.log(sigmoid(L.beta * (r.dw / r.nw - r.dl / r.nl if L.length_normalized else r.m)))
        - L.label_smoothing * mp.log(sigmoid(-L.beta * (r.dw / r.nw - r.dl / r.nl if L.length_normalized else r.m)))
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
    SimPO: simpo,
    ORPO: lambda L, r: (
        -mp.log(r.w) / r.nw - L.beta * mp.log(sigmoid(mp.log(odds(r.w ** (1 / r.nw)) / odds(r.l ** (1 / r.nl)))))
    ),
    ODPO: lambda L, r: -mp.log(sigmoid(L.beta * r.m - L.scale * (1 if L.offset == "constant" else r.gap))),
    FDPO: lambda L, r: (
        -mp.log(sigmoid(cut(L.beta * (f_prime(L, mp.exp(r.dw)) - f_prime(L, mp.exp(r.dl))), L.max_reward)))
    ),
    EXPO: expo,
    EXPORegression: lambda L, r: (
        (of_two(r.w, r.l) - 1) ** 2 + L.beta * (of_two(r.w, r.l) - of_two(r.ref_w, r.ref_l)) ** 2
    ),
    REBEL: lambda L, r: (L.beta * mp.log((r.w / r.ref_w) / (r.l / r.ref_l)) - r.gap) ** 2,
    DPOPositive: lambda L, r: -mp.log(sigmoid(L.beta * (r.m - L.penalty * max(0, mp.log(r.ref_w / r.w))))),
    CalDPO: lambda L, r: (
        -mp.log(sigmoid(r.m))
        + L.weight * ((r.dw - 1 / (2 * mp.mpf(L.beta))) ** 2 + (r.dl + 1 / (2 * mp.mpf(L.beta))) ** 2)
    ),
    KTO: kto,
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


STOPPED = [name for name, loss in LOSSES.items() if loss.weights_move and not loss.reads_baseline]


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in STOPPED])
def test_gradient_equals_that_of_the_printed_formula(name):
    """Without those that stop a gradient on purpose: WPO's weight, the KL of KTO."""
    loss = LOSSES[name]
    assert all("wpo" in one or one == "kto candidates" for one in STOPPED)
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
