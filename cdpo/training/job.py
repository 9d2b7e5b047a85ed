"""One run, from its config to summary.json: config -> rows -> tokens -> reference -> policy under constraints -> fit.

Safe to start twice: an interrupted run goes on, a finished one is not trained again. Sees plain dictionaries, no Hydra.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from cdpo.batch import Item
from cdpo.config import read as config
from cdpo.constraints.dropout import Dropout
from cdpo.constraints.freeze import decoder_layers
from cdpo.data.bradley_terry import add_fitted
from cdpo.data.rows import Data
from cdpo.data.tokens import tokenised
from cdpo.errors import ConfigError, DataError, Preempted
from cdpo.losses.candidates import OnCandidates
from cdpo.model.layers import switched
from cdpo.model.logps import one_by_one
from cdpo.model.memory import explained, sized
from cdpo.model.pretrained import check_lengths, export
from cdpo.model.reference import Scored, add_reference, check_loaded, check_start, layout_for
from cdpo.system.files import write_json
from cdpo.system.locks import locked
from cdpo.system.progress import Progress
from cdpo.system.ranks import Ranks, shard, started, whole_tree
from cdpo.system.signals import Signals
from cdpo.training.checks import read
from cdpo.training.directory import MICRO_BATCH, begin, status
from cdpo.training.loop import fit
from cdpo.training.run import Run, State

log = logging.getLogger(__name__)
THREADS = torch.get_num_threads()  # torch's own choice, before any run of this process changed it


def run(
    composed: dict[str, Any],
    folder: Path,
    command: str = "",
    group: str | None = None,
    choices: dict[str, Any] | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train what `composed`, a resolved config, describes, in `folder`. Returns what stands in summary.json.

    `command` makes this run again, `group` is the sweep it belongs to, `choices` are the names of the chosen files; all
    three are only written down. `threads` stand in for trainer.threads=null, where processes share a machine.

    Raises a CdpoError whose exit code says what kind of thing went wrong; status.json in `folder` says the same.
    """
    quiet_libraries()
    spec = read(composed)
    torch.set_num_threads(spec.trainer.threads or threads or THREADS)
    files = {"config.json": composed, "choices.json": choices or {}}
    with ExitStack() as held, started(spec.trainer.distributed, _on_gpu(spec.trainer)) as ranks:

        def begun() -> dict[str, Any] | None:
            held.enter_context(locked(folder))
            return begin(composed, folder, files, command)

        if spec.trainer.distributed == "ddp" and ranks.size == 1:
            log.warning("trainer.distributed=ddp with one process is none: start ranks with torchrun or srun")
        if summary := ranks.from_first(begun):
            log.info("%s is finished already; nothing to do", folder)
            return summary
        with Signals() as signals, status(folder, spec.logger, ranks):
            return _run(spec, composed, folder, signals, group, ranks)


def quiet_libraries() -> None:
    """Their progress bars and notices of deprecation are not for our users; warnings of cdpo itself are."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _run(
    spec: config.Config, composed: dict[str, Any], folder: Path, signals: Signals, group: str | None, ranks: Ranks
) -> dict[str, Any]:
    def interruptible(*_: Any) -> None:
        if name := ranks.agreed(signals.poll()):
            raise Preempted(f"{name} before the first step; the same command starts again", name)

    began = time.monotonic()
    if spec.task is not None:
        if ranks.size > 1:
            raise ConfigError("this experiment does not train: start one process")
        return _other(spec, folder, interruptible)
    if (beta := getattr(spec.loss, "beta", spec.beta)) != spec.beta:
        log.info("loss.beta=%g differs from beta=%g, which is that of J, the objective", beta, spec.beta)
    data = spec.dataset.load(spec.seed)
    tokenizer = spec.model.tokenizer(data)
    often = interruptible if ranks.size == 1 else lambda *_: None  # asking the others after every row takes too long
    *items, rates = tokens(spec, data, tokenizer, folder, often, ranks, _cache(spec, folder, "tokens"))
    interruptible()
    accelerator = _accelerator(spec.trainer)
    trainer = sized(spec, tokenizer, data, folder / MICRO_BATCH, accelerator.device, ranks)
    policy = spec.model.load(tokenizer, data)
    prepared = _sharded if ranks.sharded else _prepared
    with explained(spec.trainer.budget):
        policy, train, held_out, source = prepared(policy, items, spec, accelerator, folder, interruptible, ranks)
    if ranks.rank:
        set_seed((spec.draw + 7_919 * ranks.rank) % 2**31)  # dropout draws anew on every rank
    training = Run(
        policy, tokenizer, train, held_out, spec.loss, spec.constraint, spec.optimizer, trainer,
        spec.beta, spec.draw, folder, accelerator, signals, spec.logger, composed, group, rates, ranks,
    )  # fmt: skip
    waited = time.monotonic() - began
    log.info("training begins %.1f s after the start of the run", waited)
    with explained(trainer.budget):
        state = fit(training)
    if ranks.sharded:
        policy = _unsharded(training, spec, data)
    ranks.from_first(lambda: export(policy, tokenizer, folder / "model"))
    return _summary(training, state, {"reference": source, "seconds_before_training": waited}, folder)


def _other(spec: config.Config, folder: Path, interruptible: Any) -> dict[str, Any]:
    """What an experiment does instead of training."""
    summary = {"state": "finished", "metrics": spec.task.run(folder, spec.seed, interruptible)}
    write_json(folder / "summary.json", summary)
    return summary


def tokens(
    spec: config.Config, data: Data, tokenizer: Any, folder: Path, interruptible: Any, ranks: Ranks,
    shared: Path | None = None,
) -> tuple[list[Item], list[Item], list[Item], dict[str, float]]:  # fmt: skip
    """Items to train on, to hold out and without use for this loss; the shares of rows cut and dropped.

    data_report.json holds the whole; other runs find the tokens in `shared`.

    Raises DataError if nothing is left to train on, or the loss needs rewards that the data lack.
    """
    train, ledger = tokenised(data.train, tokenizer, spec.dataset, interruptible, shared)
    held_out, held_out_ledger = tokenised(data.eval, tokenizer, spec.dataset, interruptible, shared)
    report = {"read": data.ledger.to_dict(), "train": ledger.to_dict(), "eval": held_out_ledger.to_dict()}
    ranks.from_first(lambda: write_json(folder / "data_report.json", report))
    fitted = isinstance(spec.loss, OnCandidates) and spec.loss.rewards == "fitted"
    unused: list[Item] = []
    if spec.loss.unit == "pair" or fitted:  # rewards that all tie give no pair; the ledger counts it as without_pairs
        unused = [item for item in train if not item.pairs]
        train = [item for item in train if item.pairs]
    if not train:
        raise DataError("no pair is left to train on; data_report.json says where the rows went")
    if isinstance(spec.loss, OnCandidates) and not fitted:
        _check_rewards(train + held_out)
    if fitted:
        train, held_out = (_fitted(items, spec.loss.ridge, interruptible) for items in (train, held_out))
    ledgers = (ledger, held_out_ledger)
    lost = sum(one.rows - one.kept for one in (data.ledger, *ledgers))
    rates = {
        "data/cut": sum(one.notes["cut_rows"].count for one in ledgers) / sum(one.kept for one in ledgers),
        "data/dropped": lost / data.ledger.rows,
    }
    log.info("data: %d rows read, %d to train on, %d held out", data.ledger.rows, len(train), len(held_out))
    if not held_out:
        log.warning("no rows are held out, so there will be no eval/* and no objective/*; see dataset.eval_size")
    return train, held_out, unused, rates


def _check_rewards(items: list[Item]) -> None:
    if bare := [item.source for item in items if item.rewards is None]:
        raise DataError(
            f"the loss needs rewards of every response, and {len(bare)} rows have none ({', '.join(bare[:3])}): "
            "choose a loss of pairs, loss=rlhf_learned, or data with scored responses (such as bandit)"
        )


def _fitted(items: list[Item], ridge: float, interruptible: Any) -> list[Item]:
    with Progress(len(items), 0, "fit rewards", quiet=len(items) < 1000) as bar:

        def on_item(done: int) -> None:
            interruptible()
            bar.update(done)

        return add_fitted(items, ridge, on_item)


def _on_gpu(trainer: config.Trainer) -> bool:
    """Whether the run has a GPU; never MPS, which has no float64. May raise ConfigError."""
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda, but torch sees no GPU here; use auto or cpu")
    return trainer.device != "cpu" and torch.cuda.is_available()


def _accelerator(trainer: config.Trainer) -> Accelerator:
    """A fresh accelerator: its state is global, and runs of one process must not share it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16" if trainer.autocast else "no", cpu=not _on_gpu(trainer))


def _prepared(
    policy: Any, items: list[list[Item]], spec: config.Config, accelerator: Accelerator, folder: Path,
    interruptible: Any, ranks: Ranks,
) -> tuple[Any, Scored, Scored, str]:  # fmt: skip
    """The policy that is trained, and the Items with what it said before any constraint: the reference."""
    policy = policy.to(accelerator.device)
    train, held_out, source = _scored(policy, items, spec, accelerator, folder, interruptible, ranks)
    policy = _constrained(policy, spec)
    with torch.no_grad(), accelerator.autocast():
        difference = check_start(policy, train)
    log.info("step 0: policy equals reference (largest difference %.1e nats)", difference)
    return switched(policy, spec.trainer), train, held_out, source


def _sharded(
    policy: Any, items: list[list[Item]], spec: config.Config, accelerator: Accelerator, folder: Path,
    interruptible: Any, ranks: Ranks,
) -> tuple[Any, Scored, Scored, str]:  # fmt: skip
    """The same on shards: no rank need hold the whole model on its device, so the reference is asked when sharded.

    The constraints stand by then, so the log-probs of one Item must equal those of the model as it was loaded.
    """
    policy.eval()
    witness = min(items[0], key=lambda item: item.tokens)
    with torch.no_grad():
        before = one_by_one(policy, [witness])
    policy = _constrained(policy, spec)
    adapters = {p for name, p in policy.named_parameters() if "lora_" in name}  # small: whole on every rank, as in ddp
    shard(policy, decoder_layers(policy, "trainer.distributed=fsdp needs; use ddp"), adapters, accelerator.device)
    train, held_out, source = _scored(policy, items, spec, accelerator, folder, interruptible, ranks)
    with accelerator.autocast():
        check_loaded(policy, witness, before, train)
    return switched(policy, spec.trainer), train, held_out, source


def _unsharded(training: Run, spec: config.Config, data: Data) -> Any:
    """On rank 0 a fresh policy on the CPU with the trained weights, None on the others."""
    state = whole_tree(training.policy.state_dict(), keep=training.ranks.first)
    if not training.ranks.first:
        return None
    policy = _constrained(spec.model.load(training.tokenizer, data), spec)
    policy.load_state_dict(state)
    return policy


def _scored(
    policy: Any, sets: list[list[Item]], spec: config.Config, accelerator: Accelerator, folder: Path,
    interruptible: Any, ranks: Ranks,
) -> tuple[Scored, Scored, str]:  # fmt: skip
    """Both sets of Items with the log-probs of the reference, which is the policy before any constraint; where from.

    What this loss has no use for is scored too: so every loss asks for the same Items, and finds what others computed.
    """
    train_items, held_out_items, unused = sets
    items, began = train_items + held_out_items + unused, time.monotonic()
    check_lengths(policy, longest(items))
    padded, reason = layout_for(policy, train_items, getattr(spec.model, "attention", "trees"))
    noisy = any(isinstance(constraint, Dropout) for constraint in spec.constraint.values())
    if noisy and not padded and accelerator.device.type == "cuda":
        padded, reason = True, "dropout, which packed attention on CUDA does not have"
        policy.set_attn_implementation("sdpa")
    log.info("layout: %s", f"padded rows ({reason})" if padded else "packed prompt trees")
    whole = Scored(items, padded, accelerator.device)
    with Progress(len(items), 0, "reference", quiet=not ranks.first) as bar, accelerator.autocast():

        def on_batch(done: int) -> None:
            interruptible()
            bar.update(done)

        # with the number of the config: the reference is one for all constraints, however much room they leave
        own, shared = folder / "reference.safetensors", _cache(spec, folder, "reference")
        source = add_reference(policy, whole, spec.trainer.budget, own, on_batch, shared, ranks)
    log.info("reference: %s (%d Items, %.1f s)", source, len(items), time.monotonic() - began)
    n, m = len(train_items), len(train_items) + len(held_out_items)
    train = Scored(train_items, padded, accelerator.device, whole.reference[:n])
    return train, Scored(held_out_items, padded, accelerator.device, whole.reference[n:m]), source


def longest(items: list[Item]) -> int:
    """Tokens of the longest sequence that a model must take."""
    return max(len(item.prompt) + len(response) - 1 for item in items for response in item.responses)


def _cache(spec: config.Config, folder: Path, kind: str) -> Path | None:
    """Where runs share what they computed; None where no cache_dir is named and the run is not under output_root."""
    if spec.cache_dir is not None:
        return Path(spec.cache_dir).expanduser() / kind
    root = Path(spec.output_root)
    return root / ".cache" / kind if folder.resolve().is_relative_to(root.resolve()) else None


def _constrained(policy: Any, spec: config.Config) -> Any:
    """The policy wrapped by the constraints; the same on all ranks."""
    set_seed(spec.draw)
    for constraint in spec.constraint.values():
        policy = constraint.wrap(policy)
    return policy


def _summary(task: Run, state: State, before: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the run came to: the newest value of every metric, what the constraints did, how far the weights went."""
    reports = {name: constraint.report() for name, constraint in task.constraints.items()}
    summary = {
        "state": "stopped_early" if state.stopped else "finished",
        "stopped": state.stopped,
        "step": state.step,
        "steps": task.plan.steps,
        **before,
        "trainable": task.change.trainable(),
        "change/norm": task.change.norm(),
        "change/max_abs": task.change.max_abs(),
        "change/effective_rank": task.change.effective_rank(),
        "metrics": state.last,
        "constraint": reports,
    }
    task.ranks.from_first(lambda: write_json(folder / "summary.json", summary))
    return summary
