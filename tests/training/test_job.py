"""One run from config to summary: exact resume, exact gradients, honest ends. Runs are small and real."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from composing import NEEDS, composed, train
from safetensors.torch import load_file

from cdpo.config import build as config
from cdpo.errors import ConfigError, DataError, NumericsError, Preempted
from cdpo.model.head import linear_head
from cdpo.model.layers import decoder_layers
from cdpo.system import checkpoint
from cdpo.training import job, loop

CONSTRAINTS = sorted(path.stem for path in (config.CONF / "constraint").glob("*.yaml"))
TIMES = {"tokens_per_second", "pairs_per_second"}
SMALL = ["logger=none", "model.hidden_size=16", "model.heads=2", "trainer.eval_every=4", "dataset.prompts=5",
         "dataset.alphabet=4", "trainer.batch_size=2", "trainer.max_steps=8", "trainer.checkpoint_every=3"]  # fmt: skip


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(folder / "model" / name for name in names if (folder / "model" / name).exists()))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop see a signal once it has done `step` steps."""
    real = loop.take_step

    def stepping(run):
        real(run)
        if run.state.step == step:
            run.session.signals.request("SIGTERM")

    monkeypatch.setattr(loop, "take_step", stepping)


def overrides_for(constraint: str, gpt2: Path) -> list[str]:
    if constraint == "bias_only":  # needs a model with biases
        return [
            "model=hf",
            f"model.name_or_path={gpt2}",
            "optimizer.learning_rate=1e-3",
            *(s for s in SMALL if "model." not in s),
        ]
    return [*SMALL]


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a byte-level tokenizer, in a folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from cdpo.data.rows import Data, Ledger
    from cdpo.model.tiny import Tiny

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(folder)
    Tiny().tokenizer(Data([], [], Ledger())).save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw", "lbfgs"])
def test_every_optimizer_resumes_exactly(optimizer, tmp_path, monkeypatch):
    settings = composed(*SMALL, "trainer.batch_size=null", f"optimizer={optimizer}", "optimizer.schedule=cosine",
                        "optimizer.warmup_steps=2", "loss=bco")  # fmt: skip
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


def test_kill_9_at_random_moments_then_the_same_command(tmp_path):
    """Three kills at different moments; the final weights and the metrics are those of an undisturbed run."""
    command = [sys.executable, "-m", "cdpo.train", *SMALL, "trainer.max_steps=400", "constraint=[lora_r4,dropout]",
               "trainer.checkpoint_every=20", f"output_root={tmp_path}"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "name=whole"], check=True, env=environment, capture_output=True)
    folder = tmp_path / "parts"
    for kill_after in (30, 110, 250):
        process = subprocess.Popen([*command, "name=parts"], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while (
            not (folder / "metrics.jsonl").exists()
            or len((folder / "metrics.jsonl").read_bytes().splitlines()) < kill_after
        ):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = checkpoint.newest(folder / "checkpoints")
    assert last is not None
    assert 100 <= last[0] < 400
    subprocess.run([*command, "name=parts"], check=True, env=environment, capture_output=True)
    assert same(weights(tmp_path / "whole"), weights(folder))
    assert timeless(tmp_path / "whole") == timeless(folder)


def gradient_of(settings: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The gradient of the first step, as the engine makes it."""
    found = []

    def first(run):
        loop.gradient(run)
        found.append(torch.cat([p.grad.flatten() for p in run.parameters]).clone())
        raise Preempted("enough")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", first)
        with pytest.raises(Preempted):
            train(settings, folder)
    return found[0]


@pytest.mark.parametrize("loss", ["gaussian", "sft", "bco", "wpo"])
def test_gradient_does_not_depend_on_micro_batches(loss, tmp_path, monkeypatch):
    """Uneven Items: pairs and tokens per Item differ, so means of means would show."""
    base = [*SMALL, "dataset.preferences=sampled", "dataset.pairs=17", "trainer.batch_size=null", "model.dtype=float64",
            "dataset.length=2", "dataset.alphabet=3", f"loss={loss}", "constraint=kl_budget",
            "trainer.max_grad_norm=null"]  # fmt: skip
    one = gradient_of(composed(*base, "trainer.tokens_per_micro_batch=100000"), tmp_path / "one", monkeypatch)
    for budget in (1, 30, 45):
        many = gradient_of(
            composed(*base, f"trainer.tokens_per_micro_batch={budget}"), tmp_path / f"{budget}", monkeypatch
        )
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-9)  # Llama's norms are float32 inside


def test_dpo_and_gaussian_train_alike(tmp_path):
    for loss in ("dpo", "gaussian"):
        train(composed(*SMALL, f"loss={loss}", "loss.beta=0.3"), tmp_path / loss)
    dpo, gaussian = weights(tmp_path / "dpo"), weights(tmp_path / "gaussian")
    assert all(torch.allclose(dpo[name], gaussian[name], atol=1e-6) for name in dpo)


@pytest.mark.parametrize("loss", ["dpo", "gaussian"])
def test_unconstrained_minimum_is_the_optimal_policy(loss, tmp_path):
    """theory.md section 2: on the exact bandit pi* is proportional to pi_ref exp(r / beta), here by NumPy."""
    settings = composed("model=tabular", f"loss={loss}", "loss.beta=1.0", "optimizer=lbfgs", "trainer.batch_size=null",
                        "trainer.max_steps=60", "trainer.max_grad_norm=null", "logger=none", "dataset.prompts=4",
                        "dataset.alphabet=5")  # fmt: skip
    train(settings, tmp_path / "run")
    data = config.build(settings).dataset.load(0)
    table = weights(tmp_path / "run")["table.weight"].numpy()
    for x, row in enumerate(data.train):
        wanted = np.array(data.table[5 + x]) + np.array(row.rewards)
        found = table[5 + x]
        np.testing.assert_allclose(found - found.mean(), wanted - wanted.mean(), atol=5e-6)


@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "unused weight"])
def test_nan_stops_the_run_before_the_optimizer_steps(where, tmp_path, monkeypatch):
    settings = composed(*SMALL)
    real = loop.gradient

    def poisoned(run, first):
        if run.state.step == 5:
            if where == "weight":
                run.parameters[-1].data.fill_(math.nan)
            elif where == "unused weight":  # the embedding of a token that no row holds
                run.parameters[0].data.view(-1)[0] = math.nan
            elif where == "gradient":
                run.parameters[0].register_hook(lambda gradient: gradient * math.inf)
            else:
                object.__setattr__(run.loss, "beta", math.nan)
        return real(run, first)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradient", poisoned)
        with pytest.raises(NumericsError, match=r"bandit:\d|weights are not finite") as error:
            train(settings, tmp_path / "run")
    assert error.value.exit_code == 4
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] == 3
    train(settings, tmp_path / "run")  # the checkpoint is good: the same command finishes
    train(settings, tmp_path / "undisturbed")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))


def test_a_learning_rate_of_1e20_ends_with_exit_code_4(tmp_path):
    with pytest.raises(NumericsError):
        train(composed(*SMALL, "optimizer.learning_rate=1e20"), tmp_path / "run")


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    settings = composed(*SMALL)
    first = train(settings, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop, "take_step", lambda run: pytest.fail("trained again"))
    assert train(settings, tmp_path / "run") == json.loads(json.dumps(first))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_changed_trajectory_key_is_refused_and_a_free_one_is_not(tmp_path, monkeypatch):
    settings = composed(*SMALL)
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"loss\.beta=0\.1, now it is 0\.2"):
        train(composed(*SMALL, "loss.beta=0.2"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"constraint=\[\], now it is \['l2_ball'\]"):
        train(composed(*SMALL, "constraint=l2_ball"), tmp_path / "run")
    train(composed(*SMALL, "trainer.checkpoint_every=2"), tmp_path / "run")


def test_changed_data_is_refused_on_resume(tmp_path, monkeypatch):
    world = {"prompts": ["x "], "responses": ["a", "b"], "rewards": [[1.0, 0.0]]}
    path = tmp_path / "world.json"
    path.write_text(json.dumps(world))
    settings = composed("logger=none", "model=tabular", f"dataset.path={path}", "trainer.max_steps=6")
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "run")
    path.write_text(json.dumps(world | {"rewards": [[1.0, 0.5]]}))
    with pytest.raises(ConfigError, match=r"world\.json changed"):
        train(settings, tmp_path / "run")
    (tmp_path / "run" / "inputs.json").unlink()  # the checkpoint knows its data by itself
    with pytest.raises(ConfigError, match="the data or its tokens"):
        train(settings, tmp_path / "run")


def test_a_first_attempt_that_was_refused_does_not_block_its_directory(tmp_path):
    """Neither a mended config nor mended data; an attempt with numbers does."""
    path, folder = tmp_path / "pairs.jsonl", tmp_path / "run"
    row = '{"prompt": "%d", "chosen": "b", "rejected": "c"}\n'
    path.write_text("".join(row % i for i in range(20)))
    base = [*(s for s in SMALL if not s.startswith("dataset.")), "dataset=jsonl", f"dataset.path={path}"]
    with pytest.raises(DataError, match="needs rewards"):
        train(composed(*base, "loss=rlhf"), folder)
    path.write_text(path.read_text() + row % 20)
    assert train(composed(*base, "loss=dpo"), folder)["state"] == "finished"
    assert json.loads((folder / "config.json").read_text())["loss"]["_target_"].endswith(".DPO")
    (folder / "status.json").write_text('{"state": "failed"}')
    with pytest.raises(ConfigError, match="holds a run with beta="):
        train(composed(*base, "loss=dpo", "beta=0.2"), folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds a run with beta="):  # it has checkpoints
        train(composed(*base, "loss=dpo", "beta=0.2"), folder)


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


def test_gradient_checkpointing_changes_no_number(tmp_path):
    for name, switch in (("plain", "false"), ("checkpointed", "true")):
        settings = composed(*SMALL, "constraint=lora_r4", f"trainer.gradient_checkpointing={switch}")
        train(settings, tmp_path / name)
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "checkpointed"))


def test_autocast_is_bfloat16_arithmetic_on_float32_weights(tmp_path):
    train(composed(*SMALL), tmp_path / "plain")
    train(composed(*SMALL, "trainer.autocast=true"), tmp_path / "autocast")
    plain, autocast = (rows(tmp_path / name)[-1]["eval/loss"] for name in ("plain", "autocast"))
    assert plain != autocast
    assert plain == pytest.approx(autocast, abs=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "autocast").values())


def test_compile_is_refused_where_there_are_no_layers(tmp_path):
    with pytest.raises(ConfigError, match=r"no decoder layers.*trainer\.compile"):
        train(composed("trainer.compile=true", "model=tabular", "loss=dpo"), tmp_path)


@pytest.mark.slow
def test_compile_gives_the_same_numbers_up_to_rounding(tmp_path, monkeypatch):
    """Layer by layer and the head lean; sampling compiles nothing, and nor does a step whose shapes are known."""
    counted, policies = [], []
    stats, step = torch._dynamo.utils.counters["stats"], loop.take_step

    def watched(run):
        step(run)
        policies.append(run.policy)
        counted.append(stats["unique_graphs"])

    monkeypatch.setattr(loop, "take_step", watched)
    settings = [*SMALL, "trainer.samples=2", "trainer.sample_tokens=8", "trainer.max_steps=6"]
    train(composed(*settings), tmp_path / "plain")
    assert set(counted) == {0}
    counted.clear()
    train(composed(*settings, "trainer.compile=true"), tmp_path / "compiled")
    assert 0 < counted[0] <= counted[2] == counted[-1]
    assert linear_head(policies[-1]) is not None
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(policies[-1]))
    plain, compiled = (
        [r["eval/loss"] for r in rows(tmp_path / name) if "eval/loss" in r] for name in ("plain", "compiled")
    )
    assert plain == pytest.approx(compiled, abs=1e-4)
    assert len(plain) == 3
    assert all("_orig_mod" not in name for name in weights(tmp_path / "compiled"))


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


def jsonl(path: Path, count: int, chosen: str = "yes") -> Path:
    rows = [{"prompt": f"question {i}", "chosen": f"{chosen} {i}", "rejected": "no"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


OWN = [s for s in SMALL if "dataset." not in s]


@pytest.mark.parametrize(("steps", "every"), [(1, 10), (3, 1)])
def test_destroyed_weights_are_never_saved_and_never_called_finished(steps, every, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", 4)
    settings = composed(*OWN, "dataset=jsonl", f"dataset.path={path}", "dataset.eval_size=0", "optimizer=sgd",
                        "optimizer.learning_rate=1e38", "trainer.max_grad_norm=null", "trainer.log_every=10",
                        f"trainer.max_steps={steps}", f"trainer.checkpoint_every={every}")  # fmt: skip
    with pytest.raises(NumericsError, match="not finite and not saved"):
        train(settings, tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None
    assert not (tmp_path / "run" / "model").exists()


def test_files_edited_after_the_run_are_named(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", 6)
    settings = composed(*OWN, "dataset=jsonl", f"dataset.path={path}", "dataset.eval_size=0")
    train(settings, tmp_path / "run")
    train(settings, tmp_path / "run")
    jsonl(path, 6, chosen="well")
    with pytest.raises(ConfigError, match=r"rows\.jsonl changed"):
        train(settings, tmp_path / "run")


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


def test_a_run_that_failed_before_its_first_number_may_start_from_another_model(tmp_path, monkeypatch):
    """Nothing of the first attempt is taken over, its reference least of all."""
    settings = [*SMALL, "constraint=lora_r2"]

    def fails(run):
        raise RuntimeError("before any step")

    with monkeypatch.context() as patched:
        patched.setattr(job, "fit", fails)
        with pytest.raises(RuntimeError):
            train(composed(*settings), tmp_path / "run")
    assert (tmp_path / "run" / "reference.safetensors").is_file()
    train(composed(*settings, "model.init_seed=1"), tmp_path / "run")
    train(composed(*settings, "model.init_seed=1"), tmp_path / "other")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "other")


def test_a_log_prob_that_is_not_finite_stops_the_run_though_the_loss_is_finite(tmp_path, monkeypatch):
    """A rejected response that became impossible: the hinge is 0 there, and so is its gradient."""
    real = loop.score_batch

    def poisoned(run, batch, first):
        sums, statistics = real(run, batch, first)
        if run.state.step == 5:
            sums = sums.index_fill(0, batch.pairs[:1, 1], -math.inf)
        return sums, statistics

    monkeypatch.setattr(loop, "score_batch", poisoned)
    hard = ["loss=hinge", "dataset.preferences=sampled", "dataset.pairs=40"]
    with pytest.raises(NumericsError, match="step 5"):
        train(composed(*SMALL, *hard), tmp_path / "run")


def test_a_run_trains_all_of_its_model(tmp_path, monkeypatch):
    """peft leaves the root of a model that was in eval mode in training mode, and what is below it not."""
    modes, real, fit = [], loop.gradient, loop.fit

    def gradient(run, first):
        modes.append({part.training for part in run.policy.modules()})
        return real(run, first)

    def fitting(run):
        run.policy.eval()
        run.policy.training, run.state.looked = True, 0  # as in a run that was evaluated before it was stopped
        return fit(run)

    monkeypatch.setattr(loop, "gradient", gradient)
    monkeypatch.setattr(job, "fit", fitting)
    train(composed(*SMALL, "constraint=lora_r2", "trainer.max_steps=2"), tmp_path / "run")
    assert modes == [{True}, {True}]
