"""What optimizer=exact cannot solve it refuses by name, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from composing import composed, train
from exact_worlds import EXACT

from cdpo.constraints.constraint import Constraint
from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.lora import LoRA
from cdpo.errors import ConfigError
from cdpo.exact.setting import Setting, setting_of
from cdpo.training.checks import check_searchable, checked

DOUBLE = ("model=tiny", "model.dtype=float64")
REFUSED = {  # overrides, and what the message names
    "early_stop": (["constraint=early_stop_kl"], "constraint=early_stop_kl: early stopping is a point on the path"),
    "dropout": (["constraint=dropout"], "constraint=dropout: dropout is noise"),
    "dora": (["constraint=lora_r2", "constraint.lora_r2.dora=true"], "constraint=lora_r2"),
    "sparse_in_a_ball": (["constraint=[sparse_topk,l2_ball]"], "sparse_topk with another set"),
    "sparse_in_a_budget": (["constraint=[sparse_topk,kl_budget]"], "sparse_topk with another set"),
    "float32": (["model=tiny"], "it searches a model in float64: set model.dtype=float64, or use optimizer=lbfgs"),
    "checkpointing": ([*DOUBLE, "trainer.gradient_checkpointing=true"], "set trainer.gradient_checkpointing=false"),
    "ball_per_tensor": (
        [*DOUBLE, "constraint=l2_ball", "constraint.l2_ball.per_tensor=true"],
        "no solver here knows constraint.l2_ball.per_tensor=true",
    ),
    "more_steps": (["trainer.max_steps=2"], "leave trainer.max_steps=1"),
    "baseline": (["loss=bco"], "this loss reads means of earlier steps"),
    "kinks": (["loss=hinge"], "this loss has corners"),
    "kinks_within": (["loss=dpo_positive"], "this loss has corners"),
    "progress": (["loss=gaussian_annealed"], "this loss is another one in every step"),
    "whole_steps": (["loss=aot"], "this loss mixes all pairs of a step"),
    "learning_rate": (["optimizer.learning_rate=0.1"], "learning_rate"),
    "starts": (["optimizer.starts=0"], "starts=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        checked(composed(*EXACT, *overrides))
    assert message in str(error.value)


def test_a_constraint_of_ones_own_is_refused():
    @dataclass
    class Own(Constraint):
        pass

    with pytest.raises(ConfigError, match="constraint=mine: no solver here knows it"):
        setting_of({"mine": Own()}, size=4)


def test_of_two_of_a_kind_the_smaller_set_counts_and_penalties_add():
    penalties = {"c": L2ToStart(1.0), "d": L2ToStart(0.25)}
    for balls in ({"a": L2Ball(2.0), "b": L2Ball(1.0)}, {"a": L2Ball(1.0), "b": L2Ball(2.0)}):
        assert setting_of({**balls, **penalties}, size=4) == Setting(radius=1.0, pull=1.25)
    assert setting_of({"lora": LoRA(rank=4, alpha=1.0)}, size=4) == Setting(rank=4, scaling=0.25)


def test_a_model_that_is_too_large_is_refused_once_its_size_is_known(tmp_path):
    large = ("optimizer=exact", "logger=none", *DOUBLE, "model.hidden_size=256")
    with pytest.raises(ConfigError, match="searches models of at most 1,000,000 numbers"):
        train(composed(*large), tmp_path / "run")
    assert not (tmp_path / "run" / "reference.safetensors").exists()


def test_a_model_on_a_gpu_is_refused():
    spec = checked(composed("optimizer=exact", *DOUBLE))
    with pytest.raises(ConfigError, match=r"set trainer\.device=cpu"):
        check_searchable(spec, torch.nn.Linear(2, 2), "cuda")
    check_searchable(spec, torch.nn.Linear(2, 2), "cpu")
    check_searchable(checked(composed(*EXACT)), torch.nn.Linear(2, 2), "cuda")
