"""A model asked in place of a table: on a table both must say the same; on a transformer, what training comes to."""

from __future__ import annotations

import csv
import os
import signal
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
from composing import composed, train
from exact_worlds import EXACT
from safetensors.torch import load_file, save_file

from cdpo.config.identity import digest
from cdpo.errors import Preempted
from cdpo.exact import solver
from cdpo.exact.descent import value_and_gradient
from cdpo.exact.network import Network
from cdpo.exact.results import Effort
from cdpo.exact.search import objective_of, search
from cdpo.exact.setting import Setting, setting_of
from cdpo.training import loop
from cdpo.training.solve import table_of

WORLD = ("dataset.prompts=3", "dataset.alphabet=3", "beta=1")
TINY = ("model=tiny", "model.dtype=float64", "model.hidden_size=8", "model.heads=2", "model.layers=1", "logger=none",
        "dataset.length=2", "dataset.alphabet=2", "dataset.sampling=uniform", "dataset.prompts=3", "beta=1",
        )  # fmt: skip
SETS = {
    "none": [],
    "l2_ball": ["constraint=l2_ball", "constraint.l2_ball.radius=1.5"],
    "linf_ball": ["constraint=linf_ball", "constraint.linf_ball.radius=0.4"],
    "l2_to_start": ["constraint=l2_to_start", "constraint.l2_to_start.strength=0.05"],
    "weight_decay": ["constraint=weight_decay", "constraint.weight_decay.strength=0.02"],
    "lora_r2": ["constraint=lora_r2"],
    "lora_r1_in_l2_ball": ["constraint=[lora_r1,l2_ball]", "constraint.l2_ball.radius=1.5"],
    "kl_budget": ["constraint=kl_budget", "constraint.kl_budget.budget=0.1"],
    "sparse_topk": ["constraint=sparse_topk", "constraint.sparse_topk.fraction=null", "constraint.sparse_topk.k=4"],
}


class Stopped(Exception):
    """The run has come to its search."""


def begun(folder, *overrides):
    """A run of optimizer=exact that stands before its search."""
    runs = []

    def stop(run):
        runs.append(run)
        raise Stopped

    with patch.object(loop, "solve", stop), suppress(Stopped):
        train(composed("optimizer=exact", *overrides), folder)
    return runs[0]


def network_of(run, micro_batch=10_000, pause=lambda: None):
    return Network.of(run.scorer, run.change, run.train, micro_batch, pause)


def asked(policy, run):
    setting = setting_of(run.constraints, run.change.trainable())
    return objective_of(policy, run.loss, setting), setting


def points(size, count=3, scale=0.5):
    return scale * torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("own", SETS.values(), ids=SETS)
def test_on_a_table_values_and_gradients_are_those_of_the_table(own, length, tmp_path):
    run = begun(tmp_path, *EXACT, *WORLD, "loss=dpo", f"dataset.length={length}", *own)
    (table, _), (network, _) = asked(table_of(run), run), asked(network_of(run), run)
    x = points(table.size)
    with run.change.at_start():
        for mine, theirs in zip(value_and_gradient(network, x), value_and_gradient(table, x)):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(network.policy.kl(network.change(x)), table.policy.kl(table.change(x)))
    torch.testing.assert_close(network.factorised(table.change(x)), table.factorised(table.change(x)))


@pytest.mark.parametrize("loss", ["dpo", "rlhf"])
@pytest.mark.parametrize("own", SETS.values(), ids=SETS)
def test_on_a_table_it_finds_the_tables_optimum(own, loss, tmp_path):
    run = begun(tmp_path, *EXACT, *WORLD, f"loss={loss}", *own)
    table, network = table_of(run), network_of(run)
    _, setting = asked(table, run)
    known = search(table, run.loss, setting, Effort(8, 250, 1e-8, 0), {})
    with run.change.at_start():
        found = search(network, run.loss, setting, Effort(4, 250, 1e-8, 0), {})
    assert found.value.min().item() == pytest.approx(known.value.min().item(), abs=1e-8)
    assert found.at_start == pytest.approx(known.at_start, abs=1e-12)
    assert found.proof == ""


@pytest.mark.parametrize("own", [[], ["constraint=lora_r1"], ["constraint=weight_decay"]], ids=str)
@pytest.mark.parametrize("loss", ["rlhf", "dpo"])
def test_at_the_policys_own_numbers_value_and_gradient_are_those_of_training(loss, own, tmp_path):
    """The factors that training has, put in by the model's adapters; micro-batches and kept graphs change nothing."""
    run = begun(tmp_path, *TINY, f"loss={loss}", *own)
    f, _ = asked(network_of(run), run)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter += 0.1 * torch.randn_like(parameter)
    penalties = [one for c in run.constraints.values() if (one := c.parameter_penalty()) is not None]
    expected = loop.gradient(run)["objective"] + sum(float(one.detach()) for one in penalties)
    for one in penalties:
        one.backward()
    x, gradient = at_training(run)
    with run.change.at_start():
        value, found = value_and_gradient(f, x[None])
        assert value.item() == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(found[0], gradient, rtol=1e-10, atol=1e-12)
        several = torch.stack([x, x / 2, x])
        for micro_batch in (1, 40):  # an Item at a time, computed again in the backward pass
            split, _ = asked(network_of(run, micro_batch), run)
            values, gradients = value_and_gradient(split, several)
            torch.testing.assert_close(values[[0, 2]], value.expand(2), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradients[2], found[0], rtol=1e-10, atol=1e-12)


def at_training(run):
    """x of what the policy is set to, and the gradient that lies on its parameters, in the order of x. 2 x [n]"""
    from cdpo.model.change import factors

    now = [(p - start, p.grad) for _, p, start in run.change.plain()]
    now += [(f, f.grad) for layer in run.change.adapted.values() for f in reversed(factors(layer))]
    return tuple(torch.cat([one.detach().flatten() for one in column]) for column in zip(*now))


@pytest.fixture
def hasty(monkeypatch):
    """Searches that take few steps before they go on with few starts."""
    monkeypatch.setattr(solver, "FREE_STEPS", 20)
    monkeypatch.setattr(solver, "EXPLORED", 5)


def searched(folder, *overrides):
    return train(composed("optimizer=exact", *TINY, *overrides), folder)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["rlhf", "dpo"])
def test_in_a_ball_a_transformer_comes_to_rest_below_long_training(loss, tmp_path):
    own = (f"loss={loss}", "constraint=l2_ball", "constraint.l2_ball.radius=0.1")
    found = searched(tmp_path / "exact", *own, "optimizer.starts=1")
    long = ("optimizer=frank_wolfe", "trainer.max_steps=300", "trainer.eval_every=300", "trainer.log_every=300")
    trained = train(composed(*TINY, *own, *long), tmp_path / "frank_wolfe")
    certificate = found["certificate"]
    assert certificate["status"] == "searched", certificate
    assert certificate["residual"] < 1e-3
    assert found["change/norm"] <= 0.1 + 1e-12
    assert found["metrics"]["eval/loss"] <= trained["metrics"]["eval/loss"] + 1e-9
    assert found["metrics"]["objective/attained"] > 0.05


@pytest.mark.slow
def test_under_a_rank_it_is_not_worse_than_lbfgs_with_restarts(tmp_path):
    own = ("loss=rlhf", "constraint=lora_r1", "constraint.lora_r1.target_modules=[q_proj,v_proj]")
    found = searched(tmp_path / "exact", *own)
    assert found["certificate"]["status"] == "searched", found["certificate"]
    long = ("optimizer=lbfgs", "trainer.max_steps=10", "trainer.eval_every=10")
    others = [train(composed(*TINY, *own, *long, f"restart={i}"), tmp_path / str(i)) for i in range(3)]
    assert found["metrics"]["eval/loss"] <= min(one["metrics"]["eval/loss"] for one in others) + 1e-6
    rows = list(csv.DictReader((tmp_path / "exact" / "searches.csv").open()))
    assert len(rows) == 10
    assert {row["origin"] for row in rows} >= {"unconstrained optimum", "down the gradient", "random 7"}
    assert min(float(row["objective"]) for row in rows) == pytest.approx(found["metrics"]["eval/loss"], abs=1e-9)


def test_a_signal_ends_the_search_and_the_same_command_starts_it_over(hasty, tmp_path):
    settings = composed("optimizer=exact", *TINY, "loss=dpo", "optimizer.starts=1", "optimizer.steps=5")
    whole = train(settings, tmp_path / "whole")
    passes, scored = [], Network.scored

    def scoring(network, change, batch):
        passes.append(1)
        if len(passes) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return scored(network, change, batch)

    with patch.object(Network, "scored", scoring), pytest.raises(Preempted, match="the same command starts again"):
        train(settings, tmp_path / "run")
    assert len(passes) == 20
    again = train(settings, tmp_path / "run")
    assert again["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]
    assert (tmp_path / "run" / "searches.csv").read_text() == (tmp_path / "whole" / "searches.csv").read_text()


def test_it_goes_on_from_what_another_run_has_handed_over(hasty, tmp_path):
    settings = composed("optimizer=exact", *TINY, "loss=dpo", "constraint=lora_r1", "optimizer.steps=20")
    first = train(settings, tmp_path / "first")
    solution = load_file(tmp_path / "first" / "solution.safetensors")["change"]
    (tmp_path / "run").mkdir()
    save_file({"first": solution}, tmp_path / "run" / "starts.safetensors")
    found = train(settings, tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "searches.csv").open()))
    assert [row["origin"] for row in rows] == ["unconstrained optimum", "from first", "down the gradient"]
    assert found["metrics"]["eval/loss"] <= first["metrics"]["eval/loss"]


def test_what_is_frozen_keeps_its_value(hasty, tmp_path):
    own = ("loss=dpo", "constraint=freeze", "optimizer.starts=1", "optimizer.steps=5")
    run = begun(tmp_path / "begun", *TINY, *own)
    trained = sum(p.numel() for name, p in run.policy.named_parameters() if ".layers.0." in name)
    assert network_of(run).size == trained == run.change.trainable()
    assert searched(tmp_path / "run", *own)["trainable"] == trained


@pytest.mark.parametrize(("dtype", "mended"), [("float64", True), ("float32", False)])
def test_what_was_trained_is_to_be_searched_where_that_is_possible(dtype, mended, tmp_path):
    settings = composed(*TINY, "loss=dpo", f"model.dtype={dtype}", "trainer.max_steps=2", "trainer.eval_every=2")
    mend = train(settings, tmp_path)["certificate"]["mend"]
    assert mend.startswith("optimizer=exact" if mended else "trainer.batch_size=null")


def test_a_table_has_128_starts_another_model_8_and_null_is_the_same_run():
    for model, starts in ((["model=tabular"], 128), (TINY, 8)):
        null, said, other = (
            digest(composed("optimizer=exact", *model, f"optimizer.starts={one}")) for one in ("null", starts, 5)
        )
        assert null == said != other


@pytest.mark.parametrize("limits", [{"radius": 2.0}, {"box": 0.7}], ids=str)
def test_what_lies_beyond_is_projected_back(limits):
    setting = Setting(**limits)
    x = setting.project(points(6, scale=2.0))
    torch.testing.assert_close(setting.project(setting.beyond(x)), x)
    assert (setting.beyond(x) != x).any()
    torch.testing.assert_close(setting.beyond(x / 10), x / 10, rtol=0, atol=0)
