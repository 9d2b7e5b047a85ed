"""What is measured on pairs, in training and on held-out Items alike; and generations to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cdpo.batch import Item
from cdpo.candidates import candidate_kl
from cdpo.losses.loss import check_finite, per_unit
from cdpo.measure.gaussian_view import gaussian_view, histograms, summarise
from cdpo.measure.objective import attained, objective
from cdpo.measure.objective import means as mean_objective
from cdpo.model.layers import uncompiled
from cdpo.model.logps import Statistics, score
from cdpo.model.reference import Scored, with_constants
from cdpo.system.metrics import Means

if TYPE_CHECKING:
    from cdpo.batch import Batch, Logps
    from cdpo.model.change import Change
    from cdpo.system.ranks import Ranks


def add_pair_metrics(means: Means, logps: Logps, statistics: Statistics, beta: float) -> None:
    """Add the metrics of a batch to `means`, in the field's names; log-probs and log-ratios are sums, in nats.

    `chosen` is the response preferred with p >= 1/2; where p is 1/2, and for logits, the order is the data's. Logits
    and the entropy of the next-token distribution (nats) are averaged over response tokens, then pairs.
    """
    logps = replace(logps, policy=logps.policy.detach())  # nothing here is for a gradient
    of_response = torch.stack([beta * logps.log_ratio(), logps.policy, logps.policy / logps.length])
    chosen, rejected = of_response[:, logps.chosen_first().pairs].unbind(2)  # [3, P] each
    per_pair = {
        "rewards/chosen": chosen[0],
        "rewards/rejected": rejected[0],
        "rewards/margins": chosen[0] - rejected[0],
        "rewards/accuracies": correct(logps),
        "logps/chosen": chosen[1],
        "logps/rejected": rejected[1],
        "logps_mean/chosen": chosen[2],
        "logps_mean/rejected": rejected[2],
    }
    per_pair |= dict(zip(("logits/chosen", "logits/rejected"), logps.of_pairs(statistics.logit)))
    means.add_all(per_pair, logps.weight)
    means.add("entropy", statistics.entropy, logps.length)
    means.add("kl/candidates", candidate_kl(logps))


def add_log_ratio(means: Means, logps: Logps) -> None:
    """Add the mean log-ratio over all responses of all pairs, nats: what Logps.baseline averages over the steps."""
    chosen, rejected = logps.of_pairs(logps.log_ratio().detach())
    means.add("log_ratio", (chosen + rejected) / 2, logps.weight)


def correct(logps: Logps) -> Tensor:
    """Whether each pair's margin has the sign of its preference; a tie of either counts one half. [P]

    Margins tie up to float32 rounding of the log-probs.
    """
    margin = logps.margin().detach()
    scale = sum(side.abs() for side in logps.of_pairs(logps.policy.detach()))
    tie = margin.abs() <= 4 * torch.finfo(torch.float32).eps * scale
    right = torch.where(logps.preference < 0.5, -margin, margin) > 0
    return torch.where(tie | (logps.preference == 0.5), 0.5, right.double())


def reward_scale(loss: Any, default: float) -> float:
    """beta of the implicit reward beta * log-ratio: the loss's own, or that of the first loss within, or `default`."""
    inner = [getattr(loss, "loss", None), *getattr(loss, "losses", {}).values()]
    betas = [one.beta for one in (loss, *inner) if hasattr(one, "beta")]
    return float(betas[0]) if betas else default


def unit_weight(loss: Any, logps: Logps) -> Tensor:
    """Weight of each value that the loss returns: the pair's, or 1 per Item."""
    return logps.weight if loss.unit == "pair" else torch.ones(len(logps.sources), device=logps.policy.device)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: numbers, a row per prompt where rewards are known, histograms over the pairs."""

    metrics: dict[str, float]
    prompts: list[dict[str, Any]]
    histograms: dict[str, Any]


def evaluate(
    policy: nn.Module, scored: Scored, loss: Any, betas: tuple[float, float],
    measured: Callable[[Batch], tuple[Tensor, Statistics]], budget: int, ranks: Ranks,
    on_batch: Callable[[], None], context: dict[str, Any],
) -> Evaluation:  # fmt: skip
    """Means over all Items in eval mode, named eval/...; `on_batch` is called between batches and may raise.

    The batches are dealt to the ranks; all ranks then make the same of all log-probs, as one process would.

    `betas` are those of the implicit reward and of J. eval/rewards/accuracies_stderr is the standard error over pairs
    of the accuracy; eval/gaussian/* look at the pairs as `cdpo.measure.gaussian_view` does; objective/* say what RLHF makes of
    the policy, on the Items of batches that have rewards.
    """
    means, columns = Means(), Columns()
    policy.eval()

    def work(indices: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            sums, statistics = measured(scored.batch(indices))
        return torch.stack([sums, *(one.double() for one in statistics)])

    tasks = scored.tasks(budget)
    for indices, found in zip(tasks, ranks.dealt(tasks, work)):
        on_batch()
        batch, (sums, *rest) = scored.batch(indices), found.to(scored.device)
        statistics = Statistics(*rest)
        with torch.no_grad():
            logps = with_constants(sums, batch, **context)
            check_finite(logps)
            means.add("loss", per_unit(loss, logps), unit_weight(loss, logps))
        add_pair_metrics(means, logps, statistics, betas[0])
        columns.add(
            "pairs", correct=correct(logps), weight=logps.weight, **gaussian_view(logps.chosen_first(), betas[0])
        )
        if logps.rewards is not None:
            columns.add("prompts", sources=logps.sources, **objective(logps, betas[1]))
    return _summarised(means, columns)


class Columns:
    """Tables that grow batch by batch: named tensors [n] or tuples of names, joined when they are taken."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, list[Any]]] = {}

    def add(self, table: str, **columns: Any) -> None:
        """Append rows to a table."""
        for name, values in columns.items():
            self._parts.setdefault(table, {}).setdefault(name, []).append(values)

    def take(self, table: str) -> dict[str, Any]:
        """All rows of a table, column by column; empty if there are none."""
        return {
            name: torch.cat(parts) if isinstance(parts[0], Tensor) else [one for part in parts for one in part]
            for name, parts in self._parts.get(table, {}).items()
        }


def _summarised(means: Means, columns: Columns) -> Evaluation:
    view, prompts, tables = columns.take("pairs"), columns.take("prompts"), {}
    right, weight = view.pop("correct"), view.pop("weight")
    metrics = means.reduce()
    if len(weight):
        spread = weight * (right - (right * weight).sum() / weight.sum())
        metrics["rewards/accuracies_stderr"] = float(spread.square().sum().sqrt() / weight.sum())
        metrics |= {f"gaussian/{name}": value for name, value in summarise(view, weight).items()}
        tables = histograms(view, weight)
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    sources = prompts.pop("sources", [])
    if sources:
        metrics |= {f"objective/{name}": value for name, value in mean_objective(prompts).items()}
    lists = {name: column.tolist() for name, column in prompts.items()}
    rows = [{"source": source, **dict(zip(lists, row))} for source, row in zip(sources, zip(*lists.values()))]
    return Evaluation(metrics, [row | {"attained": attained(row)} for row in rows], tables)


def generations(policy: Any, scored: Scored, count: int, tokens: int, seed: int) -> Iterator[Item]:
    """Sampled continuations of the first `count` prompts, at temperature 1, that leave the run's random state alone.

    Each is an Item with one response, of at most `tokens` tokens: it ends with the first EOS, or is cut.
    """
    from cdpo.model.attention import ordinary_attention

    devices = [scored.device] if scored.device.type == "cuda" else []
    policy.eval()
    state = torch.random.fork_rng(devices=devices)
    with state, ordinary_attention(policy), uncompiled(policy), torch.no_grad():
        torch.manual_seed(seed)
        for item in scored.items[:count]:
            prompt = torch.tensor([item.prompt], device=scored.device)
            out = policy.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                pad_token_id=0,  # never used: each prompt is continued by itself
                do_sample=True,  # from the policy itself, whatever the checkpoint's generation config says
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
            )
            yield Item(item.prompt, [out[0, len(item.prompt) :].tolist()], [], source=item.source)


def sampled_kl(policy: Any, change: Change, samples: Scored, budget: int) -> Tensor:
    """log pi(y) - log pi_ref(y) of every sampled response, nats: their mean estimates KL(pi || pi_ref), up to the cut.

    The reference is the policy with its change put aside, so no second model is needed. [samples]
    """
    policy.eval()
    with torch.no_grad():
        batches = [batch for _, batch in samples.batches(budget)]
        now = torch.cat([score(policy, batch) for batch in batches])
        with change.at_start():
            start = torch.cat([score(policy, batch) for batch in batches])
    order = [i for indices, _ in samples.batches(budget) for i in indices]
    return (now - start)[torch.tensor(order).argsort()]
