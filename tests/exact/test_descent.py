"""The descents alone, on functions that know nothing of policies, against SciPy and cvxpy."""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest
import torch
from independent_gap import PRECISE
from scipy.optimize import minimize

from cdpo.exact.descent import Descent, Points, lbfgs, projected_gradient
from cdpo.exact.lagrangian import Augmented, within_budgets
from cdpo.exact.newton import hessian, newton, newton_step
from cdpo.exact.setting import Setting


def small(points: Points) -> torch.Tensor:
    return torch.linalg.vector_norm(points.gradient, dim=1) <= 1e-9


def never(points: Points) -> torch.Tensor:
    return torch.zeros(len(points.x), dtype=torch.bool)


def rosenbrock(x):
    """Rosenbrock 1960; least at (1, ..., 1). [S, n] -> [S]"""
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def quadratic(seed, n=6, condition=1e3):
    """1/2 x'Hx - b'x as a function of many points, and H and b."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.normal(size=(n, n)))[0]
    h = axes @ np.diag(np.geomspace(1, condition, n)) @ axes.T
    b = h @ random.normal(0, 3, n)
    wide, aim = torch.tensor(h), torch.tensor(b)
    return (lambda x: ((x @ wide) * x).sum(1) / 2 - x @ aim), h, b


def drawn(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def test_lbfgs_finds_the_valleys_end_from_every_start():
    found = lbfgs(Descent(rosenbrock, small, 1000), 2 * drawn(8, 4))
    other = torch.tensor([-0.7756, 0.6131, 0.3821, 0.1460])  # the local minimum of four dimensions (Shang and Qiu 2006)
    ends = [min(torch.dist(x, torch.ones(4)), torch.dist(x, other)) for x in found.x]
    assert max(ends) < 1e-3
    assert small(found).all()
    assert min(found.value) < 1e-15
    torch.testing.assert_close(found.value, rosenbrock(found.x))


def test_a_start_goes_its_own_way_whoever_goes_beside_it():
    starts = drawn(5, 3)
    together = lbfgs(Descent(rosenbrock, small, 1000), starts).x
    alone = torch.cat([lbfgs(Descent(rosenbrock, small, 1000), one[None]).x for one in starts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sets", [{"radius": 2.0}, {"box": 0.7}, {"radius": 2.0, "box": 1.1}], ids=str)
def test_projected_gradients_on_quadratics(seed, sets):
    function, h, b = quadratic(seed)
    setting = Setting(**sets)
    found = projected_gradient(Descent(function, never, 3000), drawn(3, 6, seed=seed), setting.project)
    limits = [{"type": "ineq", "fun": lambda x: 4.0 - x @ x, "jac": lambda x: -2 * x}] if "radius" in sets else []
    bounds = [(-sets["box"], sets["box"])] * 6 if "box" in sets else None
    theirs = minimize(lambda x: (x @ h @ x / 2 - b @ x, h @ x - b), np.zeros(6), jac=True, method="SLSQP",
                      bounds=bounds, constraints=limits, options={"ftol": 1e-15, "maxiter": 1000})  # fmt: skip
    for x in found.x:
        np.testing.assert_allclose(x, theirs.x, atol=1e-5)
        torch.testing.assert_close(setting.project(x[None])[0], x, rtol=0, atol=1e-12)
    assert (found.value <= theirs.fun + 1e-8 * abs(theirs.fun)).all()


def test_newton_on_a_badly_scaled_problem():
    """Curvatures 1 to 1e8, and one that is negative on the way: sum of scale * (x^4 / 4 - x^2 / 2), least at +-1."""
    scale = torch.tensor([1.0, 1e4, 1e8], dtype=torch.float64)

    def wells(x):
        return (scale * (x**4 / 4 - x**2 / 2)).sum(1)

    x = newton(Descent(wells, never, 60), torch.tensor([[0.3, -0.4, 1.5]], dtype=torch.float64))
    np.testing.assert_allclose(x[0], [1, -1, 1], atol=1e-7)
    moving = torch.tensor([True, True, False])
    held = newton(Descent(wells, never, 60), torch.tensor([[0.3, -0.4, 1.5]], dtype=torch.float64), moving)
    np.testing.assert_allclose(held[0], [1, -1, 1.5], atol=1e-7)


def test_newton_where_the_optimum_lies_at_infinity():
    """sum of exp(-scale x): each step goes on by one of its lengths; what is left is twice what a step promises."""
    scale = torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)

    def falling(x):
        return (-scale * x).exp().sum(1)

    start = torch.tensor([[1.0, 1e-3, 1e3]], dtype=torch.float64)
    everywhere = torch.ones(3, dtype=torch.bool)
    step, promised = newton_step(Descent(falling, never, 1), start, everywhere)
    torch.testing.assert_close(scale * step, torch.ones_like(step))
    assert promised.item() == pytest.approx(falling(start).item() / 2, rel=1e-9)
    x = newton(Descent(falling, never, 60, enough=1e-8), start)
    assert falling(x).item() < 4e-8
    assert (scale * x > 15).all()


def test_a_hessian_is_that_of_every_point_alone():
    points = drawn(3, 4)
    theirs = torch.stack([torch.autograd.functional.hessian(lambda x: rosenbrock(x[None])[0], x) for x in points])
    torch.testing.assert_close(hessian(rosenbrock, points, torch.arange(4)), theirs)
    some = torch.tensor([0, 2])
    torch.testing.assert_close(hessian(rosenbrock, points, some), theirs[:, some][:, :, some])


def test_newton_without_values_solves_for_the_gradient():
    def spiral(x):  # a field that is no gradient: it turns; zero at (1, 2)
        y = x - torch.tensor([1.0, 2.0], dtype=torch.float64)
        field = torch.stack([y[:, 0] - 3 * y[:, 1], 3 * y[:, 0] + y[:, 1]], dim=1)
        return (field.detach() * x).sum(1)

    x = newton(Descent(spiral, never, 60, has_values=False), torch.tensor([[5.0, -3.0]], dtype=torch.float64))
    np.testing.assert_allclose(x[0], [1, 2], atol=1e-7)


def test_the_lagrangian_knows_the_multiplier():
    """min |x - a|^2 / 2 with |x|^2 <= 1: x = a / |a| where |a| > 1; the multiplier of |x|^2 - 1 is (|a| - 1) / 2."""
    aims = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)

    def solve(function, x):
        return lbfgs(Descent(function, small, 300), x).x

    for aim, multiplier, best in zip(aims, [2.0, 0.0], [[0.6, 0.8], [0.3, 0.4]]):

        def distance(x, aim=aim):
            return (x - aim).square().sum(1) / 2

        x, found = within_budgets(Augmented(distance, [lambda x: x.square().sum(1) - 1]), solve, drawn(4, 2))
        np.testing.assert_allclose(x, np.tile(best, (4, 1)), atol=1e-8)
        np.testing.assert_allclose(found, np.full((4, 1), multiplier), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_projection_on_ball_and_box_is_the_nearest_point(seed):
    point = 3 * drawn(1, 7, seed=seed)
    radius, box = 1.0 + seed / 2, 0.6
    y = cvxpy.Variable(7)
    sets = [cvxpy.norm2(y) <= radius, cvxpy.norm_inf(y) <= box]
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(y - point[0].numpy())), sets).solve(cvxpy.CLARABEL, **PRECISE)
    found = Setting(radius=radius, box=box).project(point)[0]
    np.testing.assert_allclose(found, y.value, atol=1e-4)  # a distance is flat where it is least
    assert torch.linalg.vector_norm(found) <= radius + 1e-12
    assert found.abs().max() <= box + 1e-12
    assert torch.dist(found, point[0]) <= np.linalg.norm(y.value - point[0].numpy()) + 1e-9
