"""AOT against its definition as an integral over quantiles, copies in place of weights, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from composing import composed, train
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_losses import gradient, logps_of, random_logps
from scipy.optimize import linear_sum_assignment

from cdpo.batch import Logps
from cdpo.errors import ConfigError
from cdpo.losses import AOT, DPO, WPO, Sum
from cdpo.losses.loss import per_unit
from cdpo.training.checks import checked

both = pytest.mark.parametrize("paired", [True, False])


def mean(loss, logps: Logps) -> torch.Tensor:
    return (per_unit(loss, logps) * logps.weight).sum() / logps.weight.sum()


@both
def test_it_is_the_cheapest_assignment_of_one_sample_to_the_other(paired):
    """By scipy's assignment, which sorts nothing: the cost is convex in u - v."""
    logps = random_logps(pairs=20, seed=4)
    if paired:
        u, v = (torch.sub(*logps.of_pairs(values)) for values in (logps.policy, logps.reference))
    else:
        u, v = logps.of_pairs(logps.log_ratio())
    cost = torch.log1p(torch.exp(-0.3 * (u[:, None] - v[None, :])))
    rows, columns = linear_sum_assignment(cost.numpy())
    assert float(mean(AOT(0.3, paired), logps)) == pytest.approx(cost[rows, columns].mean().item(), rel=1e-9)


@both
def test_weights_are_copies_and_soft_labels_are_weights_of_both_orders(paired):
    logps = random_logps(pairs=4, preference=torch.tensor([1.0, 0.25, 0.0, 0.5], dtype=torch.float64))
    logps = replace(logps, weight=torch.tensor([1.0, 4.0, 2.0, 2.0], dtype=torch.float64))
    copies = [(0, 1)] + [(2, 3)] + 3 * [(3, 2)] + 2 * [(5, 4)] + [(6, 7), (7, 6)]
    ones = torch.ones(9, dtype=torch.float64)
    hard = replace(logps, pairs=torch.tensor(copies), preference=ones, weight=ones, soft=False)
    policy = logps.policy.clone().requires_grad_()
    found, expected = (mean(AOT(0.3, paired), replace(one, policy=policy)) for one in (logps, hard))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    slopes = (torch.autograd.grad(value, policy)[0] for value in (found, expected))
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)


def test_one_pair_alone_is_dpo():
    logps = random_logps(pairs=1)
    torch.testing.assert_close(AOT()(logps), DPO()(logps))
    torch.testing.assert_close(AOT(paired=False)(logps), DPO()(logps))


@both
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.sampled_from([0.0, -1e6, 1e6]), st.floats(-40, 0, width=32)), min_size=16, max_size=16
    ),
    preference=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4, max_size=4),
    weight=st.lists(st.one_of(st.just(0.0), st.floats(0.01, 9)), min_size=4, max_size=4),
)
def test_extreme_log_probs_give_finite_values_and_gradients(paired, values, preference, weight):
    p, weight = torch.tensor(preference), torch.tensor(weight, dtype=torch.float64)
    logps = logps_of(torch.tensor(values[:8]), values[8:], [1] * 8, preference=p, weight=weight)
    assert per_unit(AOT(paired=paired), logps).isfinite().all()
    assert gradient(AOT(paired=paired), logps).isfinite().all()


def test_what_is_made_of_parts_takes_losses_of_single_pairs():
    for make in (lambda: WPO(AOT()), lambda: Sum({"aot": AOT()}, {"aot": 1.0})):
        with pytest.raises(ValueError, match="AOT is one of all pairs of a step"):
            make()


QUICK = ("model=tiny", "model.hidden_size=16", "model.heads=2", "logger=none", "trainer.max_steps=2",
         "dataset.prompts=6", "dataset.alphabet=3", "trainer.batch_size=4", "trainer.eval_every=2")  # fmt: skip


def test_a_step_in_parts_is_refused_and_what_is_said_mends_it(tmp_path):
    with pytest.raises(ConfigError, match=r"set trainer.tokens_per_micro_batch=\d+") as error:
        train(composed(*QUICK, "loss=aot", "trainer.tokens_per_micro_batch=8"), tmp_path / "split")
    mend = str(error.value).partition("set ")[2].partition(",")[0]
    whole = train(composed(*QUICK, "loss=aot", mend), tmp_path / "whole")["metrics"]
    again = train(composed(*QUICK, "loss=aot"), tmp_path / "again")["metrics"]  # held-out rows in other portions
    assert whole["eval/loss"] == pytest.approx(again["eval/loss"], rel=1e-6)
    assert whole["loss"] == pytest.approx(again["loss"], rel=1e-6)


def test_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"AOT sorts all of them: set trainer.distributed=none"):
        checked(composed("loss=aot", "trainer.distributed=ddp"))


def test_joined_is_what_was_taken_apart():
    logps = random_logps(pairs=4)
    tensors = {name: value for name, value in vars(logps).items() if isinstance(value, torch.Tensor)}

    def part(pairs: slice) -> Logps:
        rows = slice(2 * pairs.start, 2 * pairs.stop)
        cut = {name: value[pairs if len(value) == 4 else rows] for name, value in tensors.items()}
        cut |= {"pairs": cut["pairs"] - rows.start, "item": cut["item"] - pairs.start}
        return replace(logps, **cut, sources=logps.sources[pairs])

    found = Logps.joined([part(slice(0, 1)), part(slice(1, 4))])
    assert all(torch.equal(getattr(found, name), value) for name, value in tensors.items())
    assert found.sources == logps.sources
