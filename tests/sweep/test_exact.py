"""Sweeps on a table search for optima without being asked to, and go on from each other's solutions."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import forking
import pandas as pd
import pytest
import torch
from composing import composed, train
from safetensors.torch import load_file, save

from cdpo.config.task import Task
from cdpo.sweep import launch
from cdpo.sweep.exact import solvable, told
from cdpo.sweep.outcome import Outcome
from cdpo.sweep.polish import to_polish
from cdpo.system.files import write_atomic, write_json
from cdpo.training.directory import RunDirectory
from cdpo.training.solve import joined
from cdpo.training.solve import told as told_of

WORLD = ("model=tabular", "logger=none", "beta=1")
SMALL = ("dataset.prompts=4", "dataset.alphabet=3")


def sweep(folder: Path, *overrides: str) -> str:
    command = ["-m", "cdpo.train", "-m", *WORLD, f"output_root={folder}", "name=swept", *overrides]
    done = forking.run(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def runs(folder: Path) -> dict[tuple[str, str], Path]:
    """Directories by loss and constraint."""
    found = {}
    for path in (folder / "swept").glob("*/choices.json"):
        choices = json.loads(path.read_text())
        found[choices["loss"], "+".join(choices["constraint"]) or "none"] = path.parent
    return found


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


def test_the_gap_of_a_table_is_zero_without_a_constraint_and_searched_under_a_rank(tmp_path):
    losses = ("rlhf", "dpo")
    larger = ("dataset.prompts=6", "dataset.alphabet=4")
    said = sweep(tmp_path, *larger, f"loss={','.join(losses)}", "constraint=none,lora_r1")
    assert "in a sweep runs on a table search for the optimum" in said
    assert re.search(
        r"1 of 4 runs search again, RLHF last, from the solutions of other losses and levels too: at most", said
    )
    found, gaps = runs(tmp_path), pd.read_csv(tmp_path / "swept/gap.csv").set_index(["loss", "constraint"])["gap"]
    assert abs(gaps["dpo", "none"]) < 1e-9
    assert gaps["dpo", "lora_r1"] > 0.001
    assert {key: summary(path)["certificate"]["status"] for key, path in found.items()} == {
        (loss, constraint): "certified" if constraint == "none" else "searched"
        for loss in losses
        for constraint in ("none", "lora_r1")
    }
    again = [found[loss, "lora_r1"] for loss in losses if (found[loss, "lora_r1"] / "starts.safetensors").is_file()]
    assert found["rlhf", "lora_r1"] in again  # few starts find RLHF's optimum under a rank
    for directory in again:
        names = set(load_file(directory / "starts.safetensors"))
        assert names == {found[loss, "lora_r1"].name for loss in losses}
        with open(directory / "searches.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {f"from {found['dpo', 'lora_r1'].name}", "random 0"} <= {row["origin"] for row in rows}
        assert summary(directory)["certificate"]["starts"] == 1 + 128  # the unconstrained optimum; the other's is none
        assert len(rows) > 1 + 128
        assert f"from {directory.name}" not in {row["origin"] for row in rows}
    best = summary(found["rlhf", "lora_r1"])["metrics"]["objective/J"]
    assert all(summary(found[loss, "lora_r1"])["metrics"]["objective/J"] <= best + 1e-9 for loss in losses)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert "again" not in sweep(tmp_path, *larger, f"loss={','.join(losses)}", "constraint=none,lora_r1")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")} == before


def test_a_search_goes_on_from_a_solution_that_it_could_not_find(tmp_path):
    """One start and one step, but the solution of a thorough search is put beside it: the run ends there."""
    thorough, poor = tmp_path / "thorough", tmp_path / "poor"
    settings = (*WORLD, *SMALL, "loss=rlhf", "constraint=lora_r1", "optimizer=exact")
    best = train(composed(*settings, "optimizer.starts=40"), thorough)["metrics"]["objective/J"]
    poor.mkdir()
    shutil.copy(thorough / "solution.safetensors", poor / "starts.safetensors")
    found = train(composed(*settings, "optimizer.starts=1", "optimizer.steps=1"), poor)
    assert found["metrics"]["objective/J"] >= best - 1e-9


@pytest.mark.parametrize(("by_objective", "hits", "low"), [(True, 1 / 3, 0.2), (False, 0.0, 0.9)])
def test_only_own_starts_count_and_each_once(by_objective, hits, low):
    """What another run handed over is the best by J; a start that went on in the second round found the best value."""
    first = [("unconstrained optimum", 2.0, 0.1), ("random 0", 1.5, 0.4), ("random 1", 1.6, 0.5)]
    second = [("unconstrained optimum", 1.0, 0.2), ("from another", 1.001, 0.9)]
    first, second = ([dict(zip(("origin", "objective", "attained"), row)) for row in part] for part in (first, second))
    found = told_of(joined(first, second, by_objective, "it"), by_objective, -2.0 if by_objective else 1.0, 0.01)
    assert (found["starts"], found["hits"]) == (3, hits)
    assert (found["attained_low"], found["attained_high"]) == (low, 0.9)
    assert (found["epsilon"], found["fall"]) == (0.01, 2.0 if by_objective else 1.0)


@pytest.mark.parametrize(("by_objective", "origin"), [(True, "random 0"), (False, "random 1")])
def test_what_goes_on_from_the_runs_own_solution_is_its_own(by_objective, origin):
    first = [{"origin": "random 0", "objective": 1.0, "attained": 0.3},
             {"origin": "random 1", "objective": 2.0, "attained": 0.4}]  # fmt: skip
    second = [{"origin": f"from {name}", "objective": 0.9, "attained": 0.5} for name in ("it", "another")]
    rows = joined(first, second, by_objective, "it")
    assert [row["origin"] for row in rows] == ["random 0", "random 1", origin, "from another"]
    found = told_of(rows, by_objective, 1.0, 0.01)
    assert (found["starts"], found["hits"]) == (2, 0.5)


def test_the_command_line_can_tell_how_to_train(tmp_path):
    sweep(tmp_path, *SMALL, "loss=dpo,ipo", "optimizer=adamw", "trainer.max_steps=2")
    assert {summary(path)["steps"] for path in runs(tmp_path).values()} == {2}


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (("model=tabular",), True),
        (("model=tabular", "constraint=[lora_r2,kl_budget]"), True),
        (("model=tabular", "constraint=early_stop"), False),
        (("model=tabular", "constraint=dropout"), False),
        (("model=tabular", "loss=bco"), False),
        (("model=tabular", "loss=aot"), False),
        (("model=tabular", "loss=gaussian_annealed"), False),
        (("model=tiny",), False),
    ],
)
def test_what_can_be_solved(overrides, answer, tmp_path):
    assert solvable(Task(tmp_path, composed(*overrides))) is answer


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["model=tabular", "loss=dpo"], False),
        (["optimizer.learning_rate=1"], True),
        (["+trainer.max_steps=3"], True),
        (["trainer.device=cpu"], False),
        (["experiment=theory"], True),
    ],
)
def test_what_counts_as_told(overrides, answer):
    from omegaconf import OmegaConf

    config = OmegaConf.create({"hydra": {"runtime": {"choices": {"experiment": None}}}})
    assert told(overrides, config) is answer


def test_runs_without_solutions_are_left_alone(tmp_path):
    assert both_rounds(Task(tmp_path, composed("model=tabular"))) == ([], [])


def searched(folder: Path, loss: str, attained: float = 0.5, **certificate) -> Task:
    """A run that is done, with its solution."""
    directory = RunDirectory(folder / loss)
    write_atomic(directory.solution, save({"change": torch.ones(2, 3)}))
    told_of = {"status": "searched", "hits": 0.1, **certificate}
    write_json(directory.summary, {"certificate": told_of, "metrics": {"objective/attained": attained}})
    config = composed("model=tabular", f"loss={loss}", "optimizer=exact", "constraint=lora_r1")
    return Task(directory.path, config, sweep=folder)


def both_rounds(*tasks: Task) -> tuple[list[Task], list[Task]]:
    """Those of other losses, and of RLHF, that are to search again."""
    return to_polish(tasks, rlhf=False), to_polish(tasks, rlhf=True)


def test_a_new_loss_beside_them_lets_all_search_again_once(tmp_path):
    rlhf, dpo = searched(tmp_path, "rlhf"), searched(tmp_path, "dpo")
    assert both_rounds(rlhf) == ([], [])
    assert both_rounds(rlhf, dpo) == ([dpo], [rlhf])
    rlhf, dpo = searched(tmp_path, "rlhf"), searched(tmp_path, "dpo")  # done again
    assert both_rounds(rlhf, dpo) == ([], [])
    ipo, sure = searched(tmp_path, "ipo"), searched(tmp_path, "wpo_candidates", hits=0.6)
    assert both_rounds(rlhf, dpo, ipo, sure) == ([dpo, ipo], [rlhf])
    assert set(load_file(rlhf.directory / "starts.safetensors")) == {"rlhf", "dpo", "ipo", "wpo_candidates"}


def test_other_levels_of_a_constraint_are_begun_from_too(tmp_path):
    """A rank's solution is one of a higher rank; another ball, another world or two constraints are another family."""
    one, two = searched(tmp_path / "1", "dpo"), searched(tmp_path / "2", "dpo")
    two = replace(two, directory=two.directory.rename(two.directory.with_name("dpo_r2")))
    two.composed["constraint"] = {"lora_r2": one.composed["constraint"]["lora_r1"] | {"rank": 2}}
    ball = searched(tmp_path / "3", "dpo")
    ball.composed["constraint"] = composed("model=tabular", "constraint=l2_ball")["constraint"]
    assert both_rounds(one, two, ball) == ([one, two], [])
    assert set(load_file(one.directory / "starts.safetensors")) == {"dpo", "dpo_r2"}
    assert both_rounds(one, ball) == ([], [])
    two.composed["dataset"]["world_seed"] = 1
    (one.directory / "starts.safetensors").unlink()
    assert both_rounds(one, two) == ([], [])


def test_a_low_rank_begins_from_a_high_ones_solution_and_the_other_way_round(tmp_path):
    """One start and one step at rank 2 beside a thorough search at rank 1 attain as much; back at rank 1 it runs."""
    thorough = tmp_path / "thorough"
    settings = (*WORLD, *SMALL, "loss=rlhf", "optimizer=exact")
    best = train(composed(*settings, "constraint=lora_r1", "optimizer.starts=40"), thorough)["metrics"]["objective/J"]
    poor = ("optimizer.starts=1", "optimizer.steps=1")
    for rank in (2, 1):
        folder = tmp_path / f"r{rank}"
        folder.mkdir()
        shutil.copy(thorough / "solution.safetensors", folder / "starts.safetensors")
        found = train(composed(*settings, f"constraint=lora_r{rank}", *poor), folder)
        if rank == 2:
            assert found["metrics"]["objective/J"] >= best - 1e-9
        thorough = folder


@pytest.mark.parametrize(("attained", "again"), [(0.6, True), (0.5, False), (0.4, False)])
def test_rlhf_searches_again_whatever_its_starts_found_where_another_loss_attains_more(attained, again, tmp_path):
    rlhf, dpo = searched(tmp_path, "rlhf", hits=0.9), searched(tmp_path, "dpo", attained, hits=0.9)
    assert both_rounds(rlhf, dpo) == ([], [rlhf] if again else [])


def test_runs_that_search_again_elsewhere_are_under_way_and_not_done(tmp_path):
    """As SLURM without waiting: jobs are submitted, and have no outcome yet."""

    class Submits:
        def carry_out(self, tasks, jobs):
            return []

    rlhf, dpo = searched(tmp_path, "rlhf"), searched(tmp_path, "dpo")
    outcomes = [Outcome(task, "done before", 0) for task in (rlhf, dpo)]
    assert [one.task for one in launch._polished(outcomes, Submits(), rlhf=False)] == [rlhf]


def test_rlhf_of_another_beta_is_no_ceiling(tmp_path):
    rlhf, dpo = searched(tmp_path, "rlhf", hits=0.9), searched(tmp_path, "dpo", 0.6, hits=0.9)
    rlhf.composed["loss"]["beta"] *= 2
    assert both_rounds(rlhf, dpo) == ([], [])
