"""Solutions against cvxpy, enumeration of supports by SciPy, and closed forms."""

from __future__ import annotations

import itertools

import cvxpy
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from cdpo.batch import Logps
from cdpo.exact.descent import value_and_gradient
from cdpo.losses.gaussian import Gaussian
from cdpo.policy_recovery.draws import Setting, draw
from cdpo.policy_recovery.known import decoded, one_bit
from cdpo.policy_recovery.methods import ALL, Knobs, Method, methods
from cdpo.policy_recovery.solver import Objective

KNOBS = Knobs(radius=2.0, strength=3.0, power=0.5, fall_from=100.0)
SMALL = Setting(features=4, pairs=40, flipped=0.2)


def by_hand(method, margins, b):
    """The mean loss of a draw in cvxpy, written out: γ = exp(-margin), λ = exp(-b)."""
    z = b - margins
    if "linear" in method:
        return cvxpy.sum(cvxpy.exp(z)) / b.size
    if method == "power":
        return cvxpy.sum(cvxpy.exp(0.5 * z)) / b.size
    return cvxpy.sum(cvxpy.logistic(z)) / b.size


def noise(method, problem, s):
    """b of every pair: 3 nats for what the reference of a method prefers, written out pair by pair."""
    flipped = problem.flipped[s].numpy()
    b = {"log, small λ": (3, 3), "log, large λ": (-3, -3), "log, right or silent": (3, 0)}.get(method, (0, 0))
    b = (3, -3) if "reference right" in method else (-3, 3) if "reference wrong" in method else b
    return np.where(flipped, float(b[1]), float(b[0]))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("variational", "l1")])
def test_a_solution_on_the_ball_is_that_of_cvxpy(name):
    problem = draw(SMALL, 3, 0)
    theta, gap = methods(KNOBS)[name].solve(problem, KNOBS)
    for s in range(3):
        x = cvxpy.Variable(4)
        value = by_hand(name, problem.chosen[s].numpy() @ x, noise(name, problem, s))
        cvxpy.Problem(cvxpy.Minimize(value), [cvxpy.norm(x) <= 2]).solve(solver="CLARABEL")
        assert theta[s].numpy() == pytest.approx(x.value, abs=0.01)
        mine = by_hand(name, problem.chosen[s].numpy() @ theta[s].numpy(), noise(name, problem, s)).value
        assert -1e-7 <= mine - value.value <= gap[s] + 1e-7


def test_variational_is_the_least_over_its_free_variance():
    """min_g γ/g + log(1 + g), over a grid of g, where the objective's own θ is; the value only, not the solver."""
    problem = draw(SMALL, 1, 0)
    theta, _ = methods(KNOBS)["variational"].solve(problem, KNOBS)
    grid = np.geomspace(1e-4, 1e4, 4000)[:, None]

    def value(x):
        gamma = np.exp(-problem.chosen[0].numpy() @ x)
        return (gamma / grid + np.log1p(grid)).min(0).mean()

    rest = [{"type": "ineq", "fun": lambda x: 4 - x @ x}]
    best = minimize(value, np.zeros(4), constraints=rest, method="SLSQP", options={"eps": 1e-4})
    assert value(theta[0].numpy()) == pytest.approx(best.fun, abs=1e-4)


def test_small_noise_averages_and_large_noise_is_linear():
    """λ to 0: every pair has weight 1, so θ is the mean difference, scaled to the ball; λ to infinity: γ/λ."""
    problem = draw(SMALL, 5, 0)
    mean = problem.chosen.mean(1)
    theta, _ = Method(Gaussian(beta=1.0, noise="constant", noise_scale=1e-9)).solve(problem, KNOBS)
    assert torch.cosine_similarity(theta, mean).numpy() == pytest.approx(1.0, abs=1e-4)
    theta, _ = Method(Gaussian(beta=1.0, noise="constant", noise_scale=1e9)).solve(problem, KNOBS)
    assert theta.numpy() == pytest.approx(methods(KNOBS)["linear"].solve(problem, KNOBS)[0].numpy(), abs=0.01)


def test_a_power_is_the_linear_penalty_of_a_shorter_direction():
    """exp(-q a·θ) is exp(-a·(q θ)): where the ball holds neither, θ of the power is θ of the linear one over q."""
    problem = draw(Setting(features=4, pairs=200, flipped=0.3), 5, 0)
    wide = Knobs(radius=50.0, strength=3.0, power=0.5, fall_from=100.0)
    power, linear = (methods(wide)[name].solve(problem, wide)[0] for name in ("power", "linear"))
    assert 0.5 * power.numpy() == pytest.approx(linear.numpy(), abs=0.01)


def test_the_reference_cancels_where_theta_is_the_change():
    """Policy = reference times exp(margin): no penalty of γ/λ sees the reference."""
    margin, b = torch.tensor([0.7], dtype=torch.float64), torch.tensor([2.5], dtype=torch.float64)

    def loss(penalty, b):
        one, zero = torch.ones(2), torch.zeros(1, dtype=torch.float64)
        pair = torch.tensor([[0, 1]])
        known = Logps(torch.cat([b + margin, zero]), torch.cat([b, zero]), one, torch.zeros(2), pair, one[:1], one[:1])
        return Gaussian(beta=1.0, penalty=penalty)(known).item()

    for penalty in ("log", "linear", "variational"):
        assert loss(penalty, b) == pytest.approx(loss(penalty, -b), rel=1e-12)


def test_falling_noise_ends_where_dpo_does_on_a_ball():
    problem = draw(SMALL, 5, 0)
    log, falling = (methods(KNOBS)[name].solve(problem, KNOBS)[0] for name in ("log", "log, falling λ"))
    assert falling.numpy() == pytest.approx(log.numpy(), abs=0.01)


def test_gradients_are_those_of_finite_differences():
    problem = draw(SMALL, 2, 0)
    theta = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = torch.ones_like(theta, dtype=torch.bool)
    objective = Objective(problem, Gaussian(beta=1.0), problem.reference(1.0, -1.0), whole)
    both = torch.cat([theta, torch.tensor([[0.0], [1.0]])], 1)
    gradient = value_and_gradient(objective, both)[1]
    assert (gradient[:, -1] == 0).all()
    for i in range(4):
        step = torch.zeros(5, dtype=torch.float64)
        step[i] = 1e-5
        slope = (objective(both + step) - objective(both - step)) / 2e-5
        assert gradient[:, i].numpy() == pytest.approx(slope.numpy(), abs=1e-8)


def test_a_sparse_solution_is_the_best_on_its_support_and_mostly_the_best_of_all():
    """Of 15 supports of 2 among 6 entries, each solved by SciPy."""
    problem, found = draw(Setting(6, 60, 0.1, nonzeros=2), 10, 0), 0
    theta, _ = methods(KNOBS)["log"].solve(problem, KNOBS)
    assert ((theta != 0).sum(1) <= 2).all()
    assert (torch.linalg.vector_norm(theta, dim=1) <= 2 + 1e-9).all()
    for chosen, mine in zip(problem.chosen.numpy(), theta.numpy()):
        values = {}
        for support in itertools.combinations(range(6), 2):

            def value(x, part=chosen[:, support]):
                return np.logaddexp(0, -part @ x).mean()

            ball = [{"type": "ineq", "fun": lambda x: 4 - x @ x}]
            values[support] = minimize(value, np.zeros(2), constraints=ball, method="SLSQP").fun
        own = np.logaddexp(0, -chosen @ mine).mean()
        assert own == pytest.approx(values[tuple(np.flatnonzero(mine))], abs=1e-4)
        found += own <= min(values.values()) + 1e-4
    assert found >= 9


@pytest.mark.parametrize("seed", range(3))
def test_decoding_solves_the_primal_programme(seed):
    """Variables θ and violations ξ >= -a·θ, ξ >= 0, with a mean margin of 1."""
    chosen = draw(SMALL, 1, seed).chosen[0].numpy()
    n, d = chosen.shape
    costs, above = np.r_[np.zeros(d), np.ones(n)], np.hstack([-chosen, -np.eye(n)])
    scale, bounds = np.r_[chosen.mean(0), np.zeros(n)][None], [*[(None, None)] * d, *[(0, None)] * n]
    best = linprog(costs, A_ub=above, b_ub=np.zeros(n), A_eq=scale, b_eq=[1.0], bounds=bounds)
    theta = decoded(chosen)
    assert chosen.mean(0) @ theta == pytest.approx(1.0)
    assert np.maximum(0, -chosen @ theta).sum() == pytest.approx(best.fun, rel=1e-8)
    assert best.fun > 0


@pytest.mark.parametrize("k", [1, 3, 8])
def test_one_bit_is_that_of_cvxpy(k):
    mean = np.random.default_rng(k).standard_normal(8)
    x = cvxpy.Variable(8)
    held = [cvxpy.norm(x) <= 1, cvxpy.norm1(x) <= k**0.5]
    cvxpy.Problem(cvxpy.Maximize(mean @ x), held).solve(solver="CLARABEL")
    assert one_bit(torch.from_numpy(mean)[None], k)[0].numpy() == pytest.approx(x.value, abs=1e-4)
