"""From rewards to preferences: how sure each label is. A scored row has rewards only; its pairs are made here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from random import Random

from cdpo.batch import Pair
from cdpo.data.rows import Row


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def bradley_terry(rewards: Sequence[float]) -> list[Pair]:
    """All unordered pairs, the better response first, with p = sigmoid(r_i - r_j); 1/2 for a tie.

    Bradley and Terry 1952. The diagonal y1 = y2 teaches nothing.
    """
    best_first = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    return [Pair(i, j, sigmoid(rewards[i] - rewards[j])) for i, j in combinations(best_first, 2)]


def drawn(pairs: Iterable[Pair], draws: int, random: Random) -> list[Pair]:
    """Each pair with the share of so many independent draws of its label that its winner won."""
    wins = ((pair, sum(random.random() < pair.preference for _ in range(draws))) for pair in pairs)
    return [pair._replace(preference=won / draws) for pair, won in wins]


def deviation(rows: Iterable[Row]) -> float:
    """Standard deviation of the rewards within their prompts: the root of the mean variance of a scored row."""
    known = [row.rewards for row in rows if row.rewards is not None]
    variances = [sum((r - sum(some) / len(some)) ** 2 for r in some) / len(some) for some in known]
    return math.sqrt(sum(variances) / len(variances))
