"""optimizer=frank_wolfe: against its definition, closed forms and optimizer=exact; its gap; what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from composing import composed, train
from run_files import rows
from small_runs import SMALL
from torch import nn

from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.linf_ball import LinfBall
from cdpo.errors import ConfigError
from cdpo.model.change import Change
from cdpo.model.gradient import Gradient
from cdpo.optim import FrankWolfe
from cdpo.training import loop
from cdpo.training.checks import checked

CURVATURE = {"a": np.array([1.0, 4.0, 0.25]), "b": np.array([2.0, 0.5])}
START = {"a": np.array([3.0, -2.0, 1.0]), "b": np.array([0.5, -0.5])}
LOWEST = {"a": np.array([5.0, -2.5, 1.2]), "b": np.array([0.6, -2.0])}  # of the quadratic below, outside of every ball
SETS = {
    "ball": L2Ball(radius=0.8),
    "ball of each": L2Ball(radius=0.8, per_tensor=True),
    "box": LinfBall(radius=0.3),
}


def value(x):
    """sum(curvature * (x - lowest) ** 2) / 2"""
    return sum((CURVATURE[name] * (x[name] - LOWEST[name]) ** 2).sum() / 2 for name in x)


def slope(x):
    return {name: CURVATURE[name] * (x[name] - LOWEST[name]) for name in x}


def in_ball(names):
    """The optimum in a ball of 0.8 of these tensors: (curvature + multiplier) change = curvature (lowest - start)."""
    curvature, pull = (np.concatenate([parts[name] for name in names]) for parts in (CURVATURE, LOWEST))
    pull = curvature * (pull - np.concatenate([START[name] for name in names]))
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(pull / (curvature + middle)) > 0.8 else (low, middle)
    change = np.split(pull / (curvature + low), np.cumsum([len(START[name]) for name in names])[:-1])
    return {name: START[name] + part for name, part in zip(names, change)}


OPTIMA = {
    "ball": in_ball(["a", "b"]),
    "ball of each": in_ball(["a"]) | in_ball(["b"]),
    "box": {name: np.clip(LOWEST[name], START[name] - 0.3, START[name] + 0.3) for name in START},
}


def vertices(name, g):
    """theta_0 + vertex(g), by definition."""
    if name == "box":
        return {key: START[key] - 0.3 * np.sign(g[key]) for key in g}
    whole = math.sqrt(sum((part**2).sum() for part in g.values()))
    norms = {key: np.linalg.norm(g[key]) if name == "ball of each" else whole for key in g}
    return {key: START[key] - 0.8 * g[key] / norms[key] for key in g}


def path(ball, steps):
    """Where the optimizer goes on the quadratic, and the gap that the ball tells before each step."""
    model = nn.ParameterDict({name: nn.Parameter(torch.tensor(start)) for name, start in START.items()})
    ball.begin(model, change := Change(model))
    optimizer = FrankWolfe().build(model.parameters())
    points, gaps = [dict(START)], []
    for step in range(steps):
        for name, g in slope(points[-1]).items():
            model[name].grad = torch.tensor(g)
        gaps.append(ball.bound(Gradient(change)))
        ball.vertex(Gradient(change))
        optimizer.param_groups[0]["lr"] = FrankWolfe().learning_rate_at(step, steps)
        optimizer.step()
        points.append({name: parameter.detach().numpy().copy() for name, parameter in model.items()})
    return points, gaps


@pytest.mark.parametrize("name", SETS)
def test_it_is_its_definition_and_its_gap_bounds_what_is_left(name):
    """theta <- (1 - h) theta + h (theta_0 + vertex(g)), h = 2 / (s + 2); f - f* <= gap; f - f* = O(1/s)."""
    points, gaps = path(SETS[name], 2000)
    lowest = value(OPTIMA[name])
    x = START
    for step, (point, gap) in enumerate(zip(points, gaps)):
        v, g = vertices(name, slope(point)), slope(point)
        np.testing.assert_allclose(np.concatenate([*x.values()]), np.concatenate([*point.values()]), atol=1e-12)
        assert gap == pytest.approx(sum((g[key] * (point[key] - v[key])).sum() for key in g), abs=1e-12)
        assert -1e-12 <= value(point) - lowest <= gap + 1e-12
        x = {key: (step * point[key] + 2 * v[key]) / (step + 2) for key in point}
    assert value(points[0]) - lowest > 1
    assert value(points[-1]) - lowest < 2e-3
    for key in START:
        np.testing.assert_allclose(points[-1][key], OPTIMA[name][key], atol=0.02)


@pytest.mark.parametrize("ball", SETS.values(), ids=SETS)
def test_a_gradient_of_zero_leads_back_to_the_start(ball):
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
    ball.begin(model, change := Change(model))
    model["a"].data += 0.1
    model["a"].grad = torch.zeros(3)
    ball.vertex(Gradient(change))
    torch.testing.assert_close(model["a"].grad, torch.full((3,), 0.1))


TABLE = ["model=tabular", "loss=dpo", "logger=none", "dataset.prompts=3", "dataset.alphabet=4", "trainer.log_every=1"]
BALLS = {
    "l2_ball": ["constraint=l2_ball", "constraint.l2_ball.radius=2"],
    "linf_ball": ["constraint=linf_ball", "constraint.linf_ball.radius=0.5"],
}


@pytest.mark.parametrize("ball", BALLS)
def test_on_tables_it_ends_where_exact_does_and_adamw_in_a_box_only(ball, tmp_path, monkeypatch, caplog):
    """By no more than the gap that it reports, in the ball at every step."""
    slack, finish = [], loop.finish_step

    def finishing(run, *arguments):
        slack.append(run.constraints[ball].slack)  # before anything is projected
        finish(run, *arguments)

    exact = train(composed(*TABLE, *BALLS[ball], "optimizer=exact"), tmp_path / "exact")["metrics"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish_step", finishing)
        steps = composed(*TABLE, *BALLS[ball], "optimizer=frank_wolfe", "trainer.max_steps=100")
        found = train(steps, tmp_path / "found")["metrics"]
    assert len(slack) == 100
    assert min(slack) >= -1e-12
    taken = [row for row in rows(tmp_path / "found") if "frank_wolfe/gap" in row]
    assert [row["learning_rate"] for row in taken] == [2 / (step + 2) for step in range(100)]
    for row in taken:
        assert -1e-12 <= row["objective"] - exact["objective"] <= row["frank_wolfe/gap"] + 1e-12
    assert taken[-1]["frank_wolfe/gap"] < 2e-5 < 1e-2 < taken[0]["frank_wolfe/gap"]
    assert found["objective/attained"] == pytest.approx(exact["objective/attained"], abs=2e-3)

    assert "rescales" not in caplog.text
    adamw = composed(*TABLE, *BALLS[ball], "trainer.batch_size=null", "trainer.max_steps=300", "trainer.log_every=300",
                     "optimizer.schedule=cosine")  # fmt: skip
    off = train(adamw, tmp_path / "adamw")["metrics"]["objective"] - exact["objective"]
    assert (off > 1e-3) == ("AdamW rescales the gradient weight by weight, so with l2_ball" in caplog.text)
    assert (off > 1e-3) == (ball == "l2_ball")


@pytest.mark.parametrize("options", [["linf_ball"], ["l2_ball"], ["l2_ball", "constraint.l2_ball.per_tensor=true"]])
def test_a_transformer_comes_near_a_stationary_point(options, tmp_path):
    """In float32, with frozen layers; the last gap is a small share of the first."""
    name, radius = options[0], 0.002 if options[0] == "linf_ball" else 0.1
    settings = composed(*SMALL, f"constraint=[{name},freeze]", "constraint.freeze.train_last_layers=1", *options[1:],
                        f"constraint.{name}.radius={radius}", "loss=dpo", "trainer.batch_size=null",
                        "optimizer=frank_wolfe", "trainer.max_steps=30")  # fmt: skip
    certificate = train(settings, tmp_path / "run")["certificate"]
    assert (certificate["mend"] == "trainer.max_steps=120") == (certificate["status"] == "not_reached")
    gaps = [row["frank_wolfe/gap"] for row in rows(tmp_path / "run") if "frank_wolfe/gap" in row]
    assert min(gaps) > -1e-7
    assert gaps[-1] < 0.2 * gaps[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "finds none: choose l2_ball or linf_ball"),
        (["constraint=[l2_ball,linf_ball]"], "finds l2_ball and linf_ball: choose"),
        (["constraint=[l2_ball,lora_r2]"], "lora_r2 makes of the ball"),
        (["constraint=[l2_ball,kl_budget]"], "kl_budget moves the weights or the objective"),
        (["constraint=[l2_ball,weight_decay]"], "weight_decay moves"),
        (["constraint=[l2_ball,l2_to_start]"], "l2_to_start moves"),
        (["constraint=[l2_ball,sparse_topk]"], "sparse_topk moves"),
        (["constraint=[l2_ball,dropout]"], "dropout moves"),
        (["constraint=l2_ball", "trainer.batch_size=4"], r"set trainer\.batch_size=null"),
        (["constraint=l2_ball", "trainer.max_grad_norm=1"], r"set trainer\.max_grad_norm=null"),
        (["constraint=l2_ball", "trainer.distributed=fsdp"], r"use trainer\.distributed=ddp"),
    ],
)
def test_what_it_cannot_move_in_is_refused_by_name(options, reason):
    with pytest.raises(ConfigError, match=rf"optimizer=frank_wolfe:\n  .*{reason}"):
        checked(composed("optimizer=frank_wolfe", *options))


def test_a_learning_rate_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate=0\.1 is not used"):
        FrankWolfe(0.1)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate=0\.1"):
        checked(composed("optimizer=frank_wolfe", "constraint=l2_ball", "optimizer.learning_rate=0.1"))


@pytest.mark.parametrize("constraint", ["l2_to_start", "weight_decay"])
@pytest.mark.parametrize(("optimizer", "warned"), [("adamw", True), ("rmsprop", True), ("sgd", False)])
def test_pulls_that_a_rescaled_gradient_does_not_balance_are_warned_of(constraint, optimizer, warned, tmp_path, caplog):
    rate = "optimizer.learning_rate=1e-3"
    one = composed(*SMALL, f"constraint={constraint}", f"optimizer={optimizer}", rate, "trainer.max_steps=1")
    train(one, tmp_path / "run")
    assert caplog.text.count(f"with {constraint} it ends elsewhere") == warned
