"""The Gaussian view of pairs, against the variances themselves, NumPy's quantiles and the slope of the penalty."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from composing import composed, train
from preference_files import HH

from cdpo.batch import Logps
from cdpo.measure.gaussian_view import BINS, gaussian_view, histograms, quantiles, summarise


def logps_of(pairs: int = 50, seed: int = 0) -> Logps:
    g = torch.Generator().manual_seed(seed)
    policy, reference = -3 * torch.rand(2, 2 * pairs, generator=g, dtype=torch.float64)
    weight = torch.rand(pairs, generator=g, dtype=torch.float64)
    index = torch.arange(2 * pairs).view(-1, 2)
    ones = torch.ones(pairs, dtype=torch.float64)
    return Logps(policy, reference, ones.repeat(2), index.flatten() // 2, index, ones, weight)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_view_is_that_of_the_variances(beta):
    logps = logps_of()
    w, l = logps.of_pairs(logps.policy.exp())  # noqa: E741
    ref_w, ref_l = logps.of_pairs(logps.reference.exp())
    gamma, noise = (l / w) ** beta, (ref_l / ref_w) ** beta
    view = gaussian_view(logps, beta)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(view["log_gamma"].exp(), gamma, **close)
    torch.testing.assert_close(view["log_lambda"].exp(), noise, **close)
    torch.testing.assert_close(view["effective_weight"], gamma / (gamma + noise), **close)
    penalty = torch.log1p(gamma / noise)  # its elasticity, d log penalty / d log γ, by differences
    up = torch.log1p(gamma * 1.0001 / noise)
    exponent = (up / penalty).log() / np.log(1.0001)
    torch.testing.assert_close(view["concavity"], 1 - exponent, rtol=1e-3, atol=1e-4)


def test_the_ends_of_concavity_are_l1_and_l0():
    logps = logps_of(3)
    policy = torch.tensor([900.0, 0.0, 0.0, 0.0, 0.0, 900.0], dtype=torch.float64)  # γ/λ: e^-900, 1, e^900
    view = gaussian_view(replace(logps, policy=policy, reference=torch.zeros_like(policy)), 1.0)
    assert view["concavity"].tolist() == pytest.approx([0, 1 - 0.5 / np.log(2), 1 - 1 / 900], abs=1e-12)
    assert all(torch.isfinite(column).all() for column in view.values())


def test_quantiles_and_means_are_those_of_repeated_pairs():
    values = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    counts = torch.tensor([5.0, 1.0, 30.0, 64.0], dtype=torch.float64)
    repeated = np.repeat(values.numpy(), counts.numpy().astype(int))
    expected = np.quantile(repeated, [0.05, 0.25, 0.5, 0.75, 0.95], method="inverted_cdf")
    assert quantiles(values, counts) == expected.tolist()
    found = summarise({"log_gamma": values, "log_lambda": torch.full_like(values, 0.5)}, counts)
    assert found["log_gamma"] == pytest.approx(repeated.mean())
    assert found["gamma_below_lambda"] == pytest.approx((1 + 64 / 2) / 100)  # -1 is below, 0.5 ties


@pytest.mark.parametrize("noise", [0.0, 1e-17, 1e-13])
def test_one_value_up_to_rounding_has_a_histogram(noise):
    values = 0.5 + noise * torch.arange(4, dtype=torch.float64)
    (table,) = histograms({"x": values}, torch.ones(4, dtype=torch.float64)).values()
    assert sum(table["shares"]) == pytest.approx(1)
    assert table["edges"][-1] - table["edges"][0] == pytest.approx(1)


def test_histograms_share_out_the_weight():
    logps = logps_of()
    view = gaussian_view(logps, 1.0)
    for name, table in histograms(view, logps.weight).items():
        assert len(table["shares"]) == BINS == len(table["edges"]) - 1
        assert sum(table["shares"]) == pytest.approx(1)
        assert table["edges"][0] == pytest.approx(float(view[name].min()))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "sft"])
def test_every_evaluation_of_every_loss_of_pairs_has_the_view(tmp_path, loss):
    settings = composed("model=tabular", f"loss={loss}", "logger=none", "trainer.max_steps=4", "trainer.eval_every=2",
                        "dataset.prompts=3")  # fmt: skip
    train(settings, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    views = [row for row in rows if "eval/gaussian/log_gamma" in row]
    bins = [json.loads(line) for line in (tmp_path / "run" / "histograms.jsonl").read_text().splitlines()]
    assert [row["step"] for row in views] == [row["step"] for row in bins] == [0, 2, 4]
    first, last = views[0], views[-1]
    assert first["eval/gaussian/log_gamma"] == pytest.approx(first["eval/gaussian/log_lambda"])  # policy = reference
    assert first["eval/gaussian/effective_weight"] == pytest.approx(0.5)
    assert last["eval/gaussian/log_lambda"] == first["eval/gaussian/log_lambda"]
    margin = last["eval/gaussian/log_lambda"] - last["eval/gaussian/log_gamma"]
    assert margin == pytest.approx(last["eval/rewards/margins"], rel=1e-9)


@pytest.mark.skipif(not HH.is_file(), reason=f"no {HH.name}")
def test_the_view_of_real_pairs(tmp_path):
    """HH, with a model of random weights: at the start the policy is the reference, so weights are 1/2."""
    with gzip.open(HH, "rt", encoding="utf-8") as lines:
        (tmp_path / "hh.jsonl").write_text("".join(line for line, _ in zip(lines, range(40))), encoding="utf-8")
    settings = composed("model=tiny", "dataset=jsonl", f"dataset.path={tmp_path}/hh.jsonl", "dataset.eval_size=10",
                        "dataset.max_prompt_tokens=32", "dataset.max_response_tokens=32", "trainer.max_steps=2",
                        "dataset.on_identical=drop", "dataset.max_drop_fraction=1", "logger=none")  # fmt: skip
    train(settings, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (row for row in rows if "eval/gaussian/log_gamma" in row)
    assert first["eval/gaussian/effective_weight"] == pytest.approx(0.5, abs=1e-4)
    assert first["eval/gaussian/log_gamma"] == pytest.approx(first["eval/gaussian/log_lambda"], abs=1e-4)
    margin = last["eval/gaussian/log_lambda"] - last["eval/gaussian/log_gamma"]
    assert margin == pytest.approx(last["eval/rewards/margins"], rel=1e-4)
