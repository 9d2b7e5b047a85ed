"""What comes before the first step: rows -> Items -> the reference's log-probs -> the policy under its constraints.

Everything random is seeded here. Long work pauses where a signal may end it, and tells how far it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cdpo.batch import Item
from cdpo.config.schema import Config, Trainer
from cdpo.constraints.dropout import Dropout
from cdpo.data.bradley_terry import add_fitted
from cdpo.data.packing import Scored
from cdpo.data.rows import Data, Ledger
from cdpo.data.tokenise import tokenise
from cdpo.errors import ConfigError, DataError
from cdpo.losses.candidates import OnCandidates
from cdpo.model.layers import decoder_layers, has_layers, switch
from cdpo.model.layout import choose_layout
from cdpo.model.logps import Scorer, one_by_one
from cdpo.model.memory import Probe, explained
from cdpo.model.pretrained import check_lengths
from cdpo.model.reference import ReferencePass, check_loaded, check_start
from cdpo.system.files import read_json, write_json
from cdpo.system.progress import Progress
from cdpo.system.ranks import shard
from cdpo.system.rng import seed_all
from cdpo.training.certificate import sample
from cdpo.training.run import Run, plan_of
from cdpo.training.session import Session

log = logging.getLogger(__name__)
COMPILED_FROM = 500  # steps


class Tokenised(NamedTuple):
    """The rows of a data set as Items, and what became of them, in reading and in tokenisation."""

    train: list[Item]
    held_out: list[Item]
    ledgers: dict[str, Ledger]  # read, train and eval

    def report(self) -> dict[str, Any]:
        """The whole, for data_report.json."""
        return {name: ledger.to_dict() for name, ledger in self.ledgers.items()}

    def rates(self) -> dict[str, float]:
        """Shares of rows that were cut and dropped, logged with every step."""
        read, *tokenised = self.ledgers.values()
        cut, kept = (sum(one.notes["cut_rows"].count for one in tokenised), sum(one.kept for one in tokenised))
        lost = sum(one.rows - one.kept for one in self.ledgers.values())
        return {"data/cut": cut / kept, "data/dropped": lost / read.rows}


class Sets(NamedTuple):
    """The Items of a run by what they are for."""

    train: list[Item]
    held_out: list[Item]
    unused: list[Item]  # of no use for this loss: without a pair

    def longest(self) -> int:
        """Tokens of the longest sequence that a model must take."""
        items = self.train + self.held_out + self.unused
        return max(len(item.prompt) + len(response) - 1 for item in items for response in item.responses)


class Ready(NamedTuple):
    """All is there for training to begin."""

    run: Run
    data: Data
    reference: str  # where its log-probs are from: computed, cache or run directory


def prepare(session: Session) -> Ready:
    """From the config to a run that can be trained. Raises ConfigError, DataError, NumericsError, Preempted."""
    spec, ranks = session.spec, session.ranks
    if (beta := getattr(spec.loss, "beta", spec.beta)) != spec.beta:
        log.info("loss.beta=%g differs from beta=%g, which is that of J, the objective", beta, spec.beta)
    data = spec.dataset.load(spec.seed)
    tokenizer = spec.model.tokenizer(data)
    rows = tokenised(spec, data, tokenizer, session.pause_alone, session.cache("tokens"))
    ranks.from_first(lambda: write_json(session.directory.data_report, rows.report()))
    sets = sets_of(spec, rows, session.pause_alone)
    session.pause()
    policy = spec.model.load(tokenizer, data)
    with explained(spec.trainer.micro_batch):
        scorer, scored, source = (_sharded if ranks.sharded else _whole)(session, policy, sets)
    if ranks.rank:
        seed_all((spec.draw + 7_919 * ranks.rank) % 2**31)  # dropout draws anew on every rank
    switch(scorer.model, replace(spec.trainer, compile=compiled(session, scorer, scored[0])))
    run = Run(
        session=session,
        scorer=scorer,
        tokenizer=tokenizer,
        train=scored[0],
        held_out=scored[1],
        trainer=sized(session, scorer, scored[0]),
        data_rates=rows.rates(),
    )
    return Ready(run, data, source)


# ------------------------------------------------------------------------------------------------------------ Items


def tokenised(
    spec: Config,
    data: Data,
    tokenizer: Any,
    pause: Callable[[], None] = lambda: None,
    shared: Path | None = None,
) -> Tokenised:
    """The rows of a run as Items, which runs on the same rows find in the folder `shared`. Raises DataError."""
    train, ledger = tokenise(data.train, tokenizer, spec.dataset, pause, shared)
    held_out, held_out_ledger = tokenise(data.held_out, tokenizer, spec.dataset, pause, shared)
    return Tokenised(train, held_out, {"read": data.ledger, "train": ledger, "eval": held_out_ledger})


def sets_of(spec: Config, rows: Tokenised, pause: Callable[[], None] = lambda: None) -> Sets:
    """What this loss trains on and what it is judged by.

    Raises DataError if nothing is left to train on, or the loss needs rewards that the data lack; ConfigError for a
    constraint that cannot act on pairs.
    """
    train, held_out, unused = rows.train, rows.held_out, list[Item]()
    fitted = isinstance(spec.loss, OnCandidates) and spec.loss.rewards == "fitted"
    if spec.loss.unit == "pair" or fitted:  # rewards that all tie give no pair; the ledger counts it as without_pairs
        unused = [item for item in train if not item.pairs]
        train = [item for item in train if item.pairs]
    if not train:
        raise DataError("no pair is left to train on; data_report.json says where the rows went")
    if getattr(spec.loss, "reads_rewards", False):
        _check_rewards(train + held_out)
    if fitted:
        train, held_out = (_fitted(items, spec.loss.ridge, pause) for items in (train, held_out))
    log.info("data: %d rows read, %d to train on, %d held out", rows.ledgers["read"].rows, len(train), len(held_out))
    if any(item.base is None for item in train):
        _check_pairs(spec, bool(held_out))
    if not held_out:
        log.warning("no rows are held out, so there will be no eval/* and no objective/*; see dataset.eval_size")
    return Sets(train, held_out, unused)


def _check_pairs(spec: Config, held_out: bool) -> None:
    """ConfigError for a loss or constraint on what pairs without rewards neither have nor let be sampled."""
    if getattr(spec.loss, "drawn", None) is not None:
        raise ConfigError("loss.weight=candidates on pairs without rewards: use loss=wpo loss.weight=importance")
    for name, constraint in spec.constraint.items():
        if constraint.not_on_pairs:
            raise ConfigError(f"constraint={name} on pairs without rewards: {constraint.not_on_pairs}")
        if getattr(constraint, "kl", None) is not None and not (spec.trainer.samples and held_out):
            raise ConfigError(
                f"constraint.{name}.kl on pairs without rewards is sampled from the policy: set trainer.samples=64 "
                "(prompts held out, each continued once at every evaluation), and hold rows out"
            )


def _check_rewards(items: list[Item]) -> None:
    if bare := [item.source for item in items if item.rewards is None]:
        raise DataError(
            f"the loss needs rewards of every response, and {len(bare)} rows have none ({', '.join(bare[:3])}): "
            "choose another loss, such as dpo or rlhf_learned, or data with scored responses (such as bandit)"
        )


def _fitted(items: list[Item], ridge: float, pause: Callable[[], None]) -> list[Item]:
    with Progress(len(items), 0, "fit rewards", quiet=len(items) < 1000) as bar:

        def tell(done: int) -> None:
            pause()
            bar.update(done)

        return add_fitted(items, ridge, tell)


# ---------------------------------------------------------------------------------------------------------- the model


def sized(session: Session, scorer: Scorer, scored: Scored) -> Trainer:
    """The trainer with micro-batches for which the GPU has room; elsewhere, and where a number is set, as it is.

    The same on all ranks and, by micro_batch.json, after a resume.
    """
    spec, ranks, file = session.spec, session.ranks, session.directory.micro_batch
    if spec.trainer.tokens_per_micro_batch or session.device.type != "cuda":
        return spec.trainer
    tokens = ranks.from_first(lambda: read_json(file)["tokens"] if file.is_file() else None)
    if tokens is None:
        tokens = Probe(scorer, scored, session.autocast, ranks).tokens(spec.optimizer.states)
        ranks.from_first(lambda: write_json(file, {"tokens": tokens}))
    log.info("micro-batches of at most %d tokens, by the GPU's memory", tokens)
    return replace(spec.trainer, tokens_per_micro_batch=tokens)


def compiled(session: Session, scorer: Scorer, scored: Scored) -> bool:
    """trainer.compile; null where it pays for itself: in long runs on a GPU, of packed trees through decoder layers."""
    trainer = session.spec.trainer
    if trainer.compile is not None:
        return trainer.compile
    able = not scored.padded and trainer.distributed != "fsdp" and has_layers(scorer.model)
    chosen = able and session.device.type == "cuda" and trainer.steps(len(scored.items)) >= COMPILED_FROM
    if chosen:
        log.info("decoder layers are compiled, as the run is long; trainer.compile=false does without")
    return chosen


def _whole(session: Session, policy: Any, sets: Sets) -> tuple[Scorer, list[Scored], str]:
    """The policy under its constraints, and the Items with what it said before any of them: the reference."""
    scorer = Scorer(policy.to(session.device))
    scored, source = _scored(session, scorer, sets)
    scorer.model = constrained(scorer.model, session.spec)
    with torch.no_grad(), session.autocast():
        difference = check_start(scorer, scored[0])
    log.info("step 0: policy and reference are at most %.1e nats apart, by rounding", difference)
    return scorer, scored, source


def _sharded(session: Session, policy: Any, sets: Sets) -> tuple[Scorer, list[Scored], str]:
    """The same on shards: no rank need hold the whole model on its device, so the reference is asked when sharded.

    The constraints stand by then, so the log-probs of one Item must equal those of the model as it was loaded.
    """
    policy.eval()
    witness = min((sets.train[i] for i in asked(session.spec, sets.train)), key=lambda item: item.tokens)
    with torch.no_grad():
        before = one_by_one(policy, [witness])
    scorer = Scorer(constrained(policy, session.spec))
    adapters = {p for name, p in scorer.named_parameters() if "lora_" in name}  # small: whole on every rank, as in ddp
    shard(scorer, decoder_layers(scorer, "trainer.distributed=fsdp needs; use ddp"), adapters, session.device)
    scored, source = _scored(session, scorer, sets)
    with session.autocast():
        check_loaded(scorer, witness, before, scored[0])
    return scorer, scored, source


def constrained(policy: Any, spec: Config) -> Any:
    """The policy wrapped by the constraints; the same on all ranks."""
    seed_all(spec.draw)
    for constraint in spec.constraint.values():
        policy = constraint.wrap(policy)
    return policy


def asked(spec: Config, train: list[Item]) -> list[int]:
    """The Items whose reference is asked for, as indices: all; or those that the run sees, if fewer than half.

    So runs that see most of the data ask for the same, whatever their seed, and find what others computed.
    """
    plan = plan_of(spec.trainer, train, spec.draw)
    seen = plan.visited() | set(sample(len(train), spec.trainer.certificate_items, plan.seed))
    return sorted(seen) if 2 * len(seen) < len(train) else list(range(len(train)))


def _scored(session: Session, scorer: Scorer, sets: Sets) -> tuple[list[Scored], str]:
    """The Items to train on and to hold out with the log-probs of the reference, and where these are from.

    Where all are asked for, what this loss has no use for is too: so every loss asks for the same Items.
    """
    check_lengths(scorer.model, sets.longest())
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
