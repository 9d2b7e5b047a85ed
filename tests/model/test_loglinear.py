"""The log-linear policy: against products of its features, and its optima against scipy on the losses' definitions."""

from __future__ import annotations

import csv
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from composing import composed, train
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

from cdpo.config.build import CONF
from cdpo.constraints.lora import LoRA
from cdpo.data.bandit import Bandit
from cdpo.data.rows import Data, Ledger
from cdpo.errors import ConfigError
from cdpo.model.export import export
from cdpo.model.loglinear import LogLinear, LogLinearForCausalLM
from cdpo.training.checks import checked

WORLD = f"dataset.path={CONF}/worlds/preservation.json"
EXACT = ("model=loglinear", "optimizer=exact", "logger=none", WORLD, "dataset.sampling=uniform")
REFERENCE = np.log([[0.6, 0.3, 0.1], [0.4, 0.2, 0.4]])
REWARDS = np.log([[0.6, 0.3, 0.1], [0.6, 0.2, 0.2]])


def features(sharing):
    """phi(x, y) = (sqrt(s) e_y, sqrt(1 - s) e_(x, y)) of two prompts and three responses. [2, 3, 9]"""
    phi = np.zeros((2, 3, 9))
    for x in range(2):
        for y in range(3):
            phi[x, y, y], phi[x, y, 3 + 3 * x + y] = sharing**0.5, (1 - sharing) ** 0.5
    return phi


def loaded(sharing):
    data = Bandit(path=str(CONF / "worlds" / "preservation.json")).load(0)
    choice = LogLinear(sharing=sharing)
    tokenizer = choice.tokenizer(data)
    return choice.load(tokenizer, data), tokenizer


@pytest.mark.parametrize("sharing", [0.0, 0.3, 1.0])
def test_logits_are_those_of_the_reference_and_features_times_theta(sharing):
    model, _ = loaded(sharing)
    prompts = torch.tensor([[3], [4]])
    np.testing.assert_allclose(model(prompts).logits[:, 0].detach(), REFERENCE, rtol=1e-14)
    theta = np.random.default_rng(0).normal(size=9)
    model.table.weight.data.copy_(torch.tensor(theta).view(3, 3))
    np.testing.assert_allclose(model(prompts).logits[:, 0].detach(), REFERENCE + features(sharing) @ theta, rtol=1e-12)
    kernel = np.einsum("ayi,byi->ab", features(sharing), features(sharing)) / 3
    np.testing.assert_allclose(kernel, [[1, sharing], [sharing, 1]])


def test_an_adapter_changes_theta_by_a_matrix_of_its_rank():
    model, _ = loaded(0.5)
    policy = LoRA(rank=1).wrap(model)
    torch.manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    layer = policy.get_base_model().table
    theta = layer(torch.arange(3))
    assert torch.linalg.matrix_rank(theta) == 1
    expected = REFERENCE + features(0.5) @ theta.detach().numpy().ravel()
    np.testing.assert_allclose(policy(torch.tensor([[3], [4]])).logits[:, 0].detach(), expected, rtol=1e-12)


def test_save_and_load(tmp_path):
    model, tokenizer = loaded(0.3)
    model.table.weight.data.normal_()
    export(model, tokenizer, tmp_path)
    again = LogLinearForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(torch.arange(5)[None]).logits, model(torch.arange(5)[None]).logits)


LOSSES = {  # of a pair's log-ratios d and log-probs m, winner less loser, and its label p; beta is 1
    "dpo": lambda d, m, p: -p * np.log(expit(d)) - (1 - p) * np.log(expit(-d)),
    "ipo": lambda d, m, p: p * (d - 0.5) ** 2 + (1 - p) * (d + 0.5) ** 2,
    "expo": lambda d, m, p: -p * np.log(expit(m)) - (1 - p) * np.log(expit(-m)),
}


def by_scipy(name, sharing, radius):
    """log pi at the loss's minimum over theta within a ball, by SLSQP on its definition. [2, 3]"""
    phi = features(sharing)

    def policy(theta):
        return log_softmax(REFERENCE + phi @ theta, axis=1)

    def value(theta):
        log_pi, total = policy(theta), 0.0
        for x, (i, j) in ((x, pair) for x in range(2) for pair in combinations(range(3), 2)):
            margin = log_pi[x, i] - log_pi[x, j]
            ratio = margin - REFERENCE[x, i] + REFERENCE[x, j]
            total += LOSSES[name](ratio, margin, expit(REWARDS[x, i] - REWARDS[x, j])) / 6
        kl = (np.exp(REFERENCE) * (REFERENCE - log_pi)).sum() / 2
        return total + (kl if name == "expo" else 0.0)

    if name == "rlhf":

        def value(theta):
            log_pi = policy(theta)
            return (np.exp(log_pi) * (log_pi - REFERENCE - REWARDS)).sum() / 2

    ball = {"type": "ineq", "fun": lambda theta: radius**2 - theta @ theta}
    start = np.random.default_rng(0).normal(0, 0.01, 9)
    found = minimize(value, start, method="SLSQP", constraints=[ball], options={"maxiter": 1000, "ftol": 1e-15})
    return policy(found.x)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "expo", "rlhf"])
@pytest.mark.parametrize(("sharing", "radius"), [(1.0, 100.0), (1.0, 0.2), (0.5, 0.2)])
def test_the_optimum_is_that_of_scipy(tmp_path, loss, sharing, radius):
    ball = ["constraint=l2_ball", f"constraint.l2_ball.radius={radius}"]
    summary = train(composed(*EXACT, "beta=1", f"loss={loss}", f"model.sharing={sharing}", *ball), tmp_path / "run")
    assert summary["certificate"]["status"] == ("searched" if loss == "rlhf" else "certified")
    rows = csv.DictReader((tmp_path / "run" / "candidates.csv").read_text().splitlines())
    found = np.array([float(row["log_policy"]) for row in rows]).reshape(2, 3)
    np.testing.assert_allclose(found, by_scipy(loss, sharing, radius), atol=2e-5)


@pytest.mark.parametrize(
    "limit",
    [
        ["constraint=l2_ball", "constraint.l2_ball.radius=0.2"],
        ["constraint=linf_ball", "constraint.linf_ball.radius=0.1"],
        ["constraint=kl_budget", "constraint.kl_budget.budget=0.01"],
        ["constraint=l2_to_start", "constraint.l2_to_start.strength=0.1"],
    ],
    ids=lambda limit: limit[0],
)
def test_without_sharing_it_is_the_table(tmp_path, limit):
    runs = {"table": ["model=tabular"], "none": ["model=loglinear", "model.sharing=0"]}
    found = {name: train(composed(*EXACT, "loss=dpo", *how, *limit), tmp_path / name) for name, how in runs.items()}
    attained = [summary["metrics"]["objective/attained"] for summary in found.values()]
    assert attained[0] == pytest.approx(attained[1], abs=1e-6)


def test_rank_and_sparsity_act_on_theta(tmp_path):
    """With all shared, one number of theta that may differ is one response, moved alike at both prompts."""
    one = ["constraint=sparse_topk", "constraint.sparse_topk.k=1", "constraint.sparse_topk.fraction=null"]
    train(composed(*EXACT, "loss=dpo", "beta=1", *one), tmp_path / "sparse")
    rows = list(csv.DictReader((tmp_path / "sparse" / "candidates.csv").read_text().splitlines()))
    ratio = np.array([float(row["log_policy"]) - float(row["log_reference"]) for row in rows]).reshape(2, 3)
    moved = ratio - np.median(ratio, axis=1, keepdims=True)
    assert (np.abs(moved) > 1e-9).sum() == 2
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-12)


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.sharing=1\.5"):
        LogLinear(sharing=1.5)
    data = Bandit(prompts=2, alphabet=2, length=2).load(0)
    with pytest.raises(ConfigError, match=r"set dataset\.length=1, or model=tabular"):
        LogLinear().load(LogLinear().tokenizer(data), data)
    with pytest.raises(ConfigError, match="dataset=bandit"):
        LogLinear().tokenizer(Data([], [], Ledger()))
    with pytest.raises(ConfigError, match="constraint=freeze: a table is one matrix"):
        checked(composed(*EXACT, "constraint=freeze"))


def test_rewards_that_differ_by_a_constant_per_prompt_have_one_optimum_for_all(tmp_path):
    """No policy knows the constant: with one change for all prompts RLHF still has its closed form."""
    path = tmp_path / "world.json"
    rewards = [[1.0, 0.0, -1.0], [3.5, 2.5, 1.5]]
    path.write_text(json.dumps({"prompts": ["p", "q"], "responses": ["a", "b", "c"], "rewards": rewards}))
    own = ("model=loglinear", "model.sharing=1", "optimizer=exact", "logger=none", "loss=rlhf", f"dataset.path={path}")
    summary = train(composed(*own), tmp_path / "run")
    assert summary["certificate"]["says"].startswith("optimal (closed form")
    assert summary["metrics"]["objective/attained"] == pytest.approx(1.0, abs=1e-9)
