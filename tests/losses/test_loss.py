"""What every loss on pairs promises: finite numbers, soft labels as two terms, the same from any micro-batches."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_losses import LOSSES, every_loss, logps_of, random_logps

from cdpo.errors import NumericsError
from cdpo.losses.combined import WPO, Sum
from cdpo.losses.loss import check_finite, per_unit


def with_strength(loss, beta: float):
    """The same loss with another beta or tau, also in its parts."""
    if isinstance(loss, WPO):
        return replace(loss, loss=with_strength(loss.loss, beta))
    if isinstance(loss, Sum):
        return replace(loss, losses={name: with_strength(part, beta) for name, part in loss.losses.items()})
    known = {f.name for f in fields(loss)} if is_dataclass(loss) else set()
    return replace(loss, **{name: beta for name in ("beta", "tau") if name in known})


extreme = st.one_of(
    st.sampled_from([0.0, -1e-7, -1e6, 1e6]), st.floats(-1e6, 1e6, width=32), st.floats(-40, 0, width=32)
)
responses = st.lists(extreme, min_size=8, max_size=8)


@every_loss
@settings(max_examples=60, deadline=None)
@given(
    policy=responses,
    reference=responses,
    length=st.lists(st.integers(1, 50), min_size=8, max_size=8),
    preference=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4, max_size=4),
    beta=st.floats(-3, 1).map(lambda e: 10**e),
    progress=st.floats(0, 1, exclude_max=True),
    baseline=st.floats(-1e3, 1e3),
)
def test_extreme_log_probs_give_finite_values_and_gradients(
    loss, policy, reference, length, preference, beta, progress, baseline
):
    policy = torch.tensor(policy, dtype=torch.float32, requires_grad=True)
    more = {"rewards": torch.linspace(-2, 2, 8), "progress": progress, "baseline": baseline}
    logps = logps_of(policy, reference, length, preference=torch.tensor(preference), **more)
    values = per_unit(with_strength(loss, beta), logps)
    (slope,) = torch.autograd.grad(values.sum(), policy)
    assert values.shape == (4,)
    assert values.isfinite().all()
    assert slope.isfinite().all()


TWO_TERMS = [name for name, loss in LOSSES.items() if not getattr(loss, "reads_preference", False)]


@pytest.mark.parametrize("name", TWO_TERMS)
def test_soft_labels_are_two_terms(name):
    loss = LOSSES[name]
    p = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    logps = random_logps(pairs=4, preference=p)
    flipped = replace(logps, pairs=logps.pairs[:, [1, 0]])
    torch.testing.assert_close(per_unit(loss, logps), p * loss(logps) + (1 - p) * loss(flipped))


@every_loss
def test_a_pair_may_be_written_either_way_round(loss):
    logps = random_logps(pairs=4, preference=torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    other = replace(logps, pairs=logps.pairs.flip(1), preference=1 - logps.preference, soft=True)
    torch.testing.assert_close(per_unit(loss, other), per_unit(loss, logps))


@every_loss
@pytest.mark.parametrize("split", [(4, 4), (5, 3), (1,) * 8])
def test_gradient_does_not_depend_on_micro_batches(loss, split):
    weight = torch.arange(1.0, 9.0, dtype=torch.float64)
    whole = random_logps(preference=torch.linspace(0.3, 1.0, 8, dtype=torch.float64), weight=weight)
    policy = whole.policy.clone().requires_grad_()

    def backward(pairs: slice) -> torch.Tensor:
        rows = slice(2 * pairs.start, 2 * pairs.stop)
        per_response = ("reference", "length", "item", "rewards", "base")
        part = {name: getattr(whole, name)[rows] for name in per_response}
        part |= {name: getattr(whole, name)[pairs] for name in ("preference", "weight")}
        logps = replace(whole, policy=policy[rows], pairs=whole.pairs[pairs] - rows.start, **part)
        return torch.autograd.grad((logps.weight * per_unit(loss, logps)).sum() / weight.sum(), policy)[0]

    ends = torch.tensor(split).cumsum(0).tolist()
    parts = sum(backward(slice(end - n, end)) for n, end in zip(split, ends))
    torch.testing.assert_close(parts, backward(slice(0, 8)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_broken_log_probs_are_named(side, bad):
    logps = random_logps()
    getattr(logps, side)[5] = bad
    with pytest.raises(NumericsError, match=r"1 of 16 .*data\.jsonl:3, response row 5"):
        check_finite(logps)


def test_many_broken_log_probs_are_counted():
    logps = random_logps()
    logps.policy[2:] = math.nan
    with pytest.raises(NumericsError, match=r"14 of 16 .*data\.jsonl:2, response row 2 .*; \.\.\."):
        check_finite(logps)
    with pytest.raises(NumericsError, match="item 1, response row 2"):
        check_finite(replace(logps, sources=()))


def test_hard_labels_are_evaluated_once_and_item_losses_as_they_are():
    calls = []

    class Counting:
        unit = "pair"

        def __call__(self, logps):
            calls.append(logps)
            return logps.margin()

    class PerItem:
        unit = "item"

        def __call__(self, logps):
            return torch.arange(3.0)

    hard = random_logps(pairs=4)
    soft = replace(hard, preference=torch.full((4,), 0.5))
    torch.testing.assert_close(per_unit(Counting(), hard), hard.margin())
    torch.testing.assert_close(per_unit(Counting(), replace(hard, soft=False)), hard.margin())
    assert [len(one.pairs) for one in calls] == [8, 4]  # both ways, unless known to be hard
    assert per_unit(PerItem(), soft).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_reads_the_baseline_says_so(name):
    """Training keeps it only for those; others are given None."""
    loss, logps = LOSSES[name], random_logps()
    reads = not torch.equal(per_unit(loss, logps), per_unit(loss, replace(logps, baseline=0.5)))
    assert getattr(loss, "reads_baseline", False) == reads


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_what_else_it_reads(name):
    loss, logps = LOSSES[name], random_logps(preference=torch.full((8,), 0.8, dtype=torch.float64))
    others = {"progress": 0.6, "rewards": logps.rewards + torch.arange(16.0), "preference": 1 - logps.preference}
    for field, other in others.items():
        reads = not torch.equal(loss(logps), loss(replace(logps, **{field: other})))
        assert getattr(loss, f"reads_{field}", False) == reads, field
