"""The bandit against numbers worked out by hand, brute-force enumeration, and simulation within its standard error."""

from __future__ import annotations

import json
import math
from collections import Counter
from random import Random

import numpy as np
import pytest

from cdpo.data.bandit import Bandit
from cdpo.errors import ConfigError, DataError

WORLD = {
    "prompts": ["north? ", "south? "],
    "responses": ["yes", "no", "maybe"],
    "rewards": [[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]],
    "reference_logits": [[0.0, math.log(2), math.log(5)], [0.0, 0.0, 0.0]],
}


@pytest.fixture
def world(tmp_path):
    """Writes a world file, with some entries replaced (None removes one), and returns its path."""

    def write(**changes):
        path = tmp_path / "world.json"
        path.write_text(json.dumps({k: v for k, v in {**WORLD, **changes}.items() if v is not None}))
        return str(path)

    return write


def masses(data):
    return {(x, p.winner, p.loser): p.weight for x, row in enumerate(data.train) for p in row.pairs}


def test_exact_weights_and_labels_by_hand(world):
    data = Bandit(path=world()).load(seed=0)
    pairs = {(p.winner, p.loser): p for p in data.train[0].pairs}
    # pi_ref = (1/8, 2/8, 5/8), two prompts: weight = 2 * pi_i * pi_j / 2
    assert pairs[0, 1].weight == pytest.approx(2 / 64)
    assert pairs[0, 2].weight == pytest.approx(5 / 64)
    assert pairs[1, 2].weight == pytest.approx(10 / 64)
    assert pairs[0, 1].preference == pytest.approx(0.7310585786)  # sigmoid(1)
    assert pairs[0, 2].preference == pytest.approx(0.8807970780)  # sigmoid(2)
    assert len(pairs) == 3
    ties = [p for p in data.train[1].pairs if p.preference == 0.5]
    assert len(ties) == 1
    assert {ties[0].winner, ties[0].loser} == {0, 2}
    assert data.train[0].rewards == [1.0, 0.0, -1.0]
    assert data.train[0].source == "world.json:1"
    assert not data.train[0].complete
    assert data.held_out == data.train


def test_uniform_sampling_gives_equal_weights(world):
    weights = masses(Bandit(path=world(), sampling="uniform").load(0)).values()
    assert list(weights) == pytest.approx([2 / 9 / 2] * 6)


@pytest.mark.parametrize("length", [1, 3])
def test_exact_weights_equal_a_simulation_of_the_chain(length):
    """Draw prompt, y1 and y2 letter by letter from the published table; a tie y1 == y2 is drawn again."""
    data = Bandit(prompts=2, alphabet=3, length=length).load(0)
    random, n, counts = Random(1), 40_000, Counter()
    index = {text: k for k, text in enumerate(data.train[0].responses)}

    def respond(x):
        context, text = 3 + x, ""
        for _ in range(length):
            letter = random.choices(range(3), [math.exp(z) for z in data.table[context]])[0]
            context, text = letter, text + data.symbols[letter]
        return index[text]

    for _ in range(n):
        x = random.randrange(2)
        counts[x, frozenset((respond(x), respond(x)))] += 1
    for (x, i, j), weight in masses(data).items():
        error = math.sqrt(weight * (1 - weight) / n)
        assert counts[x, frozenset((i, j))] / n == pytest.approx(weight, abs=5 * error)
    diagonal = sum(count for (_, pair), count in counts.items() if len(pair) == 1) / n
    assert sum(masses(data).values()) == pytest.approx(1 - diagonal, abs=5 * math.sqrt(0.25 / n))


def test_length_one_is_exactly_the_softmax_of_the_prompts_row():
    data = Bandit(prompts=3, alphabet=4, sampling="reference").load(0)
    for x, row in enumerate(data.train):
        odds = [math.exp(z) for z in data.table[4 + x]]
        for p in row.pairs:
            pi, pj = odds[p.winner] / sum(odds), odds[p.loser] / sum(odds)
            assert p.weight == pytest.approx(2 * pi * pj / 3)
            assert row.rewards[p.winner] >= row.rewards[p.loser]


def test_sampled_pairs_have_the_exact_frequencies_and_labels():
    n = 50_000
    exact = Bandit(prompts=2, alphabet=3).load(0)
    data = Bandit(prompts=2, alphabet=3, preferences="sampled", pairs=n).load(7)
    assert sum(masses(data).values()) == n
    assert all(p.preference == 1 for row in data.train for p in row.pairs)
    total = sum(masses(exact).values())
    for x, row in enumerate(exact.train):
        for p in row.pairs:
            for i, j, label in ((p.winner, p.loser, p.preference), (p.loser, p.winner, 1 - p.preference)):
                share = p.weight / total * label
                error = math.sqrt(share * (1 - share) / n)
                assert masses(data)[x, i, j] / n == pytest.approx(share, abs=5 * error)


def test_the_runs_seed_draws_preferences_and_the_worlds_seed_the_world():
    config = {"preferences": "sampled", "pairs": 100, "eval_pairs": 50}
    a, again, b = (Bandit(**config).load(seed) for seed in (0, 0, 1))
    assert a == again
    assert a.table == b.table
    assert [row.rewards for row in a.train] == [row.rewards for row in b.train]
    assert masses(a) != masses(b)
    assert sum(p.weight for row in a.held_out for p in row.pairs) == 50
    same_size = Bandit(**{**config, "eval_pairs": 100}).load(0)
    assert [row.pairs for row in same_size.held_out] != [row.pairs for row in same_size.train]  # independent samples
    other = Bandit(**config, world_seed=1).load(0)
    assert other.table != a.table
    assert other.train[0].rewards != a.train[0].rewards
    assert (
        Bandit(**{**config, "eval_pairs": None}).load(0).held_out == Bandit().load(5).train
    )  # held out: the exact ones


def test_scales_scale_and_no_more():
    one, two = (Bandit(reward_scale=r, reference_scale=z).load(0) for r, z in ((1.0, 1.0), (2.0, 3.0)))
    assert [2 * r for r in one.train[3].rewards] == pytest.approx(two.train[3].rewards)
    assert [3 * z for z in one.table[9]] == pytest.approx(two.table[9])
    rewards = [r for row in Bandit(prompts=400).load(0).train for r in row.rewards]  # 3200 draws, sd 1.5
    assert sum(rewards) / len(rewards) == pytest.approx(0, abs=5 * 1.5 / math.sqrt(3200))
    assert sum(r * r for r in rewards) / len(rewards) == pytest.approx(2.25, rel=5 * math.sqrt(2 / 3200))


def test_texts_are_enumerated_and_distinct():
    data = Bandit(prompts=101, alphabet=2, length=3).load(0)
    assert data.train[0].responses == ["aaa", "aab", "aba", "abb", "baa", "bab", "bba", "bbb"]
    assert data.prompts[:2] == ["p000 ", "p001 "]
    assert len(set(data.prompts)) == 101
    assert data.symbols == ["a", "b"]
    assert (len(data.table), len(data.table[0])) == (2 + 101, 2)


def test_a_users_world_fills_the_table_of_the_tabular_model(world):
    responses = [["yes", "no"], ["no", "maybe"]]
    logits = [[0.0, 1.0], [2.0, 3.0]]
    data = Bandit(path=world(responses=responses, rewards=[[1, 0], [0, 1]], reference_logits=logits)).load(0)
    assert data.symbols == ["yes", "no", "maybe"]
    assert data.prompts == WORLD["prompts"]
    north, south = data.table[3:]
    assert north[:2] == [0.0, 1.0]
    assert south[1:] == [2.0, 3.0]
    for row, outside in ((north, 2), (south, 0)):  # what a prompt does not offer has next to no probability
        assert math.exp(row[outside]) / sum(map(math.exp, row)) < 1e-12


def test_a_world_without_logits_has_a_uniform_reference(world):
    data = Bandit(path=world(reference_logits=None)).load(0)
    assert data.table[3:] == [[0.0] * 3] * 2
    assert list(masses(data).values()) == pytest.approx([1 / 9] * 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None, "reward": [[1]]}, "rewards: must be a non-empty list; rename 'reward'"),
        ({"responses": ["yes"]}, r"responses\[0\]: needs at least 2"),
        ({"responses": ["yes", "no", "yes"]}, r"responses\[0\]: holds 'yes' twice"),
        ({"responses": ["yes", "", "no"]}, r"responses\[0\]: must be a list of non-empty strings"),
        ({"responses": [["a", "b", "c"]]}, "responses: 1 lists for 2 prompts"),
        ({"prompts": ["north? ", "north? "]}, "prompts: holds 'north. ' twice"),
        ({"prompts": [1, 2]}, "prompts: must be a list of non-empty strings"),
        ({"rewards": [[1, 0, -1]]}, "rewards: must be a list of 2 lists"),
        ({"rewards": [[1, 0, -1], [1, 0]]}, r"rewards\[1\]: 2 numbers for 3 responses"),
        ({"rewards": [[1, 0, "2"], [1, 0, 0]]}, r"rewards\[0\]: must be a list of finite numbers"),
        ({"reference_logits": [[1, 0, True], [1, 0, 0]]}, r"reference_logits\[0\]: must be a list of finite numbers"),
        ({"rewards": [[1, 0, math.nan], [1, 0, 0]]}, "NaN is not a JSON number"),
        ({"reference_logit": [[0]]}, "reference_logit: unknown key; did you mean 'reference_logits'?"),
    ],
)
def test_a_bad_world_is_refused_with_file_entry_and_reason(world, changes, message):
    with pytest.raises(DataError, match=message) as error:
        Bandit(path=world(**changes)).load(0)
    assert "world.json" in str(error.value)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pairs": 5}, "dataset.pairs=5 has no effect with dataset.preferences=exact"),
        ({"eval_pairs": 5}, "dataset.eval_pairs=5 has no effect"),
        ({"preferences": "sampled"}, "needs a number of draws"),
        ({"path": "w.json", "alphabet": 4}, "dataset.alphabet=4 has no effect with dataset.path"),
        ({"path": "w.json", "world_seed": 1}, "dataset.world_seed=1 has no effect"),
        ({"alphabet": 1}, "dataset.alphabet=1"),
        ({"length": 0}, "dataset.length=0"),
        ({"prompts": 0}, "dataset.prompts=0"),
        ({"reward_scale": math.nan}, "dataset.reward_scale=nan"),
        ({"max_prompt_tokens": 0}, "dataset.max_prompt_tokens=0"),
        ({"max_drop_fraction": 1.5}, "dataset.max_drop_fraction=1.5"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Bandit(**config)


def test_a_world_that_is_missing_or_too_large_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file"):
        Bandit(path="nowhere.json").load(0)
    with pytest.raises(ConfigError, match="more than 1,000,000 pairs"):
        Bandit(alphabet=8, length=12).load(0)


def test_label_noise_flips_training_labels_only():
    clean, noisy = (Bandit(prompts=2, label_noise=noise).load(0) for noise in (0.0, 0.2))
    for before, after in zip(clean.train, noisy.train):
        for one, other in zip(before.pairs, after.pairs):
            assert other.preference == pytest.approx(0.8 * one.preference + 0.2 * (1 - one.preference))
            assert other[:2] + other[3:] == one[:2] + one[3:]
    assert noisy.held_out == clean.held_out
    drawn = Bandit(prompts=1, alphabet=2, reward_scale=0, label_noise=0.0, preferences="sampled", pairs=4000).load(0)
    assert sum(pair.weight for pair in drawn.train[0].pairs) == 4000


def test_sampled_labels_are_flipped_at_the_rate_of_the_noise():
    options = {"prompts": 1, "alphabet": 2, "reward_scale": 40, "preferences": "sampled", "pairs": 10_000}
    row = Bandit(**options, label_noise=0.3).load(0).train[0]  # without noise, the better response always wins
    best = max(range(2), key=lambda i: row.rewards[i])
    lost = sum(pair.weight for pair in row.pairs if pair.loser == best)
    assert lost / 10_000 == pytest.approx(0.3, abs=4 * (0.21 / 10_000) ** 0.5)


@pytest.mark.parametrize("alignment", [-1.0, -0.6, 0.6, 1.0])
def test_the_reference_is_aligned_with_the_rewards_as_asked(alignment):
    world = Bandit(prompts=400, reference_alignment=alignment, reference_scale=2.0)._generate()
    logits, rewards = np.array(world.table[8:]).ravel(), np.array(world.rewards).ravel()
    assert np.corrcoef(logits, rewards)[0, 1] == pytest.approx(alignment, abs=0.04)
    assert logits.std() == pytest.approx(2.0, rel=0.05)
    assert world.rewards == Bandit(prompts=400)._generate().rewards


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_noise": 0.5},
        {"label_noise": -0.1},
        {"reference_alignment": 1.1},
        {"reference_alignment": 1, "length": 2},
    ],
)
def test_noise_and_alignment_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Bandit(**wrong)
