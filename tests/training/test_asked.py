"""A run that sees little of the data asks the reference about no more of it."""

from __future__ import annotations

import json

import pytest
import torch
from composing import composed, train
from run_files import weights
from safetensors.torch import load_file

from cdpo.batch import Item, Pair
from cdpo.training import loop, scored
from cdpo.training.certificate import sample
from cdpo.training.checks import checked
from cdpo.training.scored import asked

FEW = ("model.hidden_size=16", "model.heads=2", "model.dtype=float64", "logger=none", "trainer.threads=1",
       "trainer.batch_size=4", "trainer.max_steps=3", "trainer.certificate_items=5", "dataset=jsonl",
       "dataset.eval_size=8", "trainer.checkpoint_every=1")  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """Of a run on 88 prompts, of which it sees 12, and 5 for its certificate."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}{'?' * (i % 7)}", "chosen": f" {i} yes", "rejected": f" {i}"} for i in range(96)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda *more: composed(*FEW, f"dataset.path={path}", *more)


def items(n: int) -> list[Item]:
    return [Item([i], [[1], [2]], [Pair(0, 1)]) for i in range(n)]


def test_what_steps_and_certificate_see_is_asked_about_or_all(config):
    spec = checked(config())
    few = asked(spec, items(88))
    assert set(few) >= set(sample(88, 5, spec.draw))
    assert 12 <= len(few) <= 17
    assert few == sorted(few)
    assert asked(spec, items(24)) == list(range(24))  # half of it is seen
    for more in ("trainer.max_steps=22", "trainer.max_steps=null", "trainer.certificate_items=44"):
        assert asked(checked(config(more)), items(88)) == list(range(88))


def reference_of(folder):
    return load_file(folder / "reference.safetensors")["values"]


def numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows]


def test_the_numbers_are_those_of_a_run_that_asks_about_all(config, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    few = train(config(), tmp_path / "few")
    assert "not of 7" in caplog.text
    monkeypatch.setattr(scored, "asked", lambda spec, train: list(range(len(train))))
    every = train(config(), tmp_path / "all")
    assert len(reference_of(tmp_path / "few")) < len(reference_of(tmp_path / "all")) / 2
    assert few["certificate"]["residual"] == pytest.approx(every["certificate"]["residual"], rel=1e-9)
    for ours, theirs in zip(numbers(tmp_path / "few"), numbers(tmp_path / "all"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12, nan_ok=True)


def test_a_resume_asks_about_the_same(config, tmp_path, monkeypatch):
    train(config(), tmp_path / "whole")
    step = loop.take_step

    def killed(run):
        if run.state.step == 2:
            raise KeyboardInterrupt
        step(run)

    monkeypatch.setattr(loop, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path / "parts")
    monkeypatch.setattr(loop, "take_step", step)
    assert train(config(), tmp_path / "parts")["reference"] == "run directory"
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    one, two = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_runs_that_see_the_same_share_it(config, tmp_path):
    under = (f"output_root={tmp_path}/out",)
    sources = [train(config(*under, *more), tmp_path / "out" / name)["reference"] for name, more in
               {"a": (), "b": ("loss=ipo",), "c": ("seed=1",), "d": ("seed=1", "beta=0.5")}.items()]  # fmt: skip
    assert sources == ["computed", "cache", "computed", "cache"]
