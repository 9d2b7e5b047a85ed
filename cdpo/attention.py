"""Attention over packed prompt trees: a token sees its own prompt and its own branch, and nothing else.

Enters through transformers' public attention interface; the layout travels as the keyword `trees` through the model's
forward. An architecture that cannot take it is found out by `layout_for`, which compares numbers, not names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from cdpo.batch import Batch

NAME = "cdpo_trees"  # as transformers knows it


@dataclass(frozen=True)
class Trees:
    """What attention must know of a packed row: the trees' sizes, and which token sees which."""

    sizes: list[int]  # tokens of each tree
    masks: list[Tensor]  # on CPU: [L, L] per tree, or one [trees, 1, L, L] if all trees have one size
    block_mask: Any = None  # on CUDA: flex_attention's BlockMask
    added: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)  # the masks as numbers, once per dtype

    @property
    def even(self) -> bool:
        """All trees have one size, so that one batched call serves them."""
        return len(set(self.sizes)) == 1

    def additive(self, dtype: torch.dtype) -> list[Tensor]:
        """The masks as 0 and -inf in the queries' dtype: boolean ones would be converted again in every layer."""
        if dtype not in self.added:
            self.added[dtype] = [torch.zeros_like(m, dtype=dtype).masked_fill_(~m, -torch.inf) for m in self.masks]
        return self.added[dtype]


def trees_of(batch: Batch) -> Trees:
    """The layout of a packed batch; built once and used by every layer."""
    tree, branch = batch.tree[0], batch.branch[0]
    sizes = torch.bincount(tree, minlength=len(batch.sources)).tolist()
    if tree.is_cuda:
        return Trees(sizes, [], _block_mask(tree, branch))
    masks = [_mask(part) for part in branch.split(sizes)]
    return Trees(sizes, [torch.stack(masks)[:, None]] if len(set(sizes)) == 1 else masks)


def _mask(branch: Tensor) -> Tensor:
    """Who sees whom within one tree: earlier tokens of the prompt (branch 0) or of one's own branch. [L] -> [L, L]"""
    visible = (branch == 0) | (branch == branch[:, None])
    return visible.tril()


def _block_mask(tree: Tensor, branch: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (tree[q] == tree[k]) & (q >= k) & ((branch[k] == 0) | (branch[q] == branch[k]))

    return create_block_mask(sees, None, None, len(tree), len(tree), device=tree.device)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, key heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    trees: Trees | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for packed trees. Returns [1, T, heads, d].

    Raises ValueError for anything it would otherwise have to ignore: a mask, soft-capping, a sliding window.
    """
    refused = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if trees is None or attention_mask is not None or refused or kwargs.get("sliding_window"):
        raise ValueError(f"packed trees do not support {refused or 'this attention'}")
    gqa = key.shape[1] != query.shape[1]
    if trees.block_mask is not None:
        if dropout:
            raise ValueError("attention dropout is not available for packed trees on CUDA; set model.attention=sdpa")
        out = _compiled_flex()(query, key, value, block_mask=trees.block_mask, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2), None
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": gqa}
    masks = trees.additive(query.dtype)
    if trees.even:  # [1, h, B * L, d] -> [B, h, L, d]: one call for all trees
        q, k, v = (x[0].unflatten(1, (len(trees.sizes), -1)).transpose(0, 1) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=masks[0], **options)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    parts = zip(*(x.split(trees.sizes, dim=2) for x in (query, key, value)), masks)
    outs = [scaled_dot_product_attention(q, k, v, attn_mask=mask, **options) for q, k, v, mask in parts]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def register() -> None:
    """Make `cdpo_trees` known to transformers. No mask function is registered: the model then builds no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, tree_attention)


@contextlib.contextmanager
def ordinary_attention(model: Any) -> Iterator[None]:
    """Within the block the model attends as transformers does by default, which is what generation needs."""
    before = model.config._attn_implementation
    if before != NAME:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
