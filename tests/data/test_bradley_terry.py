"""Fitted rewards: against closed forms, a grid and Zermelo's iteration; rows of one prompt are one fit."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from composing import composed, train
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpo.batch import Item, Pair
from cdpo.data.bandit import Bandit
from cdpo.data.bradley_terry import add_fitted, fit
from cdpo.errors import DataError


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
    return [item.fitted_rewards for item in add_fitted(rows, ridge, lambda done: None)]


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
