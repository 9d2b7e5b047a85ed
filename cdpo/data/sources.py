"""Preference data, a file of one's own or a data set of the hub: read, validated, split. Sees text, never tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any, Literal

from cdpo.batch import Base
from cdpo.data.formats import ADAPTERS, FORMATS, check, detect
from cdpo.data.labels import bradley_terry, deviation, drawn
from cdpo.data.records import Record, read, require_file
from cdpo.data.rows import BadRow, Data, Dataset, Ledger, Row, refuse_unused, report, require_positive
from cdpo.errors import ConfigError, DataError

log = logging.getLogger(__name__)
LOOK_AT = 200  # records that vote on the format


@dataclass(frozen=True, kw_only=True)
class Source(Dataset):
    """What files and hub data sets share: which rows are refused, and which are held out. A subclass has `parts`."""

    format: Literal["auto", "columns", "transcripts", "messages", "scored"] = "auto"
    eval_size: float = 0.1  # held out of the training rows by the run's seed: a share below 1, else a number of rows
    max_rows: int | None = None  # read no more than these, per file or split
    max_eval_rows: int | None = None  # evaluate on no more than these, drawn by the run's seed
    max_chars: int = 1_000_000  # characters of a row
    on_malformed: Literal["error", "drop"] = "error"  # no JSON, wrong type, missing key, no finite number, ...
    on_empty: Literal["error", "drop"] = "error"  # no character in the prompt or a response; white space is text
    on_identical: Literal["error", "drop"] = "error"  # chosen == rejected
    on_long: Literal["error", "drop"] = "error"  # more than max_chars
    on_contradiction: Literal["warn", "error"] = "warn"  # A > B and B > A for one prompt
    labels: Literal["bradley_terry", "hard", "sampled"] | None = None  # from rewards; null: bradley_terry
    draws: int | None = None  # of the label of each training pair, if sampled
    reward_scale: float | Literal["standard"] = 1.0  # multiplies rewards; standard: 1 / their deviation in a prompt
    base: Base | None = None  # what responses with rewards stand for, as in cdpo.batch; null: uniform

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "max_rows", "max_eval_rows", "max_chars", "draws")
        if self.labels != "sampled":
            refuse_unused(self, ["draws"], "without dataset.labels=sampled")
        elif self.draws is None:
            raise ConfigError("dataset.labels=sampled needs a number of draws of each label, such as dataset.draws=1")
        if self.reward_scale != "standard" and not 0 < self.reward_scale < math.inf:
            raise ConfigError(f"dataset.reward_scale={self.reward_scale}: choose a finite number above 0, or standard")
        if not 0 <= self.eval_size < math.inf or (self.eval_size >= 1 and self.eval_size != int(self.eval_size)):
            raise ConfigError(f"dataset.eval_size={self.eval_size}: choose a share below 1, or a whole number of rows")

    def title(self) -> str:
        """What messages about all rows call them."""
        return type(self).__name__

    def parts(self) -> Iterable[tuple[str, Iterable[Record]]]:
        """The training rows, and the held-out ones if they lie apart: a name for messages, and the records.

        Raises ConfigError if there are none to be read.
        """
        raise NotImplementedError

    def load(self, seed: int) -> Data:
        """Training and held-out rows. Raises DataError that names every row that cannot be used, ConfigError."""
        ledger = Ledger()
        train, *held_out = [self._rows(name, records, ledger) for name, records in self.parts()]
        assert len(held_out) <= 1, "parts() has training rows, and held-out ones at most"
        return self._finish(train, held_out[0] if held_out else None, ledger, seed)

    def _policy(self, kind: str) -> str:
        return "error" if kind == "file" else str(getattr(self, option(kind)))  # nobody knows what a cut file held

    def _rows(self, name: str, records: Iterable[Record], ledger: Ledger) -> list[Row]:
        """The usable rows of one file or split. Raises DataError that lists the others, unless they may be dropped."""
        records = islice(records, self.max_rows)
        first = _until_objects(records, LOOK_AT)
        if not first:
            raise DataError(f"{name}: 0 rows")
        form = self._format(name, [record.value for record in first if isinstance(record.value, dict)])
        rows, bad = [], []
        for record in chain(first, records):  # which are never all in memory
            try:
                rows.append(self._row(record, form))
                ledger.keep()
            except BadRow as problem:
                bad.append((record.source, problem))
                ledger.drop(problem.kind, record.source)
        self._judge(name, bad)
        return rows

    def _format(self, name: str, objects: list[dict[str, Any]]) -> str:
        if self.format != "auto":
            return self.format
        form = detect(objects) if objects else "columns"
        log.info("%s: format %s (dataset.format=... forces another)", name, form)
        return form

    def _row(self, record: Record, form: str) -> Row:
        if isinstance(record.value, BadRow):
            raise record.value
        return check(FORMATS[form](record.source, record.value), self.max_chars)

    def _judge(self, name: str, bad: list[tuple[str, BadRow]]) -> None:
        fatal = [(source, problem) for source, problem in bad if self._policy(problem.kind) == "error"]
        if fatal:
            options = sorted({f"dataset.{option(problem.kind)}=drop" for _, problem in fatal if problem.kind != "file"})
            advice = f"mend the rows, or drop and count them with {' '.join(options)}" if options else ""
            raise report(name, fatal, advice)
        for source, problem in bad[:5]:
            log.warning("%s: dropped: %s", source, problem)

    def _finish(self, train: list[Row], held_out: list[Row] | None, ledger: Ledger, seed: int) -> Data:
        name = self.title()
        ledger.check_drops(name, self.max_drop_fraction)
        note(train + (held_out or []), ledger)
        for kind in ("duplicates", "contradictions", "whitespace_only"):
            tally = ledger.notes[kind]
            if tally.count:
                log.warning("%s: %d %s: %s", name, tally.count, kind.replace("_", " "), ", ".join(tally.rows))
        if self.on_contradiction == "error" and ledger.notes["contradictions"].count:
            raise DataError(f"{name}: contradictions: {', '.join(ledger.notes['contradictions'].rows)}")
        if held_out is None:
            train, held_out = split(name, train, self.eval_size, seed)
        scale = self._scale(train, held_out)  # judges the settings for rewards, too
        train = [self._scored(row, scale, seed) for row in train]
        held_out = [self._scored(row, scale) for row in held_out]
        for row in train + held_out:
            if not row.pairs:
                ledger.note("without_pairs", row.source)
        if self.max_eval_rows is not None and len(held_out) > self.max_eval_rows:
            some = Random(f"evaluated {seed}").sample(range(len(held_out)), self.max_eval_rows)
            held_out = [held_out[i] for i in sorted(some)]
        labels = "hard" if train[0].rewards is None else self.labels or "bradley_terry"
        log.info("%s: labels %s, rewards times %g, base %s", name, labels, scale, train[0].base)
        return Data(train, held_out, ledger, labels=labels, reward_scale=scale)

    def _scale(self, train: list[Row], held_out: list[Row]) -> float:
        """What rewards are multiplied by. ConfigError for a setting that these rows do not use; DataError."""
        known = {row.rewards is not None for row in train + held_out}
        if len(known) > 1:
            raise DataError(f"{self.title()}: rows to train on and rows held out must both have rewards, or neither")
        if known == {False}:
            refuse_unused(self, ("labels", "reward_scale", "base"), "on pairs without rewards")
            return 1.0
        if self.labels == "hard":
            log.warning("dataset.labels=hard: unconstrained, DPO has no finite optimum, so its gap says little")
        if self.reward_scale != "standard":
            return self.reward_scale
        if not (found := deviation(train)):
            raise DataError(f"{self.title()}: dataset.reward_scale=standard, but all rewards of each prompt are equal")
        return 1 / found

    def _scored(self, row: Row, scale: float, seed: int | None = None) -> Row:
        """The row with scaled rewards and the pairs that follow from them; labels are drawn where there is a seed."""
        if row.rewards is None:
            return row
        if self.base == "enumerated" and len(set(row.responses)) < len(row.responses):
            raise DataError(f"{row.source}: dataset.base=enumerated, but a response stands there twice; keep one")
        rewards, pairs = [scale * reward for reward in row.rewards], row.pairs
        if self.labels != "hard":
            pairs = [pair for pair in bradley_terry(rewards) if len({row.responses[k] for k in pair[:2]}) == 2]
        if self.draws is not None and seed is not None:
            pairs = drawn(pairs, self.draws, Random(f"labels {seed} {row.source}"))
        return replace(row, rewards=rewards, pairs=pairs, base=self.base or "uniform")


@dataclass(frozen=True, kw_only=True)
class Jsonl(Source):
    """A file of one's own: .jsonl, .json (a list of objects) or .parquet, each also .gz."""

    path: str
    eval_path: str | None = None  # a file of held-out rows; null holds out eval_size of the training rows

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_path is not None:
            refuse_unused(self, ["eval_size"], "with dataset.eval_path, which names the held-out rows")

    def title(self) -> str:
        return Path(self.path).name

    def parts(self) -> list[tuple[str, Iterator[Record]]]:
        """The file, and that of held-out rows. Raises ConfigError if one is missing."""
        paths = [Path(path) for path in (self.path, self.eval_path) if path is not None]
        found = [(path.name, self.records(path)) for path in paths]
        for path in paths:
            require_file(path)
        return found

    def records(self, path: Path) -> Iterator[Record]:
        """What a file holds. Raises ConfigError, at once, for a type of file that is not known."""
        return read(path)


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """A data set of the Hugging Face hub, or a local folder with its files."""

    name: str  # hub id or folder
    config: str | None = None
    data_dir: str | None = None  # folder within the data set
    revision: str | None = None  # branch, tag or commit
    split: str = "train"
    eval_split: str | None = None  # null holds out eval_size of the training rows
    adapter: Literal["none", "shp", "ultrafeedback"] = "none"  # columns that are in none of the formats

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_split is not None:
            refuse_unused(self, ["eval_size"], "with dataset.eval_split, which names the held-out rows")

    def title(self) -> str:
        return self.name

    def parts(self) -> list[tuple[str, Iterator[Record]]]:
        """The splits. Rows are named "split:number", from 1; reading raises DataError if the data set cannot be had."""
        splits = [split for split in (self.split, self.eval_split) if split is not None]
        return [(f"{self.name}[{split}]", self._records(split)) for split in splits]

    def _records(self, part: str) -> Iterator[Record]:
        from datasets import load_dataset

        try:
            table = load_dataset(self.name, self.config, data_dir=self.data_dir, split=part, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:  # not found, gated, offline, no such split, bad files
            raise DataError(
                f"{self.name}[{part}]: cannot be loaded ({type(error).__name__}: {error}); check dataset.name, "
                "dataset.config, dataset.split and the network, or save the files and use dataset=jsonl"
            ) from error
        for number, columns in enumerate(table, 1):
            yield self._adapt(f"{part}:{number}", columns)

    def _adapt(self, source: str, columns: dict[str, Any]) -> Record:
        try:
            return Record(source, ADAPTERS[self.adapter](columns))
        except BadRow as problem:
            return Record(source, problem)


def _until_objects(records: Iterator[Record], count: int) -> list[Record]:
    """The first records, until so many of them are objects, or all."""
    taken: list[Record] = []
    while count and (record := next(records, None)):
        taken.append(record)
        count -= isinstance(record.value, dict)
    return taken


def option(kind: str) -> str:
    """The setting that decides about bad rows of this kind."""
    return f"on_{kind}" if kind in ("empty", "identical", "long") else "on_malformed"


def note(rows: list[Row], ledger: Ledger) -> None:
    """Count preferences that repeat or contradict an earlier one, and responses of white space only."""
    seen: dict[int, str] = {}
    for row in rows:
        for i, j, *_ in row.pairs:
            key, reverse = ((str(row.prompt), row.responses[a], row.responses[b]) for a, b in ((i, j), (j, i)))
            for kind, first in (("duplicates", seen.get(hash(key))), ("contradictions", seen.get(hash(reverse)))):
                if first is not None:
                    ledger.note(kind, f"{row.source} and {first}")
            seen.setdefault(hash(key), row.source)
        if any(text.isspace() for text in row.responses):
            ledger.note("whitespace_only", row.source)


def split(name: str, rows: list[Row], size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, in their order. Rows of one prompt stay together: no prompt is seen in both."""
    if size == 0:
        return rows, []
    wanted = int(size) if size >= 1 else max(1, round(size * len(rows)))
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(str(row.prompt), []).append(i)
    shuffled = list(groups.values())
    Random(f"held out {seed}").shuffle(shuffled)
    held_out: set[int] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not 0 < len(held_out) < len(rows):
        raise DataError(
            f"{name}: dataset.eval_size={size:g} holds out {len(held_out)} of {len(rows)} rows; "
            "choose another, or 0 to hold out none (rows of one prompt stay together)"
        )
    return [r for i, r in enumerate(rows) if i not in held_out], [r for i, r in enumerate(rows) if i in held_out]
