"""Summed log-probabilities of responses. The only module that sees logits; it reduces over tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from cdpo.attention import trees_of

if TYPE_CHECKING:
    from cdpo.batch import Batch, Item


class Statistics(NamedTuple):
    """Means over the tokens of each response, without gradient."""

    entropy: Tensor  # [S]; of the next-token distribution, nats
    logit: Tensor  # [S]; mean logit over the vocabulary


def logits_at(model: nn.Module, batch: Batch) -> Tensor:
    """Logits where a response token is predicted, and nowhere else, float32 or better. [M, vocabulary]

    The model's own head is used, so soft-capping and logit scaling of an architecture are honoured.
    """
    if batch.attention_mask is None:
        out = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.predict_at,
            trees=trees_of(batch),
        )
        logits = out.logits[0]
    else:
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = out.logits.flatten(0, 1)[batch.predict_at]
    return logits if logits.dtype == torch.float64 else logits.float()


def score(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y|x) of every response, summed over its tokens, in nats. [S], float64"""
    return _summed(logits_at(model, batch), batch)


def score_with_statistics(model: nn.Module, batch: Batch) -> tuple[Tensor, Statistics]:
    """The same log-probs, and what evaluation wants to know of the logits. [S], 2 x [S]"""
    logits = logits_at(model, batch)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # 0 log 0 = 0, where a logit is -inf
        means = [_by_response(x[batch.row], batch) / batch.length for x in (entropy, logits.mean(-1))]
    return _summed(logits, batch), Statistics(*means)


def _summed(logits: Tensor, batch: Batch) -> Tensor:
    token = logits[batch.row, batch.target] - logits.logsumexp(-1)[batch.row]  # [N]
    return _by_response(token.double(), batch)  # a float32 sum of 2,000 tokens is off by 1e-3


def _by_response(values: Tensor, batch: Batch) -> Tensor:
    """Sum over the tokens of each response. [N] -> [S]; tokens stand response after response."""
    return torch.segment_reduce(values, "sum", lengths=batch.length)


def one_by_one(model: nn.Module, items: Sequence[Item]) -> Tensor:
    """The plain way, one sequence at a time through the model's ordinary forward; slow; all else must equal it."""
    device = next(model.parameters()).device
    sums = []
    for item in items:
        for response in item.responses:
            ids = torch.tensor([item.prompt + response[:-1]], device=device)  # nothing is predicted from the last
            logits = model(input_ids=ids, use_cache=False).logits[0, len(item.prompt) - 1 :]
            logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
            sums.append(logp.gather(1, torch.tensor(response, device=device)[:, None]).double().sum())
    return torch.stack(sums)
