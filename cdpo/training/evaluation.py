"""What a policy makes of the held-out Items, and what it writes when it is asked to."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdpo.batch import Item, Logps
from cdpo.losses.loss import check_finite, per_unit, unit_weight
from cdpo.measure.gaussian_view import gaussian_view, histograms, summarise
from cdpo.measure.objective import attained, effective_sample_size, objective, to_bradley_terry
from cdpo.measure.objective import means as mean_objective
from cdpo.measure.pairs import add_kl, add_pair_metrics, correct
from cdpo.model.logps import Statistics
from cdpo.model.sampling import sampled_kl
from cdpo.system.metrics import Means
from cdpo.training.draws import continued
from cdpo.training.run import Run


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: numbers, histograms over the pairs; where rewards are known rows of each prompt.

    And a row per candidate: its reward, and what policy and reference make of it on the prompt's candidates, nats.
    """

    metrics: dict[str, float]
    prompts: list[dict[str, Any]]
    candidates: list[dict[str, Any]]
    histograms: dict[str, Any]


def evaluate(run: Run) -> Evaluation:
    """Means over all held-out Items in eval mode, named eval/...; may be interrupted between batches (Preempted).

    The batches are dealt to the ranks; all ranks then make the same of all log-probs, as one process would.

    eval/rewards/accuracies_stderr is the standard error over pairs of the accuracy; eval/gaussian/* look at the pairs
    as `cdpo.measure.gaussian_view` does; objective/* say what RLHF makes of the policy, where the Items have rewards.
    """
    scored, tables = run.held_out, _Tables()
    if not scored.items:
        return Evaluation({}, [], [], {})
    run.scorer.eval()

    def work(indices: tuple[int, ...]) -> Tensor:
        with torch.no_grad(), run.autocast():
            sums, statistics = run.scorer(scored.batch(indices), statistics=True)
        return torch.stack([sums, *(one.double() for one in statistics)])

    portions = scored.portions(run.trainer.micro_batch)
    for indices, found in zip(portions, run.ranks.mapped(portions, work)):
        run.session.pause()
        policy, *rest = found.to(scored.device)
        with torch.no_grad():
            logps = scored.batch(indices).logps(policy, **run.context())
            check_finite(logps)
            tables.add(run, logps, Statistics(*rest))
    with torch.no_grad():
        tables.add_loss_of_all(run)
    return tables.summarised()


class _Tables:
    """What is known of each pair and each prompt, batch by batch, until it is summed up."""

    def __init__(self) -> None:
        self.means = Means()
        self.pairs: dict[str, list[Tensor]] = {}
        self.prompts: dict[str, list[Tensor]] = {}
        self.candidates: list[dict[str, Any]] = []
        self.sources: list[str] = []  # of the prompts
        self.parts: list[Logps] = []  # where the loss must see them in one piece

    def add(self, run: Run, logps: Logps, statistics: Statistics) -> None:
        if getattr(run.loss, "whole_steps", False):
            self.parts.append(logps)
        else:
            self.means.add("loss", per_unit(run.loss, logps), unit_weight(run.loss, logps))
        add_pair_metrics(self.means, logps, statistics, run.reward_beta)
        add_kl(self.means, logps)
        view = gaussian_view(logps.chosen_first(), run.reward_beta)
        _append(self.pairs, {"correct": correct(logps), "weight": logps.weight, **view})
        if logps.rewards is not None:
            columns = objective(logps, run.objective_beta)
            drawn = run.held_out.items[0].base == "empirical"
            columns |= {"effective_sample_size": effective_sample_size(logps)} if drawn else to_bradley_terry(logps)
            _append(self.prompts, columns)
            self.sources += logps.sources
            self.candidates += of_candidates(logps)

    def add_loss_of_all(self, run: Run) -> None:
        """The loss of what was kept for it."""
        if self.parts:
            logps = Logps.joined(self.parts)
            self.means.add("loss", per_unit(run.loss, logps), unit_weight(run.loss, logps))

    def summarised(self) -> Evaluation:
        metrics, pairs = self.means.reduce(), {name: torch.cat(parts) for name, parts in self.pairs.items()}
        right, weight, bins = pairs.pop("correct"), pairs.pop("weight"), {}
        if len(weight):
            spread = weight * (right - (right * weight).sum() / weight.sum())
            metrics["rewards/accuracies_stderr"] = float(spread.square().sum().sqrt() / weight.sum())
            metrics |= {f"gaussian/{name}": value for name, value in summarise(pairs, weight).items()}
            bins = histograms(pairs, weight)
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        prompts = {name: torch.cat(parts) for name, parts in self.prompts.items()}
        if prompts:
            metrics |= {f"objective/{name}": value for name, value in mean_objective(prompts).items()}
        columns = zip(self.sources, *(column.tolist() for column in prompts.values()))
        rows = [dict(zip(("source", *prompts), row)) for row in columns]
        return Evaluation(metrics, [row | {"attained": attained(row)} for row in rows], self.candidates, bins)


def of_candidates(logps: Logps) -> list[dict[str, Any]]:
    """A row per candidate of every Item, with its number among them, from 1 on."""
    assert logps.rewards is not None
    on_item, numbers = logps.renormalised(), Counter[int]()
    columns = (one.tolist() for one in (logps.item, logps.rewards, on_item.reference, on_item.policy))
    rows = []
    for item, *found in zip(*columns):
        numbers[item] += 1
        values = dict(zip(("reward", "log_reference", "log_policy"), found))
        rows.append({"source": logps.sources[item], "candidate": numbers[item], **values})
    return rows


def _append(table: dict[str, list[Tensor]], columns: dict[str, Tensor]) -> None:
    for name, values in columns.items():
        table.setdefault(name, []).append(values)


@dataclass(frozen=True)
class Samples:
    """Responses of the policy, with their log-ratios to the reference, nats."""

    items: list[Item]
    log_ratio: Tensor  # [samples]

    def metrics(self) -> dict[str, float]:
        """An estimate of the policy's KL to the reference, up to the cut of the responses, and its standard error."""
        n = len(self.log_ratio)
        stderr = float(self.log_ratio.std() / math.sqrt(n)) if n > 1 else math.nan
        return {"eval/kl/sampled": float(self.log_ratio.mean()), "eval/kl/sampled_stderr": stderr}


def sample(run: Run) -> Samples | None:
    """What the policy writes; None where nothing is wanted. All ranks draw the same."""
    trainer, scored = run.trainer, run.held_out
    if not trainer.samples or not scored.items:
        return None
    samples = continued(run, scored.items[: trainer.samples], trainer.sample_tokens)
    with run.autocast():
        return Samples(samples.items, sampled_kl(run.scorer, run.change, samples, trainer.micro_batch))
