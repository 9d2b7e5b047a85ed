"""The training loop: exact gradients, numbers that settings of speed do not change, and no step with NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from composing import composed, train
from run_files import rows, same, weights
from small_runs import OWN, SMALL, jsonl

from cdpo.config import build as config
from cdpo.errors import ConfigError, NumericsError, Preempted
from cdpo.model.layers import decoder_layers
from cdpo.model.logps import linear_head
from cdpo.system import checkpoint
from cdpo.training import job, loop


def gradient_of(settings: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The gradient of the first step, as training makes it."""
    found = []

    def first(run):
        loop.gradient(run)
        found.append(torch.cat([p.grad.flatten() for p in run.parameters]).clone())
        raise Preempted("enough")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", first)
        with pytest.raises(Preempted):
            train(settings, folder)
    return found[0]


@pytest.mark.parametrize("loss", ["gaussian", "sft", "bco", "wpo", "expo", "kto"])
def test_gradient_does_not_depend_on_micro_batches(loss, tmp_path, monkeypatch):
    """Uneven Items: pairs and tokens per Item differ, so means of means would show."""
    base = [*SMALL, "dataset.preferences=sampled", "dataset.pairs=17", "trainer.batch_size=null", "model.dtype=float64",
            "dataset.length=2", "dataset.alphabet=3", f"loss={loss}", "constraint=kl_budget",
            "trainer.max_grad_norm=null"]  # fmt: skip
    one = gradient_of(composed(*base, "trainer.tokens_per_micro_batch=100000"), tmp_path / "one", monkeypatch)
    for budget in (1, 30, 45):
        many = gradient_of(
            composed(*base, f"trainer.tokens_per_micro_batch={budget}"), tmp_path / f"{budget}", monkeypatch
        )
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-9)  # Llama's norms are float32 inside


def test_dpo_and_gaussian_train_alike(tmp_path):
    for loss in ("dpo", "gaussian"):
        train(composed(*SMALL, f"loss={loss}", "loss.beta=0.3"), tmp_path / loss)
    dpo, gaussian = weights(tmp_path / "dpo"), weights(tmp_path / "gaussian")
    assert all(torch.allclose(dpo[name], gaussian[name], atol=1e-6) for name in dpo)


@pytest.mark.parametrize("loss", ["dpo", "gaussian"])
def test_unconstrained_minimum_is_the_optimal_policy(loss, tmp_path):
    """theory.md section 2: on the exact bandit pi* is proportional to pi_ref exp(r / beta), here by NumPy."""
    settings = composed("model=tabular", f"loss={loss}", "loss.beta=1.0", "optimizer=lbfgs", "trainer.batch_size=null",
                        "trainer.max_steps=60", "trainer.max_grad_norm=null", "logger=none", "dataset.prompts=4",
                        "dataset.alphabet=5")  # fmt: skip
    train(settings, tmp_path / "run")
    data = config.build(settings).dataset.load(0)
    table = weights(tmp_path / "run")["table.weight"].numpy()
    for x, row in enumerate(data.train):
        wanted = np.array(data.table[5 + x]) + np.array(row.rewards)
        found = table[5 + x]
        np.testing.assert_allclose(found - found.mean(), wanted - wanted.mean(), atol=5e-6)


@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "unused weight"])
def test_nan_stops_the_run_before_the_optimizer_steps(where, tmp_path, monkeypatch):
    settings = composed(*SMALL)
    real = loop.gradient

    def poisoned(run, first):
        if run.state.step == 5:
            if where == "weight":
                run.parameters[-1].data.fill_(math.nan)
            elif where == "unused weight":  # the embedding of a token that no row holds
                run.parameters[0].data.view(-1)[0] = math.nan
            elif where == "gradient":
                run.parameters[0].register_hook(lambda gradient: gradient * math.inf)
            else:
                object.__setattr__(run.loss, "beta", math.nan)
        return real(run, first)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradient", poisoned)
        with pytest.raises(NumericsError, match=r"bandit:\d|weights are not finite") as error:
            train(settings, tmp_path / "run")
    assert error.value.exit_code == 4
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] == 3
    train(settings, tmp_path / "run")  # the checkpoint is good: the same command finishes
    train(settings, tmp_path / "undisturbed")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))


@pytest.mark.parametrize(("steps", "expected"), [(5, [0, 0.25, 0.5, 0.75, 1]), (1, [1])])
def test_what_follows_training_begins_at_0_and_is_at_1_in_the_last_step(steps, expected, tmp_path, monkeypatch):
    """So the last gradient of annealed noise is that of DPO, and so is the loss at the end."""
    seen, real = [], loop.accumulate

    def recording(run, *arguments):
        seen.append(run.context()["progress"])
        return real(run, *arguments)

    monkeypatch.setattr(loop, "accumulate", recording)
    still = composed(*SMALL, f"trainer.max_steps={steps}", "loss=gaussian_annealed", "optimizer.learning_rate=1e-12")
    assert train(still, tmp_path / "run")["metrics"]["eval/loss"] == pytest.approx(math.log(2))  # DPO of the reference
    assert seen == expected


def test_a_learning_rate_of_1e20_ends_with_exit_code_4(tmp_path):
    with pytest.raises(NumericsError):
        train(composed(*SMALL, "optimizer.learning_rate=1e20"), tmp_path / "run")


def test_gradient_checkpointing_changes_no_number(tmp_path):
    for name, switch in (("plain", "false"), ("checkpointed", "true")):
        settings = composed(*SMALL, "constraint=lora_r4", f"trainer.gradient_checkpointing={switch}")
        train(settings, tmp_path / name)
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "checkpointed"))


def test_autocast_is_bfloat16_arithmetic_on_float32_weights(tmp_path):
    train(composed(*SMALL), tmp_path / "plain")
    train(composed(*SMALL, "trainer.autocast=true"), tmp_path / "autocast")
    plain, autocast = (rows(tmp_path / name)[-1]["eval/loss"] for name in ("plain", "autocast"))
    assert plain != autocast
    assert plain == pytest.approx(autocast, abs=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "autocast").values())


def test_compile_is_refused_where_there_are_no_layers(tmp_path):
    with pytest.raises(ConfigError, match=r"no decoder layers.*trainer\.compile"):
        train(composed("trainer.compile=true", "model=tabular", "loss=dpo"), tmp_path)


@pytest.mark.slow
def test_compile_gives_the_same_numbers_up_to_rounding(tmp_path, monkeypatch):
    """Layer by layer and the head lean; sampling compiles nothing, and nor does a step whose shapes are known."""
    counted, policies = [], []
    stats, step = torch._dynamo.utils.counters["stats"], loop.take_step

    def watched(run):
        step(run)
        policies.append(run.policy)
        counted.append(stats["unique_graphs"])

    monkeypatch.setattr(loop, "take_step", watched)
    settings = [*SMALL, "trainer.samples=2", "trainer.sample_tokens=8", "trainer.max_steps=6"]
    train(composed(*settings), tmp_path / "plain")
    assert set(counted) == {0}
    counted.clear()
    train(composed(*settings, "trainer.compile=true"), tmp_path / "compiled")
    assert 0 < counted[0] <= counted[2] == counted[-1]
    assert linear_head(policies[-1]) is not None
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(policies[-1]))
    plain, compiled = (
        [r["eval/loss"] for r in rows(tmp_path / name) if "eval/loss" in r] for name in ("plain", "compiled")
    )
    assert plain == pytest.approx(compiled, abs=1e-4)
    assert len(plain) == 3
    assert all("_orig_mod" not in name for name in weights(tmp_path / "compiled"))


@pytest.mark.parametrize(("steps", "every"), [(1, 10), (3, 1)])
def test_destroyed_weights_are_never_saved_and_never_called_finished(steps, every, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", 4)
    settings = composed(*OWN, "dataset=jsonl", f"dataset.path={path}", "dataset.eval_size=0", "optimizer=sgd",
                        "optimizer.learning_rate=1e38", "trainer.max_grad_norm=null", "trainer.log_every=10",
                        f"trainer.max_steps={steps}", f"trainer.checkpoint_every={every}")  # fmt: skip
    with pytest.raises(NumericsError, match="not finite and not saved"):
        train(settings, tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None
    assert not (tmp_path / "run" / "model").exists()


def test_a_log_prob_that_is_not_finite_stops_the_run_though_the_loss_is_finite(tmp_path, monkeypatch):
    """A rejected response that became impossible: the hinge is 0 there, and so is its gradient."""
    real = loop.score_batch

    def poisoned(run, batch, first):
        sums, statistics = real(run, batch, first)
        if run.state.step == 5:
            sums = sums.index_fill(0, batch.pairs[:1, 1], -math.inf)
        return sums, statistics

    monkeypatch.setattr(loop, "score_batch", poisoned)
    hard = ["loss=hinge", "dataset.preferences=sampled", "dataset.pairs=40"]
    with pytest.raises(NumericsError, match="step 5"):
        train(composed(*SMALL, *hard), tmp_path / "run")


def test_a_run_trains_all_of_its_model(tmp_path, monkeypatch):
    """peft leaves the root of a model that was in eval mode in training mode, and what is below it not."""
    modes, real, fit = [], loop.gradient, loop.fit

    def gradient(run, first):
        modes.append({part.training for part in run.policy.modules()})
        return real(run, first)

    def fitting(run):
        run.policy.eval()
        run.policy.training, run.state.evaluated = True, 0  # as in a run that was evaluated before it was stopped
        return fit(run)

    monkeypatch.setattr(loop, "gradient", gradient)
    monkeypatch.setattr(job, "fit", fitting)
    train(composed(*SMALL, "constraint=lora_r2", "trainer.max_steps=2"), tmp_path / "run")
    assert modes == [{True}, {True}]


def test_samples_of_an_adapted_policy_under_autocast(folders, tmp_path):
    """Whose frozen matrices are in bfloat16."""
    path = jsonl(tmp_path / "rows.jsonl", 8)
    settings = ("model=hf", f"model.name_or_path={folders['llama']}", "dataset=jsonl", f"dataset.path={path}",
                "dataset.eval_size=2", "constraint=lora_r2", "trainer.autocast=true", "trainer.samples=2",
                "trainer.sample_tokens=4", "trainer.max_steps=1", "logger=none")  # fmt: skip
    found = train(composed(*settings), tmp_path / "run")["metrics"]
    assert abs(found["eval/kl/sampled"]) < 1
