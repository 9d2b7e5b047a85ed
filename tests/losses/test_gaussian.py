"""The Gaussian family against the statements that define it: densities, minima over a grid, DPO, hand-made limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from cdpo.batch import Logps
from cdpo.losses import DPO, ODPO, Gaussian


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def logps_of(policy: torch.Tensor, reference: torch.Tensor, progress: float = 0.0) -> Logps:
    """[P, 2] log-probs of winners and losers."""
    ones, count = torch.ones(len(policy), dtype=policy.dtype), policy.numel()
    pairs = torch.arange(count).view(-1, 2)
    length, item = torch.ones(count), torch.arange(count) // 2
    return Logps(policy.flatten(), reference.flatten(), length, item, pairs, ones, ones, progress=progress)


def random_logps(pairs: int = 64, scale: float = 20.0) -> Logps:
    g = torch.Generator().manual_seed(0)
    policy, reference = -scale * torch.rand(2, pairs, 2, generator=g, dtype=torch.float64)
    return logps_of(policy, reference)


def variances(signal, noise, beta: float = 1.0) -> Logps:
    """Log-probs that have these variances γ and λ: the winner at 0, the loser at log(variance) / beta."""
    signal, noise = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (signal, noise)))
    policy, reference = (torch.stack([torch.zeros_like(v), v.log() / beta], -1).view(-1, 2) for v in (signal, noise))
    return logps_of(policy, reference)


def value_and_gradient(loss, logps: Logps) -> tuple[torch.Tensor, torch.Tensor]:
    policy = logps.policy.detach().requires_grad_()
    value = loss(replace(logps, policy=policy))
    return value.detach(), torch.autograd.grad(value.sum(), policy)[0]


def assert_same_loss(ours, other, logps: Logps) -> None:
    for a, b in zip(value_and_gradient(ours, logps), value_and_gradient(other, logps)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_default_is_dpo_in_value_and_gradient(beta):
    assert_same_loss(Gaussian(beta=beta), DPO(beta=beta), random_logps())


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), st.floats(-3, 1).map(lambda e: 10**e))
def test_default_is_dpo_to_rounding_in_float32(values, beta):
    policy, reference = torch.tensor(values).view(2, 1, 2)
    logps = logps_of(policy, reference)
    (ours, our_gradient), (dpo, dpo_gradient) = (value_and_gradient(f(beta=beta), logps) for f in (Gaussian, DPO))
    rounding = 8 * torch.finfo(torch.float32).eps * beta * float(policy.abs().max() + reference.abs().max()) + 1e-6
    torch.testing.assert_close(ours, dpo, rtol=1e-6, atol=rounding)
    torch.testing.assert_close(our_gradient, dpo_gradient, rtol=1e-6, atol=beta * min(1.0, rounding))


def test_default_is_the_likelihood_of_observing_zero():
    """-2 log N(0; 0, γ + λ), less its value at γ = 0."""
    signal, noise = torch.rand(2, 50, dtype=torch.float64) + 0.01
    density = lambda variance: -2 * Normal(0.0, variance.sqrt()).log_prob(torch.zeros(()))  # noqa: E731
    loss = Gaussian(beta=0.5)(variances(signal, noise, beta=0.5))
    torch.testing.assert_close(loss, (density(signal + noise) - density(noise)).double())


def test_observation_is_the_likelihood_of_observing_v():
    signal, noise, v = *(torch.rand(2, 50, dtype=torch.float64) + 0.01), torch.tensor(0.7, dtype=torch.float64)
    density = -2 * Normal(0.0, (signal + noise).sqrt()).log_prob(v)
    expected = density - math.log(2 * math.pi) - noise.log()
    torch.testing.assert_close(Gaussian(beta=0.5, observation=0.7)(variances(signal, noise, beta=0.5)), expected)


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.8, 2.0])
def test_observation_has_its_minimum_where_signal_is_v_squared_less_noise(noise):
    grid = torch.logspace(-6, 2, 200_001, dtype=torch.float64)
    best = grid[Gaussian(beta=1.0, observation=0.9)(variances(grid, noise)).argmin()]
    assert float(best) == pytest.approx(max(0.81 - noise, grid[0].item()), rel=1e-3)


def test_constant_noise_is_reference_free_dpo():
    logps = random_logps()
    assert_same_loss(Gaussian(noise="constant"), lambda x: DPO()(replace(x, reference=0 * x.reference)), logps)


@pytest.mark.parametrize("noise", ["reference", "constant"])
@pytest.mark.parametrize("scale", [0.2, 7.0])
def test_scaled_noise_is_a_shifted_margin(noise, scale):
    logps = random_logps()
    free = replace(logps, reference=0 * logps.reference) if noise == "constant" else logps
    expected = -torch.log(torch.sigmoid(0.1 * free.margin() + math.log(scale)))
    torch.testing.assert_close(Gaussian(noise=noise, noise_scale=scale)(logps), expected)


def test_noise_below_one_is_the_offset_of_odpo():
    assert_same_loss(Gaussian(noise_scale=0.2), ODPO(scale=math.log(5)), random_logps())


@pytest.mark.parametrize(
    ("schedule", "progress", "scale"),
    [("linear", 0.0, 9.0), ("linear", 0.25, 7.0), ("linear", 0.5, 5.0), ("exponential", 0.5, 3.0)],
)
def test_noise_falls_from_its_scale_to_one(schedule, progress, scale):
    annealed = Gaussian(noise_scale=9.0, noise_schedule=schedule)
    logps = replace(random_logps(), progress=progress)
    assert_same_loss(annealed, Gaussian(noise_scale=scale), logps)
    assert_same_loss(annealed, DPO(), replace(logps, progress=1.0))


def test_variational_is_a_minimum_over_g():
    g = torch.logspace(-8, 8, 400_001, dtype=torch.float64)
    for signal, noise in [(1e-4, 1.0), (0.3, 0.2), (1.0, 1.0), (5.0, 0.01), (40.0, 3.0)]:
        expected = (signal / g + (noise + g).log()).min() - math.log(noise)
        loss = Gaussian(beta=1.0, penalty="variational")(variances(signal, noise))
        torch.testing.assert_close(loss[0], expected, rtol=1e-6, atol=1e-6)


def test_variational_equals_its_closed_form_in_the_variances():
    signal, noise = (torch.rand(2, 50, dtype=torch.float64) + 1e-3) * 10
    x, s = signal.sqrt(), (4 * noise + signal).sqrt()
    expected = 2 * x / (x + s) + (2 * noise + signal + x * s).log() - math.log(2) - noise.log()
    torch.testing.assert_close(Gaussian(beta=1.0, penalty="variational")(variances(signal, noise)), expected)


def test_linear_is_the_limit_of_large_noise():
    """c log(1 + γ / (c λ)) -> γ / λ, with an error of (γ/λ)^2 / (2 c)."""
    signal, noise = torch.rand(2, 50, dtype=torch.float64) + 0.5
    logps = variances(signal, noise)
    linear = Gaussian(beta=1.0, penalty="linear")(logps)
    torch.testing.assert_close(linear, signal / noise)
    for c in (1e2, 1e4):
        error = linear - c * Gaussian(beta=1.0, noise_scale=c)(logps)
        assert (error > 0).all()
        assert (error <= linear**2 / (2 * c)).all()


def test_power_one_half_is_the_ratio_of_standard_deviations_and_power_one_is_linear():
    signal, noise = torch.rand(2, 50, dtype=torch.float64) + 0.1
    logps = variances(signal, noise)
    torch.testing.assert_close(Gaussian(1.0, penalty="power", power=0.5)(logps), signal.sqrt() / noise.sqrt())
    assert_same_loss(Gaussian(penalty="power", power=1.0), Gaussian(penalty="linear"), logps)


@pytest.mark.parametrize(
    "penalty", [{"penalty": "log"}, {"penalty": "variational"}, {"penalty": "power", "power": 0.5}]
)
def test_penalties_are_concave_and_increasing_in_the_signal(penalty):
    signal = torch.linspace(0.01, 20, 2000, dtype=torch.float64)
    slope = Gaussian(beta=1.0, **penalty)(variances(signal, 0.5)).diff()
    assert (slope > 0).all()
    assert (slope.diff() < 0).all()


def test_one_step_of_majorise_minimise_is_the_gradient_of_dpo():
    """The tangent of the concave penalty, w γ with w = 1 / (γ_t + λ) held fixed, touches it with its slope."""
    logps, beta = random_logps(scale=5.0), 0.3

    def majoriser(logps: Logps) -> torch.Tensor:
        chosen, rejected = logps.of_pairs(logps.policy)
        ref_chosen, ref_rejected = logps.of_pairs(logps.reference)
        signal, noise = (rejected - chosen).mul(beta).exp(), (ref_rejected - ref_chosen).mul(beta).exp()
        return signal / (signal.detach() + noise)

    torch.testing.assert_close(value_and_gradient(majoriser, logps)[1], value_and_gradient(DPO(beta), logps)[1])


UNUSED_OR_WRONG = [
    ({"power": 0.5}, "power"),
    ({"penalty": "linear", "power": 1.0}, "power"),
    ({"penalty": "power"}, "power"),
    ({"penalty": "power", "power": 1.5}, "power"),
    ({"penalty": "power", "power": 0.0}, "power"),
    ({"noise_schedule": "linear"}, "noise_scale"),
    ({"noise_schedule": "exponential", "noise_scale": 0.5}, "noise_scale"),
    ({"noise_schedule": "cosine", "noise_scale": 2.0}, "noise_schedule"),
    ({"noise_scale": 0.0}, "noise_scale"),
    ({"noise": "none"}, "noise"),
    ({"observation": 0.0}, "observation"),
    ({"observation": 1.0, "penalty": "variational"}, "observation"),
    ({"observation": 1.0, "penalty": "power", "power": 0.5}, "observation"),
    ({"penalty": "l1"}, "penalty"),
    ({"beta": 0.0}, "beta"),
]


@pytest.mark.parametrize(("options", "named"), UNUSED_OR_WRONG)
def test_an_option_that_is_wrong_or_unused_is_an_error(options, named):
    with pytest.raises(ValueError, match=named):
        Gaussian(**options)
