"""A world of one's own: attained and gap as `independent_gap.py`, which shares no line with cdpo, computes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from composing import composed, train
from independent_gap import gap

WORLD = {
    "prompts": ["Where to? ", "How long? ", "With whom? "],
    "responses": [
        ["north", "south", "east", "west"],
        ["a day", "a week", "a year"],
        ["alone", "a friend", "strangers", "the dog", "nobody"],
    ],
    "rewards": [[1.0, -0.5, 2.0, 0.3], [0.2, 1.4, -1.0], [0.0, 1.5, -2.0, 2.5, -0.7]],
    "reference_logits": [[0.5, 1.0, -1.0, 0.0], [1.0, 0.0, 0.3], [0.2, -0.3, 1.2, -1.0, 0.4]],
}
SOLVER = ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.learning_rate=2.0", "trainer.max_steps=400",
          "trainer.max_grad_norm=null", "trainer.batch_size=null", "trainer.log_every=400")  # fmt: skip


@pytest.mark.parametrize("radius", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_attained_and_gap_are_those_of_an_independent_script(tmp_path, radius, beta):
    path = tmp_path / "world.json"
    path.write_text(json.dumps(WORLD))
    expected = gap(str(path), radius, beta)
    found = {}
    for loss in ("rlhf", "dpo"):
        run = composed("model=tabular", f"dataset.path={path}", "logger=none", f"beta={beta}", *SOLVER, f"loss={loss}",
                       "constraint=l2_ball", f"constraint.l2_ball.radius={radius}")  # fmt: skip
        summary = train(run, tmp_path / loss)
        found[loss] = summary["metrics"]["objective/attained"]
        assert summary["constraint"]["l2_ball"]["binds"] == 1
    assert found == pytest.approx({loss: expected[loss] for loss in found}, abs=1e-6)
    assert found["rlhf"] - found["dpo"] == pytest.approx(expected["gap"], abs=1e-6)
    assert expected["gap"] > 0


def test_the_script_runs_by_itself(tmp_path):
    path = tmp_path / "world.json"
    path.write_text(json.dumps(WORLD | {"reference_logits": None}))
    script = Path(__file__).parents[1] / "independent_gap.py"
    out = subprocess.run([sys.executable, script, path, "1.5"], capture_output=True, text=True, check=True).stdout
    assert "'gap'" in out
