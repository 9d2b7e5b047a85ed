"""Unions of grids: what is run, what the command line narrows, and that Hydra's own sweeps are as they were."""

from __future__ import annotations

import itertools

import forking
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra_plugins.cdpo_grids import Grids, axes, check, lost, narrowed


def parsed(*overrides: str):
    return OverridesParser.create().parse_overrides(list(overrides))


def test_axes_are_keys_with_their_values_and_the_last_override_of_a_key_counts():
    found = axes(parsed("loss=dpo,ipo", "seed=0", "loss=rlhf", "constraint=[a,b]"))
    assert found == {
        "loss": {"rlhf": "loss=rlhf"},
        "seed": {"0.0": "seed=0"},
        "constraint": {"[a,b]": "constraint=[a,b]"},
    }
    with pytest.raises(HydraException, match="only lists"):
        axes(parsed("beta=interval(0,1)"))
    assert axes(parsed("seed=0,0.0,2,+0")) == {"seed": {"0.0": "seed=0", "2.0": "seed=2"}}


def jobs(base, grid):
    """The values of every job, in the order of the axes."""
    return [list(job) for job in itertools.product(*(axis.values() for axis in narrowed(base, grid).values()))]


def test_a_grid_is_the_product_of_its_axes_with_the_common_ones():
    base, grid = axes(parsed("seed=0,1", "loss=dpo,rlhf")), axes(parsed("constraint=a,b"))
    expected = [[f"seed={s}", f"loss={loss}", f"constraint={c}"] for s, loss, c in itertools.product(
        (0, 1), ("dpo", "rlhf"), "ab")]  # fmt: skip
    assert jobs(base, grid) == expected


def test_where_both_have_a_key_the_common_values_are_run():
    base = axes(parsed("seed=0", "loss=dpo,rlhf", "constraint=b,c"))
    assert jobs(base, axes(parsed("constraint=a,b"))) == [["seed=0", "loss=dpo", "constraint=b"],
                                                          ["seed=0", "loss=rlhf", "constraint=b"]]  # fmt: skip
    assert jobs(base, axes(parsed("loss=rlhf", "constraint=a,c"))) == [["seed=0", "loss=rlhf", "constraint=c"]]
    assert jobs(base, axes(parsed("constraint=a"))) == []


def test_the_same_number_is_the_same_value_however_it_is_written():
    grid = axes(parsed("optimizer.learning_rate=2,8", "+x=a"))
    for written in ("2.0", "2e0", "+2"):
        base = axes(parsed(f"++optimizer.learning_rate={written}", "x='a'"))
        assert jobs(base, grid) == [["optimizer.learning_rate=2", "+x=a"]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["loss=ipo,dpo,sft"], "has loss=sft; there are loss=dpo, loss=ipo, loss=rlhf$"),
        (["restart=0,1,7"], None),  # the second grid takes what it is given
        (["loss=rlhf", "restart=7"], None),
        (["loss=dpo", "restart=7"], "has loss=dpo together with restart=7$"),
        (["loss=dpo,rlhf", "restart=7"], "has loss=dpo together with restart=7$"),
        (["experiment=a", "seed=0,1", "restart=7,8", "loss=dpo"], "has restart=7 together with loss=dpo$"),
        (["experiment=a", "loss=sft"], "has loss=sft; there are loss=dpo, loss=ipo, loss=rlhf$"),
    ],
)
def test_no_value_of_the_command_line_is_dropped_silently(given, message):
    grids = [axes(parsed("loss=dpo,ipo", "restart=0,1")), axes(parsed("loss=rlhf"))]
    if message is None:
        check(axes(parsed(*given)), grids)
        return
    with pytest.raises(HydraException, match=message):
        check(axes(parsed(*given)), grids)


def test_the_keys_that_leave_no_grid_are_named():
    grids = [axes(parsed("constraint=none", "optimizer=adamw")), axes(parsed("constraint=l2_ball", "optimizer=sgd"))]
    given = axes(parsed("experiment=a", "constraint=none", "optimizer=sgd", "seed=0"))
    with pytest.raises(HydraException, match="has constraint=none together with optimizer=sgd"):
        check(given, grids)


def test_a_value_that_one_grid_lacks_is_named():
    grids = [axes(parsed("loss=dpo,ipo", "restart=0,1")), axes(parsed("loss=rlhf"))]
    given = axes(parsed("experiment=a", "loss=ipo,rlhf", "restart=0,5"))
    assert [lost(given, grid) for grid in grids] == [["loss=rlhf", "restart=5"], ["loss=ipo"]]


def test_legality_is_checked_until_every_override_was_in_a_job(monkeypatch):
    checked = []
    monkeypatch.setattr(
        "hydra.plugins.sweeper.Sweeper.validate_batch_is_legal", lambda self, jobs: checked.extend(jobs)
    )
    jobs = [[f"a={a}", f"b={b}", f"c={c}"] for a, b, c in itertools.product(range(5), range(4), range(3))]
    object.__new__(Grids).validate_batch_is_legal(jobs)  # without __init__: Hydra reloads the modules of its plugins
    assert {override for job in checked for override in job} == {override for job in jobs for override in job}
    assert len(checked) <= 5 + 4 + 3


def run(*arguments: str):
    return forking.run("-m", "cdpo.train", *arguments)


@pytest.mark.slow
def test_an_experiment_narrowed_on_the_command_line_runs_what_is_left(tmp_path):
    base = ("experiment=constraint_gap", f"output_root={tmp_path}", "optimizer.steps=5", "seed=0")
    done = run(*base, "loss=rlhf,dpo", "constraint=none,l2_to_start")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "constraint_gap").iterdir() if path.name.startswith("bandit"))
    kinds = sorted(name.split("-")[2] + " " + name.split("-")[3] for name in names)
    assert kinds == ["dpo l2_to_start", "dpo none", *["rlhf l2_to_start"] * 7, "rlhf none"]
    lines = done.stderr.splitlines()
    at = lines.index("the command line leaves 3 of the experiment's 9 grids")
    assert lines[at + 1 : at + 4] == [
        "grid 1 runs without constraint=l2_to_start",
        "grid 6 runs without constraint=none",
        "grid 7 runs without loss=dpo, constraint=none",
    ]
    for options, nothing in ((base, "loss=glob(zzz*)"), (base[1:2], "seed=range(3,3)")):
        refused = run("-m", *options, nothing)
        assert refused.returncode == 2
        assert f"{nothing}: no value matches" in refused.stderr
    refused = run(*base, "constraint=none,dropout")
    assert refused.returncode == 2
    assert "no grid of this experiment has constraint=dropout; there are constraint=none, " in refused.stderr
    refused = run("experiment=rank_sweep", "constraint=none", f"output_root={tmp_path}")
    assert refused.returncode == 2
    assert "constraint.lora_r8.rank is set, but constraint=lora_r8 is not chosen" in refused.stderr
    config = tmp_path / "experiment" / "mine.yaml"
    config.parent.mkdir()
    config.write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {grids: [{beta: '${seed}', loss: 'dpo,ipo'}]}}\n"
    )
    refused = run("--config-dir", str(tmp_path), "experiment=mine", f"output_root={tmp_path}")
    assert refused.returncode == 2
    assert "beta=${seed} is an interpolation; write its value out" in refused.stderr


def test_the_command_of_a_run_in_a_sweep_finds_its_directory_again(tmp_path):
    base = ("experiment=constraint_gap", f"output_root={tmp_path}", "optimizer.steps=5")
    assert run(*base, "loss=dpo", "constraint=lora_r1", "seed=1", "restart=1").returncode == 0
    (folder,) = (tmp_path / "constraint_gap").glob("bandit-*")
    words = (folder / "command.txt").read_text().split()
    assert words[:2] == ["cdpo-train", "-m"]
    again = run(*words[1:])
    assert again.returncode == 0
    assert "done before" in again.stdout
    assert [path.name for path in (tmp_path / "constraint_gap").glob("bandit-*")] == [folder.name]
