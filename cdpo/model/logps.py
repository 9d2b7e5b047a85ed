"""Summed log-probabilities of responses. Logits exist here and in `head` only; sums run over tokens only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cdpo.errors import ConfigError
from cdpo.model.attention import Trees, takes_trees
from cdpo.model.head import LeanHead, LogitTransform, TokenLogps

if TYPE_CHECKING:
    from cdpo.batch import Batch, Item

A = TypeVar("A")


class Statistics(NamedTuple):
    """Means over the tokens of each response, without gradient."""

    entropy: Tensor  # [S]; of the next-token distribution, nats
    logit: Tensor  # [S]; mean logit over the vocabulary


class Scorer(nn.Module):
    """A model that is asked for the log-probs of responses.

    Where it is known what the model does to the logits of its head (`logit_transform`, which `choose_layout` finds
    out), the model runs without its head, whose work `LeanHead` does in less room. Else the model makes all logits.

    All that goes through the model goes through this module: where weights are sharded they are whole only within it.
    """

    model: Any
    logit_transform: LogitTransform | None

    def __init__(self, model: Any, logit_transform: LogitTransform | None = None) -> None:
        super().__init__()
        self.model, self.logit_transform = model, logit_transform

    def forward(self, batch: Batch, statistics: bool = False) -> tuple[Tensor, Statistics | None]:
        """log pi(y|x) of every response, summed over its tokens, in nats; and statistics of its logits, if asked for.

        [S], float64; 2 x [S]. Raises ConfigError for packed rows where the model's attention does not know of trees.
        """
        if batch.attention_mask is None and not takes_trees(self.model):
            raise ConfigError("this model does not attend over packed trees: ask choose_layout, or pack padded rows")
        head = linear_head(self.model)
        if self.logit_transform is None or head is None:
            tokens = _plain(self.logits(batch), batch, statistics)
        else:
            hidden = _at(decoder(self.model)(**inputs_of(batch)).last_hidden_state, batch)
            tokens = LeanHead(head, self.logit_transform).logps(hidden, batch.position, batch.target, statistics)
        return _summed(tokens, batch), _statistics(tokens, batch) if statistics else None

    def logits(self, batch: Batch) -> Tensor:
        """All logits wherever response tokens are predicted, by the whole model. [M, vocabulary]"""
        logits: Tensor = self.model(**inputs_of(batch, whole_model=True)).logits
        return logits[0] if batch.attention_mask is None else _at(logits, batch)

    def ask(self, question: Callable[[Any], A]) -> A:
        """question(model), with the model's weights whole meanwhile, where they are sharded."""
        return question(self.model)


def linear_head(model: nn.Module) -> nn.Linear | None:
    """The head, where the model can run without it: a plain matrix, nothing compiled, no hook left out."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    if type(head) is not nn.Linear or compiled:
        return None
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in (head, model, _without_adapters(model)))
    return None if hooked else head


def decoder(model: Any) -> nn.Module:
    """A causal language model without its head, adapters or not."""
    inner = _without_adapters(model)
    return inner.model if inner.base_model is inner else inner.base_model  # type: ignore[no-any-return]


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def inputs_of(batch: Batch, whole_model: bool = False) -> dict[str, Any]:
    """What a forward pass is given: one packed row with its trees, or padded rows.

    In packed rows the whole model is told where logits are wanted: nowhere but where response tokens are predicted.
    """
    if batch.attention_mask is not None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    wanted = {"logits_to_keep": batch.predict_at} if whole_model else {}
    ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    return {**ids, **wanted, "use_cache": False, "trees": Trees(batch)}


def _plain(logits: Tensor, batch: Batch, statistics: bool) -> TokenLogps:
    """The same as `LeanHead.logps`, from logits at all positions. [M, vocabulary]"""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    token = logits[batch.position, batch.target] - logits.logsumexp(-1)[batch.position]
    if not statistics:
        return TokenLogps(token, None, None)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # 0 log 0 = 0, where a logit is -inf
        return TokenLogps(token, entropy, logits.mean(-1))


def _at(values: Tensor, batch: Batch) -> Tensor:
    """Where response tokens are predicted. [R, T, ...] -> [M, ...]"""
    return values.flatten(0, 1)[batch.predict_at]


def _summed(tokens: TokenLogps, batch: Batch) -> Tensor:
    return _by_response(tokens.logp.double(), batch)  # a float32 sum of 2,000 tokens is off by 1e-3


def _statistics(tokens: TokenLogps, batch: Batch) -> Statistics:
    assert tokens.entropy is not None
    assert tokens.logit is not None
    return Statistics(*(_by_response(x[batch.position], batch) / batch.length for x in (tokens.entropy, tokens.logit)))


def _by_response(values: Tensor, batch: Batch) -> Tensor:
    """Sum over the tokens of each response. [N] -> [S]; tokens stand response after response."""
    return torch.segment_reduce(values, "sum", lengths=batch.length)


def next_token_kl(policy: Tensor, reference: Tensor, batch: Batch) -> Tensor:
    """KL(policy || reference) of next tokens, summed along each response, nats. [M, vocabulary], the same -> [S]"""
    ours, theirs = (one.double().log_softmax(-1) for one in (policy, reference))
    apart = (ours - theirs).masked_fill(ours == -torch.inf, 0)  # 0 log 0 = 0
    return _by_response((ours.exp() * apart).sum(-1)[batch.position], batch)


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
