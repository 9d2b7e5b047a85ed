"""On pairs without rewards no KL of two coins is taken for the policy's: it is drawn from the policy, or refused."""

from __future__ import annotations

import json

import pytest
from composing import composed, train
from run_files import rows as rows_of
from small_runs import OWN, jsonl

from cdpo.errors import ConfigError

DRAWN = ["trainer.samples=3", "trainer.sample_tokens=4"]


def settings(path, *more):
    return composed(*OWN, "dataset=jsonl", f"dataset.path={path}", "dataset.eval_size=3", *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["constraint=early_stop_kl"], r"constraint.early_stop_kl.kl on pairs .* set trainer.samples=64"),
        (["constraint=early_stop_kl", *DRAWN, "dataset.eval_size=0"], "hold rows out"),
    ],
)
def test_a_kl_that_is_not_there_is_refused_before_a_model_is_loaded(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(jsonl(tmp_path / "rows.jsonl", 10), *more), tmp_path / "run")
    assert not (tmp_path / "run" / "reference.safetensors").exists()


def test_early_stopping_goes_by_draws_of_the_policy(tmp_path):
    """A rate far too large: the first evaluation after a step finds the policy far off, by its own draws."""
    path = jsonl(tmp_path / "rows.jsonl", 10)
    run = settings(path, "constraint=early_stop_kl", "constraint.early_stop_kl.kl=1.0", *DRAWN,
                   "optimizer.learning_rate=0.1", "trainer.eval_every=2", "trainer.max_steps=8")  # fmt: skip
    summary = train(run, tmp_path / "run")
    assert summary["state"] == "stopped_early"
    rows = rows_of(tmp_path / "run")
    sampled = [row["eval/kl/sampled"] for row in rows if "eval/kl/sampled" in row]
    assert max(sampled[:-1]) <= 1.0 < sampled[-1]
    drawn = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    last = [row["log_ratio"] for row in drawn if row["step"] == summary["step"]]
    assert sampled[-1] == pytest.approx(sum(last) / 3)
    assert summary["constraint"]["early_stop_kl"]["boundary_distance"] == pytest.approx(1 - sampled[-1])
    assert not any("kl/candidates" in name for row in rows for name in row)


def test_where_candidates_have_a_kl_draws_do_not_stop_a_run(tmp_path):
    """A world whose responses are all there are: its KL is exact after every step."""
    run = composed(*OWN, "dataset.prompts=4", "dataset.alphabet=3", "constraint=early_stop_kl", *DRAWN,
                   "constraint.early_stop_kl.kl=0.05", "optimizer.learning_rate=0.02")  # fmt: skip
    summary = train(run, tmp_path / "run")
    before, after = [row["kl/candidates"] for row in rows_of(tmp_path / "run") if "kl/candidates" in row][-2:]
    assert before <= 0.05 < after
    assert summary["constraint"]["early_stop_kl"]["boundary_distance"] == pytest.approx(0.05 - after)
