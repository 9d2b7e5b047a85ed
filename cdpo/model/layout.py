"""How a model is given its batches: packed trees where it computes the right numbers from them, else padded rows.

Found out by comparing numbers with the plain forward pass; no architecture is trusted by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cdpo.batch import Batch, Item
from cdpo.data.packing import pack
from cdpo.errors import ConfigError
from cdpo.model import attention, head
from cdpo.model.logps import Scorer, decoder, inputs_of, linear_head, one_by_one


@torch.no_grad()
def choose_layout(scorer: Scorer, items: Sequence[Item], wanted: str) -> tuple[bool, str]:
    """Whether rows must be padded, and why; "" where packed trees give the numbers of the plain forward, on two Items.

    Sets the model's attention, which for packed trees is another, and the scorer's `logit_transform`. `wanted` is the
    `attention` of conf/model. Raises ConfigError for a model whose padded rows do not give the plain numbers either.
    """
    model = scorer.model
    probe = _probe(items)
    expected = scorer.ask(lambda model: one_by_one(model, probe))

    def agrees(padded: bool) -> bool:
        batch = pack(probe, padded=padded).to(expected.device)
        return bool(((scorer(batch)[0] - expected).abs() <= rounding_tolerance(model.dtype, batch.length)).all())

    rows = pack(probe, padded=True).to(expected.device)
    scorer.logit_transform = scorer.ask(lambda model: logit_transform_of(model, rows))
    if not agrees(padded=True):
        scorer.logit_transform = None
        if not agrees(padded=True):
            raise ConfigError("padded rows give other log-probs than single ones: this model takes no batches")
    if wanted != "trees":
        return True, f"model.attention={wanted}"
    attention.register()
    before = getattr(model.config, "_attn_implementation", None)
    try:
        model.set_attn_implementation(attention.NAME)
        reason = "" if agrees(padded=False) else "its packed log-probs differ from the plain ones"
        if model.config._attn_implementation != attention.NAME:
            reason = "its attention cannot be replaced"
    except Exception as error:  # whatever an architecture makes of the layout, padded rows are right
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if reason:
        model.set_attn_implementation(before or "eager")
    return bool(reason), reason


@torch.no_grad()
def logit_transform_of(model: Any, batch: Batch) -> head.LogitTransform | None:
    """What a model does to the logits of its head, a plain matrix; None if its own forward pass is the only way.

    Asked with PROBES for logits. The head's input must be what the decoder gives, and nothing else.
    """
    linear = linear_head(model)
    if linear is None:
        return None
    try:
        with _left_out(linear) as kept:
            probed = model(**inputs_of(batch, whole_model=True)).logits
        hidden = decoder(model)(**inputs_of(batch)).last_hidden_state
    except Exception:  # whatever the model does with its logits, it cannot do it with PROBES
        return None
    if len(kept) != 1 or not torch.equal(kept[0], hidden):
        return None
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return head.transform_of(probed.flatten(0, -2)[0], cap and float(cap))


@contextmanager
def _left_out(linear: nn.Linear) -> Iterator[list[Tensor]]:
    """Within the block the model's forward pass leaves out its head: its input is kept, PROBES are its output."""
    kept: list[Tensor] = []

    def instead(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden.new_tensor(head.PROBES).expand(*hidden.shape[:-1], -1)

    linear.forward = instead  # type: ignore[method-assign, assignment]
    try:
        yield kept
    finally:
        del linear.forward  # the class's own again


def _probe(items: Sequence[Item]) -> list[Item]:
    """The shortest Item, then the longest of those with two responses of several tokens, for these can see each other.

    The longest, because a window or chunk of attention shows only beyond its size; with at most four responses each.
    """

    def branches(item: Item) -> bool:
        return sum(len(response) > 1 for response in item.responses) > 1

    chosen = min(items, key=lambda item: item.tokens), max(items, key=lambda item: (branches(item), item.tokens))
    return [
        replace(item, responses=sorted(item.responses, key=len)[-4:], pairs=[], rewards=None, fitted_rewards=None)
        for item in chosen
    ]


def rounding_tolerance(dtype: torch.dtype, length: Tensor) -> Tensor:
    """How far two ways to score the same response with the same weights may differ, in nats, at most. [S] -> [S]

    The error of one token's logit is a few roundings of a logit of size 10; those of many tokens mostly cancel. The
    norms of many architectures compute in float32 whatever the dtype is.
    """
    token = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.3)
    return token * (length.sqrt() + length / 10)
