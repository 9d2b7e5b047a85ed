"""What each loss makes of exact Bradley-Terry preferences, over the weight of its regulariser, in closed form.

Hu et al. 2024, 2025 (arXiv 2407.09072, 2506.07492): a prompt whose reference is right already, and one where it is not.
"""

from __future__ import annotations

import csv
from itertools import combinations

import numpy as np
import pytest
from composing import composed, train
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_softmax, wrightomega
from scipy.stats import entropy

from cdpo.config.build import CONF

RIGHT = np.array([[0.6, 0.3, 0.1], [0.6, 0.2, 0.2]])  # Bradley-Terry policies, whose logs are the rewards
REFERENCE = np.array([[0.6, 0.3, 0.1], [0.4, 0.2, 0.4]])
PAIRS = list(combinations(range(3), 2))
INVERSE = {  # u of f'(u) = s, and the largest s
    "reverse_kl": (np.exp, np.inf),
    "forward_kl": (lambda s: -1 / s, 0.0),
    "alpha": (lambda s: (-0.5 * s) ** -2.0, 0.0),
    "jensen_shannon": (lambda s: np.exp(s) / (2 - np.exp(s)), np.log(2)),
    "chi_squared": (lambda s: wrightomega(s).real, np.inf),  # u + log u = s
}


def solved(tmp_path, loss, beta, *more):
    """log pi of both prompts at the optimum that optimizer=exact finds, and the certificate. [2, 3]"""
    path = f"dataset.path={CONF}/worlds/preservation.json"
    given = ["optimizer=exact", "logger=none", path, "dataset.sampling=uniform", f"loss={loss}", f"beta={beta}"]
    summary = train(composed("model=tabular", *given, *more), tmp_path / "run")
    rows = csv.DictReader((tmp_path / "run" / "candidates.csv").read_text().splitlines())
    return np.array([float(row["log_policy"]) for row in rows]).reshape(2, 3), summary["certificate"]["status"]


def f_divergence(divergence, beta):
    """f'(pi / pi_ref) = r / beta + c, with the c at which pi sums to 1. [2, 3]"""
    inverse, largest = INVERSE[divergence]
    found = []
    for right, reference in zip(RIGHT, REFERENCE):
        slopes = np.log(right) / beta
        high = min(largest - slopes.max() - 1e-12, 400.0 - slopes.max())
        shift = brentq(lambda c: reference @ inverse(slopes + c) - 1, -2000.0, high, xtol=1e-13)  # noqa: B023
        found.append(reference * inverse(slopes + shift))
    return np.log(found)


def ipo(tau):
    """Least squares: the margins of log-ratios are pulled to (2 p - 1) / (2 tau). [2, 3]"""
    rows = np.array([np.eye(3)[i] - np.eye(3)[j] for i, j in PAIRS])
    found = []
    for right, reference in zip(RIGHT, REFERENCE):
        p = np.array([right[i] / (right[i] + right[j]) for i, j in PAIRS])
        ratio = np.linalg.lstsq(rows, (2 * p - 1) / (2 * tau), rcond=None)[0]
        found.append(log_softmax(np.log(reference) + ratio))
    return np.array(found)


def expo(beta):
    """By BFGS on its definition, prompt by prompt. [2, 3]"""

    def value(z, right, reference):
        log_pi = log_softmax(z)
        p = [(right[i] / (right[i] + right[j]), log_pi[i] - log_pi[j]) for i, j in PAIRS]
        return -np.mean([q * np.log(expit(m)) + (1 - q) * np.log(expit(-m)) for q, m in p]) - beta * reference @ log_pi

    fits = [minimize(value, np.log(b), args=(a, b), tol=1e-12) for a, b in zip(RIGHT, REFERENCE)]
    return np.array([log_softmax(fit.x) for fit in fits])


@pytest.mark.parametrize("beta", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("divergence", INVERSE)
def test_f_dpo_has_the_optimum_of_its_divergence(tmp_path, divergence, beta):
    found, status = solved(tmp_path, f"fdpo_{divergence}", beta)
    assert status in ("certified", "searched")
    np.testing.assert_allclose(found, f_divergence(divergence, beta), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("beta", "dpo_moved", "ipo_moved"), [(0.05, 7.23, 1.15), (1.0, 0.121, 0.007), (20, 0.0004, 0)])
def test_the_good_prompt_moves_as_the_theory_says(tmp_path, beta, dpo_moved, ipo_moved):
    """KL(pi* || pi) where pi_ref = pi*; DPO pi_ref exp(r / beta), IPO least squares, EXPO nothing at all."""
    expected = {
        "dpo": (log_softmax(np.log(REFERENCE) + np.log(RIGHT) / beta, axis=1), dpo_moved),
        "rlhf": (log_softmax(np.log(REFERENCE) + np.log(RIGHT) / beta, axis=1), dpo_moved),
        "ipo": (ipo(beta), ipo_moved),
        "expo": (expo(beta), 0.0),
    }
    for loss, (closed, moved) in expected.items():
        found, status = solved(tmp_path / loss, loss, beta)
        assert status == "certified"
        np.testing.assert_allclose(found, closed, rtol=1e-6, atol=2e-6)
        digits = 2 if moved > 1 else 3 if moved > 1e-3 else 4
        assert round(entropy(RIGHT[0], np.exp(found[0])), digits) == moved


def test_the_other_prompt_comes_to_the_bradley_terry_policy_or_goes_beyond(tmp_path):
    """At a small weight: EXPO is at pi*, DPO gives all to the best response."""
    for loss, aim in (("expo", RIGHT), ("expo_regression", RIGHT), ("dpo", np.eye(3)[[0, 0]])):
        found, _ = solved(tmp_path / loss, loss, 0.0067)
        np.testing.assert_allclose(np.exp(found), aim, atol=0.003)
