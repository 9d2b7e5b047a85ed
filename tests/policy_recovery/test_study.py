"""Draws, transitions by hand, files and refusals of the study."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import forking
import numpy as np
import pytest
import yaml

import cdpo
from cdpo.errors import ConfigError, Preempted
from cdpo.policy_recovery import PolicyRecovery
from cdpo.policy_recovery.draws import Setting, draw
from cdpo.policy_recovery.methods import ALL
from cdpo.policy_recovery.results import Axis, Diagram, Outcome, transition, transitions

TINY = {
    "draws": 4, "pairs": 40, "features": [2, 8], "flipped": [0.1], "accuracy": [1.0],
    "dimension": 8, "nonzeros": [1], "pairs_per_feature": [8, 1],
}  # fmt: skip


def nothing():
    pass


def test_draws_are_what_they_say():
    few, many = (draw(Setting(6, 50, share, 2, 0.8), 7, 3) for share in (0.1, 0.3))
    assert few.truth.equal(many.truth)
    assert ((few.truth != 0).sum(1) == 2).all()
    assert few.truth.square().sum(1).numpy() == pytest.approx(1.0)
    assert (few.flipped.sum(1) == 5).all()
    assert (many.flipped.sum(1) == 15).all()
    assert (few.flipped <= many.flipped).all()
    assert (few.misread.sum(1) == 10).all()
    margins = (few.chosen * few.truth[:, None]).sum(2)
    assert ((margins < 0) == few.flipped).all()
    assert few.separates(few.truth).all()
    assert not few.separates(-few.truth).any()


def test_what_a_reference_thinks_pair_by_pair():
    problem = draw(Setting(2, 20, 0.25, None, 0.8), 1, 0)
    said = problem.reference(3.0, -1.0)[0].tolist()
    for b, flipped, misread in zip(said, problem.flipped[0].tolist(), problem.misread[0].tolist()):
        assert b == (-1.0 if flipped else 3.0) * (-1 if misread else 1)


def test_transitions_by_hand():
    """One half lies midway between 2 and 4 on a logarithmic scale: √8; a rise on the way is averaged away."""
    rates = np.array([[1, 0.75, 0.25, 0], [0.4, 0.3, 0, 0], [1, 1, 0.9, 0.6], [0.6, 0.9, 0.25, 0]])
    found = transition([1, 2, 4, 8], rates)
    assert found[0] == pytest.approx(math.sqrt(8))
    assert found[1] == 0
    assert found[2] == math.inf
    assert found[3] == pytest.approx(2 * 2 ** (0.25 / 0.5))


def diagram(**successes):
    """One row, two columns at d/n of .1 and .2, of which a method recovers so many of 100 draws."""
    found = {}
    for (name, counts), column in itertools.product(successes.items(), (0, 1)):
        recovered = np.arange(100) < counts[column]
        found[name, 0, column] = Outcome(recovered, recovered, np.ones(100), np.zeros(100))
    return Diagram("errors", Axis([0.1], "ε"), Axis([0.1, 0.2], "d/n"), found)


def test_moves_are_ratios_with_intervals_of_the_same_draws():
    lines = {one["method"]: one for one in transitions(diagram(log=(80, 20), same=(80, 20), none=(9, 0)), "log", 0)}
    assert lines["log"]["transition"] == pytest.approx(0.1 * math.sqrt(2))
    assert lines["log"]["transition_low"] < lines["log"]["transition"] < lines["log"]["transition_high"]
    assert lines["same"]["moved_low"] == lines["same"]["moved"] == lines["same"]["moved_high"] == 1.0
    assert math.isnan(lines["none"]["transition"])
    assert math.isnan(lines["none"]["moved"])


def test_the_interval_of_a_transition_covers():
    """95 % of 60 repetitions, with rates of .8 and .2, whose transition is known."""
    random, inside = np.random.default_rng(0), 0
    for seed in range(60):
        lines = transitions(diagram(log=(random.binomial(100, 0.8), random.binomial(100, 0.2))), "log", seed)
        inside += lines[0]["transition_low"] <= 0.1 * math.sqrt(2) <= lines[0]["transition_high"]
    assert inside >= 52


def test_the_files_hold_the_metrics(tmp_path):
    metrics = PolicyRecovery(**TINY).run(tmp_path, 0, nothing)
    names = ["points.csv", "transitions.csv"]
    names += [f"recovery-{name}.{kind}" for name in ("errors", "reference", "sparse") for kind in ("png", "svg")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    points = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert len(points) == 2 * len(ALL) + 2 * 4 + 2 * len(ALL)
    for one in points:
        assert float(one["low"]) <= float(one["recovered"]) <= float(one["high"])
        assert float(one["gap"]) <= 1e-3
    moved = list(csv.DictReader((tmp_path / "transitions.csv").open()))
    known = {f"transition/{one['diagram']}/{one['method']}/{float(one['row']):g}": one["transition"] for one in moved}
    assert {name: f"{value:.6g}" for name, value in metrics.items()} == {k: v for k, v in known.items() if v != "nan"}


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        PolicyRecovery(**TINY).run(tmp_path / folder, seed, nothing)
    a, b, c = ((tmp_path / folder / "points.csv").read_bytes() for folder in "abc")
    assert a == b != c


def test_an_interrupted_run_leaves_no_file(tmp_path):
    calls = itertools.count(1)

    def interrupt():
        if next(calls) == 3:
            raise Preempted("stop")

    with pytest.raises(Preempted):
        PolicyRecovery(**TINY).run(tmp_path, 0, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_is_right_moves_the_transition(tmp_path):
    """Fixed seed, 20 % of the labels flipped, 100 draws: the intervals of DPO's shares are apart."""
    kept = {"flipped": [0.2], "features": [8], "accuracy": [1.0], "nonzeros": [1], "pairs_per_feature": [1]}
    PolicyRecovery(**kept).run(tmp_path, 0, nothing)
    lines = csv.DictReader((tmp_path / "points.csv").open())
    rows = {one["method"]: one for one in lines if one["diagram"] == "errors"}
    assert float(rows["log"]["high"]) < float(rows["log, right or silent"]["low"])
    assert float(rows["log, reference wrong"]["cosine"]) < 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("draws", 0),
        ("cosine", 1.0),
        ("radius", math.inf),
        ("strength", 0.0),
        ("power", 1.5),
        ("fall_from", 1.0),
        ("pairs", 0),
        ("features", [1]),
        ("features", [4, 2]),
        ("flipped", [0.5]),
        ("flipped", []),
        ("accuracy", [1.1]),
        ("accuracy_flipped", 0.5),
        ("dimension", 7),
        ("nonzeros", [41]),
        ("nonzeros", [0]),
        ("pairs_per_feature", [1, 2]),
        ("pairs_per_feature", [0]),
        ("sparse_flipped", -0.1),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=r"^study\.\w+=.*: choose "):
        PolicyRecovery(**{key: value})


def test_the_experiment_runs(tmp_path):
    values = [f"study.{key}={value}" for key, value in TINY.items()]
    base = ("-m", "cdpo.train", "experiment=policy_recovery", f"output_root={tmp_path}", "logger=none")
    done = forking.run(*base, *values)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "policy_recovery" / "recovery-errors.svg").is_file()


def test_the_experiment_states_the_defaults():
    text = (Path(cdpo.__file__).parents[1] / "conf/experiment/policy_recovery.yaml").read_text()
    study = yaml.safe_load(text)["study"]
    assert study.pop("_target_") == "cdpo.policy_recovery.PolicyRecovery"
    assert study == vars(PolicyRecovery())
