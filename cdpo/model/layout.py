"""How a model is given its batches: packed trees where it computes the right numbers from them, else padded rows.

Found out by comparing numbers with the plain forward pass; no architecture is trusted by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cdpo.batch import Item
from cdpo.data.packing import pack
from cdpo.errors import ConfigError
from cdpo.model import attention
from cdpo.model.head import distrust
from cdpo.model.logps import one_by_one, score


def layout_for(model: Any, items: Sequence[Item], wanted: str) -> tuple[bool, str]:
    """Whether rows must be padded, and why: packed trees are used where they give the numbers of the plain forward.

    Compares numbers on two Items; an architecture is not trusted by name. `wanted` is the model's `attention`.
    Raises ConfigError for a model whose padded rows do not give those numbers either.
    """
    probe = _probe(items)
    with torch.no_grad():
        expected = one_by_one(model, probe)

    def agrees(padded: bool) -> bool:
        with torch.no_grad():
            batch = pack(probe, padded=padded).to(expected.device)
            return bool(((score(model, batch) - expected).abs() <= rounding(model.dtype, batch.length)).all())

    if not agrees(padded=True):
        distrust(model)
        if not agrees(padded=True):
            raise ConfigError("padded rows give other log-probs than single ones: this model takes no batches")
    if wanted != "trees":
        return True, f"model.attention={wanted}"
    attention.register()
    before = getattr(model.config, "_attn_implementation", None)
    with torch.no_grad():
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


def _probe(items: Sequence[Item]) -> list[Item]:
    """The shortest Item, then the longest of those with two responses of several tokens, for these can see each other.

    The longest, because a window or chunk of attention shows only beyond its size; with at most four responses each.
    """

    def branches(item: Item) -> bool:
        return sum(len(response) > 1 for response in item.responses) > 1

    chosen = min(items, key=lambda item: item.tokens), max(items, key=lambda item: (branches(item), item.tokens))
    return [
        replace(item, responses=sorted(item.responses, key=len)[-4:], pairs=[], rewards=None, fitted=None)
        for item in chosen
    ]


def rounding(dtype: torch.dtype, length: Tensor) -> Tensor:
    """How far two ways to score the same response with the same weights may differ, in nats, at most. [S] -> [S]

    The error of one token's logit is a few roundings of a logit of size 10; those of many tokens mostly cancel. The
    norms of many architectures compute in float32 whatever the dtype is.
    """
    token = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.3)
    return token * (length.sqrt() + length / 10)
