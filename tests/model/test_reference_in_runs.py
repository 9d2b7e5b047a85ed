"""One reference for a whole sweep, through whole runs: which settings share it, which do not, and exact resume."""

from __future__ import annotations

import json

import pytest
from composing import composed, train
from run_files import key_of
from safetensors.torch import load_file

from cdpo.system import cache
from cdpo.training import loop

PAIRS = [
    {"prompt": f"\n\nHuman: {i}{'?' * i}\n\nAssistant:", "chosen": f" {i} yes", "rejected": f" {i}"} for i in range(40)
]
SMALL = ("model.hidden_size=32", "logger=none", "trainer.max_steps=2", "dataset.eval_size=0.2", "trainer.threads=1")


def run(tmp_path, name, *overrides):
    """`reference` of summary.json, for a run below tmp_path/out on tmp_path/pairs.jsonl."""
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    words = ("dataset=jsonl", f"dataset.path={data}", f"output_root={tmp_path}/out", *SMALL, *overrides)
    return train(composed(*words), tmp_path / "out" / name)["reference"]


SAME = [
    "beta=0.7",
    "loss=ipo",
    "loss=simpo",
    "seed=3",
    "restart=2",
    "constraint=lora_r2",
    "constraint=lora_r4",
    "constraint=dropout",
    "optimizer.learning_rate=1e-2",
    "trainer.batch_size=4",
    "dataset.max_prompt_tokens=500",  # no row is that long, so no token changes
    "dataset.eval_size=0.4",
]
OTHER = [
    "model.init_seed=1",
    "model.hidden_size=64",
    "model.dtype=float64",
    "dataset.max_prompt_tokens=24",
    "dataset.max_response_tokens=5",
    "dataset.max_rows=39",
    "dataset.max_eval_rows=2",
    "trainer.autocast=true",
]


def test_settings_that_share_a_reference(tmp_path):
    assert run(tmp_path, "first") == "computed"
    assert {word: run(tmp_path, word, word) for word in SAME} == dict.fromkeys(SAME, "cache")
    assert len(list((tmp_path / "out" / ".cache").glob("reference/*"))) == 1


def test_settings_that_do_not(tmp_path):
    assert run(tmp_path, "first") == "computed"
    assert {word: run(tmp_path, word, word) for word in OTHER} == dict.fromkeys(OTHER, "computed")
    assert {word: run(tmp_path, f"{word}-again", word, "beta=0.7") for word in OTHER} == dict.fromkeys(OTHER, "cache")


def test_other_text_is_another_reference(tmp_path):
    run(tmp_path, "first")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**p, "chosen": " no"}) + "\n" for p in PAIRS))
    assert run(tmp_path, "second") == "computed"


def test_losses_that_leave_rows_out_share_with_those_that_do_not(tmp_path):
    """A prompt whose rewards all tie gives no pair, and RLHF trains on it all the same."""
    rows = [{"prompt": f"p{i}", "responses": [" a", " b"], "rewards": [1.0, float(i % 3 > 0)]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [run(tmp_path, loss, f"loss={loss}") for loss in ("dpo", "rlhf")] == ["computed", "cache"]


def test_a_cache_dir_of_ones_own_and_another_output_root(tmp_path):
    words = [f"cache_dir={tmp_path}/mine"]
    assert run(tmp_path, "a", *words) == "computed"
    assert run(tmp_path, "b", *words, f"output_root={tmp_path}/elsewhere") == "cache"
    assert not (tmp_path / "out" / ".cache").exists()


def test_a_run_outside_output_root_leaves_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(composed(*SMALL[:3]), tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in found]


@pytest.mark.parametrize("deleted", [False, True])
def test_a_resumed_run_is_exact_whatever_became_of_the_cache(tmp_path, monkeypatch, deleted):
    """Started from a cache, stopped after two of six steps; then the cache is gone, or holds other numbers."""
    six = ("trainer.max_steps=6", "trainer.batch_size=8", "loss=dpo", "trainer.checkpoint_every=1")
    run(tmp_path, "filler")
    assert run(tmp_path, "whole", *six) == "cache"

    class Stopped(Exception):
        pass

    step = loop.take_step

    def stop(task):
        if task.state.step == 2:
            raise Stopped
        step(task)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop)
        with pytest.raises(Stopped):
            run(tmp_path, "parts", *six)
    (path,) = (tmp_path / "out" / ".cache").glob("reference/*/values.safetensors")
    if deleted:
        path.unlink()
    else:
        cache.write(path, key_of(path), load_file(path)["values"] + 1e-4)
    assert run(tmp_path, "parts", *six) == "run directory"
    assert rows(tmp_path / "out" / "parts") == rows(tmp_path / "out" / "whole")
