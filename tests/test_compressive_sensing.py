"""Recovery against enumeration of all vertices, dual certificates, and numbers worked out by hand."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import forking
import numpy as np
import pytest
import yaml
from scipy.optimize import linprog

import cdpo
from cdpo.compressive_sensing import Point, Recovery, draw, relative_error, reweighted, weighted_l1
from cdpo.errors import ConfigError, NumericsError, Preempted

TINY = {"unknowns": 20, "measurements": 10, "sparsities": [2, 4], "trials": 6, "iterations": 3}


def vertices(matrix, data):
    """All basic solutions of A x = b: concave and weighted l1 penalties have their minimum at one of them."""
    m, n = matrix.shape
    for support in itertools.combinations(range(n), m):
        x = np.zeros(n)
        x[list(support)] = np.linalg.solve(matrix[:, support], data)
        yield x


def log_penalty(x, noise):
    return np.log(np.abs(x) + noise).sum()


def nothing():
    pass


@pytest.mark.parametrize("seed", range(5))
def test_every_method_recovers_a_signal_with_one_nonzero(seed):
    matrix, signal = draw(10, 20, 1, (seed,))
    assert np.count_nonzero(signal) == 1
    for estimate in Recovery(**TINY).estimates(matrix, matrix @ signal).values():
        assert estimate == pytest.approx(signal, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_weighted_l1_equals_the_best_of_all_vertices(seed):
    random = np.random.default_rng(seed)
    matrix, data, weights = random.standard_normal((4, 9)), random.standard_normal(4), random.uniform(0.05, 1, 9)
    best = min(vertices(matrix, data), key=lambda x: weights @ np.abs(x))
    assert weighted_l1(matrix, data, weights) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_weighted_l1_has_a_dual_certificate(seed):
    """b'y <= sum w |x| for every feasible x and every y with |A'y| <= w: a y that reaches equality is a proof."""
    random = np.random.default_rng(seed)
    matrix, signal = draw(32, 64, 16, (seed,))
    data, weights = matrix @ signal, random.uniform(0.05, 1, 64)
    x = weighted_l1(matrix, data, weights)
    both, bound = np.vstack([matrix.T, -matrix.T]), np.concatenate([weights, weights])
    y = linprog(-data, A_ub=both, b_ub=bound, bounds=(None, None), method="highs-ipm").x
    y /= max(1.0, np.max(np.abs(matrix.T @ y) / weights))  # feasible to the last bit
    assert matrix @ x == pytest.approx(data, abs=1e-9)
    assert data @ y == pytest.approx(weights @ np.abs(x), rel=1e-6)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_reweighting_never_raises_the_log_penalty(noise, seed):
    matrix, signal = draw(12, 30, 7, (seed,))
    data = matrix @ signal
    start = np.linalg.pinv(matrix) @ data  # dense, so that there is something to lower
    iterates = reweighted(matrix, data, start, [noise] * 6)
    penalties = [log_penalty(x, noise) for x in (start, *iterates)]
    assert len(iterates) == 6
    assert penalties[1] < penalties[0]
    assert np.diff(penalties).max() <= 1e-7
    assert all(matrix @ x == pytest.approx(data, abs=1e-9) for x in iterates)


def test_a_large_noise_is_plain_l1():
    matrix, signal = draw(16, 32, 10, (0,))
    data = matrix @ signal
    start = weighted_l1(matrix, data, np.ones(32))
    assert relative_error(start, signal) > 0.1  # l1 fails here, so that staying there says something
    assert reweighted(matrix, data, start, [1e9] * 3)[-1] == pytest.approx(start, abs=1e-6)


def test_a_falling_noise_finds_more_global_minima_than_a_fixed_one():
    """Of sum log(|x_i| + 0.01), found by enumeration."""
    solver, found = Recovery(noise=0.01), {"l1": 0, "fixed": 0, "annealed": 0}
    for seed in range(60):
        matrix, signal = draw(5, 10, 3, (seed,))
        data = matrix @ signal
        least = min(log_penalty(x, 0.01) for x in vertices(matrix, data))
        for method, estimate in solver.estimates(matrix, data).items():
            assert log_penalty(estimate, 0.01) >= least - 1e-7
            found[method] += log_penalty(estimate, 0.01) <= least + 1e-7
    assert found["l1"] <= found["fixed"] < found["annealed"]


def test_a_falling_noise_recovers_more_than_l1_in_the_transition(tmp_path):
    """Fixed seed, the default size, 80 problems, and the 95 % intervals are apart."""
    Recovery(sparsities=[14], trials=80).run(tmp_path, 0, nothing)
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "recovery.csv").open())}
    assert float(rows["l1"]["high"]) < float(rows["annealed"]["low"])
    assert float(rows["l1"]["high"]) < float(rows["fixed"]["low"])


def test_the_files_hold_the_metrics(tmp_path):
    metrics = Recovery(**TINY).run(tmp_path, 0, nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recovery.csv", "recovery.png", "recovery.svg"]
    assert (tmp_path / "recovery.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "recovery.svg").read_text().rstrip().endswith("</svg>")
    rows = list(csv.DictReader((tmp_path / "recovery.csv").open()))
    assert len(rows) == len(metrics) == 6
    for row in rows:
        assert int(row["trials"]) == 6
        assert int(row["recovered"]) / 6 == metrics[f"recovery/{row['method']}/k={row['sparsity']}"]
        assert float(row["low"]) <= float(row["rate"]) <= float(row["high"])


def test_wilson_interval_by_hand():
    """Centre (r + z^2 / 2) / (n + z^2), half-width z sqrt(r (n - r) / n + z^2 / 4) / (n + z^2), z = 1.959964."""
    assert Point(1, "l1", 10, 0).interval == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert Point(1, "l1", 10, 5).interval == pytest.approx((0.2365931, 0.7634069), abs=1e-6)


def test_the_same_seed_gives_the_same_csv_and_another_seed_another(tmp_path):
    study = Recovery(**{**TINY, "sparsities": [5], "trials": 20})
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        study.run(tmp_path / folder, seed, nothing)
    a, b, c = ((tmp_path / folder / "recovery.csv").read_bytes() for folder in "abc")
    assert a == b != c


def test_a_point_does_not_depend_on_the_other_points(tmp_path):
    alone = Recovery(**{**TINY, "sparsities": [4]}).run(tmp_path, 0, nothing)
    assert alone.items() <= Recovery(**TINY).run(tmp_path, 0, nothing).items()


def test_draws_have_the_promised_moments():
    matrix, signal = draw(200, 300, 250, (0,))
    assert (matrix**2).sum(axis=0).mean() == pytest.approx(1.0, abs=0.02)
    assert np.count_nonzero(signal) == 250
    assert signal[signal != 0].std() == pytest.approx(1.0, abs=0.15)


def test_an_interrupted_run_leaves_no_file(tmp_path):
    calls = itertools.count(1)

    def interrupt():
        if next(calls) == 4:
            raise Preempted("stop")

    with pytest.raises(Preempted):
        Recovery(**TINY).run(tmp_path, 0, interrupt)
    assert next(calls) == 5  # once per trial
    assert list(tmp_path.iterdir()) == []


def test_a_linear_programme_without_solution_is_an_error():
    with pytest.raises(NumericsError, match=r"choose a larger study\.noise"):
        weighted_l1(np.zeros((2, 3)), np.ones(2), np.ones(3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unknowns", 0),
        ("measurements", 0),
        ("measurements", 64),
        ("sparsities", []),
        ("sparsities", [0]),
        ("sparsities", [65]),
        ("sparsities", [8, 8]),
        ("trials", 0),
        ("iterations", 1),
        ("noise", 0.0),
        ("noise", 1e-7),
        ("noise", float("nan")),
        ("anneal_from", 0.05),
        ("anneal_from", float("inf")),
        ("tolerance", 0.0),
        ("tolerance", 1.0),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"^study\.{key}=.*: choose "):
        Recovery(**{key: value})


def test_the_experiment_runs_and_refuses_what_it_would_ignore(tmp_path):
    def run(*arguments):
        command = ["-m", "cdpo.train", "experiment=compressive_sensing", f"output_root={tmp_path}"]
        return forking.run(*command, *arguments)

    refused = run("loss=ipo", "study.trials=1", "trainer.max_steps=3")
    assert refused.returncode == 2
    assert "loss=ipo, trainer.max_steps=3: this experiment does not train" in refused.stderr
    assert not (tmp_path / "compressive_sensing").exists()
    done = run("study.trials=1", "study.sparsities=[2]", "seed=3", "logger=none")
    assert done.returncode == 0, done.stderr
    assert "recovery/l1/k=2" in done.stdout
    assert (tmp_path / "compressive_sensing" / "recovery.svg").is_file()


def test_the_experiment_states_the_defaults():
    text = (Path(cdpo.__file__).parents[1] / "conf/experiment/compressive_sensing.yaml").read_text()
    study = yaml.safe_load(text)["study"]
    assert text.startswith("# @package _global_\n")
    assert study.pop("_target_") == "cdpo.compressive_sensing.Recovery"
    assert study == vars(Recovery())
