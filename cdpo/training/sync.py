"""When the reference of the loss is moved to the policy, and which Items are scored with it."""

from __future__ import annotations

import logging
import time

from cdpo.data.packing import Scored
from cdpo.errors import Preempted
from cdpo.model.reference import log_probs
from cdpo.training.journal import Journal
from cdpo.training.run import Run

log = logging.getLogger(__name__)


def sync_if_due(run: Run, journal: Journal) -> bool:
    """Move the reference of the loss if it is time; False where a signal puts it off until the run goes on."""
    state, every = run.state, run.trainer.sync_reference
    if every is None or state.step % every or state.step == state.synced:
        return True
    try:
        sync(run, journal, every)
    except Preempted:
        return False
    state.synced, state.moved_ratio_sum = state.step, 0.0
    return True


def warn_if_never(run: Run) -> None:
    """A warning where training was stopped before the reference was moved for the first time."""
    every = run.trainer.sync_reference
    if every is not None and not run.state.synced:
        log.warning("trainer.sync_reference=%d moved no reference: training ended after step %d", every, run.state.step)


def sync(run: Run, journal: Journal, every: int) -> None:
    """Move it, and score with it the Items that are seen until it moves again. Raises Preempted, NumericsError."""
    step, began = run.state.step, time.monotonic()
    items = sorted(run.plan.visited(step, every))
    seen = Scored([run.train.items[i] for i in items], run.train.padded, run.device)

    def tell(done: int) -> None:
        run.session.pause()
        journal.bar.update(step, reference=done / len(items))

    with run.autocast():
        run.moving.move(items, lambda: log_probs(run.scorer, seen, run.trainer.micro_batch, run.ranks, tell))
    if not run.state.synced:
        log.info(
            "step %d: the reference moves to the policy, for the loss and rewards/* of training; J, KL and eval/* keep "
            "that which training began with (%d Items, %.1f s)",
            *(step, len(items), time.monotonic() - began),
        )
