"""RLHF on candidate sets, J and its optimum, fitted rewards: against closed forms, NumPy and brute force."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from composing import composed, train
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpo.batch import Item, Logps, Pair
from cdpo.config import build as config
from cdpo.config.identity import run_name
from cdpo.data.bandit import Bandit
from cdpo.data.bradley_terry import add_fitted, fit
from cdpo.errors import ConfigError, DataError
from cdpo.losses.candidates import RLHF, OnPolicyRegression
from cdpo.losses.loss import per_unit
from cdpo.measure.objective import attained, means, objective

SIZES = (2, 5, 3)  # candidates of each Item
EXACT = ("model=tabular", "optimizer=lbfgs", "logger=none", "beta=1", "trainer.eval_every=1000")


def logps_of(seed: int = 0, **more) -> Logps:
    """Three Items of unequal size, whose log-probs are not normalised on their candidates."""
    g = torch.Generator().manual_seed(seed)
    total = sum(SIZES)
    policy, reference, rewards = 2 * torch.randn(3, total, generator=g, dtype=torch.float64)
    item = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    first = torch.tensor([0, 2, 7])
    pairs = torch.stack([first, first + 1], 1)
    ones = torch.ones(3, dtype=torch.float64)
    lengths = torch.ones(total, dtype=torch.float64)
    return Logps(policy, reference, lengths, item, pairs, ones, ones, rewards, sources=("a", "b", "c"), **more)


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


def test_rlhf_is_minus_the_objective():
    logps = logps_of()
    torch.testing.assert_close(per_unit(RLHF(beta=0.7), logps), -objective(logps, 0.7)["J"], rtol=1e-12, atol=0)


def over_pairs(logps: Logps, beta: float) -> torch.Tensor:
    """On-policy regression as theory.md section 4 writes it, summed over all ordered pairs of candidates. [I]"""
    expected = []
    for i in range(len(SIZES)):
        at = (logps.item == i).nonzero().flatten().tolist()
        pi = logps.policy[at].softmax(0).detach()
        delta = logps.log_ratio()
        total = sum(
            pi[a] * pi[b] * (beta * (delta[at[a]] - delta[at[b]]) - (logps.rewards[at[a]] - logps.rewards[at[b]])) ** 2
            for a, b in itertools.product(range(len(at)), repeat=2)
        )
        expected.append(total / 4)
    return torch.stack(expected)


def test_onpolicy_regression_has_the_gradient_of_its_expectation_over_pairs():
    logps, beta = logps_of(), 0.7
    policy = logps.policy.clone().requires_grad_()
    moving = replace(logps, policy=policy)
    found, expected = (
        torch.autograd.grad(values.sum(), policy)[0]
        for values in (OnPolicyRegression(beta)(moving), over_pairs(moving, beta))
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_the_value_of_onpolicy_regression_is_what_its_gradient_descends():
    logps = logps_of()
    table = objective(logps, 0.7)
    torch.testing.assert_close(OnPolicyRegression(0.7)(logps), 0.49 * table["kl_to_optimum"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(0.7 * (table["J_optimum"] - table["J"]), 0.49 * table["kl_to_optimum"])


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_gradient_of_onpolicy_regression_is_beta_times_that_of_rlhf(beta):
    logps = logps_of()

    def gradient(loss):
        policy = logps.policy.clone().requires_grad_()
        return torch.autograd.grad(loss(replace(logps, policy=policy)).sum(), policy)[0]

    torch.testing.assert_close(gradient(OnPolicyRegression(beta)), beta * gradient(RLHF(beta)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["rlhf", "rlhf_learned", "onpolicy_regression", "wpo_candidates"])
def test_every_loss_on_candidates_raises_j_of_a_transformer_under_lora(loss, tmp_path):
    """Responses of several tokens, all of them enumerated."""
    drawn = ["loss.drawn=uniform"] if loss == "wpo_candidates" else []
    run = composed("model=tiny", "model.hidden_size=16", "model.heads=2", "constraint=lora_r2", f"loss={loss}", *drawn,
                   "dataset.prompts=4", "dataset.alphabet=3", "dataset.length=2", "dataset.sampling=uniform", "beta=1",
                   "trainer.batch_size=null", "trainer.max_steps=40", "optimizer.learning_rate=2e-2",
                   "trainer.eval_every=20", "logger=none")  # fmt: skip
    summary = train(run, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reached = [row["objective/attained"] for row in rows if "objective/attained" in row]
    assert reached[0] == pytest.approx(0, abs=1e-5)
    assert 0.1 < reached[1] < reached[2] < 1
    assert summary["constraint"]["lora_r2"]["rank"] <= 2


def test_the_gradient_of_rlhf_is_the_slope_of_its_value():
    logps = logps_of()
    torch.autograd.gradcheck(lambda p: RLHF(0.3)(replace(logps, policy=p)), logps.policy.clone().requires_grad_())


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


# ------------------------------------------------------------------------------------------------- fitted rewards


def item_of(pairs: list[Pair], k: int) -> Item:
    return Item([1], [[i] for i in range(k)], pairs, None, "data.jsonl:4")


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_exact_preferences_give_back_the_rewards(seed):
    row = Bandit(prompts=1, alphabet=5, world_seed=seed, sampling="uniform").load(0).train[0]
    found, rewards = np.array(fit(item_of(row.pairs, 5))), np.array(row.rewards)
    np.testing.assert_allclose(found, rewards - rewards.mean(), atol=1e-5)


def test_one_pair_gives_its_log_odds():
    assert fit(item_of([Pair(0, 1, 0.8)], 2)) == pytest.approx([math.log(4) / 2, -math.log(4) / 2], abs=1e-8)
    counts = [Pair(0, 1, 1.0, 3.0), Pair(1, 0, 1.0, 1.0)]  # won three times, lost once
    assert fit(item_of(counts, 2)) == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-8)


def test_the_fit_has_the_highest_likelihood_on_a_grid():
    pairs = [Pair(0, 1, 0.9, 2.0), Pair(1, 2, 0.4, 1.0), Pair(2, 0, 0.3, 1.5)]

    def likelihood(a, b):
        r = [a, b, -a - b]
        return sum(
            w * (p * -np.logaddexp(0, r[j] - r[i]) + (1 - p) * -np.logaddexp(0, r[i] - r[j])) for i, j, p, w in pairs
        )

    grid = np.linspace(-2, 2, 401)
    a, b = max(itertools.product(grid, grid), key=lambda point: likelihood(*point))
    assert fit(item_of(pairs, 3))[:2] == pytest.approx([a, b], abs=0.006)


def test_groups_that_are_never_compared_have_mean_zero():
    found = fit(item_of([Pair(0, 1, 0.8), Pair(2, 3, 0.6, 5.0)], 5))
    expected = [math.log(4) / 2, -math.log(4) / 2, math.log(1.5) / 2, -math.log(1.5) / 2, 0]
    assert found == pytest.approx(expected, abs=1e-7)
    assert fit(item_of([], 3)) == [0, 0, 0]


def test_a_likelihood_without_maximum_is_an_error_and_a_ridge_mends_it():
    pairs = [Pair(0, 1), Pair(1, 2), Pair(2, 1)]
    with pytest.raises(DataError, match=r"data.jsonl:4: no finite rewards .* set loss.ridge"):
        fit(item_of(pairs, 3))
    found = fit(item_of(pairs, 3), ridge=0.01)
    assert found[0] > max(found[1:])
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize("scale", [5, 15])
def test_rewards_far_apart_are_found_too(scale):
    rewards = scale * np.random.default_rng(1).standard_normal(8)
    pairs = [Pair(i, j, 1 / (1 + math.exp(rewards[j] - rewards[i]))) for i, j in itertools.combinations(range(8), 2)]
    np.testing.assert_allclose(fit(item_of(pairs, 8)), rewards - rewards.mean(), atol=1e-6)


def rows_of_one_prompt(*pairs: str, prompt: int = 1) -> list[Item]:
    """One Item for each winner and loser, as a file of pairs has them."""
    return [Item([prompt], [[ord(one)] for one in pair], [Pair(0, 1)], None, f"f:{i}") for i, pair in enumerate(pairs)]


def rewards_of(rows: list[Item], ridge: float = 0.0) -> list[list[float]]:
    return [item.fitted for item in add_fitted(rows, ridge, lambda done: None)]


def test_rows_of_one_prompt_are_one_fit():
    """a beats b three times of four; rows of another prompt say the opposite, and are another fit."""
    rows, other = rows_of_one_prompt("ab", "ba", "ab", "ab"), rows_of_one_prompt("ba", "ba", "ab", "ba", prompt=2)
    mixed = [row for two in zip(rows, other) for row in two]
    a = math.log(3) / 2
    up, down = pytest.approx([a, -a], abs=1e-8), pytest.approx([-a, a], abs=1e-8)
    assert rewards_of(mixed) == [up, up, down, up, up, down, up, up]


def test_rows_whose_responses_overlap_are_one_fit():
    """Against Zermelo's iteration (1929), which knows wins only."""
    won = {"ab": 5, "ba": 2, "bc": 4, "cb": 3, "cd": 1, "dc": 2, "da": 1}
    rows = rows_of_one_prompt(*(pair for pair, times in won.items() for _ in range(times)))
    strength = dict.fromkeys("abcd", 1.0)
    for _ in range(5000):
        strength = {
            i: sum(n for pair, n in won.items() if pair[0] == i)
            / sum(n / (strength[pair[0]] + strength[pair[1]]) for pair, n in won.items() if i in pair)
            for i in "abcd"
        }
    rewards = {i: math.log(s) for i, s in strength.items()}
    mean = sum(rewards.values()) / 4
    for row, found in zip(rows, rewards_of(rows)):
        assert found == pytest.approx([rewards[chr(response[0])] - mean for response in row.responses], abs=1e-7)


def test_rows_of_one_prompt_that_share_no_response_do_not_touch_and_take_little_memory():
    rows = [Item([1], [[2 * i], [2 * i + 1]], [Pair(0, 1)]) for i in range(2000)]
    tracemalloc.start()
    found = rewards_of(rows, ridge=0.01)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [rewards_of(rows[:1], ridge=0.01)[0]] * 2000
    assert peak < 16e6  # one array of all pairs of responses has 128e6 bytes


def test_prompts_without_a_fit_are_counted_once():
    rows = rows_of_one_prompt("ab", "ab", "cd") + rows_of_one_prompt("ab", "ba", prompt=0)
    with pytest.raises(DataError, match=r"f:0 with 2 more of its prompt: no finite .* \(1 of 2 prompts\)"):
        rewards_of(rows)


def test_pairs_without_weight_are_no_comparison():
    with pytest.raises(DataError, match=r"data.jsonl:4: all its pairs have weight 0"):
        fit(item_of([Pair(0, 1, 0.8, 0.0)], 2))
    assert fit(item_of([Pair(0, 1, 0.8), Pair(1, 2, 1.0, 0.0)], 3)) == pytest.approx(
        [math.log(4) / 2, -math.log(4) / 2, 0], abs=1e-8
    )


@pytest.mark.parametrize("ridge", [1e-2, 1e-8, 1e-15])
def test_a_ridge_has_its_closed_equation(ridge):
    """One hard pair: the slope 1 / (1 + exp(2 r)) of the likelihood is that of the ridge, ridge * r."""
    r = fit(item_of([Pair(0, 1)], 2), ridge)[0]
    assert 1 / (1 + math.exp(2 * r)) == pytest.approx(ridge * r, rel=1e-4)


def test_a_ridge_too_small_to_hold_anything_is_an_error():
    with pytest.raises(DataError, match=r"win nearly every comparison; set loss\.ridge"):
        fit(item_of([Pair(0, 1)], 2), 1e-300)


def test_near_certain_preferences_give_their_log_odds():
    assert fit(item_of([Pair(0, 1, 1 - 2**-53)], 2))[0] == pytest.approx(math.log(2**53 - 1) / 2, abs=1e-9)


@pytest.mark.parametrize("p", [1e-17, 1e-300, 1e-320])
def test_a_maximum_that_float64_cannot_place_is_an_error(p):
    with pytest.raises(DataError, match="win nearly every comparison"):
        fit(item_of([Pair(0, 1, p), Pair(1, 2, 0.5)], 3))


def test_pairs_without_rewards_are_enough_for_fitted_ones(tmp_path):
    """Held out rows too; a hard label has no finite maximum, and every prompt that lacks one is counted."""
    path = tmp_path / "pairs.jsonl"
    row = '{"prompt": "%d", "chosen": "b", "rejected": "c"}\n'
    path.write_text("".join(row % i for i in range(20)))
    base = ("loss=rlhf_learned", "dataset=jsonl", f"dataset.path={path}", "logger=none", "dataset.eval_size=0.25",
            "model.hidden_size=32", "model.layers=1")  # fmt: skip
    with pytest.raises(DataError, match=r"win every comparison; set loss.ridge=0.01, .* \(15 of 15 prompts\)"):
        train(composed(*base), tmp_path / "run")
    metrics = train(composed(*base, "loss.ridge=0.1"), tmp_path / "ridge")["metrics"]
    assert math.isfinite(metrics["eval/loss"])
    assert not any(name.startswith("objective/") for name in metrics)  # J is of true rewards only


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=rlhf", "loss.rewards=learned"], "loss"),
        (["loss=rlhf", "loss.ridge=0.1"], "ridge"),
        (["loss=rlhf_learned", "loss.ridge=-1.0"], "ridge"),
        (["loss=onpolicy_regression", "beta=0.0"], "beta"),
        (["restart=-1"], "restart"),
        (["beta=-1.0"], "beta"),
    ],
)
def test_settings_that_cannot_be_used(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config.build(composed(*overrides))


@pytest.mark.parametrize("loss", ["rlhf", "onpolicy_regression"])
def test_data_without_rewards_is_refused(tmp_path, loss):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "b", "rejected": "c"}) + "\n" for i in range(20)))
    run = composed(f"loss={loss}", "dataset=jsonl", f"dataset.path={path}", "logger=none")
    with pytest.raises(DataError, match="needs rewards"):
        train(run, tmp_path / "run")
    with pytest.raises(ConfigError, match="needs rewards"):
        RLHF()(replace(logps_of(), rewards=None))


def test_scored_rows_of_a_file_train_and_are_measured(tmp_path):
    """The layout of UltraFeedback: several scored responses per prompt, of several tokens, on a language model."""
    path = tmp_path / "scored.jsonl"
    row = '{"prompt": "Name %d.", "responses": ["one", "two words", "three is it", "no"], "rewards": [1, 3, 2, 0.5]}\n'
    path.write_text("".join(row % i for i in range(20)))
    run = composed("loss=rlhf", "dataset=jsonl", f"dataset.path={path}", "logger=none", "trainer.epochs=10",
                   "model.hidden_size=32", "model.layers=1", "beta=1")  # fmt: skip
    metrics = train(run, tmp_path / "run")["metrics"]
    assert metrics["objective/attained"] > 0.5  # held-out prompts that differ in a number
    assert metrics["objective/J_reference"] < metrics["objective/J"] < metrics["objective/J_optimum"]


def test_every_restart_starts_elsewhere_on_the_same_data(tmp_path):
    base = ("model=tabular", "constraint=lora_r1", "logger=none", "trainer.max_steps=3", "beta=1")
    first, same, other = (
        train(composed(*base, f"restart={restart}", f"name=r{i}"), tmp_path / str(i))["metrics"]
        for i, restart in enumerate((0, 0, 1))
    )
    assert first["objective/J"] == same["objective/J"] != other["objective/J"]
    assert first["objective/J_optimum"] == other["objective/J_optimum"]
    assert run_name(composed("restart=2"), {}).split("-")[4] == "s0r2"
