"""Seeds that change nothing are told, or refused, before a sweep starts; and they do change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composing import composed, train
from sweeping import Sweeper

from cdpo.config.task import Task
from cdpo.errors import ConfigError
from cdpo.sweep.seeds import check, draws

SMALL = ("logger=none", "loss=dpo", "dataset.prompts=4", "dataset.alphabet=3", "trainer.max_steps=3",
         "model.dtype=float64")  # fmt: skip
TINY = ("model=tiny", "model.hidden_size=16", "model.heads=2", "model.layers=1")


def numbers(directory: Path, *overrides: str) -> str:
    """What a run measures, at every step, but for what depends on the clock."""
    train(composed(*SMALL, *overrides), directory)
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    kept = [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]
    assert len(kept) > 1
    return json.dumps(kept)


@pytest.mark.parametrize(
    ("overrides", "drawn"),
    [
        (("model=tabular",), False),
        (TINY, False),
        (("model=tabular", "constraint=l2_ball", "trainer.batch_size=null"), False),
        (("model=tabular", "constraint=kl_budget"), False),
        (("model=tabular", "trainer.batch_size=2"), True),
        (("model=tabular", "constraint=lora_r1"), True),
        (("model=tabular", "constraint=dropout"), True),
        (("model=tabular", "dataset.preferences=sampled", "dataset.pairs=20"), True),
    ],
)
def test_what_draws_from_the_seed_is_what_changes_with_it(tmp_path, overrides, drawn):
    assert draws(composed(*SMALL, *overrides)) == drawn
    found = {numbers(tmp_path / f"{seed}", *overrides, f"seed={seed}") for seed in (0, 1)}
    assert (len(found) == 2) == drawn


def test_a_loss_or_a_constraint_of_ones_own_may_draw():
    tree = composed(*SMALL, "model=tabular", "constraint=l2_ball")
    assert not draws(tree)
    tree["constraint"]["l2_ball"]["_target_"] = "mine.Random"
    assert draws(tree)
    assert draws(composed(*SMALL, "model=tabular") | {"loss": {"_target_": "mine.Random"}})


def tasks(*overrides: str, constraints=("none",), seeds=(0, 1)) -> list[Task]:
    choices = {"dataset": "bandit", "model": "tabular"}
    return [
        Task(Path("x"), composed(*SMALL, "model=tabular", *overrides, f"constraint={c}", f"seed={s}"), choices=choices)
        for c in constraints
        for s in seeds
    ]


def test_a_sweep_whose_seeds_all_change_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"^seed=0,1 changes nothing .* constraint=none: "):
        check(tasks())


def test_a_sweep_in_which_some_seeds_change_nothing_is_told_in_a_line(capsys):
    check(tasks(constraints=("none", "l2_ball", "lora_r1")))
    said = capsys.readouterr().err
    assert said.startswith("seed=0,1 changes nothing for dataset=bandit model=tabular constraint=none,l2_ball: ")
    assert said.count("\n") == 1


def test_one_seed_worlds_and_draws_are_no_matter(capsys):
    check(tasks(seeds=(0,)))
    check(tasks("dataset.world_seed=${seed}"))
    check(tasks("trainer.batch_size=2"))
    check([])
    assert capsys.readouterr().err == ""


def test_the_command_line_refuses_it_and_starts_nothing(tmp_path):
    sweeper = Sweeper(tmp_path, "seed=0,1", "loss=dpo")
    code, text = sweeper.run("loss=dpo,ipo")
    assert code == 2, text
    assert "seed=0,1 changes nothing for dataset=bandit model=tabular constraint=none" in text
    assert not list(sweeper.out.glob("*/config.json"))
