"""Packing against a slow walk over the Items, and the plan of what training sees, by hypothesis."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpo.batch import Item, Pair
from cdpo.data.packing import Plan, by_tokens, pack

tokens = st.lists(st.integers(0, 9), min_size=1, max_size=5)
real = st.floats(-1e6, 1e6)


@st.composite
def some_items(draw):
    """Up to five Items with rewards and pairs, or without; any of them may lack pairs."""
    rewarded = draw(st.booleans())
    items = []
    for i in range(draw(st.integers(1, 5))):
        responses = draw(st.lists(tokens, min_size=2, max_size=4))
        index = st.integers(0, len(responses) - 1)
        pairs = draw(st.lists(st.builds(Pair, index, index, st.floats(0, 1), st.floats(0.1, 9)), max_size=3))
        rewards = draw(st.lists(real, min_size=len(responses), max_size=len(responses))) if rewarded else None
        items.append(Item(draw(tokens), responses, pairs, rewards, f"row {i}"))
    return items


def context(batch, flat):
    """(token, position) of everything that the token at `flat` sees, by the rule of Batch's docstring."""
    row, column = divmod(flat, batch.input_ids.shape[1])
    tree, branch = batch.tree[row].tolist(), batch.branch[row].tolist()
    if batch.attention_mask is not None:  # padded: an ordinary causal row
        seen = list(range(column + 1))
        assert batch.attention_mask[row, seen].all()
    else:
        seen = [k for k in range(column + 1) if tree[k] == tree[column] and branch[k] in (0, branch[column])]
    ids, positions = batch.input_ids[row].tolist(), batch.position_ids[row].tolist()
    return [(ids[k], positions[k]) for k in seen]


@settings(max_examples=60, deadline=None)
@given(some_items(), st.booleans())
def test_every_response_token_is_predicted_from_its_prompt_and_what_came_before(items, padded):
    batch = pack(items, padded=padded)
    n = 0
    for item in items:
        for response in item.responses:
            for j, token in enumerate(response):
                before = [*item.prompt, *response[:j]]
                flat = int(batch.predict_at[batch.position[n]])
                assert context(batch, flat) == [(known, at) for at, known in enumerate(before)]
                assert int(batch.target[n]) == token
                n += 1
    assert n == len(batch.target) == len(batch.position) == batch.length.sum()
    assert sorted(set(batch.position.tolist())) == list(
        range(len(batch.predict_at))
    )  # no logit is computed for nothing
    assert len(set(batch.predict_at.tolist())) == len(batch.predict_at)


@settings(max_examples=60, deadline=None)
@given(some_items(), st.booleans())
def test_tokens_are_encoded_once_and_counted(items, padded):
    batch = pack(items, padded=padded)
    if padded:
        each = [len(item.prompt) + len(response) - 1 for item in items for response in item.responses]
        assert batch.input_ids.shape == (len(each), max(each))
        assert batch.attention_mask.sum(1).tolist() == each
    else:
        each = [len(item.prompt) + sum(len(r) - 1 for r in item.responses) for item in items]
        assert batch.input_ids.shape == (1, sum(each))
        assert [item.tokens for item in items] == torch.bincount(batch.tree[0]).tolist() == each
        assert batch.attention_mask is None
    assert batch.tokens == sum(each)


@settings(max_examples=60, deadline=None)
@given(some_items(), st.booleans(), st.randoms())
def test_constants_stand_beside_their_responses(items, padded, draw):
    reference = [torch.tensor([draw.gauss(0, 9) for _ in item.responses], dtype=torch.float64) for item in items]
    batch = pack(items, reference, padded)
    numbers = {"item": [], "length": [], "reference": [], "rewards": []}
    pairs, preference, weight = [], [], []
    for i, item in enumerate(items):
        first = len(numbers["item"])
        for k, response in enumerate(item.responses):
            numbers["item"].append(i)
            numbers["length"].append(len(response))
            numbers["reference"].append(float(reference[i][k]))
            numbers["rewards"].append(item.rewards[k] if item.rewards else None)
        for pair in item.pairs:
            pairs.append([first + pair.winner, first + pair.loser])
            preference.append(pair.preference)
            weight.append(pair.weight)
    if items[0].rewards is None:
        assert batch.rewards is None
        del numbers["rewards"]
    assert {name: getattr(batch, name).tolist() for name in numbers} == numbers
    assert batch.pairs.tolist() == pairs
    assert batch.pairs.shape == (len(pairs), 2)
    assert batch.pairs.dtype == torch.long  # also without a pair, so that it always indexes
    assert (batch.preference.tolist(), batch.weight.tolist()) == (preference, weight)
    assert batch.sources == tuple(item.source for item in items)


def test_without_a_reference_it_is_zero():
    item = Item([1], [[2], [3], [4]], [])
    assert pack([item]).reference.tolist() == [0.0, 0.0, 0.0]


def test_rewards_and_fitted_rewards_are_of_all_items_or_of_none():
    known, unknown = Item([1], [[2], [3]], [], [0.0, 0.0]), Item([1], [[2], [3]], [], fitted_rewards=[1.0, 2.0])
    assert pack([known]).rewards.tolist() == [0.0, 0.0]
    assert pack([known]).fitted_rewards is None
    assert pack([unknown]).rewards is None
    assert pack([unknown]).fitted_rewards.tolist() == [1.0, 2.0]
    with pytest.raises(AssertionError, match="some Items of a batch have rewards"):
        pack([known, unknown])


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60), st.randoms())
def test_by_tokens_splits_within_the_budget(sizes, budget, draw):
    indices = [i for i in range(len(sizes)) if draw.random() < 0.8]
    draw.shuffle(indices)
    batches = by_tokens(sizes, indices, budget)
    assert sorted(i for batch in batches for i in batch) == sorted(indices)
    for batch in batches:
        assert len(batch) == 1 or sum(sizes[i] for i in batch) <= budget
    flat = [sizes[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)
    for batch, following in pairwise(batches):  # no batch is cut short
        assert sum(sizes[i] for i in batch) + sizes[following[0]] > budget
    assert batches == by_tokens(sizes, sorted(indices), budget)  # whatever order they come in


plans = st.builds(
    Plan,
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    batch_size=st.integers(1, 8),
    steps=st.just(1000),
    seed=st.integers(0, 2**31 - 1),
    micro_batch=st.integers(1, 60),
)


def seen(plan, step):
    return sorted(i for batch in plan[step] for i in batch)


@settings(deadline=None)
@given(plans, st.integers(0, 5))
def test_an_epoch_covers_every_item_once(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    per_step = [seen(plan, step) for step in steps]
    assert sorted(i for step in per_step for i in step) == list(range(len(plan.sizes)))
    assert all(len(step) == plan.batch_size for step in per_step[:-1])
    assert 1 <= len(per_step[-1]) <= plan.batch_size


@settings(deadline=None)
@given(plans, st.lists(st.integers(0, 99), min_size=1, max_size=5))
def test_a_step_depends_on_nothing_that_came_before(plan, steps):
    """In any order, from a fresh plan, and after the global generator was used: the same step, the same Items."""
    expected = {step: plan[step] for step in range(100)}
    torch.rand(3)
    fresh = Plan(list(plan.sizes), plan.batch_size, 7, plan.seed, plan.micro_batch)
    for step in steps:
        assert fresh[step] == expected[step]


@settings(deadline=None)
@given(plans, st.integers(1, 60))
def test_the_token_budget_moves_no_item_to_another_step(plan, budget):
    other = Plan(plan.sizes, plan.batch_size, plan.steps, plan.seed, budget)
    assert [seen(plan, step) for step in range(20)] == [seen(other, step) for step in range(20)]


def order(seed, epoch):
    plan = Plan([1] * 50, 1, 1000, seed, 1)
    return tuple(plan[step][0][0] for step in range(epoch * 50, (epoch + 1) * 50))


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (1, 1), (0, 2), (2**31 - 1, 0)])
def test_seeds_and_epochs_differ(other):
    assert order(0, 0) != order(*other)


def test_every_item_is_as_likely_to_come_first():
    """Over 2,000 seeds each of 4 Items comes first 500 times, give or take 6 standard deviations."""
    counts = torch.bincount(torch.tensor([Plan([1] * 4, 1, 1, seed, 1)[0][0][0] for seed in range(2000)]))
    assert (counts - 500).abs().max() < 6 * (2000 * 3 / 16) ** 0.5
