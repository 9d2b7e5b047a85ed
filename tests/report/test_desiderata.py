"""Verdicts of the desiderata: on policies in closed form, written down as runs leave them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from written_runs import NOT_REACHED, change, write_run

from cdpo.report.write import report

WEIGHTS = [0.0067, 0.05, 1.0, 20.0, 148.0]
RIGHT, REFERENCE = np.log([0.6, 0.3, 0.1]), np.log([0.4, 0.4, 0.2])
POLICIES = {  # of a prompt's rewards, its reference's logits and the weight
    "dpo": lambda r, z, beta: softmax(z + r / beta),
    "rlhf": lambda r, z, beta: softmax((r + beta * z) / (1 + beta)),  # from pi* to the reference, whatever its name
}


def written(folder, loss, beta, prompts):
    """A run whose candidates.csv holds the policy in closed form."""
    path = write_run(folder, loss, beta=beta)
    rows = []
    for source, (rewards, logits) in prompts.items():
        policy = np.log(POLICIES[loss](rewards, logits, beta))
        for k, values in enumerate(zip(rewards, np.log(softmax(logits)), policy)):
            named = zip(("reward", "log_reference", "log_policy"), map(float, values))
            rows.append({"source": source, "candidate": k + 1, **dict(named)})
    with open(path / "candidates.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    summary = json.loads((path / "summary.json").read_text())
    change(path, "summary", metrics=summary["metrics"] | {"objective/tv_to_bradley_terry": 0.1})
    return path


def tables(folder):
    """The tables of the section: title -> rows, by their first cell."""
    report(folder)
    text = (folder / "report.md").read_text()
    if "## Desiderata" not in text:
        return {}
    section = text.split("## Desiderata")[1].split("\n## ")[0]
    found = {}
    for part in section.split("### ")[1:]:
        title, _, rest = part.partition("\n")
        rows = [line.strip("| ").split(" | ") for line in rest.splitlines() if line.startswith("|")]
        found[title.replace("\\", "")] = {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}
    return found


def test_interpolation_is_read_from_both_ends(tmp_path):
    for loss in POLICIES:
        for beta in WEIGHTS:
            written(tmp_path, loss, beta, {"one": (RIGHT, REFERENCE)})
    found = tables(tmp_path)["Interpolation"]
    assert [found[loss]["interpolates"] for loss in ("dpo", "rlhf")] == ["fail", "pass"]
    assert float(found["dpo"]["to π\\*"]) == pytest.approx(0.4, abs=1e-3)
    assert float(found["dpo"]["to the best response"]) == 0
    low, high = (POLICIES["rlhf"](RIGHT, REFERENCE, weight) for weight in (WEIGHTS[0], WEIGHTS[-1]))
    assert float(found["rlhf"]["to π\\*"]) == pytest.approx(np.abs(low - np.exp(RIGHT)).sum() / 2, rel=1e-3)
    assert float(found["rlhf"]["to π_ref"]) == pytest.approx(np.abs(high - np.exp(REFERENCE)).sum() / 2, rel=1e-3)
    assert (tmp_path / "figures" / "interpolation.svg").is_file()
    assert "could not be drawn" not in (tmp_path / "report.html").read_text()


def test_preservation_asks_of_the_prompts_whose_reference_is_right(tmp_path):
    prompts = {"good": (RIGHT, RIGHT), "bad": (np.log([0.6, 0.2, 0.2]), np.log([0.4, 0.2, 0.4]))}
    for loss in POLICIES:
        for beta in WEIGHTS:
            written(tmp_path, loss, beta, prompts)
    found = tables(tmp_path)
    verdicts, grid = found["Preservation"], found["KL(π* ‖ π) on the good prompts, nats"]
    assert [verdicts[loss]["preserves"] for loss in ("dpo", "rlhf")] == ["fail", "pass"]
    for beta in (0.05, 1.0, 20.0):
        moved = entropy(np.exp(RIGHT), softmax(RIGHT + RIGHT / beta))
        assert float(grid["dpo"][f"weight {beta:g}"]) == pytest.approx(moved, rel=1e-3)
    assert float(verdicts["dpo"]["good: largest KL"]) == float(grid["dpo"]["weight 0.0067"])
    assert float(verdicts["rlhf"]["good: largest KL"]) < 1e-12
    improved = {b: 1 - np.abs(POLICIES["dpo"](*prompts["bad"], b) - [0.6, 0.2, 0.2]).sum() / 0.4 for b in WEIGHTS}
    best = max(improved, key=improved.get)
    assert float(verdicts["dpo"]["others: best improvement"]) == pytest.approx(improved[best], rel=1e-3)
    assert float(verdicts["dpo"]["at weight"]) == best
    assert float(verdicts["rlhf"]["best compromise"]) == pytest.approx(1 - 0.0067 / 1.0067, abs=0.02)
    assert (tmp_path / "figures" / "preservation.svg").is_file()
    assert not (tmp_path / "figures" / "interpolation.svg").exists()  # it has two prompts


def test_a_run_that_did_not_reach_its_optimum_has_no_verdict(tmp_path):
    for beta in WEIGHTS:
        change(written(tmp_path, "rlhf", beta, {"one": (RIGHT, REFERENCE)}), "summary", certificate=NOT_REACHED)
    assert tables(tmp_path)["Interpolation"]["rlhf"]["interpolates"] == "as trained"


@pytest.mark.parametrize("weights", [[0.05, 1.0, 20.0], [0.001, 1000.0]], ids=["no ends", "too few"])
def test_weights_that_do_not_reach_the_ends_say_nothing_of_limits(tmp_path, weights):
    for beta in weights:
        written(tmp_path, "dpo", beta, {"one": (RIGHT, REFERENCE)})
    assert "Interpolation" not in tables(tmp_path)


def test_runs_without_candidates_are_left_out(tmp_path):
    paths = [written(tmp_path, "dpo", beta, {"one": (RIGHT, REFERENCE)}) for beta in WEIGHTS]
    (paths[0] / "candidates.csv").unlink()
    (paths[1] / "candidates.csv").write_text("not,that\n1,2\n")
    assert "could not be drawn" not in report(tmp_path).read_text()
    for path in paths:
        (path / "candidates.csv").unlink(missing_ok=True)
    assert tables(tmp_path) == {}


def test_more_constraints_than_panels_are_told(tmp_path):
    prompts = {"good": (RIGHT, RIGHT), "bad": (np.log([0.6, 0.2, 0.2]), np.log([0.4, 0.2, 0.4]))}
    for radius in range(1, 18):
        limit = {"l2_ball": {"_target_": "cdpo.constraints.l2_ball.L2Ball", "radius": float(radius)}}
        for beta in WEIGHTS[:3]:
            change(written(tmp_path, "dpo", beta, prompts), "config", constraint=limit)
    found = tables(tmp_path)
    assert len(found["Preservation"]) == 1  # by the name of the loss, of 17 rows
    text = (tmp_path / "report.md").read_text()
    assert text.count("| dpo | l2\\_ball") + text.count("| dpo | l2_ball") >= 17
    assert "2 more are left out" in text
    assert "could not be drawn" not in text
