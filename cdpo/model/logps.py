"""Summed log-probabilities of responses. The only module that sees logits; it reduces over tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cdpo.model.attention import Trees
from cdpo.model.head import Tokens, distrust, forward_is, left_out, linear_head, shape_of, token_logps, undecided

if TYPE_CHECKING:
    from cdpo.batch import Batch, Item


class Statistics(NamedTuple):
    """Means over the tokens of each response, without gradient."""

    entropy: Tensor  # [S]; of the next-token distribution, nats
    logit: Tensor  # [S]; mean logit over the vocabulary


def score(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y|x) of every response, summed over its tokens, in nats. [S], float64"""
    return _summed(_tokens(model, batch, statistics=False), batch)


def score_with_statistics(model: nn.Module, batch: Batch) -> tuple[Tensor, Statistics]:
    """The same log-probs, and what evaluation wants to know of the logits. [S], 2 x [S]"""
    tokens = _tokens(model, batch, statistics=True)
    assert tokens.entropy is not None
    assert tokens.logit is not None
    means = [_by_response(x[batch.row], batch) / batch.length for x in (tokens.entropy, tokens.logit)]
    return _summed(tokens, batch), Statistics(*means)


def _tokens(model: nn.Module, batch: Batch, statistics: bool) -> Tokens:
    """Every response token where it is predicted, and no logits elsewhere.

    The model runs without its head, whose work `token_logps` does in less room; where it cannot, the head does it.
    All of it is the model's forward pass, as weights that are sharded are whole only there.
    """
    head, forward = linear_head(model), model.forward

    def plain(**inputs: Any) -> Tokens:
        return _plain(_at(forward(**inputs).logits, batch), batch, statistics)

    def lean(**inputs: Any) -> Tokens:
        assert head is not None
        try:
            with left_out(head) as hidden:
                probed = forward(**inputs).logits
        except Exception:
            if not undecided(head):
                raise
            distrust(model)  # whatever the model does with its logits, it cannot do it with PROBES
            return plain(**inputs)
        shape = shape_of(model, head, probed) if len(hidden) == 1 else None
        if shape is None:
            return plain(**inputs)
        return token_logps(_at(hidden[0], batch), head, batch.row, batch.target, shape, statistics)

    with forward_is(model, plain if head is None else lean):
        return model(**_inputs(batch))


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the model's forward pass is given: one packed row with its trees, or padded rows."""
    if batch.attention_mask is not None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "logits_to_keep": batch.predict_at}
    return {**ids, "use_cache": False, "trees": Trees(batch)}


def _plain(logits: Tensor, batch: Batch, statistics: bool) -> Tokens:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    token = logits[batch.row, batch.target] - logits.logsumexp(-1)[batch.row]
    if not statistics:
        return Tokens(token, None, None)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # 0 log 0 = 0, where a logit is -inf
        return Tokens(token, entropy, logits.mean(-1))


def _at(values: Tensor, batch: Batch) -> Tensor:
    """Where response tokens are predicted; the model itself sees to that in packed rows. [M, ...]"""
    return values[0] if batch.attention_mask is None else values.flatten(0, 1)[batch.predict_at]


def _summed(tokens: Tokens, batch: Batch) -> Tensor:
    return _by_response(tokens.logp.double(), batch)  # a float32 sum of 2,000 tokens is off by 1e-3


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
