"""Exact resume: with every constraint and optimizer, after signals and kills at any moment."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import forking
import pytest
from composing import NEEDS, composed, train
from run_files import rows, same, timeless, weights
from small_runs import SMALL, interrupted_at

from cdpo.config import build as config
from cdpo.errors import Preempted
from cdpo.system import checkpoint
from cdpo.training import loop

CONSTRAINTS = sorted(path.stem for path in (config.CONF / "constraint").glob("*.yaml"))


def overrides_for(constraint: str, gpt2: Path) -> list[str]:
    if constraint == "bias_only":  # needs a model with biases
        return [
            "model=hf",
            f"model.name_or_path={gpt2}",
            "optimizer.learning_rate=1e-3",
            *(s for s in SMALL if "model." not in s),
        ]
    return [*SMALL]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_k_steps_and_resume_equal_n_steps(constraint, gpt2, tmp_path, monkeypatch):
    settings = composed(*overrides_for(constraint, gpt2), f"constraint={constraint}", *NEEDS.get(constraint, []))
    train(settings, tmp_path / "whole")
    for step in (3, 5):  # at a checkpoint, and between two
        with monkeypatch.context() as patch:
            interrupted_at(step, patch)
            stops = json.loads((tmp_path / "whole" / "summary.json").read_text())["step"] <= step
            if not stops:
                with pytest.raises(Preempted):
                    train(settings, tmp_path / f"parts{step}")
        train(settings, tmp_path / f"parts{step}")
        assert same(weights(tmp_path / "whole"), weights(tmp_path / f"parts{step}"))
        assert timeless(tmp_path / "whole") == timeless(tmp_path / f"parts{step}")


@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [("sgd", "bco"), ("rmsprop", "bco"), ("adamw", "bco"), ("adamw", "gaussian_annealed"), ("lbfgs", "dpo"),
     ("frank_wolfe", "dpo")],
)  # fmt: skip
def test_every_optimizer_resumes_exactly(optimizer, loss, tmp_path, monkeypatch):
    """And so does a loss that follows training."""
    follows = ["optimizer.schedule=cosine", "optimizer.warmup_steps=2"]
    own = ["constraint=l2_ball"] if optimizer == "frank_wolfe" else follows
    settings = composed(*SMALL, "trainer.batch_size=null", f"optimizer={optimizer}", *own, f"loss={loss}")
    train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted_at(4, patch)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "parts")
    train(settings, tmp_path / "parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_a_signal_during_an_evaluation_puts_it_off_and_loses_nothing(tmp_path, monkeypatch):
    settings = composed(*SMALL)
    train(settings, tmp_path / "whole")
    real = loop.evaluate

    def evaluating(run):
        if run.state.step == 4:
            run.session.signals.request("SIGTERM")
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluating)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "parts")
    assert [r["step"] for r in rows(tmp_path / "parts") if "eval/loss" in r] == [0]
    train(settings, tmp_path / "parts")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


@pytest.mark.parametrize(
    "options",
    [["constraint=[lora_r4,dropout]"], ["optimizer=frank_wolfe", "constraint=linf_ball", "trainer.batch_size=null"]],
    ids=["adamw", "frank_wolfe"],
)
def test_kill_9_at_random_moments_then_the_same_command(options, tmp_path):
    """Three kills at different moments; the final weights and the metrics are those of an undisturbed run."""
    command = ["-m", "cdpo.train", *SMALL, "trainer.max_steps=400", *options, "trainer.checkpoint_every=20",
               f"output_root={tmp_path}"]  # fmt: skip
    forking.run(*command, "name=whole", check=True)
    folder = tmp_path / "parts"
    for kill_after in (30, 110, 250):
        process = forking.Program(*command, "name=parts")
        deadline = time.monotonic() + 120
        while (
            not (folder / "metrics.jsonl").exists()
            or len((folder / "metrics.jsonl").read_bytes().splitlines()) < kill_after
        ):
            assert process.poll() is None, f"ended before it could be killed: {process.err}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = checkpoint.newest(folder / "checkpoints")
    assert last is not None
    assert 100 <= last[0] < 400
    forking.run(*command, "name=parts", check=True)
    assert same(weights(tmp_path / "whole"), weights(folder))
    assert timeless(tmp_path / "whole") == timeless(folder)


def test_samples_are_written_at_every_evaluation_and_once_after_a_resume(tmp_path, monkeypatch):
    settings = composed(*SMALL, "trainer.samples=2", "trainer.sample_tokens=5")
    train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted_at(5, patch)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "parts")
    train(settings, tmp_path / "parts")
    lines = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 4, 4, 8, 8]
    assert (tmp_path / "parts" / "samples.jsonl").read_text().splitlines() == lines
