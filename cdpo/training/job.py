"""One run, from its config to summary.json: prepare, fit, export.

Safe to start twice: an interrupted run goes on, a finished one is not trained again. Sees plain values, no Hydra.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cdpo.config.task import Task
from cdpo.data.rows import Data
from cdpo.data.tokenise import NOT_PARALLEL
from cdpo.errors import ConfigError
from cdpo.model.export import export
from cdpo.model.memory import explained
from cdpo.system.files import write_json
from cdpo.system.locks import locked
from cdpo.system.ranks import process_group, whole_tree
from cdpo.system.signals import Signals
from cdpo.training.checks import checked
from cdpo.training.directory import RunDirectory
from cdpo.training.loop import fit
from cdpo.training.prepare import constrained, prepare
from cdpo.training.run import Run
from cdpo.training.session import Session, device_of, on_gpu

log = logging.getLogger(__name__)
THREADS = torch.get_num_threads()  # torch's own choice, before any run of this process changed it


def run(task: Task, threads: int | None = None) -> dict[str, Any]:
    """Do what `task` describes, in its directory. Returns what stands in summary.json.

    `threads` stand in for trainer.threads=null, where processes share a machine.

    Raises a CdpoError whose exit code says what kind of thing went wrong; status.json says the same.
    """
    quiet_libraries()
    spec, directory = checked(task.composed), RunDirectory(task.directory)
    torch.set_num_threads(spec.trainer.threads or threads or THREADS)
    with ExitStack() as held, process_group(spec.trainer.distributed, on_gpu(spec.trainer)) as ranks:

        def begun() -> dict[str, Any] | None:
            held.enter_context(locked(directory.path))
            return directory.begin(task)

        if spec.trainer.distributed == "ddp" and ranks.size == 1:
            log.warning("trainer.distributed=ddp with one process is none: start ranks with torchrun or srun")
        if summary := ranks.from_first(begun):
            log.info("%s is finished already; nothing to do", directory.path)
            return summary
        with Signals() as signals:
            session = Session(spec, task, ranks, device_of(spec.trainer), signals)
            with _told(session):
                return _train(session) if spec.study is None else _other(session)


def quiet_libraries() -> None:
    """Their progress bars and notices of deprecation are not for our users; warnings of cdpo itself are."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", NOT_PARALLEL)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def _told(session: Session) -> Iterator[None]:
    """Within the block status.json says how the run is; after the logger's copy has ended too, how it ended."""
    if not session.ranks.first:
        yield
        return
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "ranks": session.ranks.size,
    }
    code = 0
    with session.directory.running(machine):
        try:
            yield
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            raise
        finally:
            session.spec.logger.finish(code)


def _train(session: Session) -> dict[str, Any]:
    began = time.monotonic()
    ready = prepare(session)
    waited = time.monotonic() - began
    log.info("training begins %.1f s after the start of the run", waited)
    with explained(ready.run.trainer.micro_batch):
        fit(ready.run)
    _export(ready.run, ready.data)
    data = {"labels": ready.data.labels, "reward_scale": ready.data.reward_scale, "base": ready.run.train.items[0].base}
    return _summary(ready.run, {"reference": ready.reference, **data, "seconds_before_training": waited})


def _other(session: Session) -> dict[str, Any]:
    """What an experiment does instead of training."""
    if session.ranks.size > 1:
        raise ConfigError("this experiment does not train: start one process")
    metrics = session.spec.study.run(session.directory.path, session.spec.seed, session.pause)
    summary = {"state": "finished", "metrics": metrics}
    write_json(session.directory.summary, summary)
    return summary


def _export(run: Run, data: Data) -> None:
    """Save the trained model. Of a sharded one the first rank builds the whole anew, on the CPU."""
    spec, policy = run.session.spec, run.policy
    if run.ranks.sharded:
        state = whole_tree(policy.state_dict(), keep=run.ranks.first)
        if run.ranks.first:
            policy = constrained(spec.model.load(run.tokenizer, data), spec)
            policy.load_state_dict(state)
    run.ranks.from_first(lambda: export(policy, run.tokenizer, run.directory.model))


def _summary(run: Run, before: dict[str, Any]) -> dict[str, Any]:
    """What the run came to: the newest value of every metric, what the constraints did, how far the weights went."""
    state, change = run.state, run.change
    summary = {
        "state": "stopped_early" if state.stopped else "finished",
        "stopped": state.stopped,
        "step": state.step,
        "steps": run.plan.steps,
        **before,
        "trainable": change.trainable(),
        "change/norm": change.norm(),
        "change/max_abs": change.max_abs(),
        "change/effective_rank": change.effective_rank(),
        "metrics": state.latest,
        "certificate": state.certificate,
        "constraint": {name: constraint.report() for name, constraint in run.constraints.items()},
    }
    run.ranks.from_first(lambda: write_json(run.directory.summary, summary))
    return summary
