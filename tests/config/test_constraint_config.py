"""Constraint files, ranges, combinations and state. Every file in conf/constraint is covered by being there."""

import copy
import functools
import importlib
from pathlib import Path

import pytest
import torch
from composing import NEEDS, node_of
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from policies import large_steps, make, prepare

from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.constraint import check
from cdpo.constraints.dropout import Dropout
from cdpo.constraints.early_stop import EarlyStop
from cdpo.constraints.freeze import Freeze
from cdpo.constraints.kl_budget import KLBudget
from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.linf_ball import LinfBall
from cdpo.constraints.lora import LoRA
from cdpo.constraints.sparse_topk import SparseTopK
from cdpo.constraints.weight_decay import WeightDecay
from cdpo.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "conf" / "constraint"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
CHOICES = [name for name in FILES if name != "none"]


@functools.cache
def options_of(name):
    return node_of("constraint", name)


def build(name):
    """The constraint that a file describes."""
    options = dict(options_of(name))
    module, cls = options.pop("_target_").rsplit(".", 1)
    return getattr(importlib.import_module(module), cls)(**options)


def test_files_compose_one_by_one_and_together(tmp_path):
    (tmp_path / "constraint").symlink_to(FOLDER)
    (tmp_path / "config.yaml").write_text("defaults: [_self_, {constraint: [none]}]\nconstraint: {}\n")
    options = {name: options_of(name) for name in CHOICES}
    with initialize_config_dir(str(tmp_path), version_base=None):
        for name in FILES:
            alone = OmegaConf.to_container(compose("config", [f"constraint={name}", *NEEDS.get(name, [])]))
            assert alone == {"constraint": {} if name == "none" else {name: options[name]}}
        needs = [need for name in CHOICES for need in NEEDS.get(name, [])]
        together = compose("config", [f"constraint=[{','.join(CHOICES)}]", "constraint.l2_ball.radius=7", *needs])
    assert list(together.constraint) == CHOICES
    assert together.constraint.l2_ball.radius == 7
    assert together.constraint.lora_r8.rank == 8


@pytest.mark.parametrize("name", CHOICES)
def test_2n_steps_are_n_steps_a_restart_and_n_steps(name):
    """Bit for bit, with noise, multipliers and patience; everything is rebuilt from the file at the restart."""

    def begin():
        constraint = build(name)
        return constraint, prepare(make("gpt2"), constraint)[0]

    def go(constraint, model, steps):
        for step in steps:
            kl = (0.9, 0.1, 0.4, 0.7, 0.0, 0.2)[step]
            large_steps(model, constraint, steps=[step], metrics={"kl_budget/kl": kl, "early_stop/kl": kl})
            outcomes.append(constraint.stop_reason({"step": 34 * step, "eval/loss": (3, 1, 2, 2, 2, 2)[step]}))

    outcomes = []
    whole, whole_model = begin()
    go(whole, whole_model, range(6))
    straight, outcomes = outcomes, []
    first, first_model = begin()
    go(first, first_model, range(3))
    state, saved = copy.deepcopy(first.state_dict()), copy.deepcopy(first_model.state_dict())
    second, second_model = begin()
    second.load_state_dict(state)
    second_model.load_state_dict(saved)
    go(second, second_model, range(3, 6))
    for one, other in zip(whole_model.parameters(), second_model.parameters()):
        assert torch.equal(one, other)
    assert whole.state_dict() == second.state_dict()
    assert whole.report() == second.report()
    assert straight == outcomes


def test_state_holds_what_moves():
    assert set(KLBudget(budget=1.0).state_dict()) == {"multiplier", "kl"}
    assert set(EarlyStop(step=1).state_dict()) == {"best", "stale", "last_kl", "stopped"}
    assert set(L2Ball(radius=1.0).state_dict()) == {"steps_projected", "slack"}
    assert LoRA(rank=1).state_dict() == {}


@pytest.mark.parametrize(
    ("cls", "options", "reason"),
    [
        (LoRA, {"rank": 0}, "rank=0"),
        (LoRA, {"rank": 1, "alpha": 0.0}, "alpha=0.0"),
        (LoRA, {"rank": 1, "dropout": 1.0}, "dropout=1.0"),
        (LoRA, {"rank": 1, "rslora": True}, "set alpha"),
        (LoRA, {"rank": 1, "target_modules": []}, "target_modules is empty"),
        (WeightDecay, {"strength": 0.0}, "strength=0.0"),
        (L2ToStart, {"strength": -1.0}, "strength=-1.0"),
        (L2Ball, {"radius": 0.0}, "radius=0.0"),
        (L2Ball, {"radius": float("nan")}, "radius=nan"),
        (LinfBall, {"radius": float("inf")}, "radius=inf"),
        (EarlyStop, {}, "needs step, metric or kl"),
        (EarlyStop, {"step": 0}, "step=0"),
        (EarlyStop, {"metric": "loss"}, "eval/"),
        (EarlyStop, {"metric": "eval/loss", "patience": 0}, "patience=0"),
        (EarlyStop, {"metric": "eval/loss", "min_delta": -1.0}, "min_delta"),
        (EarlyStop, {"metric": "eval/loss", "mode": "least"}, "min or max"),
        (EarlyStop, {"kl": 0.0}, "kl=0.0"),
        (Freeze, {}, "needs patterns or train_last_layers"),
        (Freeze, {"patterns": ["*.bias"]}, "regular expression"),
        (Freeze, {"train_last_layers": 0}, "train_last_layers=0"),
        (Dropout, {"p": 1.0}, "p=1.0"),
        (KLBudget, {"budget": 0.0}, "budget=0.0"),
        (KLBudget, {"budget": 1.0, "rate": -1.0}, "rate=-1.0"),
        (SparseTopK, {}, "either k or fraction"),
        (SparseTopK, {"k": 1, "fraction": 0.5}, "either k or fraction"),
        (SparseTopK, {"k": 0}, "k=0"),
        (SparseTopK, {"fraction": 1.5}, "fraction=1.5"),
    ],
)
def test_out_of_range(cls, options, reason):
    with pytest.raises(ValueError, match=reason):
        cls(**options)


LORA, DORA = LoRA(rank=1), LoRA(rank=1, dora=True)


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (LORA, LoRA(rank=2), "two adapters"),
        (LORA, Freeze(train_last_layers=1), "target_modules"),
        (LORA, BiasOnly(), "freezes the biases"),
        (LORA, LinfBall(radius=1.0), "no longer of low rank"),
        (LORA, SparseTopK(k=1), "no longer of low rank"),
        (DORA, L2Ball(radius=1.0), "dora=false"),
        (DORA, L2ToStart(strength=1.0), "dora=false"),
        (Dropout(p=0.1), Dropout(p=0.2), "overwrite"),
        (KLBudget(budget=1.0), KLBudget(budget=2.0), "two multipliers"),
    ],
)
def test_combinations_that_are_refused(one, other, reason):
    for pair in ({"a": one, "b": other}, {"a": other, "b": one}):
        with pytest.raises(ConfigError, match=rf"a with b: .*{reason}"):
            check(pair, lbfgs=False)


def test_combinations_that_are_defined():
    lora = [LORA, L2Ball(radius=1.0), L2ToStart(strength=1.0), WeightDecay(strength=0.1), Dropout(p=0.1)]
    parts = [Freeze(train_last_layers=1), BiasOnly(), LinfBall(radius=1.0), SparseTopK(k=1), *lora[1:]]
    for group in (lora, parts):
        group = [*group, KLBudget(budget=1.0), EarlyStop(step=1), EarlyStop(kl=1.0)]
        check({str(i): constraint for i, constraint in enumerate(group)}, lbfgs=False)


def test_all_conflicts_are_told_at_once():
    constraints = {"lora_r1": LORA, "freeze": Freeze(train_last_layers=1), "linf_ball": LinfBall(radius=1.0)}
    with pytest.raises(ConfigError) as caught:
        check(constraints, lbfgs=True)
    message = str(caught.value)
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "linf_ball with optimizer=lbfgs",
        "lora_r1 with freeze",
        "lora_r1 with linf_ball",
    ]


def test_lbfgs_takes_what_keeps_the_objective_fixed():
    allowed = {name for name in CHOICES if not build(name).not_with_lbfgs}
    smooth = {"bias_only", "early_stop", "early_stop_kl", "early_stop_metric", "freeze", "freeze_embeddings"}
    assert allowed == smooth | {name for name in CHOICES if name.startswith("lora")}
    assert LoRA(rank=1, dropout=0.1).not_with_lbfgs


@pytest.mark.parametrize("unused", [{"patience": 5}, {"min_delta": 0.1}, {"mode": "max"}])
def test_early_stop_refuses_what_only_a_metric_uses(unused):
    with pytest.raises(ValueError, match="belong to metric"):
        EarlyStop(step=5, **unused)
