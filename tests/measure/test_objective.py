"""J, its optimum and the share that is attained: against their definitions in NumPy, and through whole runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from candidates import SIZES, logps_of
from composing import composed, train
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpo.batch import Logps
from cdpo.measure.objective import attained, means, objective

EXACT = ("model=tabular", "optimizer=lbfgs", "logger=none", "beta=1", "trainer.eval_every=1000")


def by_hand(logps: Logps, beta: float) -> list[dict[str, float]]:
    """Everything from the definitions, Item by Item, in NumPy."""
    found = []
    for i in range(len(SIZES)):
        at = (logps.item == i).numpy()
        pi, ref, r = (np.exp(x.numpy()[at]) for x in (logps.policy, logps.reference, logps.rewards))
        pi, ref, r = pi / pi.sum(), ref / ref.sum(), np.log(r)
        star = ref * np.exp(r / beta) / (ref * np.exp(r / beta)).sum()
        kl = (pi * np.log(pi / ref)).sum()
        found.append(
            {
                "J": (pi * r).sum() - beta * kl,
                "J_reference": (ref * r).sum(),
                "J_optimum": beta * math.log((ref * np.exp(r / beta)).sum()),
                "kl": kl,
                "expected_reward": (pi * r).sum(),
                "kl_to_optimum": (pi * np.log(pi / star)).sum(),
                "tv_to_optimum": np.abs(pi - star).sum() / 2,
            }
        )
    return found


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_the_objective_is_its_definition(beta):
    logps = logps_of()
    table, expected = objective(logps, beta), by_hand(logps, beta)
    for name, column in table.items():
        np.testing.assert_allclose(column.numpy(), [row[name] for row in expected], rtol=1e-11, atol=1e-12)
    averaged = means(table)
    j, low, high = (np.mean([row[name] for row in expected]) for name in ("J", "J_reference", "J_optimum"))
    assert averaged["attained"] == pytest.approx((j - low) / (high - low), rel=1e-11)


@given(st.integers(0, 10_000), st.floats(0.05, 20))
@settings(max_examples=50, deadline=None)
def test_what_is_lost_is_beta_times_the_divergence_from_the_optimum(seed, beta):
    table = objective(logps_of(seed), beta)
    lost = table["J_optimum"] - table["J"]
    torch.testing.assert_close(lost, beta * table["kl_to_optimum"], rtol=1e-9, atol=1e-9)
    assert (table["J_optimum"] >= table["J_reference"]).all()


def test_attained_is_0_at_the_reference_and_1_at_the_optimum():
    logps = logps_of()
    assert means(objective(replace(logps, policy=logps.reference + 3), 0.5))["attained"] == pytest.approx(0, abs=1e-12)
    best = replace(logps, policy=logps.reference + logps.rewards / 0.5)
    assert means(objective(best, 0.5))["attained"] == pytest.approx(1, abs=1e-12)
    tied = replace(logps, rewards=torch.ones_like(logps.rewards))
    assert math.isnan(means(objective(replace(tied, policy=tied.reference), 0.5))["attained"])
    for seed in range(200):  # J* - J_reference is rounding noise of either sign there
        drawn = logps_of(seed)
        tied = replace(drawn, rewards=torch.full_like(drawn.rewards, 3.7))
        assert math.isnan(means(objective(tied, 0.5))["attained"])
    assert math.isnan(attained({"J": 1.0, "J_reference": 1.0, "J_optimum": 1.0}))


@pytest.mark.parametrize(
    ("loss", "steps", "missed"),
    [
        ("dpo", 30, 1e-10),
        ("gaussian", 30, 1e-10),
        ("rlhf", 120, 1e-10),
        ("onpolicy_regression", 200, 1e-10),
        ("rlhf_learned", 200, 1e-10),
    ],
)
def test_without_a_constraint_every_loss_of_the_theory_attains_everything(tmp_path, loss, steps, missed):
    run = composed(*EXACT, f"loss={loss}", f"trainer.max_steps={steps}", "trainer.log_every=50")
    summary = train(run, tmp_path / "run")
    assert summary["metrics"]["objective/attained"] == pytest.approx(1, abs=missed)
    assert summary["metrics"]["objective/tv_to_optimum"] < 1e-5


def test_another_beta_of_the_loss_than_of_the_objective_misses_the_optimum(tmp_path):
    run = composed(*EXACT, "loss=dpo", "loss.beta=0.5", "trainer.max_steps=20")
    assert train(run, tmp_path / "run")["metrics"]["objective/attained"] < 0.9


def test_the_table_of_prompts_adds_up_to_the_metrics(tmp_path):
    summary = train(composed(*EXACT, "loss=dpo", "trainer.max_steps=2"), tmp_path / "run")
    table = np.genfromtxt(tmp_path / "run" / "objective.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert list(table["source"]) == [f"bandit:{x + 1}" for x in range(16)]
    for name in ("J", "J_reference", "J_optimum", "kl", "expected_reward", "kl_to_optimum", "tv_to_optimum"):
        assert table[name].mean() == pytest.approx(summary["metrics"][f"objective/{name}"], rel=1e-12)
    one = table[3]
    assert one["attained"] == pytest.approx((one["J"] - one["J_reference"]) / (one["J_optimum"] - one["J_reference"]))
