"""Two ranks on the CPU, started by torchrun: the numbers of one process, exact resume, honest ends. No mocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composing import composed, train
from ranked import by_torchrun, together
from run_files import weights
from safetensors.torch import load_file

from cdpo.data.packing import Plan
from cdpo.errors import ConfigError

# 17 pairs over 5 prompts: Items with 1 to 6 pairs; batches of 3 and then 2 leave the ranks uneven shares
UNEVEN = ["logger=none", "dataset.prompts=5", "dataset.alphabet=4", "dataset.preferences=sampled", "dataset.pairs=17",
          "trainer.batch_size=3", "trainer.max_steps=8", "trainer.eval_every=4", "trainer.checkpoint_every=3",
          "trainer.max_grad_norm=1.0"]  # fmt: skip
TINY = [*UNEVEN, "model.hidden_size=16", "model.heads=2", "model.dtype=float64"]
RUNS = {
    "tabular": [*UNEVEN, "model=tabular"],
    "lbfgs": [*UNEVEN, "model=tabular", "optimizer=lbfgs", "trainer.batch_size=null", "trainer.max_steps=3"],
    "one_item_a_step": [*UNEVEN, "model=tabular", "trainer.batch_size=1"],  # rank 1 never has a micro-batch
    "tiny": [*TINY, "trainer.tokens_per_micro_batch=12"],  # several micro-batches per rank
    "lora": [*TINY, "constraint=lora_r4", "loss=bco"],
    "few_seen": [*TINY, "dataset.prompts=40", "trainer.max_steps=2", "trainer.certificate_items=2"],
    "l2_ball": [*TINY, "constraint=[l2_ball,weight_decay]", "constraint.l2_ball.radius=0.01", "optimizer=sgd"],
    "frank_wolfe": [*TINY, "constraint=l2_ball", "constraint.l2_ball.radius=0.1", "optimizer=frank_wolfe",
                    "trainer.batch_size=null", "trainer.max_grad_norm=null"],
    "moving": [*TINY, "loss=kto", "trainer.sync_reference=3", "trainer.sync_mixture=0.6"],
    "early_stop": [*UNEVEN, "model=tabular", "constraint=[early_stop_kl,kl_budget]",
                   "constraint.early_stop_kl.kl=0.02", "optimizer.learning_rate=0.1"],
}  # fmt: skip
CLOCK = {"tokens_per_second", "pairs_per_second"}


def run_of(name: str, how: str = "none", *more: str) -> dict:
    return composed(*RUNS[name], *more, f"trainer.distributed={how}")


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def uncertified(row: dict) -> set[str]:
    """Names of metrics but for certificates, of which sharded weights have none."""
    return {name for name in row if not name.startswith("certificate/")}


def equal_numbers(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < tolerance
    assert [uncertified(row) for row in rows(one)] == [uncertified(row) for row in rows(other)]
    for ours, theirs in zip(rows(one), rows(other)):
        for name in ours.keys() & theirs.keys():
            value = ours[name]
            assert theirs[name] == pytest.approx(value, rel=10 * tolerance, abs=10 * tolerance), name


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def ending(folder: Path, rank: int) -> str:
    return json.loads(Path(f"{folder}.rank{rank}.json").read_text())["ending"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs of two ranks with ddp, in one pair of processes, for each start takes seconds."""
    root = tmp_path_factory.mktemp("ddp")
    jobs = [{"config": run_of(name, "ddp"), "folder": str(root / name)} for name in RUNS]
    noisy = composed(*TINY, "constraint=[lora_r4,dropout]", "trainer.distributed=ddp")
    jobs += [
        {"config": noisy, "folder": str(root / "whole")},
        {"config": noisy, "folder": str(root / "parts"), "rank": 1, "step": 5, "fault": "SIGTERM"},
        {"config": noisy, "folder": str(root / "parts")},
        {"config": run_of("tiny", "ddp"), "folder": str(root / "error"), "rank": 1, "step": 5, "fault": "raise"},
        {"config": run_of("tiny", "ddp"), "folder": str(root / "fewer"), "rank": 1, "step": 5, "fault": "SIGUSR1"},
        {"config": run_of("tiny"), "folder": str(root / "unasked")},
        {"config": run_of("tiny", "ddp", f"cache_dir={root / 'cache'}"), "folder": str(root / "computes")},
        {"config": run_of("tiny", "ddp", f"cache_dir={root / 'cache'}", "beta=0.2"), "folder": str(root / "reads")},
    ]
    (root / "text").write_text(together(jobs, root))
    return root


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process(name, ddp, tmp_path):
    train(run_of(name), tmp_path / "one")
    equal_numbers(tmp_path / "one", ddp / name)
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "one", ddp / name))
    assert [one[key] for key in ("state", "stopped", "step")] == [two[key] for key in ("state", "stopped", "step")]
    assert one["state"] == ("stopped_early" if name == "early_stop" else "finished")
    if name == "l2_ball":
        assert one["constraint"]["l2_ball"]["steps_projected"] == two["constraint"]["l2_ball"]["steps_projected"] > 0


def test_evaluation_and_reference_are_those_of_one_process_bit_for_bit(ddp, tmp_path):
    train(run_of("tiny"), tmp_path / "one")
    assert rows(tmp_path / "one")[0] == rows(ddp / "tiny")[0]  # at step 0, before the order of sums can differ
    one, two = (load_file(folder / "reference.safetensors")["values"] for folder in (tmp_path / "one", ddp / "tiny"))
    assert torch.equal(one, two)


def test_the_reference_of_two_ranks_is_shared_with_other_runs(ddp, tmp_path):
    sources = [json.loads((ddp / name / "summary.json").read_text())["reference"] for name in ("computes", "reads")]
    assert sources == ["computed", "cache"]
    summary = train(run_of("tiny", "none", f"cache_dir={ddp / 'cache'}"), tmp_path / "one")
    assert summary["reference"] == "cache"
    equal_numbers(tmp_path / "one", ddp / "computes")


def test_a_signal_on_rank_1_stops_both_at_the_same_step_and_the_rest_is_exact(ddp):
    assert ending(ddp / "parts", 0) == ending(ddp / "parts", 1)
    assert ending(ddp / "parts", 0).startswith("Preempted: SIGTERM after step 5")
    assert rows(ddp / "whole") == rows(ddp / "parts")
    one, two = weights(ddp / "whole"), weights(ddp / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_error_on_rank_1_ends_both_and_is_told(ddp):
    for rank in (0, 1):
        assert ending(ddp / "error", rank).startswith("RuntimeError: rank 1: on purpose")
    assert status(ddp / "error")["state"] == "failed"
    assert "rank 1: on purpose" in status(ddp / "error")["cause"]


def test_a_run_of_two_ranks_goes_on_in_one_process(ddp, tmp_path, caplog):
    assert status(ddp / "fewer")["state"] == "preempted"
    train(run_of("tiny"), ddp / "fewer")
    assert "ranks changed since the last attempt" in caplog.text
    train(run_of("tiny"), tmp_path / "one")
    equal_numbers(tmp_path / "one", ddp / "fewer")


def test_several_ranks_without_being_asked_for_are_refused(ddp):
    for rank in (0, 1):
        assert ending(ddp / "unasked", rank).startswith("ConfigError: 2 ranks were started")
    assert not (ddp / "unasked").exists()


def test_only_rank_0_talks(ddp):
    text = (ddp / "text").read_text()
    assert text.count("tiny 8/8") == 1
    assert not (ddp / "tiny" / "nonfinite.json").exists()


def test_ddp_with_one_process_equals_none(tmp_path):
    for how in ("none", "ddp"):
        train(run_of("tabular", how), tmp_path / how)
    assert rows(tmp_path / "none") == rows(tmp_path / "ddp")


def test_shares_hold_every_item_once_and_one_rank_has_the_step_itself():
    plan = Plan([5, 9, 1, 7, 3, 8, 2], batch_size=5, steps=4, seed=3, micro_batch=10)
    for step in range(4):
        assert plan.shares(step, 1) == [plan[step]]
        for ranks in (2, 3, 8):
            shares = plan.shares(step, ranks)
            assert len(shares) == ranks
            assert sorted(i for share in shares for batch in share for i in batch) == sorted(plan.step_items(step))
            loads = [sum(plan.sizes[i] for batch in share for i in batch) for share in shares]
            assert max(loads) - min(loads) <= max(plan.sizes)


@pytest.mark.parametrize(("choice", "reason"), [
    (["model=tabular"], "model=tabular"), (["optimizer=lbfgs", "trainer.batch_size=null"], "lbfgs"),
    (["constraint=sparse_topk"], "one tensor"), (["constraint=lora_r4", "constraint.lora_r4.dora=true"], "DoRA"),
    (["trainer.samples=1"], r"trainer\.samples"), (["trainer.compile=true"], r"trainer\.compile"),
])  # fmt: skip
def test_what_shards_cannot_do_is_refused_before_anything_is_loaded(choice, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        train(composed(*choice, "trainer.distributed=fsdp"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def started(folder: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """The command of the README."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "cdpo.train", *overrides, f"output_root={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
@pytest.mark.flaky(reruns=1)
def test_the_command_line_of_two_ranks(tmp_path):
    done = started(tmp_path, *RUNS["tabular"], "trainer.distributed=ddp", "name=run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("objective/attained") == 1
    refused = started(tmp_path, *RUNS["tabular"], "name=other")
    assert refused.returncode == 1
    assert refused.stderr.count("cdpo-train: 2 ranks were started") == 1
    swept = started(tmp_path, "-m", "seed=0,1", "trainer.distributed=ddp")
    assert "a sweep is started by one process" in swept.stderr


@pytest.mark.slow
@pytest.mark.flaky(reruns=1)
def test_a_rank_that_is_killed_ends_the_other_and_is_told(tmp_path):
    config = run_of("tiny", "ddp")
    code, _ = by_torchrun(
        [{"config": config, "folder": str(tmp_path / "r"), "rank": 1, "step": 5, "fault": "SIGKILL"}], tmp_path
    )
    assert code == 1
    assert status(tmp_path / "r")["state"] == "interrupted"
    assert "another rank is gone" in status(tmp_path / "r")["cause"]
    code, text = by_torchrun([{"config": config, "folder": str(tmp_path / "r")}], tmp_path)
    assert code == 0, text
    train(run_of("tiny"), tmp_path / "one")
    equal_numbers(tmp_path / "one", tmp_path / "r")


SHARDED = {
    "tiny": TINY,
    "several": [*TINY, "trainer.tokens_per_micro_batch=12", "trainer.gradient_checkpointing=true"],
    "one_item_a_step": [*TINY, "trainer.batch_size=1"],
    "lora": [*TINY, "constraint=lora_r4"],
    "moving": [*TINY, "loss=kto", "trainer.sync_reference=3", "trainer.sync_mixture=0.6"],
    "moving_lora": [*TINY, "loss=dpo", "trainer.sync_reference=3", "constraint=lora_r4"],
    "constraints": [*TINY, "constraint=[l2_ball,linf_ball,l2_to_start,weight_decay,kl_budget,freeze_embeddings]",
                    "constraint.l2_ball.radius=0.01", "constraint.linf_ball.radius=0.001", "optimizer=sgd"],
}  # fmt: skip


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    config = {name: composed(*options, "trainer.distributed=fsdp") for name, options in SHARDED.items()}
    jobs = [{"config": config[name], "folder": str(root / name)} for name in SHARDED]
    jobs += [
        {"config": config["several"], "folder": str(root / "parts"), "rank": 1, "step": 5, "fault": "SIGTERM"},
        {"config": config["several"], "folder": str(root / "parts")},
    ]
    together(jobs, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_shards_equal_one_process(name, fsdp, tmp_path):
    train(composed(*SHARDED[name]), tmp_path / "one")
    equal_numbers(tmp_path / "one", fsdp / name)


@pytest.mark.slow
def test_shards_resume_exactly(fsdp):
    assert ending(fsdp / "parts", 0) == ending(fsdp / "parts", 1)
    assert rows(fsdp / "several") == rows(fsdp / "parts")
    one, two = weights(fsdp / "several"), weights(fsdp / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.flaky(reruns=1)
def test_an_error_in_a_sharded_rank_ends_the_other(tmp_path):
    config = composed(*TINY, "trainer.distributed=fsdp")
    job_ = {"config": config, "folder": str(tmp_path / "r"), "rank": 1, "step": 5, "fault": "raise"}
    by_torchrun([job_], tmp_path)
    assert ending(tmp_path / "r", 1).startswith("RuntimeError: on purpose")
    assert "another rank is gone" in status(tmp_path / "r")["cause"]
