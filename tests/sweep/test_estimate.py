"""A dry run says what the real one then takes, and starts nothing."""

from __future__ import annotations

import json
import re

import pytest
import torch
from composing import composed, train
from sweeping import Sweeper

from cdpo.config.build import build
from cdpo.errors import ConfigError
from cdpo.model.pretrained import HuggingFace
from cdpo.sweep.estimate import estimate


@pytest.mark.parametrize("constraint", ["none", "lora_r2", "freeze"])
def test_steps_and_trainable_are_those_of_the_run(constraint, tmp_path):
    tree = composed(f"constraint={constraint}", "logger=none", "trainer.epochs=3", "trainer.batch_size=6")
    found = estimate(tree, {})
    summary = train(tree, tmp_path / "run")
    assert (found.steps, found.trainable) == (summary["steps"], summary["trainable"])
    assert found.items == 16


@pytest.mark.parametrize(
    ("options", "numbers"),  # kept per trained number: optimizer state; and weight, gradient, copy of the start
    [(["optimizer=adamw"], 2 + 3), (["optimizer=sgd"], 0 + 3), (["optimizer=sgd", "optimizer.momentum=0.9"], 1 + 3),
     (["optimizer=rmsprop"], 1 + 3)],
)  # fmt: skip
def test_bytes_are_weights_gradients_states_and_start(options, numbers):
    tree = composed("model=tabular", "model.dtype=float64", *options)
    found = estimate(tree, {})
    assert found.gib * 2**30 == pytest.approx(8 * numbers * found.parameters, rel=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "lbfgs", "frank_wolfe"])
def test_optimizers_keep_as_many_numbers_as_they_say(name):
    parameter = torch.nn.Parameter(torch.randn(5000))
    schedule = build(composed("model=tabular", f"optimizer={name}")).optimizer
    optimizer = schedule.build([parameter])
    for _ in range(30):

        def closure():
            optimizer.zero_grad()
            loss = (parameter**4).sum() + (parameter[1:] * parameter[:-1]).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    tensors = []
    for value in optimizer.state[parameter].values():
        tensors += [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor)]
    kept = sum(t.numel() for t in tensors) / parameter.numel()
    assert kept == pytest.approx(schedule.states, abs=0.1 if name != "lbfgs" else 1.1)


def test_a_skeleton_has_the_shapes_of_the_model_and_takes_adapters(tmp_path):
    tree = composed("logger=none", "trainer.max_steps=1")
    train(tree, tmp_path / "run")
    real = HuggingFace(str(tmp_path / "run/model"))
    skeleton, loaded = real.skeleton(None, None), real.load(real.tokenizer(None), None)
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    shapes = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (skeleton, loaded)]
    assert shapes[0] == shapes[1]
    tree = composed(f"model.name_or_path={tmp_path}/run/model", "model=hf", "constraint=lora_r2", "logger=none")
    assert estimate(tree, {}).trainable == train(tree, tmp_path / "again")["trainable"]


@pytest.mark.parametrize(
    "options",
    [
        ["model=tabular", "optimizer=lbfgs", "trainer.batch_size=4"],
        ["model=tabular", "trainer.gradient_checkpointing=true"],
        ["model.max_positions=2"],
    ],
)
def test_what_the_run_would_refuse_is_refused(options, tmp_path):
    tree = composed("logger=none", *options)
    with pytest.raises(ConfigError) as said:
        train(tree, tmp_path / "run")
    with pytest.raises(ConfigError, match=re.escape(str(said.value))):
        estimate(tree, {})


def test_a_sweep_is_described_refusals_are_counted_and_nothing_is_started(tmp_path):
    sweeper = Sweeper(tmp_path)
    code, text = sweeper.run("dry_run=true", "trainer.batch_size=4,-1", "loss.how=none")
    assert code == 1
    assert "2 runs: 0 done before, 1 refused; nothing was started" in text
    assert "1 refused: ConfigError: trainer: batch_size=-1 must be at least 1" in text
    assert not list(sweeper.out.glob("bandit-*"))
    assert sweeper.run("trainer.batch_size=4", "loss.how=none")[0] == 0
    code, text = sweeper.run("dry_run=true", "trainer.batch_size=4", "loss.how=none")
    assert code == 0
    assert "1 done before" in text
    assert json.loads((sweeper.out / "sweep.json").read_text())["runs"]
