"""RLHF on candidate sets and its relatives: against the objective, sums over all pairs, and each other."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from candidates import SIZES, logps_of
from composing import composed, train

from cdpo.batch import Logps
from cdpo.config import build as config
from cdpo.config.identity import run_name
from cdpo.errors import ConfigError, DataError
from cdpo.losses.candidates import RLHF, OnPolicyRegression
from cdpo.losses.loss import per_unit
from cdpo.measure.objective import objective


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


@pytest.mark.parametrize("loss", ["rlhf", "onpolicy_regression", "rebel"])
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
