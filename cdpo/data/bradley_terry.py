"""Rewards from preferences: the first stage of RLHF, one free number per response, fitted by maximum likelihood.

Pairs read from files are hard labels (soft ones follow from rewards): a response that never loses has no finite reward
without a ridge. All rows of a prompt share one fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

from cdpo.batch import Item, Pair
from cdpo.errors import DataError


def add_fitted(items: list[Item], ridge: float, tell: Callable[[int], None]) -> list[Item]:
    """The Items with their fitted rewards: one fit per prompt, to the pairs of all its Items.

    `tell` is told how many are done and may raise. Raises DataError, with the first reason and the number of prompts,
    where some have no fit.
    """
    found, problems, done = list(items), [], 0
    order = sorted(range(len(items)), key=lambda i: items[i].prompt)
    prompts = [list(rows) for _, rows in groupby(order, key=lambda i: items[i].prompt)]
    for rows in prompts:
        done += len(rows)
        tell(done)
        whole, places = pooled([items[i] for i in rows])
        try:
            rewards = fit(whole, ridge)
        except DataError as problem:
            problems.append((rows[0], problem))
            continue
        for i, place in zip(rows, places):
            found[i] = replace(items[i], fitted_rewards=[rewards[j] for j in place])
    if problems:
        raise DataError(f"{min(problems)[1]} ({len(problems)} of {len(prompts)} prompts)")
    return found


def pooled(items: list[Item]) -> tuple[Item, list[list[int]]]:
    """Items of one prompt as one, equal responses merged; and where each Item's responses stand in it."""
    known: dict[tuple[int, ...], int] = {}
    places = [[known.setdefault(tuple(response), len(known)) for response in item.responses] for item in items]
    pairs = [
        pair._replace(winner=place[pair.winner], loser=place[pair.loser])
        for item, place in zip(items, places)
        for pair in item.pairs
    ]
    source = items[0].source + f" with {len(items) - 1} more of its prompt" * (len(items) > 1)
    return Item(items[0].prompt, [list(response) for response in known], pairs, None, source), places


def fit(item: Item, ridge: float = 0.0) -> list[float]:
    """Bradley-Terry rewards of the K responses of one Item (nats), by its pairs' mean log-likelihood, less a ridge.

    Responses that no chain of pairs connects cannot be compared: every connected group is fitted alone, by the mean
    over its pairs and with arrays of its size squared, and has mean 0; so has a response without pairs. Raises
    DataError where no maximum exists (Ford 1957), as some response, or a group, never loses to the rest, or where it is
    so flat that float64 cannot tell its place to 1e-3 nats; a ridge bounds both. And where all pairs have weight 0.
    """
    rewards = np.zeros(len(item.responses))
    pairs = [pair for pair in item.pairs if pair.weight > 0]
    if item.pairs and not pairs:
        raise DataError(f"{item.source}: all its pairs have weight 0; leave the row out, or give them weights")
    if not pairs:
        return rewards.tolist()
    connected = defaultdict(list)
    for one, pair in zip(_groups(item, pairs, ridge), pairs):
        connected[one].append(pair)
    for some in connected.values():
        place = {i: n for n, i in enumerate(dict.fromkeys(i for pair in some for i in pair[:2]))}
        local = tuple(pair._replace(winner=place[pair.winner], loser=place[pair.loser]) for pair in some)
        found = _connected(local, len(place), ridge)
        if found is None:
            raise _unbounded(item, "nearly every")
        rewards[list(place)] = found
    return rewards.tolist()


@lru_cache(maxsize=8)  # rows of one hard pair are all the same problem
def _connected(pairs: tuple[Pair, ...], k: int, ridge: float) -> np.ndarray | None:
    """The fit of k responses that the pairs connect; None where float64 cannot place it. [k]"""
    winner, loser, p, weight = (np.array(column) for column in zip(*pairs))
    weight, level = weight / weight.sum(), 1 / k  # `level` fixes the mean

    def value(r: np.ndarray) -> tuple[float, np.ndarray]:
        m = r[winner] - r[loser]
        slope = weight * ((1 - p) * expit(m) - p * expit(-m))  # expit(m) - p, which would round away at p = 1
        gradient = np.bincount(winner, slope, k) - np.bincount(loser, slope, k) + ridge * r + level * r.sum()
        loss = -weight @ (p * log_expit(m) + (1 - p) * log_expit(-m))
        return float(loss + ridge * r @ r / 2 + level * r.sum() ** 2 / 2), gradient

    def hessian(r: np.ndarray) -> np.ndarray:
        m = r[winner] - r[loser]
        curvature = np.bincount(winner * k + loser, weight * expit(m) * expit(-m), k * k).reshape(k, k)
        curvature += curvature.T
        return np.diag(curvature.sum(0) + ridge) - curvature + level

    found = minimize(value, np.zeros(k), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-8}).x
    step = np.full(k, np.inf)
    with suppress(np.linalg.LinAlgError):  # Newton's steps: where preferences are near-certain, a small gradient is
        for _ in range(100):  # no sign of a near maximum
            step = np.linalg.solve(hessian(found), value(found)[1])
            found -= step
            if abs(step).max() < 1e-9:
                break
    return found if abs(step).max() < 1e-3 else None


def _groups(item: Item, pairs: list[Pair], ridge: float) -> np.ndarray:
    """In which connected group of responses each pair is. [P]"""
    k, (winner, loser, p, weight) = len(item.responses), (np.array(column) for column in zip(*pairs))
    losses = np.concatenate([weight * p, weight * (1 - p)])  # mass of wins, from the loser to the winner and back
    ends = (np.concatenate([loser, winner]), np.concatenate([winner, loser]))
    graph = coo_array((losses, ends), shape=(k, k)).tocsr()
    graph.eliminate_zeros()
    count, group = connected_components(graph, connection="weak")
    if not ridge and connected_components(graph, connection="strong")[0] > count:
        raise _unbounded(item, "every")
    return group[winner]


def _unbounded(item: Item, often: str) -> DataError:
    return DataError(
        f"{item.source}: no finite rewards have the highest likelihood, as some responses win {often} comparison; "
        "set loss.ridge=0.01, or take the exact preferences of a bandit"
    )
