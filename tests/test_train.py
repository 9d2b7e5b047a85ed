"""The command line as a user meets it: exit codes, messages of a few lines, sweeps in which one run may fail."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from pathlib import Path

import forking
import pytest

from cdpo import train
from cdpo.config.build import CONF

QUICK = ["logger=none", "model=tabular", "trainer.max_steps=3", "dataset.prompts=3", "dataset.alphabet=3"]
WORLDS = ["seed=0,1", "dataset.world_seed=${seed}"]


@pytest.fixture
def cdpo_train(tmp_path, monkeypatch, capsys):
    """Run the console script's function; returns exit code and what went to stderr and stdout."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cdpo-train", *arguments, f"output_root={tmp_path}/out"])
        before = set(logging.getLogger().handlers)
        try:
            train.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        for handler in set(logging.getLogger().handlers) - before:
            logging.getLogger().removeHandler(
                handler
            )  # Hydra's: a directory that may be gone, a stream that is captured
        captured = capsys.readouterr()
        return code, captured.err + captured.out

    return run


@pytest.fixture
def sweep(tmp_path):
    """The same for several runs, which are processes of their own."""

    def run(*arguments: str) -> tuple[int, str]:
        done = forking.run("-m", "cdpo.train", "-m", *QUICK, *arguments, f"output_root={tmp_path}/out")
        return done.returncode, done.stderr + done.stdout

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["loss.betta=1"], 2, "unknown key loss.betta, did you mean beta?"),
        (["+loss.betta=1"], 2, "unknown key loss.betta, did you mean beta?"),
        (["++trainer.batchsize=1"], 2, "unknown key trainer.batchsize, did you mean batch_size?"),
        (["looss=dpo"], 2, "unknown key looss, did you mean loss?"),
        (["loss=dpoo"], 2, "loss=dpoo does not exist, did you mean dpo?"),
        (["constraint=lora_r9"], 2, "constraint=lora_r9 does not exist, did you mean lora_r8?"),
        (["constraint=[l2_ball,lora_r9]"], 2, "constraint=lora_r9 does not exist, did you mean lora_r8?"),
        (["constraint.lora_r8.rank=2"], 2, "but constraint=lora_r8 is not chosen: add constraint=lora_r8, or leave"),
        (["constraint.loora.rank=2"], 2, "no constraint is called loora, did you mean lora?; there are bias_only, "),
        (["constraint=lora"], 2, "constraint.lora.rank has no default: set constraint.lora.rank=..."),
        (["experiment=theorie"], 2, "experiment=theorie does not exist, did you mean theory?; there are ball_sweep, "),
        (["~model"], 2, "missing 1 required positional argument: 'model'"),
        (["optimizer.learning_rate=1e-4x"], 2, "optimizer.learning_rate='1e-4x'"),
        (["loss.beta=-1"], 2, "loss: beta=-1.0"),
        (["trainer.autocast=no"], 2, "autocast"),
        (["name=../../escape"], 2, "name='../../escape' must match"),
        (["dataset=jsonl"], 2, "dataset.path has no default: set dataset.path=..."),
        (["dataset=jsonl", "dataset.path=nowhere.jsonl"], 2, "nowhere.jsonl: no such file"),
        (["constraint=[lora_r4,lora_r8]"], 2, "lora_r4 with lora_r8"),
        (["constraint=[lora_r8,bias_only]"], 2, "lora_r8 with bias_only"),
        (["optimizer=lbfgs", "constraint=l2_ball"], 2, "l2_ball with optimizer=lbfgs"),
        (["optimizer=lbfgs", "trainer.batch_size=2"], 2, "=lbfgs needs the full batch: set trainer.batch_size=null"),
        (["optimizer=exact", "trainer.max_steps=1", "trainer.batch_size=2"], 2, "optimizer=exact needs the full batch"),
        (["optimizer=lbfgs", "trainer.batch_size=null", "loss=wpo"], 2, "loss WPO with optimizer=lbfgs: a part of it"),
        (["optimizer=lbfgs", "trainer.batch_size=null", "loss=bco"], 2, "loss BCO with optimizer=lbfgs: a part of it"),
        (["optimizer=lbfgs", "loss=gaussian_annealed"], 2, "it changes from step to step"),
        (["loss.power=0.5"], 2, "power"),
        (["loss=wpo_candidates", "dataset.sampling=uniform"], 2, "the pairs are drawn uniform: set loss.drawn=uniform"),
        (["loss=wpo_candidates", "model=tiny"], 2, "not this model: set loss.drawn=uniform dataset.sampling=uniform"),
        (["loss=wpo_candidates", "loss.drawn=uniform"], 2, "the pairs are drawn reference: set loss.drawn=reference"),
        (["dataset.pairs=100"], 2, "dataset.pairs=100 has no effect"),
        (["loss._target_=os.system"], 2, "is not under cdpo."),
        (["model._target_=subprocess.Popen"], 2, "is not under cdpo."),
        (["trainer.device=cuda"], 2, "torch sees no GPU"),
        (["constraint=bias_only"], 2, "bias"),
        (["dataset.path={tmp}/world.json"], 3, "world.json"),
        (["optimizer.learning_rate=1e300", "optimizer=sgd"], 4, "step"),
    ],
)
def test_bad_input_ends_with_its_code_and_says_what_to_change(cdpo_train, tmp_path, arguments, code, message):
    (tmp_path / "world.json").write_text('{"prompts": ["x"], "responses": ["a", "b"], "rewards": [[1.0]]}')
    if "trainer.device=cuda" in arguments and __import__("torch").cuda.is_available():
        pytest.skip("a GPU is here")
    own_data = any(argument.startswith(("dataset=", "dataset.path=")) for argument in arguments)
    base = QUICK[:3] if own_data else QUICK
    found, text = cdpo_train(*base, *(a.format(tmp=tmp_path) for a in arguments))
    assert found == code, text
    assert message in text
    assert "Traceback" not in text


def test_without_its_study_an_experiment_trains(cdpo_train, tmp_path):
    code, text = cdpo_train("experiment=compressive_sensing", "~study", *QUICK)
    assert code == 0, text
    assert json.loads((tmp_path / "out/compressive_sensing/summary.json").read_text())["steps"] == 3


def test_bad_rows_are_named_with_file_and_line(cdpo_train, tmp_path):
    lines = [json.dumps({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"}) for i in range(6)]
    lines[2], lines[4] = '{"prompt": "p", "chosen": "yes"', '{"prompt": "p", "choosen": "yes", "rejected": "no"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    code, text = cdpo_train("logger=none", "dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl")
    assert code == 3
    assert "rows.jsonl:3" in text
    assert "rows.jsonl:5" in text
    assert "2 rows" in text


def test_remote_code_cannot_be_trusted_by_a_file(cdpo_train, tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "evil.yaml").write_text(
        "_target_: cdpo.model.HuggingFace\nname_or_path: x\ntrust_remote_code: true\n"
    )
    code, text = cdpo_train(f"hydra.searchpath=[file://{tmp_path}/conf]", "model=evil", "logger=none")
    assert code == 2
    assert "only be set on the command line" in text


def test_a_sweep_goes_on_after_a_failure_and_the_exit_code_tells(sweep, tmp_path):
    code, text = sweep("loss=dpo,ipo", "optimizer=sgd", "optimizer.learning_rate=1e-3,1e300", *WORLDS)
    assert code == 1
    states = [json.loads(path.read_text())["state"] for path in sorted((tmp_path / "out").glob("*/status.json"))]
    assert sorted(states) == ["failed"] * 4 + ["finished"] * 4
    assert text.count("NumericsError") >= 4
    assert "8 runs" in text


def test_a_sweep_twice_trains_nothing_twice(sweep, tmp_path):
    arguments = ("loss=dpo,gaussian", "constraint=none,lora_r1,l2_ball")
    assert sweep(*arguments)[0] == 0
    folders = sorted((tmp_path / "out").glob("*/summary.json"))
    assert len(folders) == 6
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*/*")}
    code, text = sweep(*arguments)
    assert code == 0
    assert text.count("done before") == 6
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*/*")} == before


def test_a_swept_name_makes_sweeps_of_their_own(sweep, tmp_path):
    code, text = sweep("name=a,b", *WORLDS)
    assert code == 0
    for name in ("a", "b"):
        assert f"report: {tmp_path}/out/{name}/report.html" in text
        record = json.loads((tmp_path / "out" / name / "sweep.json").read_text())["runs"]
        begun = {path.parent.name for path in (tmp_path / "out" / name).glob("*/config.json")}
        assert {run["directory"] for run in record} == begun
        assert len(begun) == 2


def test_a_launcher_of_one_process_is_refused_and_leaves_nothing(sweep, tmp_path):
    code, text = sweep("seed=0,1", "hydra/launcher=basic")
    assert code == 2
    assert "a sweep needs hydra/launcher=local or slurm" in text
    assert not list((tmp_path / "out").glob("bandit*"))


def test_what_rank_0_says_no_other_rank_repeats(cdpo_train, monkeypatch):
    def told(task):
        error = RuntimeError("rank 1: on purpose\nand its traceback")
        error.told = True  # as Ranks.on_all says
        raise error

    monkeypatch.setattr("cdpo.training.job.run", told)
    assert "on purpose" in cdpo_train(*QUICK)[1]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    try:
        code, text = cdpo_train(*QUICK)
    finally:
        logging.disable(logging.NOTSET)  # as cdpo-train sets it on every rank but 0
    assert code == 1
    assert "on purpose" not in text


def test_model_name_alone_chooses_the_hf_group():
    assert train.with_model_group(["model.name_or_path=x"]) == ["model=hf", "model.name_or_path=x"]
    chosen = ["model=gpt2", "model.name_or_path=x"]
    assert train.with_model_group(chosen) == chosen


def test_dataset_limits_that_a_model_cannot_hold_are_refused(cdpo_train, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p" * 90, "chosen": "yes", "rejected": "no"}) + "\n")
    code, text = cdpo_train(
        "logger=none",
        "dataset=jsonl",
        f"dataset.path={tmp_path}/rows.jsonl",
        "dataset.eval_size=0",
        "model.max_positions=64",
    )
    assert code == 2
    assert "the model knows 64 positions" in text


def started(folder: Path, *arguments: str) -> forking.Program:
    small = ["logger=none", "model.hidden_size=16", "model.heads=2", "trainer.max_steps=100000"]
    return forking.Program("-m", "cdpo.train", *small, f"output_root={folder}", "name=run", *arguments)


def wait_for_steps(process: forking.Program, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    path = folder / "run" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.err
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_exits_with_75(tmp_path, number):
    process = started(tmp_path)
    wait_for_steps(process, tmp_path, 5)
    process.send_signal(number)
    assert process.wait() == 75, process.err
    assert "the same command goes on from there" in process.err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted"
    saved = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert int(saved[-1].name[-8:]) == steps[-1]


def test_a_second_launch_in_the_same_directory_is_refused(tmp_path):
    process = started(tmp_path)
    wait_for_steps(process, tmp_path, 2)
    other = started(tmp_path)
    code = other.wait()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert code == 2
    assert f"pid {process.pid}" in other.err


@pytest.mark.parametrize("group", ["model", "dataset", "loss", "optimizer", "logger", "constraint", "trainer"])
def test_an_empty_group_is_a_config_error(cdpo_train, group):
    code, text = cdpo_train(f"{group}=null")
    assert code == 2, text


@pytest.mark.parametrize("override", ["+constraint.foo=3", "early_stop_kl.kl=nan", "name=123"])
def test_odd_values_end_in_a_sentence(cdpo_train, override):
    if override.startswith("early"):
        code, text = cdpo_train(*QUICK, "constraint=early_stop_kl", "constraint." + override)
    else:
        code, text = cdpo_train(*QUICK, override)
    assert code == 2, text


def test_a_refused_launch_leaves_the_run_as_it_was(cdpo_train, tmp_path):
    assert cdpo_train(*QUICK, "name=kept")[0] == 0

    def contents() -> dict[Path, bytes]:
        files = (tmp_path / "out" / "kept").rglob("*.json")
        return {path: path.read_bytes() for path in files if path.name != "lock.json"}  # who looked last

    before = contents()
    command = (tmp_path / "out" / "kept" / "command.txt").read_text()
    assert cdpo_train(*QUICK, "name=kept", "loss=ipo")[0] == 2
    assert contents() == before
    assert command.startswith("cdpo-train logger=none model=tabular")
    assert (tmp_path / "out" / "kept" / "command.txt").read_text() == command


def test_a_config_error_leaves_no_empty_directory(cdpo_train, tmp_path):
    assert cdpo_train(*QUICK, "loss.beta=-1")[0] == 2
    assert not list((tmp_path / "out").glob("*"))


def test_help_names_every_group_and_choice(cdpo_train):
    for more in (["loss=dpo,ipo", "constraint=[lora_r8]", "-m"], [""]):  # added to a command that is there already
        assert cdpo_train(*more, "--help") == cdpo_train("--help")
    code, text = cdpo_train("--help")
    words = set(text.replace("=", " ").replace(",", " ").split())
    shipped = {path.stem for path in CONF.glob("*/*.yaml") if path.parent.name != "hydra"}
    assert code == 0
    assert shipped <= words
    assert {"model", "dataset", "loss", "constraint", "optimizer", "logger"} <= words
