"""What is measured on pairs, in training and on held-out Items alike; and generations to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cdpo.candidates import candidate_kl
from cdpo.losses import per_unit
from cdpo.metrics import Means
from cdpo.reference import Scored, with_constants

if TYPE_CHECKING:
    from cdpo.batch import Batch, Logps
    from cdpo.logps import Statistics


def add_pair_metrics(means: Means, logps: Logps, beta: float) -> None:
    """Add the metrics of a batch to `means`, in the field's names; log-probs and log-ratios are sums, in nats.

    `chosen` is the response preferred with p >= 1/2. Where p is 1/2 the order is the data's.
    """
    flip = (logps.preference < 0.5)[:, None]
    chosen, rejected = torch.where(flip, logps.pairs.flip(1), logps.pairs).unbind(1)
    policy, ratio = logps.policy.detach(), logps.log_ratio().detach()
    margin = ratio[chosen] - ratio[rejected]
    per_pair = {
        "rewards/chosen": beta * ratio[chosen],
        "rewards/rejected": beta * ratio[rejected],
        "rewards/margins": beta * margin,
        "rewards/accuracies": correct(logps),
        "logps/chosen": policy[chosen],
        "logps/rejected": policy[rejected],
        "logps_mean/chosen": policy[chosen] / logps.length[chosen],
        "logps_mean/rejected": policy[rejected] / logps.length[rejected],
        "log_ratio": (ratio[chosen] + ratio[rejected]) / 2,
    }
    for name, values in per_pair.items():
        means.add(name, values, logps.weight)
    means.add("kl/candidates", candidate_kl(logps).detach())


def add_statistics(means: Means, logps: Logps, statistics: Statistics) -> None:
    """Entropy of the next-token distribution (nats) and mean logits, averaged over response tokens, then pairs."""
    for side, response in (("chosen", logps.pairs[:, 0]), ("rejected", logps.pairs[:, 1])):
        means.add(f"logits/{side}", statistics.logit[response], logps.weight)
    means.add("entropy", statistics.entropy, logps.length)


def correct(logps: Logps) -> Tensor:
    """Whether each pair's margin has the sign of its preference; a tie of either counts one half. [P]

    Margins tie up to float32 rounding of the log-probs.
    """
    margin = logps.margin().detach()
    scale = sum(side.abs() for side in logps.of_pairs(logps.policy.detach()))
    tie = margin.abs() <= 4 * torch.finfo(torch.float32).eps * scale
    right = torch.where(logps.preference < 0.5, -margin, margin) > 0
    return torch.where(tie | (logps.preference == 0.5), 0.5, right.double())


def reward_scale(loss: Any) -> float:
    """beta of the implicit reward beta * log-ratio: the loss's own, or that of the first loss within, or 1."""
    inner = [getattr(loss, "loss", None), *getattr(loss, "losses", {}).values()]
    betas = [one.beta for one in (loss, *inner) if hasattr(one, "beta")]
    return float(betas[0]) if betas else 1.0


def unit_weight(loss: Any, logps: Logps) -> Tensor:
    """Weight of each value that the loss returns: the pair's, or 1 per Item."""
    return logps.weight if loss.unit == "pair" else torch.ones(len(logps.sources), device=logps.policy.device)


def evaluate(
    policy: nn.Module,
    scored: Scored,
    loss: Any,
    beta: float,
    score: Callable[[Batch], tuple[Tensor, Statistics]],
    budget: int,
    progress: float,
    baseline: float,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over all Items in eval mode, named eval/...; `on_batch` is called between batches and may raise.

    eval/rewards/accuracies_stderr is the standard error over pairs of the accuracy.
    """
    means, answers = Means(), []
    policy.eval()
    for _, batch in scored.batches(budget):
        on_batch()
        with torch.no_grad():
            sums, statistics = score(batch)
            logps = with_constants(sums, batch, progress, baseline)
            means.add("loss", per_unit(loss, logps), unit_weight(loss, logps))
        add_pair_metrics(means, logps, beta)
        add_statistics(means, logps, statistics)
        answers.append((correct(logps), logps.weight))
    right, weight = (torch.cat(parts) for parts in zip(*answers))
    spread = weight * (right - (right * weight).sum() / weight.sum())
    stderr = float(spread.square().sum().sqrt() / weight.sum())
    row = means.reduce() | {"rewards/accuracies_stderr": stderr}
    return {f"eval/{name}": value for name, value in row.items() if name != "log_ratio"}


def generations(policy: Any, tokenizer: Any, scored: Scored, count: int, tokens: int, seed: int) -> Iterator[dict]:
    """Sampled continuations of the first `count` prompts, at temperature 1, that leave the run's random state alone."""
    from cdpo.attention import ordinary_attention

    devices = [scored.device] if scored.device.type == "cuda" else []
    policy.eval()
    with torch.random.fork_rng(devices=devices), ordinary_attention(policy), torch.no_grad():
        torch.manual_seed(seed)
        for item in scored.items[:count]:
            prompt = torch.tensor([item.prompt], device=scored.device)
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            mask = torch.ones_like(prompt)
            out = policy.generate(
                input_ids=prompt,
                attention_mask=mask,
                max_new_tokens=tokens,
                pad_token_id=pad,
                do_sample=True,  # from the policy itself, whatever the checkpoint's generation config says
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
            )
            texts = {"prompt": tokenizer.decode(item.prompt), "response": tokenizer.decode(out[0, len(item.prompt) :])}
            yield {"source": item.source, **texts}
