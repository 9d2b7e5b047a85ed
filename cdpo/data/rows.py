"""Rows as read, before tokenisation, and the ledger of what became of them. Reads no file and loads no model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal

from cdpo.batch import Base, Pair
from cdpo.errors import ConfigError, DataError

SHOWN = 20  # row names per kind, in messages and in data_report.json
NOTES = (  # what can befall a row besides being dropped
    "cut_rows",  # whose prompt or some response was cut
    "cut_prompts",
    "cut_responses",
    "lost_eos",
    "boundary_mismatches",
    "special_tokens",
    "duplicates",
    "contradictions",
    "whitespace_only",
    "without_pairs",
)


@dataclass(frozen=True)
class Row:
    """One prompt with its K >= 2 responses, as text."""

    source: str  # where it came from, "data.jsonl:4"
    prompt: str | list[dict[str, str]]  # text, or chat messages with role and content
    responses: list[str]  # K texts
    pairs: list[Pair]  # indices into responses; empty where all rewards tie
    rewards: list[float] | None = None  # [K], where the data set knows them
    complete: bool = True  # open text that ends: it gets an EOS; False for the responses of a bandit
    base: Base | None = None  # what stands for the reference on the responses; None: uniform where rewards are known

    def texts(self) -> list[str]:
        """Every text of the row: of the prompt or its messages, then the responses."""
        prompt = [self.prompt] if isinstance(self.prompt, str) else [message["content"] for message in self.prompt]
        return prompt + self.responses


class BadRow(ValueError):
    """A row that cannot be used: its kind, and what is wrong and what to do in one line."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.end = 0  # where its text ends, for a reader that goes on


@dataclass
class Tally:
    """How often something happened, and to which rows (the first 20)."""

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, source: str) -> None:
        self.count += 1
        if len(self.rows) < SHOWN and source not in self.rows:
            self.rows.append(source)


@dataclass
class Ledger:
    """What became of every row: rows == kept + dropped, always. `notes` count what befell them besides."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)  # by kind
    notes: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in NOTES})
    lengths: dict[str, float] = field(default_factory=dict)  # tokens: mean and max of prompt, chosen, rejected

    def keep(self) -> None:
        self.rows += 1
        self.kept += 1

    def drop(self, kind: str, source: str) -> None:
        self.rows += 1
        self.dropped.setdefault(kind, Tally()).add(source)

    def note(self, kind: str, source: str) -> None:
        self.notes[kind].add(source)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and names, for data_report.json."""
        dropped = {kind: asdict(tally) for kind, tally in self.dropped.items()}
        notes = {kind: asdict(tally) for kind, tally in self.notes.items()}
        return {"rows": self.rows, "kept": self.kept, "dropped": dropped, **notes, "lengths": dict(self.lengths)}

    def check_drops(self, name: str, max_fraction: float) -> None:
        """Raise DataError when nothing is left, or when more than `max_fraction` of the rows were dropped."""
        lost = self.rows - self.kept
        if self.rows and (self.kept == 0 or lost > max_fraction * self.rows):
            kinds = "; ".join(f"{kind}: {t.count} ({', '.join(t.rows[:5])})" for kind, t in self.dropped.items())
            raise DataError(
                f"{name}: {lost} of {self.rows} rows dropped, more than dataset.max_drop_fraction={max_fraction:g} "
                f"allows or leaving none ({kinds}); mend the rows, raise the token limits, or raise that fraction"
            )


@dataclass(frozen=True)
class Data:
    """What a data set yields. The table, symbols and prompts are for the tabular model, known to a bandit only."""

    train: list[Row]
    held_out: list[Row]
    ledger: Ledger  # of reading; tokenisation keeps its own
    table: list[list[float]] | None = None  # [symbols + prompts, symbols] reference logits; row = last token seen
    symbols: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    labels: str = "given"  # of the training pairs: bradley_terry, sampled or hard; given: as the data set made them
    reward_scale: float = 1.0  # by which the rewards were multiplied when they were read


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a data set extends: the settings of tokenisation. It adds `load(seed)`, which returns `Data`."""

    max_prompt_tokens: int = 512  # longer prompts lose their beginning, alike for all responses
    max_response_tokens: int = 512  # longer responses lose their end, and get no EOS
    chat_template: Literal["own", "plain"] = "own"  # the tokenizer's, or Human/Assistant turns as plain text
    on_special_tokens: Literal["warn", "drop", "error"] = "warn"  # a response that spells a special token
    max_mismatch_fraction: float = 1.0  # fail above this share of rows whose joint tokenisation differs
    max_drop_fraction: float = 0.1  # fail above this share of dropped rows

    def __post_init__(self) -> None:
        require_positive(self, "max_prompt_tokens", "max_response_tokens")
        for name in ("max_mismatch_fraction", "max_drop_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"dataset.{name}={getattr(self, name)}: choose a share between 0 and 1")


def require_positive(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is None or at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"dataset.{name}={value}: choose at least 1")


def refuse_unused(config: Any, names: Iterable[str], because: str) -> None:
    """Raise ConfigError when a named field was moved from its default although nothing would read it."""
    defaults = {f.name: f.default for f in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"dataset.{name}={getattr(config, name)} has no effect {because}; leave it out")


def report(name: str, bad: list[tuple[str, BadRow]], advice: str = "") -> DataError:
    """One error that lists the first 20 bad rows, by source, and their total."""
    lines = [f"  {source}: {problem} [{problem.kind}]" for source, problem in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    count = f"{len(bad)} row{'s' * (len(bad) > 1)}"
    return DataError("\n".join([f"{name}: {count} cannot be used", *lines, *([advice] if advice else [])]))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """For a name that nobody knows: "; did you mean 'chosen'?", or nothing where no known name is near."""
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def misspelt(wanted: str, present: Iterable[str]) -> str:
    """For a name that is missing: "; rename 'choosen'", or nothing where no present name is near."""
    near = get_close_matches(wanted, [name for name in present if name != wanted], n=1)
    return f"; rename {near[0]!r}" if near else ""


def is_number(value: Any) -> bool:
    """Finite and a number; JSON's true and false are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1e300  # a larger one is no float
    return isinstance(value, float) and math.isfinite(value)
