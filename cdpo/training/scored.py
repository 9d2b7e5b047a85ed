"""The Items of a run with what the reference says of them: of which it is asked, and how the model is given them."""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

from cdpo.batch import Item
from cdpo.config.schema import Config
from cdpo.constraints.dropout import Dropout
from cdpo.data.packing import Scored
from cdpo.model.layout import choose_layout
from cdpo.model.logps import Scorer
from cdpo.model.pretrained import check_lengths
from cdpo.model.reference import ReferencePass
from cdpo.system.progress import Progress
from cdpo.training.certificate import sample
from cdpo.training.run import plan_of
from cdpo.training.session import Session

log = logging.getLogger(__name__)


class Sets(NamedTuple):
    """The Items of a run by what they are for."""

    train: list[Item]
    held_out: list[Item]
    unused: list[Item]  # of no use for this loss: without a pair
    drawn: int = 0  # tokens at most that the policy writes itself after a prompt to train on, for a constraint

    def check_lengths(self, model: Any) -> None:
        """ConfigError if some sequence is longer than the model can take."""
        items = self.train + self.held_out + self.unused
        longest = max(len(item.prompt) + len(response) - 1 for item in items for response in item.responses)
        check_lengths(model, longest)
        if self.drawn:
            longest = max(len(item.prompt) for item in self.train) + self.drawn - 1
            check_lengths(model, longest, "dataset.max_prompt_tokens + draw_tokens of the constraint")


def asked(spec: Config, train: list[Item]) -> list[int]:
    """The Items whose reference is asked for, as indices: all; or those that the run sees, if fewer than a quarter.

    So runs that see more ask for the same, whatever their seed, and find what others computed; those that see less ask
    for what their own seed draws.
    """
    plan = plan_of(spec.trainer, train, spec.draw)
    seen = plan.visited() | set(sample(len(train), spec.trainer.certificate_items, plan.seed))
    return sorted(seen) if 4 * len(seen) < len(train) else list(range(len(train)))


def scored_with_reference(session: Session, scorer: Scorer, sets: Sets) -> tuple[list[Scored], str]:
    """The Items to train on and to hold out with the log-probs of the reference, and where these are from.

    Where all are asked for, what this loss has no use for is too: so every loss asks for the same Items.
    """
    sets.check_lengths(scorer.model)
    chosen = asked(session.spec, sets.train)
    few = len(chosen) < len(sets.train)
    items = [sets.train[i] for i in chosen] + sets.held_out + ([] if few else sets.unused)
    whole = Scored(items, _padded(session, scorer, sets), session.device)
    source = _ask(session, scorer, whole)
    if few:
        log.info("reference: not of %d Items that this run does not see", len(sets.train) - len(chosen))
    n, m = len(chosen), len(chosen) + len(sets.held_out)
    found = dict(zip(chosen, whole.reference[:n]))
    parts = (
        (sets.train, [found.get(i) for i in range(len(sets.train))]),
        (sets.held_out, whole.reference[n:m]),
    )
    return [Scored(some, whole.padded, session.device, reference) for some, reference in parts], source


def _ask(session: Session, scorer: Scorer, whole: Scored) -> str:
    """Fill in the reference, from where it is found soonest; returns from where."""
    began, count = time.monotonic(), len(whole.items)
    with Progress(count, 0, "reference", quiet=not session.ranks.first) as bar, session.autocast():

        def tell(done: int) -> None:
            session.pause()
            bar.update(done)

        # with the config's micro-batches: the reference is one for all constraints, however much room they leave
        own, shared = session.directory.reference, session.cache("reference")
        micro_batch = session.spec.trainer.micro_batch
        source = ReferencePass(micro_batch, own, shared, session.ranks, tell).fill(scorer, whole)
    log.info("reference: %s (%d Items, %.1f s)", source, count, time.monotonic() - began)
    return source


def _padded(session: Session, scorer: Scorer, sets: Sets) -> bool:
    """Whether the model is given padded rows; the log says why."""
    padded, reason = choose_layout(scorer, sets.train, getattr(session.spec.model, "attention", "trees"))
    noisy = any(isinstance(constraint, Dropout) for constraint in session.spec.constraint.values())
    if noisy and not padded and session.device.type == "cuda":
        padded, reason = True, "dropout, which packed attention on CUDA does not have"
        scorer.model.set_attn_implementation("sdpa")
    log.info("layout: %s", f"padded rows ({reason})" if padded else "packed prompt trees")
    return padded
