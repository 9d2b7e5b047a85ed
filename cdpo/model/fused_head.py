"""What `head` computes, for GPUs: large slices of the vocabulary, one compiled kernel between their matrix products.

Every row has one target here: a position that predicts several tokens stands there as often.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from cdpo.model.logits import LogitTransform
from cdpo.system.threads import start_compile_workers

CHUNK = 1 << 28  # bytes of logits that are alive at most, as they leave the matrix product
ALIGNED = 128  # slices begin and end at multiples, else tensor cores lie idle


class Seen(NamedTuple):
    """Of the slices so far, of every row's logits z: the largest; sums of e = exp(z - largest), e z, z. [N] each"""

    top: Tensor
    total: Tensor
    dot: Tensor
    first: Tensor
    own: Tensor  # the target's z


class FusedLogProbs(torch.autograd.Function):
    """z = transform(h W' + b), [N, vocabulary]; log softmax(z)[n, target[n]], entropy and mean logit of N rows. 3 x [N]

    Float32 or better between the products. Entropy and mean logit have no gradient, and no meaning unless there are
    `statistics`. `backward` says whether there will be a backward pass; it goes through once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        transform: LogitTransform, statistics: bool, dtype: torch.dtype, backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        h, absorb = hidden.to(dtype), _kernels(hidden.is_cuda)[0]
        top, *zeros = h.new_zeros(5, len(h), dtype=torch.promote_types(dtype, torch.float32))
        seen = Seen(top - torch.inf, *zeros)
        trained = any(ctx.needs_input_grad[1:3])
        frozen = backward and not trained and transform.cap is None
        mean = top.new_zeros(h.shape) if frozen else None  # the expected row of a frozen weight
        for a, b in slices(len(h), weight, dtype):
            w = weight[a:b].to(dtype)
            e, seen, rescale = absorb(_logits(h, w, bias, a), seen, target - a, transform, statistics)
            if mean is not None:
                mean = mean.mul_(rescale[:, None]).add_(e @ w)
        logsum = seen.top + seen.total.log()
        ctx.transform, ctx.dtype = transform, dtype
        expected = None if mean is None else mean.div_(seen.total[:, None])
        ctx.save_for_backward(hidden, weight, bias, target, logsum, expected)
        entropy, logit = logsum - seen.dot / seen.total, seen.first / len(weight)
        ctx.mark_non_differentiable(entropy, logit)
        return seen.own - logsum, entropy, logit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, target, logsum, expected = ctx.saved_tensors
        if expected is not None:
            own = weight[target].to(ctx.dtype)  # as the products saw it
            d_hidden = (own - expected) * (ctx.transform.scale * gradient)[:, None]
            return d_hidden.to(hidden.dtype), *(None,) * 7
        h, slope = hidden.to(ctx.dtype), _kernels(hidden.is_cuda)[1]
        d_hidden = logsum.new_zeros(hidden.shape) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for a, b in slices(len(h), weight, ctx.dtype):
            w = weight[a:b].to(ctx.dtype)
            dz = slope(_logits(h, w, bias, a), logsum, gradient, target - a, ctx.transform)
            if d_hidden is not None:
                d_hidden += dz @ w
            if d_weight is not None:
                d_weight[a:b] = dz.T @ h
            if d_bias is not None:
                d_bias[a:b] = dz.sum(0, dtype=logsum.dtype)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, *(None,) * 5


def slices(rows: int, weight: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Slices of the vocabulary, even but for the last one, whose logits take about CHUNK bytes at most."""
    vocabulary = len(weight)
    pieces = -(-vocabulary * rows * dtype.itemsize // CHUNK) or 1
    width = -(-vocabulary // (pieces * ALIGNED)) * ALIGNED
    return [(a, min(a + width, vocabulary)) for a in range(0, vocabulary, width)]


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, a: int) -> Tensor:
    """Before any transform, in the dtype of `h`. [N, width], [v, width] -> [N, v]"""
    return h @ w.T if bias is None else torch.addmm(bias[a : a + len(w)].to(h.dtype), h, w.T)


@lru_cache(maxsize=2)
def _kernels(on_gpu: bool) -> tuple[Any, Any]:
    """`_absorb` and `_slope`, compiled where that is possible."""
    compiled = on_gpu and has_triton()
    if compiled:
        start_compile_workers()
    return tuple(torch.compile(f, dynamic=True) if compiled else f for f in (_absorb, _slope))  # type: ignore[return-value]


def _absorb(
    z: Tensor, seen: Seen, at: Tensor, transform: LogitTransform, statistics: bool
) -> tuple[Tensor, Seen, Tensor]:
    """exp(z - top) as z was, [N, v]; what has been seen by now; what sums of before were multiplied by, [N]."""
    dtype, z = z.dtype, transform(z.to(seen.top.dtype, copy=True))
    inside = (at >= 0) & (at < z.shape[1])
    own = torch.where(inside, z.gather(1, at.clamp(0, z.shape[1] - 1)[:, None])[:, 0], seen.own)
    top = torch.maximum(seen.top, z.amax(1))
    shift = top.masked_fill(top == -torch.inf, 0)  # where every logit so far is -inf
    rescale = (seen.top - shift).exp()
    e = (z - shift[:, None]).exp()
    dot, first = seen.dot, seen.first
    if statistics:
        finite = z.clamp(min=torch.finfo(z.dtype).min)  # not -inf * 0
        dot, first = dot * rescale + (e * finite).sum(1), first + z.sum(1)
    return e.to(dtype), Seen(top, seen.total * rescale + e.sum(1), dot, first, own), rescale


def _slope(z: Tensor, logsum: Tensor, gradient: Tensor, at: Tensor, transform: LogitTransform) -> Tensor:
    """d loss / d (h W' + b) of a slice, as its logits are, from d loss / d logp. [N, v], [N], [N], [N] -> [N, v]"""
    dtype, z = z.dtype, transform(z.to(logsum.dtype, copy=True))
    own = torch.arange(z.shape[1], device=z.device) == at[:, None]
    dz = (own.to(z.dtype) - (z - logsum[:, None]).exp()) * (transform.scale * gradient)[:, None]
    return (dz if transform.cap is None else dz * (1 - (z / transform.cap).square())).to(dtype)
