"""J, its optimum and the share that is attained: against their definitions in NumPy, and through whole runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from candidates import SIZES, logps_of
from composing import composed, train
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from cdpo.batch import Logps
from cdpo.measure.objective import attained, means, objective, to_bradley_terry

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


def test_the_bradley_terry_policy_says_of_two_responses_what_the_preferences_say():
    """exp(r) on the candidates, by scipy; whatever the base, as no reference enters."""
    logps = logps_of(3)
    found = to_bradley_terry(logps)
    chosen = to_bradley_terry(replace(logps, policy=logps.policy + logps.reference, base=0 * logps.reference))
    for i in range(len(SIZES)):
        at = (logps.item == i).numpy()
        pi, right = softmax(logps.policy.numpy()[at]), softmax(logps.rewards.numpy()[at])
        odds = np.log(right[:, None] / right[None])
        np.testing.assert_allclose(odds, np.subtract.outer(logps.rewards.numpy()[at], logps.rewards.numpy()[at]))
        expected = [entropy(pi, right), entropy(right, pi), np.abs(pi - right).sum() / 2]
        np.testing.assert_allclose([float(column[i]) for column in found.values()], expected, rtol=1e-11)
        np.testing.assert_allclose([float(column[i]) for column in chosen.values()], expected, rtol=1e-11)


@pytest.mark.parametrize("base", ["uniform", "empirical"])
def test_draws_of_the_reference_have_no_bradley_terry_policy(tmp_path, base):
    rows = [{"prompt": f"{i}?", "responses": ["yes", "no"], "rewards": [1.0, i % 3]} for i in range(20)]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = composed("dataset=jsonl", f"dataset.path={path}", f"dataset.base={base}", "logger=none", "loss=dpo",
                   "model.hidden_size=16", "model.heads=2", "trainer.max_steps=1")  # fmt: skip
    metrics = train(run, tmp_path / "run")["metrics"]
    assert ("objective/tv_to_bradley_terry" in metrics) == (base == "uniform")
    assert "objective/tv_to_optimum" in metrics


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
    names = ["J", "J_reference", "J_optimum", "kl", "expected_reward", "kl_to_optimum", "tv_to_optimum"]
    for name in (*names, *(f"{distance}_bradley_terry" for distance in ("kl_to", "kl_from", "tv_to"))):
        assert table[name].mean() == pytest.approx(summary["metrics"][f"objective/{name}"], rel=1e-12)
    one = table[3]
    assert one["attained"] == pytest.approx((one["J"] - one["J_reference"]) / (one["J_optimum"] - one["J_reference"]))


def test_the_table_of_candidates_holds_the_policy(tmp_path):
    """objective.csv again, from it."""
    train(composed(*EXACT, "loss=dpo", "trainer.max_steps=2"), tmp_path / "run")
    tables = {
        name: np.genfromtxt(tmp_path / "run" / f"{name}.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
        for name in ("candidates", "objective")
    }
    found = tables["candidates"]
    assert list(found["candidate"][:9]) == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    for row in tables["objective"]:
        one = found[found["source"] == row["source"]]
        policy, reference = np.exp(one["log_policy"]), np.exp(one["log_reference"])
        assert policy.sum() == pytest.approx(1, rel=1e-12)
        assert (policy * one["reward"]).sum() == pytest.approx(row["expected_reward"], rel=1e-12)
        assert entropy(policy, reference) == pytest.approx(row["kl"], rel=1e-9)
        assert entropy(softmax(one["reward"]), policy) == pytest.approx(row["kl_from_bradley_terry"], rel=1e-9)
