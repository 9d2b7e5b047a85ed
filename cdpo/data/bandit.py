"""The bandit: prompts whose K responses all have known rewards, so that every expectation is an exact sum."""

from __future__ import annotations

import itertools
import math
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from cdpo.batch import Pair
from cdpo.data.labels import bradley_terry
from cdpo.data.records import read_object
from cdpo.data.rows import (
    BadRow,
    Data,
    Dataset,
    Ledger,
    Row,
    did_you_mean,
    is_number,
    misspelt,
    refuse_unused,
    report,
    require_positive,
)
from cdpo.errors import ConfigError

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
GENERATED = ("prompts", "alphabet", "length", "reward_scale", "reference_scale", "reference_alignment", "world_seed")
MAX_PAIRS = 1_000_000  # held in memory; beyond it a world is no longer a toy
OUTSIDE = 30.0  # nats below the least likely candidate: symbols that a prompt does not offer


@dataclass(frozen=True)
class World:
    """X prompts with K responses each. `table` is [symbols + X, symbols], reference logits given the last token."""

    prompts: list[str]
    responses: list[list[str]]  # [X][K]
    rewards: list[list[float]]  # [X][K]
    reference: list[list[float]]  # [X][K] probabilities, each row sums to 1
    table: list[list[float]]
    symbols: list[str]


@dataclass(frozen=True, kw_only=True)
class Bandit(Dataset):
    """Bradley-Terry preferences p(i over j) = sigmoid(r_i - r_j) over pairs y1, y2 drawn independently, y1 != y2.

    exact: every pair once, labelled with p and weighted with its sampling mass. sampled: `pairs` draws, hard labels.
    """

    prompts: int = 16
    alphabet: int = 8  # letters
    length: int = 1  # letters per response: K = alphabet ** length
    reward_scale: float = 1.5  # standard deviation of the rewards, in nats of Bradley-Terry log-odds
    reference_scale: float = 1.0  # standard deviation of the reference's logits; 0 is uniform
    reference_alignment: float = 0.0  # correlation of those logits with the rewards, in [-1, 1]; length=1 only
    world_seed: int = 0  # the world, apart from the run's seed, so that seeds compare on one world
    preferences: Literal["exact", "sampled"] = "exact"
    pairs: int | None = None  # draws, if sampled
    eval_pairs: int | None = None  # draws of an independent held-out sample, if sampled; null: the exact preferences
    label_noise: float = 0.0  # share of training labels that are flipped, below 1/2; held-out labels are clean
    sampling: Literal["reference", "uniform"] = "reference"  # where y1 and y2 come from
    path: str | None = None  # JSON file with prompts, responses, rewards and perhaps reference_logits

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unused(self, ("chat_template",), "on plain text")
        require_positive(self, "prompts", "length", "pairs", "eval_pairs")
        if not 2 <= self.alphabet <= len(LETTERS):
            raise ConfigError(f"dataset.alphabet={self.alphabet}: choose 2 to {len(LETTERS)}")
        if self.path is not None:
            refuse_unused(self, GENERATED, "with dataset.path, which brings its own world")
        if self.preferences == "exact":
            refuse_unused(self, ("pairs", "eval_pairs"), "with dataset.preferences=exact, which takes every pair")
        elif self.pairs is None:
            raise ConfigError("dataset.preferences=sampled needs a number of draws, such as dataset.pairs=10000")
        for name in ("reward_scale", "reference_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"dataset.{name}={getattr(self, name)}: choose a finite number, 0 or more")

        if not -1 <= self.reference_alignment <= 1:
            raise ConfigError(f"dataset.reference_alignment={self.reference_alignment}: choose it in [-1, 1]")
        if self.reference_alignment and self.length > 1:
            raise ConfigError("dataset.reference_alignment needs dataset.length=1: longer responses share their logits")
        if not 0 <= self.label_noise < 0.5:
            raise ConfigError(f"dataset.label_noise={self.label_noise}: choose a share of flips in [0, 0.5)")

    def load(self, seed: int) -> Data:
        """Rows of one prompt with all K responses, their rewards and pairs. `seed` draws preferences, not the world.

        Raises DataError for a world file that cannot be used, ConfigError for a world with too many pairs.
        """
        world = self._generate() if self.path is None else read_world(Path(self.path))
        self._check_size(len(world.prompts), max(map(len, world.responses)))
        exact = [self._exact_pairs(world, x) for x in range(len(world.prompts))]
        held_out = exact
        train = [[flipped(pair, self.label_noise) for pair in pairs] for pairs in exact]
        if self.pairs is not None:
            train = sample(train, self.pairs, Random(f"train pairs {seed}"))
        if self.eval_pairs is not None:
            held_out = sample(exact, self.eval_pairs, Random(f"eval pairs {seed}"))
        ledger = Ledger(rows=len(exact), kept=len(exact))
        rows = [self._rows(world, pairs) for pairs in (train, held_out)]
        labels = "bradley_terry" if self.preferences == "exact" else "sampled"
        return Data(rows[0], rows[1], ledger, world.table, world.symbols, world.prompts, labels)

    def _generate(self) -> World:
        self._check_size(self.prompts, self.alphabet**self.length)  # before it is enumerated
        letters = list(LETTERS[: self.alphabet])
        logits, drawn = Random(f"logits {self.world_seed}"), Random(f"rewards {self.world_seed}")
        table = [
            [self.reference_scale * logits.gauss(0, 1) for _ in letters] for _ in range(self.alphabet + self.prompts)
        ]
        if self.length == 1:  # nothing follows a letter; a weight that means nothing should have no norm to decay
            table[: self.alphabet] = [[0.0] * self.alphabet for _ in letters]
        words = list(itertools.product(range(self.alphabet), repeat=self.length))
        rewards = [[drawn.gauss(0, 1) for _ in words] for _ in range(self.prompts)]  # standard normal
        if right := self.reference_alignment:
            rest = math.sqrt(1 - right**2)
            for row, aim in zip(table[self.alphabet :], rewards):
                row[:] = [rest * logit + right * self.reference_scale * z for logit, z in zip(row, aim)]
        return World(
            prompts=[f"p{x:0{max(2, len(str(self.prompts - 1)))}d} " for x in range(self.prompts)],
            responses=[["".join(letters[i] for i in word) for word in words]] * self.prompts,
            rewards=[[self.reward_scale * z for z in row] for row in rewards],
            reference=[[chain(table, self.alphabet + x, word) for word in words] for x in range(self.prompts)],
            table=table,
            symbols=letters,
        )

    def _check_size(self, prompts: int, k: int) -> None:
        if prompts * k * (k - 1) // 2 > MAX_PAIRS:
            raise ConfigError(
                f"{prompts} prompts x {k} responses have more than {MAX_PAIRS:,} pairs; "
                "choose fewer dataset.prompts, or a smaller dataset.alphabet or dataset.length"
            )

    def _exact_pairs(self, world: World, x: int) -> list[Pair]:
        """All unordered pairs of prompt x, the better response first; the diagonal y1 = y2 teaches nothing."""
        k = len(world.rewards[x])
        mass = world.reference[x] if self.sampling == "reference" else [1 / k] * k
        pairs = [
            pair._replace(weight=2 * mass[pair.winner] * mass[pair.loser] / len(world.prompts))
            for pair in bradley_terry(world.rewards[x])
        ]
        return [pair for pair in pairs if pair.weight > 0]  # what underflows is never sampled

    def _rows(self, world: World, pairs: list[list[Pair]]) -> list[Row]:
        name = Path(self.path).name if self.path else "bandit"
        return [
            Row(f"{name}:{x + 1}", prompt, world.responses[x], pairs[x], world.rewards[x], False, "enumerated")
            for x, prompt in enumerate(world.prompts)
        ]


def flipped(pair: Pair, share: float) -> Pair:
    """The pair with that share of its labels flipped: p -> (1 - share) p + share (1 - p)."""
    return pair._replace(preference=(1 - share) * pair.preference + share * (1 - pair.preference))


def sample(exact: list[list[Pair]], n: int, random: Random) -> list[list[Pair]]:
    """n draws from the exact preferences of all prompts, hard labels, merged: weight = count."""
    flat = [(x, pair) for x, pairs in enumerate(exact) for pair in pairs]
    draws = random.choices(flat, weights=[pair.weight for _, pair in flat], k=n)
    counts = Counter(
        (x, pair.winner, pair.loser) if random.random() < pair.preference else (x, pair.loser, pair.winner)
        for x, pair in draws
    )
    merged: list[list[Pair]] = [[] for _ in exact]
    for (x, winner, loser), count in sorted(counts.items()):
        merged[x].append(Pair(winner, loser, 1.0, float(count)))
    return merged


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    mass = [math.exp(z - top) for z in logits]
    total = sum(mass)
    return [m / total for m in mass]


def chain(table: list[list[float]], context: int, word: Sequence[int]) -> float:
    """Probability of a word, letter by letter, each given the one before; the first given `context`."""
    p = 1.0
    for letter in word:
        p *= softmax(table[context])[letter]
        context = letter
    return p


def read_world(path: Path) -> World:
    """A world from JSON: prompts [X], responses [K] or [X][K], rewards [X][K], reference_logits [X][K] (else uniform).

    Raises DataError that names each entry which cannot be used.
    """
    value = read_object(path)
    bad = list(_problems(value))
    if bad:
        raise report(path.name, [(f"{path.name}: {where}", problem) for where, problem in bad])
    prompts, rewards = value["prompts"], [[float(reward) for reward in row] for row in value["rewards"]]
    responses = _per_prompt(value["responses"], len(prompts))
    logits = value.get("reference_logits") or [[0.0] * len(row) for row in rewards]
    symbols = list(dict.fromkeys(itertools.chain.from_iterable(responses)))  # distinct, in order
    table = [[0.0] * len(symbols) for _ in symbols]  # a response is one symbol: nothing follows it
    for names, row in zip(responses, logits):
        known = dict(zip(names, row))
        table.append([float(known.get(symbol, min(row) - OUTSIDE)) for symbol in symbols])
    return World(prompts, responses, rewards, [softmax(row) for row in logits], table, symbols)


def _per_prompt(responses: list[Any], n: int) -> list[list[str]]:
    return [responses] * n if isinstance(responses[0], str) else responses


def _problems(value: dict[str, Any]) -> Iterator[tuple[str, BadRow]]:
    """What keeps `value` from being a world: entry and reason."""
    needed, optional = ("prompts", "responses", "rewards"), ("reference_logits",)
    for key in needed:
        if not isinstance(value.get(key), list) or not value[key]:
            yield key, BadRow("key", f"must be a non-empty list{misspelt(key, value)}")
    for key in value.keys() - {*needed, *optional}:
        yield key, BadRow("key", f"unknown key{did_you_mean(key, (*needed, *optional))}")
    if not all(isinstance(value.get(key), list) and value[key] for key in needed):
        return
    n = len(value["prompts"])
    yield from _problems_of_texts("prompts", value["prompts"], least=1)
    per_prompt = _per_prompt(value["responses"], n)
    if len(per_prompt) != n:
        yield "responses", BadRow("length", f"{len(per_prompt)} lists for {n} prompts; give one list for each, or one")
    for x, texts in enumerate(per_prompt if per_prompt[0] is not value["responses"] else per_prompt[:1]):
        yield from _problems_of_texts(f"responses[{x}]", texts, least=2)
    for key in ("rewards", "reference_logits"):
        if value.get(key) is not None:
            yield from _problems_of_numbers(key, value[key], per_prompt)


def _problems_of_texts(where: str, texts: Any, least: int) -> Iterator[tuple[str, BadRow]]:
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        yield where, BadRow("type", "must be a list of non-empty strings")
    elif len(texts) < least:
        yield where, BadRow("length", f"needs at least {least} entries")
    elif len(set(texts)) < len(texts):
        yield where, BadRow("identical", f"holds {next(t for t in texts if texts.count(t) > 1)!r} twice; keep one")


def _problems_of_numbers(key: str, rows: Any, responses: list[Any]) -> Iterator[tuple[str, BadRow]]:
    if not isinstance(rows, list) or len(rows) != len(responses):
        yield key, BadRow("length", f"must be a list of {len(responses)} lists, one for each prompt")
        return
    for x, (row, texts) in enumerate(zip(rows, responses)):
        if not isinstance(row, list) or not all(map(is_number, row)):
            yield f"{key}[{x}]", BadRow("type", "must be a list of finite numbers")
        elif isinstance(texts, list) and len(row) != len(texts):
            yield f"{key}[{x}]", BadRow("length", f"{len(row)} numbers for {len(texts)} responses; give one for each")
