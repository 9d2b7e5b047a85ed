"""A run directory: when a run may begin or go on there, and when it is refused."""

from __future__ import annotations

import json

import pytest
from composing import composed, train
from run_files import timeless
from small_runs import OWN, SMALL, interrupted_at, jsonl

from cdpo.errors import ConfigError, DataError, Preempted
from cdpo.training import job, loop


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    settings = composed(*SMALL)
    first = train(settings, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop, "take_step", lambda run: pytest.fail("trained again"))
    assert train(settings, tmp_path / "run") == json.loads(json.dumps(first))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_changed_trajectory_key_is_refused_and_a_free_one_is_not(tmp_path, monkeypatch):
    settings = composed(*SMALL)
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"loss\.beta=0\.1, now it is 0\.2"):
        train(composed(*SMALL, "loss.beta=0.2"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"constraint=\[\], now it is \['l2_ball'\]"):
        train(composed(*SMALL, "constraint=l2_ball"), tmp_path / "run")
    train(composed(*SMALL, "trainer.checkpoint_every=2"), tmp_path / "run")


def test_changed_data_is_refused_on_resume(tmp_path, monkeypatch):
    world = {"prompts": ["x "], "responses": ["a", "b"], "rewards": [[1.0, 0.0]]}
    path = tmp_path / "world.json"
    path.write_text(json.dumps(world))
    settings = composed("logger=none", "model=tabular", f"dataset.path={path}", "trainer.max_steps=6")
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "run")
    path.write_text(json.dumps(world | {"rewards": [[1.0, 0.5]]}))
    with pytest.raises(ConfigError, match=r"world\.json changed"):
        train(settings, tmp_path / "run")
    (tmp_path / "run" / "inputs.json").unlink()  # the checkpoint knows its data by itself
    with pytest.raises(ConfigError, match="the data or its tokens"):
        train(settings, tmp_path / "run")


def test_a_first_attempt_that_was_refused_does_not_block_its_directory(tmp_path):
    """Neither a mended config nor mended data; an attempt with numbers does."""
    path, folder = tmp_path / "pairs.jsonl", tmp_path / "run"
    row = '{"prompt": "%d", "chosen": "b", "rejected": "c"}\n'
    path.write_text("".join(row % i for i in range(20)))
    base = [*(s for s in SMALL if not s.startswith("dataset.")), "dataset=jsonl", f"dataset.path={path}"]
    with pytest.raises(DataError, match="needs rewards"):
        train(composed(*base, "loss=rlhf"), folder)
    path.write_text(path.read_text() + row % 20)
    assert train(composed(*base, "loss=dpo"), folder)["state"] == "finished"
    assert json.loads((folder / "config.json").read_text())["loss"]["_target_"].endswith(".DPO")
    (folder / "status.json").write_text('{"state": "failed"}')
    with pytest.raises(ConfigError, match="holds a run with beta="):
        train(composed(*base, "loss=dpo", "beta=0.2"), folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds a run with beta="):  # it has checkpoints
        train(composed(*base, "loss=dpo", "beta=0.2"), folder)


def test_files_edited_after_the_run_are_named(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", 6)
    settings = composed(*OWN, "dataset=jsonl", f"dataset.path={path}", "dataset.eval_size=0")
    train(settings, tmp_path / "run")
    train(settings, tmp_path / "run")
    jsonl(path, 6, chosen="well")
    with pytest.raises(ConfigError, match=r"rows\.jsonl changed"):
        train(settings, tmp_path / "run")


def test_a_run_that_failed_before_its_first_number_may_start_from_another_model(tmp_path, monkeypatch):
    """Nothing of the first attempt is taken over, its reference least of all."""
    settings = [*SMALL, "constraint=lora_r2"]

    def fails(run):
        raise RuntimeError("before any step")

    with monkeypatch.context() as patched:
        patched.setattr(job, "fit", fails)
        with pytest.raises(RuntimeError):
            train(composed(*settings), tmp_path / "run")
    assert (tmp_path / "run" / "reference.safetensors").is_file()
    train(composed(*settings, "model.init_seed=1"), tmp_path / "run")
    train(composed(*settings, "model.init_seed=1"), tmp_path / "other")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "other")
