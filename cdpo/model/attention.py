"""Attention over packed prompt trees: a token sees its own prompt and its own branch, and nothing else.

Enters through transformers' public attention interface; the layout travels as the keyword `trees` through the model's
forward. An architecture that cannot take it is found out by `choose_layout`, which compares numbers, not names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cdpo.system.threads import start_compile_workers

if TYPE_CHECKING:
    from cdpo.batch import Batch

NAME = "cdpo_trees"  # as transformers knows it
BLOCK = 128  # tokens; what flex_attention skips, or takes without looking, at once
ORDINARY = {"FORCE_USE_FLEX_ATTENTION": True}  # below 128 tokens too, where its kernel for decoding fails with GQA


class Trees:
    """What attention must know of a packed row: the trees' sizes, and which token sees which.

    On a CPU worked out when the first layer asks, and kept for the others; a model without attention never does.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        tree, branch = batch.tree[0], batch.branch[0]
        #: on CUDA: flex_attention's BlockMask, there before a compiled layer asks for it; else None
        self.block_mask = _block_mask(tree, branch) if tree.is_cuda else None
        self._added: dict[torch.dtype, list[Tensor]] = {}  # the masks as numbers, once per dtype

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each tree."""
        return torch.bincount(self._batch.tree[0], minlength=len(self._batch.sources)).tolist()

    @cached_property
    def masks(self) -> list[Tensor]:
        """On CPU: [L, L] per tree, or one [trees, 1, L, L] if all trees have one size."""
        masks = [_mask(part) for part in self._batch.branch[0].split(self.sizes)]
        return [torch.stack(masks)[:, None]] if self.even else masks

    @property
    def even(self) -> bool:
        """All trees have one size, so that one batched call serves them."""
        return len(set(self.sizes)) == 1

    def additive(self, dtype: torch.dtype) -> list[Tensor]:
        """The masks as 0 and -inf in the queries' dtype: boolean ones would be converted again in every layer."""
        if dtype not in self._added:
            self._added[dtype] = [torch.zeros_like(m, dtype=dtype).masked_fill_(~m, -torch.inf) for m in self.masks]
        return self._added[dtype]


def _mask(branch: Tensor) -> Tensor:
    """Who sees whom within one tree: earlier tokens of the prompt (branch 0) or of one's own branch. [L] -> [L, L]"""
    visible = (branch == 0) | (branch == branch[:, None])
    return visible.tril()


def _block_mask(tree: Tensor, branch: Tensor) -> Any:
    """The same for flex_attention, from the first and last tree and branch of each block of BLOCK tokens. 2 x [T]

    create_block_mask would look at every pair of tokens; here a block too many may be visited, and none too few.
    """
    from torch.nn.attention.flex_attention import BlockMask

    start, end, own = _seen(tree, branch)

    def sees(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((k >= own[q]) | ((k >= start[q]) & (k < end[q])))

    (tree_min, tree_max), (branch_min, branch_max) = _bounds(tree), _bounds(branch)
    block = torch.arange(len(tree_min), device=tree.device)
    meet = (tree_min[:, None] <= tree_max) & (tree_min <= tree_max[:, None])  # [query block, key block]
    related = (branch_min == 0) | ((branch_min[:, None] <= branch_max) & (branch_min <= branch_max[:, None]))
    visited = meet & related & (block[:, None] >= block)
    same_tree = (tree_min[:, None] == tree_max) & (tree_min == tree_max[:, None])  # both blocks lie in it
    same_branch = (branch_min[:, None] == branch_max) & (branch_min == branch_max[:, None])
    seen = (branch_max == 0) | same_branch  # all keys are of the prompt, or all tokens are of one branch
    complete = torch.arange(1, len(tree_min) + 1, device=tree.device) * BLOCK <= len(tree)  # the last may be short
    full = visited & same_tree & seen & (block[:, None] > block) & complete[:, None]
    partial = _listed(visited & ~full)
    return BlockMask.from_kv_blocks(*partial, *_listed(full), BLOCK, sees, (len(tree), len(tree)))


def _seen(tree: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each token's prompt begins and ends, and its own branch begins, which may be the prompt. 2 x [T] -> 3 x [T]

    So a kernel asks nothing of keys but where they are.
    """
    branches = branch.max() + 1
    run = (tree * branches + branch).contiguous()  # ascending: trees stand one after another, and branches in them
    ends = torch.searchsorted(run, tree * branches, right=True)
    return tuple(x.int() for x in (torch.searchsorted(tree, tree), ends, torch.searchsorted(run, run)))  # type: ignore[return-value]


def _bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value in each block; the last block may be short. [T] -> 2 x [T / BLOCK]"""
    blocks = torch.cat([x, x[-1:].expand(-len(x) % BLOCK)]).view(-1, BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks stand in each row, and which, those first. [n, n] -> [1, 1, n], [1, 1, n, n]"""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _flex() -> Any:
    """flex_attention, within a compiled layer as a part of it, else compiled by itself."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)


@lru_cache(maxsize=1)
def _compiled(flex_attention: Any) -> Any:
    start_compile_workers()
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
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": gqa}
    if trees.block_mask is not None:
        if dropout:
            raise ValueError("attention dropout is not available for packed trees on CUDA; set model.attention=sdpa")
        out = _flex()(query, key, value, block_mask=trees.block_mask, kernel_options=ORDINARY, **options)
        return out.transpose(1, 2), None
    options["dropout_p"] = dropout
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


def register_for_compiled_layers() -> None:
    """Like `register`, but on a CPU not compiled with the layer around it, as trees have other sizes in every batch."""
    from transformers import AttentionInterface

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        inside = getattr(kwargs.get("trees"), "block_mask", None) is not None
        return tree_attention(*args, **kwargs) if inside else apart(*args, **kwargs)

    apart = torch.compiler.disable(tree_attention)
    AttentionInterface.register(NAME, attend)


def takes_trees(model: Any) -> bool:
    """Whether the model attends over packed trees; what is no model of transformers is taken to."""
    return getattr(getattr(model, "config", None), "_attn_implementation", NAME) == NAME


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
