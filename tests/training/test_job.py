"""One run from config to summary: what is written, logged, sampled and exported. Runs are small and real."""

from __future__ import annotations

import json
import math

import pytest
from composing import composed, train
from run_files import rows
from small_runs import OWN, SMALL, jsonl

from cdpo.errors import ConfigError
from cdpo.system.logger import NoLogger


def test_a_constraint_that_stops_training_is_told_in_the_summary(tmp_path):
    summary = train(composed(*SMALL, "constraint=early_stop", "constraint.early_stop.step=5"), tmp_path / "run")
    assert (summary["state"], summary["step"]) == ("stopped_early", 5)
    assert "5" in summary["stopped"]
    assert rows(tmp_path / "run")[-1]["step"] == 5
    assert "eval/loss" in rows(tmp_path / "run")[-1]


def test_step_rows_come_once_and_have_the_promised_names(tmp_path):
    train(composed(*SMALL), tmp_path / "run")
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    promised = """loss grad_norm learning_rate epoch num_tokens logps/chosen logps/rejected logps_mean/chosen
        logps_mean/rejected rewards/chosen rewards/rejected rewards/margins rewards/accuracies logits/chosen
        logits/rejected entropy tokens_per_second pairs_per_second change/norm data/cut data/dropped kl/candidates"""
    assert set(promised.split()) <= steps[0].keys()
    assert steps[0]["rewards/accuracies"] == 0.5  # ties at the start count one half
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dropout_of_a_checkpoint_is_off_unless_it_is_the_constraint(gpt2, tmp_path):
    """GPT-2's config asks for dropout 0.1: without the constraint two forward passes in train mode must agree."""
    base = [
        *(s for s in SMALL if "model." not in s),
        "model=hf",
        f"model.name_or_path={gpt2}",
        "optimizer.learning_rate=1e-2",
    ]
    train(composed(*base), tmp_path / "plain")
    train(composed(*base, "seed=0", "constraint=dropout"), tmp_path / "dropout")
    first, second = (
        next(r for r in rows(tmp_path / n) if r["step"] == 1 and "loss" in r) for n in ("plain", "dropout")
    )
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert abs(second["rewards/margins"]) > 1e-4


def test_early_stopping_on_held_out_rows_needs_some(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"}) for i in range(4)))
    base = [s for s in SMALL if "dataset." not in s]
    settings = composed(
        *base, "dataset=jsonl", f"dataset.path={path}", "dataset.eval_size=0", "constraint=early_stop_metric"
    )
    with pytest.raises(ConfigError, match="no rows are held out"):
        train(settings, tmp_path / "run")


@pytest.mark.parametrize(
    ("loss", "scale"), [("dpo", 0.1), ("wpo", 0.1), ("dpo_sft", 0.1), ("ipo", 0.1), ("sft", 0.1), ("simpo", 2.0)]
)
def test_logged_rewards_are_beta_times_the_log_ratio(loss, scale, tmp_path):
    train(composed(*SMALL, f"loss={loss}", "trainer.batch_size=null"), tmp_path / "run")
    last = rows(tmp_path / "run")[-1]
    first = rows(tmp_path / "run")[0]
    moved = last["eval/logps/chosen"] - first["eval/logps/chosen"]
    assert last["eval/rewards/chosen"] == pytest.approx(scale * moved, rel=1e-5)


def test_cut_and_dropped_are_shares_of_rows(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", 10)
    settings = composed(*OWN, "dataset=jsonl", f"dataset.path={path}", "dataset.max_prompt_tokens=2",
                        "dataset.max_response_tokens=2", "dataset.eval_size=0")  # fmt: skip
    train(settings, tmp_path / "run")
    assert rows(tmp_path / "run")[0]["data/cut"] == 1.0  # of every row the prompt and both responses are cut
    assert rows(tmp_path / "run")[0]["data/dropped"] == 0.0


def test_pairs_that_are_never_sampled_do_no_harm(tmp_path):
    world = {"prompts": ["x ", "y "], "responses": ["a", "b"], "rewards": [[1.0, 0.0], [0.0, 1.0]],
             "reference_logits": [[0, -2000], [0, 0]]}  # fmt: skip
    (tmp_path / "world.json").write_text(json.dumps(world))
    path = f"dataset.path={tmp_path}/world.json"
    summary = train(
        composed("logger=none", "model=tabular", path, "trainer.batch_size=1", "trainer.max_steps=4"), tmp_path / "run"
    )
    assert summary["state"] == "finished"


def test_training_16_bit_weights_is_warned_about(tmp_path, caplog):
    train(composed(*SMALL, "model.dtype=bfloat16"), tmp_path / "whole")
    assert "weights in 16 bits" in caplog.text
    caplog.clear()
    train(composed(*SMALL, "model.dtype=bfloat16", "constraint=lora_r2"), tmp_path / "lora")
    assert "weights in 16 bits" not in caplog.text  # the factors are float32


def test_an_adapter_names_a_local_base_by_absolute_path(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(gpt2.parent)
    train(
        composed(*OWN[:1], *OWN[3:], "model=hf", f"model.name_or_path={gpt2.name}", "constraint=lora_r2"),
        tmp_path / "run",
    )
    config_ = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config_["base_model_name_or_path"] == str(gpt2.resolve())


def test_no_secret_reaches_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "abcd1234secret")
    settings = composed(*SMALL, "logger=wandb", "logger.mode=offline", "logger.tags=[abcd1234secret]")
    train(settings, tmp_path / "run", command="cdpo-train logger.tags=[abcd1234secret]")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if b"abcd1234secret" in path.read_bytes()]


@pytest.mark.parametrize("fault", [None, RuntimeError("on purpose")])
def test_a_run_has_not_ended_before_its_copy_has(tmp_path, monkeypatch, fault):
    """A run that is killed while the copy ends goes on; one whose logger fails has failed."""
    seen = []

    def finish(self, code):
        seen.append((json.loads((tmp_path / "run/status.json").read_text())["state"], code))
        if fault:
            raise fault

    monkeypatch.setattr(NoLogger, "finish", finish)
    settings = composed(*SMALL)
    if fault:
        with pytest.raises(RuntimeError, match="on purpose"):
            train(settings, tmp_path / "run")
    else:
        train(settings, tmp_path / "run")
    assert seen == [("running", 0)]
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == ("failed" if fault else "finished")
