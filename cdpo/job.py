"""One run, from its config to summary.json: config -> rows -> tokens -> reference -> policy under constraints -> fit.

Safe to start twice: an interrupted run goes on, a finished one is not trained again. Sees plain dictionaries, no Hydra.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from cdpo import __version__, config
from cdpo.batch import Item
from cdpo.constraints import Constraint, check
from cdpo.constraints.dropout import Dropout
from cdpo.engine import fit
from cdpo.errors import ConfigError, DataError, DiskError, Preempted
from cdpo.files import read_json, redact, sha256, sweep, write_atomic, write_json
from cdpo.lock import locked
from cdpo.model import check_lengths, export
from cdpo.preemption import Signals
from cdpo.progress import Progress
from cdpo.reference import Scored, add_reference, check_start, layout_for
from cdpo.rows import Data
from cdpo.run import Run, State
from cdpo.tokenise import tokenise

log = logging.getLogger(__name__)
THREADS = torch.get_num_threads()  # torch's own choice, before any run of this process changed it


def run(composed: dict[str, Any], folder: Path, command: str = "", group: str | None = None) -> dict[str, Any]:
    """Train what `composed`, a resolved config, describes, in `folder`. Returns what stands in summary.json.

    `command` makes this run again, `group` is the sweep it belongs to; both are only written down.

    Raises a CdpoError whose exit code says what kind of thing went wrong; status.json in `folder` says the same.
    """
    spec = config.read(composed)
    _check_kinds(spec)
    check(spec.constraint, lbfgs=spec.optimizer.full_batch)
    torch.set_num_threads(spec.trainer.threads or THREADS)
    with locked(folder):
        sweep(folder)
        _same_run(composed, folder)
        if _state(folder) in ("finished", "stopped_early"):
            log.info("%s is finished already; nothing to do", folder)
            return read_json(folder / "summary.json")
        write_json(folder / "config.json", composed)
        write_json(folder / "inputs.json", _inputs(composed))
        write_atomic(folder / "command.txt", command + "\n")
        with Signals() as signals, _status(folder, spec.logger):
            return _run(spec, composed, folder, signals, group)


def _run(
    spec: config.Config, composed: dict[str, Any], folder: Path, signals: Signals, group: str | None
) -> dict[str, Any]:
    def interruptible(*_: Any) -> None:
        if signals.requested:
            raise Preempted(f"{signals.poll()} before the first step; the same command starts again")

    data = spec.dataset.load(spec.seed)
    tokenizer = spec.model.tokenizer(data)
    train_items, held_out_items, rates = _tokens(spec, data, tokenizer, folder, interruptible)
    interruptible()
    accelerator = _accelerator(spec.trainer)
    policy = spec.model.load(tokenizer, data).to(accelerator.device)
    train, held_out = _scored(policy, train_items, held_out_items, spec, accelerator, folder, interruptible)
    policy = _constrained(policy, train, spec, accelerator)
    task = Run(
        policy, tokenizer, train, held_out, spec.loss, spec.constraint, spec.optimizer, spec.trainer,
        spec.seed, folder, accelerator, signals, spec.logger, composed, group, rates,
    )  # fmt: skip
    state = fit(task)
    export(policy, tokenizer, folder / "model")
    return _summary(task, state, folder)


def _tokens(
    spec: config.Config, data: Data, tokenizer: Any, folder: Path, interruptible: Any
) -> tuple[list[Item], list[Item], dict[str, float]]:
    """Items to train on and to hold out, and the shares of rows cut and dropped; data_report.json holds the whole."""
    train, ledger = tokenise(data.train, tokenizer, spec.dataset, interruptible)
    held_out, held_out_ledger = tokenise(data.eval, tokenizer, spec.dataset, interruptible)
    report = {"read": data.ledger.to_dict(), "train": ledger.to_dict(), "eval": held_out_ledger.to_dict()}
    write_json(folder / "data_report.json", report)
    if spec.loss.unit == "pair":  # an Item whose rewards all tie has no pair; the ledger counts it as without_pairs
        train, held_out = ([item for item in items if item.pairs] for items in (train, held_out))
    if not train:
        raise DataError("no pair is left to train on; data_report.json says where the rows went")
    ledgers = (ledger, held_out_ledger)
    lost = sum(one.rows - one.kept for one in (data.ledger, *ledgers))
    rates = {
        "data/cut": sum(one.notes["cut_rows"].count for one in ledgers) / sum(one.kept for one in ledgers),
        "data/dropped": lost / data.ledger.rows,
    }
    log.info("data: %d rows read, %d to train on, %d held out", data.ledger.rows, len(train), len(held_out))
    return train, held_out, rates


def _accelerator(trainer: config.Trainer) -> Accelerator:
    """A fresh accelerator: its state is global, and runs of one process must not share it. May raise ConfigError."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda, but torch sees no GPU here; use auto or cpu")
    cpu = trainer.device == "cpu" or not torch.cuda.is_available()  # never MPS, which has no float64
    accelerator = Accelerator(mixed_precision="bf16" if trainer.autocast else "no", cpu=cpu)
    if accelerator.num_processes > 1:
        raise ConfigError(f"{accelerator.num_processes} ranks were started, but a run trains on one; start one process")
    return accelerator


def _scored(
    policy: Any, train_items: list[Item], held_out_items: list[Item], spec: config.Config, accelerator: Accelerator,
    folder: Path, interruptible: Any,
) -> tuple[Scored, Scored]:  # fmt: skip
    """Both sets of Items with the log-probs of the reference, which is the policy before any constraint."""
    items = train_items + held_out_items
    check_lengths(policy, max(len(item.prompt) + len(response) - 1 for item in items for response in item.responses))
    padded, reason = layout_for(policy, train_items, getattr(spec.model, "attention", "trees"))
    noisy = any(isinstance(constraint, Dropout) for constraint in spec.constraint.values())
    if noisy and not padded and accelerator.device.type == "cuda":
        padded, reason = True, "dropout, which packed attention on CUDA does not have"
        policy.set_attn_implementation("sdpa")
    log.info("layout: %s", f"padded rows ({reason})" if padded else "packed prompt trees")
    train, held_out = (Scored(items, padded, accelerator.device) for items in (train_items, held_out_items))
    for scored, name in ((train, "reference-train"), (held_out, "reference-eval")):
        with Progress(len(scored.items), 0, name, quiet=not scored.items) as bar, accelerator.autocast():

            def on_batch(done: int, bar: Progress = bar) -> None:
                interruptible()
                bar.update(done)

            if scored.items:
                cache = folder / f"{name}.safetensors"
                add_reference(policy, scored, spec.trainer.tokens_per_micro_batch, cache, on_batch)
    return train, held_out


def _constrained(policy: Any, train: Scored, spec: config.Config, accelerator: Accelerator) -> Any:
    """The policy that is trained: wrapped by the constraints, and checked to start as the reference."""
    set_seed(spec.seed)
    for constraint in spec.constraint.values():
        policy = constraint.wrap(policy)
    with torch.no_grad(), accelerator.autocast():
        difference = check_start(policy, train)
    log.info("step 0: policy equals reference (largest difference %.1e nats)", difference)
    if spec.trainer.gradient_checkpointing:
        if not getattr(policy, "supports_gradient_checkpointing", False):
            raise ConfigError("trainer.gradient_checkpointing: this model does not support it; set it to false")
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.trainer.compile:
        policy.compile(dynamic=True)
    return policy


def _summary(task: Run, state: State, folder: Path) -> dict[str, Any]:
    """What the run came to: the newest value of every metric, what the constraints did, how far the weights went."""
    reports = {name: constraint.report() for name, constraint in task.constraints.items()}
    summary = {
        "state": "stopped_early" if state.stopped else "finished",
        "stopped": state.stopped,
        "step": state.step,
        "steps": task.plan.steps,
        "trainable": task.change.trainable(),
        "change/norm": task.change.norm(),
        "change/max_abs": task.change.max_abs(),
        "change/effective_rank": task.change.effective_rank(),
        "metrics": state.last,
        "constraint": reports,
    }
    write_json(folder / "summary.json", summary)
    return summary


# ------------------------------------------------------------------------------------------------- the run directory


def _state(folder: Path) -> str | None:
    path = folder / "status.json"
    return read_json(path)["state"] if path.is_file() else None


def _check_kinds(spec: config.Config) -> None:
    """ConfigError if a group holds something of another kind, or nothing."""
    kinds = {"model": "load", "dataset": "load", "loss": "unit", "optimizer": "build", "logger": "start"}
    for group, method in kinds.items():
        if not hasattr(getattr(spec, group), method):
            raise ConfigError(f"{group}={getattr(spec, group)!r} is no {group}: choose one of conf/{group}/")
    for name, constraint in spec.constraint.items():
        if not isinstance(constraint, Constraint):
            raise ConfigError(f"constraint.{name}={constraint!r} is no constraint: choose with constraint={name}")


def _inputs(composed: dict[str, Any]) -> dict[str, str]:
    """Size and sha256 of the local files that a run reads: data, world, and the model's folder."""
    named = [composed["dataset"].get(key) for key in ("path", "eval_path")] + [composed["model"].get("name_or_path")]
    paths = [Path(name) for name in named if name]
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*"))) if file.is_file()
    ]
    return {str(file): _print(file) for file in files}


def _print(file: Path) -> str:
    """Large files, which weights are, by size alone: before training the step-0 check looks at what they do."""
    size = file.stat().st_size
    return f"{size} bytes" + (f", sha256 {sha256(file)}" if size < 1 << 30 else "")


def _same_run(composed: dict[str, Any], folder: Path) -> None:
    """ConfigError if `folder` holds a run of another config or of other files; names the key, or the file."""
    path = folder / "config.json"
    if not path.is_file():
        return
    old, new = config.trajectory(read_json(path)), config.trajectory(redact(composed))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key}={old.get(key)!r}, now it is {new.get(key)!r}: "
                "choose another name, or go back to the old value"
            )
    before, now = (read_json(folder / "inputs.json") if (folder / "inputs.json").is_file() else {}), _inputs(composed)
    if changed := sorted(file for file in before.keys() | now.keys() if before and before.get(file) != now.get(file)):
        raise ConfigError(f"{folder} holds a run of other files: {', '.join(changed)} changed; choose another name")


@contextmanager
def _status(folder: Path, logger: Any) -> Iterator[None]:
    """Keep status.json true: running, then finished, stopped_early, preempted or failed and why; end the logger."""
    where = {
        "cdpo": __version__,
        "torch": torch.__version__,
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    path = folder / "status.json"
    before = read_json(path) if path.is_file() else where
    if changed := [key for key, value in where.items() if before.get(key) != value and key != "host"]:
        log.warning("%s changed since the last attempt: the run goes on, but not bit for bit", ", ".join(changed))
    write_json(path, {"state": "running", **where})
    try:
        yield
    except BaseException as error:
        state = "preempted" if isinstance(error, Preempted) else "failed"
        cause = f"{type(error).__name__}: {error}"
        with suppress(DiskError):  # a full disk must not hide why the run failed
            write_json(path, {"state": state, "cause": cause, **where})
        logger.finish(getattr(error, "exit_code", 1))
        raise
    logger.finish(0)
    write_json(path, {"state": read_json(folder / "summary.json")["state"], **where})
