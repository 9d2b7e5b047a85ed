"""What comes before the first step: rows -> Items -> the reference's log-probs -> the policy under its constraints.

Everything random is seeded here. Long work pauses where a signal may end it, and tells how far it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cdpo.batch import Item
from cdpo.config.schema import Config, Trainer
from cdpo.constraints.early_stop import EarlyStop
from cdpo.data.bradley_terry import add_fitted
from cdpo.data.packing import Scored
from cdpo.data.rows import Data, Ledger
from cdpo.data.tokenise import tokenise
from cdpo.errors import ConfigError, DataError
from cdpo.losses.candidates import OnCandidates
from cdpo.model.layers import decoder_layers, stacks_of, switch
from cdpo.model.logps import Scorer, one_by_one
from cdpo.model.memory import Probe, explained
from cdpo.model.reference import check_loaded, check_start
from cdpo.system.files import read_json, write_json
from cdpo.system.progress import Progress
from cdpo.system.ranks import shard
from cdpo.system.rng import seed_all
from cdpo.training.checks import check_searchable
from cdpo.training.run import Run, drawing_of, plan_of
from cdpo.training.scored import Sets, asked, scored_with_reference
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
    check_searchable(spec, policy, session.device.type)
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

    Raises DataError if nothing is left to train on, or the loss needs rewards that the data lack; ConfigError for what
    a constraint cannot do on such data.
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
    else:
        _check_candidates(spec)
    if not held_out:
        log.warning("no rows are held out, so there will be no eval/* and no objective/*; see dataset.eval_size")
    drawing = drawing_of(spec.constraint, train)
    return Sets(train, held_out, unused, drawing.draw_tokens if drawing else 0)


def _check_pairs(spec: Config, held_out: bool) -> None:
    """ConfigError for a loss or constraint on what pairs without rewards neither have nor let be sampled."""
    if getattr(spec.loss, "drawn", None) is not None:
        raise ConfigError("loss.weight=candidates on pairs without rewards: use loss=wpo loss.weight=importance")
    drawing = [name for name, constraint in spec.constraint.items() if constraint.draws]
    if len(drawing) > 1:
        raise ConfigError(f"constraint={' and '.join(drawing)} draw from the policy, each in its own way: keep one")
    if drawing and spec.trainer.distributed == "fsdp":
        raise ConfigError(
            f"constraint={drawing[0]} on pairs without rewards draws from the policy token by token, for which no rank "
            "has the whole of it: use trainer.distributed=ddp"
        )
    for name, constraint in spec.constraint.items():
        if isinstance(constraint, EarlyStop) and constraint.kl is not None and not (spec.trainer.samples and held_out):
            raise ConfigError(
                f"constraint.{name}.kl on pairs without rewards is sampled from the policy: set trainer.samples=64 "
                "(prompts held out, each continued once at every evaluation), and hold rows out"
            )


def _check_candidates(spec: Config) -> None:
    """ConfigError for options of draws of the policy, where a KL is known without them."""
    for name, constraint in spec.constraint.items():
        for key in ("draws", "draw_every", "draw_tokens"):
            if getattr(constraint, key) != (default := getattr(type(constraint), key)):
                raise ConfigError(
                    f"constraint.{name}.{key}={getattr(constraint, key)} is for pairs without rewards; here the KL is "
                    f"that on the responses of each prompt: leave it at {default}"
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
    """The trainer with micro-batches as they are set, or for which the GPU has room; on a CPU as it is.

    The same on all ranks and, by micro_batch.json, after a resume, whatever is set by then.
    """
    spec, ranks, file = session.spec, session.ranks, session.directory.micro_batch
    if session.device.type != "cuda":
        return spec.trainer
    known = ranks.from_first(lambda: read_json(file)["tokens"] if file.is_file() else None)
    tokens = known or spec.trainer.tokens_per_micro_batch
    if tokens is None:
        most = plan_of(spec.trainer, scored.items, spec.draw).largest_step()
        tokens = Probe(scorer, scored, session.autocast, ranks, most).tokens(spec.states)
    if known is None:
        ranks.from_first(lambda: write_json(file, {"tokens": tokens}))
    log.info("micro-batches of at most %d tokens", tokens)
    return replace(spec.trainer, tokens_per_micro_batch=tokens)


def compiled(session: Session, scorer: Scorer, scored: Scored) -> bool:
    """trainer.compile; null where it pays for itself: in long runs on a GPU, of packed trees through decoder layers."""
    trainer = session.spec.trainer
    if trainer.compile is not None:
        return trainer.compile
    able = not scored.padded and trainer.distributed != "fsdp" and bool(stacks_of(scorer.model))
    chosen = able and session.device.type == "cuda" and trainer.steps(len(scored.items)) >= COMPILED_FROM
    if chosen:
        log.info("decoder layers are compiled, as the run is long; trainer.compile=false does without")
    return chosen


def _whole(session: Session, policy: Any, sets: Sets) -> tuple[Scorer, list[Scored], str]:
    """The policy under its constraints, and the Items with what it said before any of them: the reference."""
    scorer = Scorer(policy.to(session.device))
    scored, source = scored_with_reference(session, scorer, sets)
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
    scored, source = scored_with_reference(session, scorer, sets)
    with session.autocast():
        check_loaded(scorer, witness, before, scored[0])
    return scorer, scored, source


def constrained(policy: Any, spec: Config) -> Any:
    """The policy wrapped by the constraints; the same on all ranks."""
    seed_all(spec.draw)
    for constraint in spec.constraint.values():
        policy = constraint.wrap(policy)
    return policy
