"""Log-probs of tokens straight from hidden states: a slice of the vocabulary at a time, never all logits at once.

Matrix products of the size of the head: 3 where one slice is all (1 forward, 2 backward); a fourth for all slices but
the last, which the backward pass computes again. A frozen head needs 2 and keeps no logits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cdpo.model.fused_head import FusedLogProbs
from cdpo.model.logits import UNCHANGED, LogitTransform

CHUNK = 1 << 26  # bytes of logits that are alive at most
FUSED = ("cuda",)  # where `fused_head` does it
PROBES = (-40.0, -1.0, 0.25, 1.0, 40.0)  # logits at which a model is asked what it makes of them


class TokenLogps(NamedTuple):
    """Of N tokens at M positions; entropy and logit only where asked for, and without gradient."""

    logp: Tensor  # [N] nats
    entropy: Tensor | None  # [M]; of the next-token distribution, nats
    logit: Tensor | None  # [M]; mean over the vocabulary


class _LogProbs(torch.autograd.Function):
    """z = transform(h W' + b) at M positions; log softmax(z)[position, target] for N tokens. See `LeanHead.logps`.

    Of the slices so far: `top` is the largest z, `total` sum exp(z - top), `first` sum z, `dot` sum exp(z - top) z. [M]
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, target: Tensor,
        transform: LogitTransform, statistics: bool, dtype: torch.dtype, backward: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        h, count = hidden.to(dtype), len(hidden)
        top, total, first, dot = (h.new_zeros(count, dtype=wide) for _ in range(4))
        top.fill_(-torch.inf)
        token = h.new_empty(len(position), dtype=wide)
        trained = ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2])
        frozen = backward and not trained and transform.cap is None
        mean = h.new_zeros(hidden.shape, dtype=wide) if frozen else None  # expected row of the weight
        slices, buffer = _slices(count, weight, wide)
        for a, b in slices:
            w = weight[a:b].to(dtype)
            z = transform(_logits(h, w, None if bias is None else bias[a:b], buffer))
            inside, at = _within(target, a, b)
            torch.where(inside, z[position, at], token, out=token)
            if statistics:
                first += z.sum(-1)
            before, top = top, torch.maximum(top, z.amax(-1))
            rescale = (before - top).exp_().masked_fill_(top == -torch.inf, 0)  # 0 where every logit so far is -inf
            shift = top.masked_fill(top == -torch.inf, 0)
            if statistics:
                dot = dot.mul_(rescale).add_(_exp_and_dot(z, shift))
            else:
                z.sub_(shift[:, None]).exp_()
            total = total.mul_(rescale).add_(z.sum(-1))
            if mean is not None:
                mean.mul_(rescale[:, None]).add_(z.to(dtype) @ w)
        logsum = top + total.log()
        if backward:
            kept = (buffer, top - logsum) if trained and transform.cap is None else None
            ctx.kept, ctx.transform, ctx.dtype = kept, transform, dtype
            expected = None if mean is None else mean.div_(total[:, None])
            ctx.save_for_backward(hidden, weight, bias, position, target, logsum, expected)
        token -= logsum[position]
        out = (logsum - dot / total, first / len(weight)) if statistics else (None, None)
        ctx.mark_non_differentiable(*(x for x in out if x is not None))
        return token, *out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, position, target, logsum, expected = ctx.saved_tensors
        dtype, rest = ctx.dtype, (None,) * 6
        summed = logsum.new_zeros(len(hidden)).index_add_(0, position, gradient)  # [M]; the gradients at each position
        if expected is not None:
            own = (gradient[:, None] * ctx.transform.scale) * weight[target].to(dtype)  # as the products saw it
            d_hidden = expected * (-ctx.transform.scale * summed)[:, None]
            d_hidden.index_add_(0, position, own.to(expected.dtype))
            return d_hidden.to(hidden.dtype), None, None, *rest
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        h = hidden.to(dtype)
        d_hidden = logsum.new_zeros(hidden.shape) if needs_hidden else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        d_bias = torch.empty_like(bias) if needs_bias else None
        slices, buffer = _slices(len(h), weight, logsum.dtype, *(ctx.kept[:1] if ctx.kept else ()))
        kept, ctx.kept = ctx.kept, None  # it is overwritten: a second pass would compute it again
        for a, b in reversed(slices):
            w = weight[a:b].to(dtype)
            slope = None
            if kept:
                dz = _view(buffer, len(h), b - a).mul_((-summed * kept[1].exp())[:, None])
                kept = None
            else:
                dz = ctx.transform(_logits(h, w, None if bias is None else bias[a:b], buffer))
                if ctx.transform.cap is not None:
                    slope = 1 - (dz / ctx.transform.cap).square_()
                dz.sub_(logsum[:, None]).exp_().mul_(-summed[:, None])
            inside, at = _within(target, a, b)
            dz.index_put_((position, at), gradient.where(inside, 0), accumulate=True)
            if slope is not None:
                dz.mul_(slope)
            dz = (dz if ctx.transform.scale == 1 else dz.mul_(ctx.transform.scale)).to(dtype)
            if d_hidden is not None:
                d_hidden.addmm_(dz, w) if dtype == d_hidden.dtype else d_hidden.add_(dz @ w)
            if d_weight is not None:
                torch.mm(dz.T, h, out=d_weight[a:b]) if dtype == weight.dtype else d_weight[a:b].copy_(dz.T @ h)
            if d_bias is not None:
                d_bias[a:b] = dz.sum(0)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, *rest


def _slices(count: int, weight: Tensor, dtype: torch.dtype, buffer: Tensor | None = None) -> tuple[list, Tensor]:
    """Even slices of the vocabulary whose logits at `count` positions take CHUNK bytes at most, and room for one."""
    vocabulary = len(weight)
    pieces = -(-vocabulary * count * dtype.itemsize // CHUNK) or 1
    width = -(-vocabulary // pieces)
    if buffer is None:
        buffer = torch.empty(count * width, dtype=dtype, device=weight.device)
    return [(a, min(a + width, vocabulary)) for a in range(0, vocabulary, width)], buffer


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Of the tokens of a slice of the vocabulary, written into `buffer`. [M, width], [v, width], [v] -> [M, v]"""
    z = _view(buffer, len(h), len(w))
    if bias is not None:
        return z.copy_(torch.addmm(bias.to(h.dtype), h, w.T))
    return torch.mm(h, w.T, out=z) if h.dtype == z.dtype else z.copy_(h @ w.T)


def _exp_and_dot(z: Tensor, shift: Tensor) -> Tensor:
    """Turn z into e = exp(z - shift), in place; returns the sums of e * z, without a second copy of z. [M, v] -> [M]"""
    rows = len(z) if z.is_cuda else max(1, (1 << 17) // z.shape[1])  # few enough to stay in the CPU's cache
    sums = []
    for part, by in zip(z.split(rows), shift.split(rows)):
        e = (part - by[:, None]).exp_()
        sums.append(part.clamp_(min=torch.finfo(z.dtype).min).mul_(e).sum(-1))  # not -inf * 0
        part.copy_(e)
    return torch.cat(sums)


def _within(target: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a slice, and where in it; nothing here waits for a GPU. 2 x [N]"""
    return (target >= a) & (target < b), (target - a).clamp(0, b - a - 1)


class LeanHead(NamedTuple):
    """A model's head, a plain matrix, and what the model does to its logits; it never holds all of them."""

    linear: nn.Linear
    transform: LogitTransform = UNCHANGED

    def logps(self, hidden: Tensor, position: Tensor, target: Tensor, statistics: bool = False) -> TokenLogps:
        """Log-probs of the N tokens `target`, predicted at `position` [N] of the M positions of `hidden` [M, width].

        Logits are computed in the head's dtype, or autocast's, then float32 or better, as a forward pass would.
        Backward goes through once; derivatives of derivatives are not available.
        """
        device, (weight, bias) = hidden.device.type, (self.linear.weight, self.linear.bias)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        with torch.autocast(device, enabled=False):
            if device in FUSED:
                rows = hidden[position]  # one for each token
                last = (self.transform, statistics, dtype, backward)
                return _at_positions(
                    FusedLogProbs.apply(rows, weight, bias, target, *last), position, len(hidden), statistics
                )
            found = _LogProbs.apply(hidden, weight, bias, position, target, self.transform, statistics, dtype, backward)
        return TokenLogps(*found)


def _at_positions(found: tuple[Tensor, ...], position: Tensor, count: int, statistics: bool) -> TokenLogps:
    """What `fused_head` found for each token; the statistics once for each of `count` positions."""
    if not statistics:
        return TokenLogps(found[0], None, None)
    one = position.new_empty(count).scatter_(0, position, torch.arange(len(position), device=position.device))
    return TokenLogps(found[0], found[1][one], found[2][one])


def transform_of(probed: Tensor, cap: float | None) -> LogitTransform | None:
    """What a model made of logits that were PROBES: cap them at `cap`, or scale them; None if it is neither. [5]"""
    found = probed.detach().double().cpu()
    scale = float(found[PROBES.index(1.0)]) if len(found) == len(PROBES) else math.nan
    transform = LogitTransform(cap=cap) if cap else LogitTransform(scale)
    expected = transform(torch.tensor(PROBES, dtype=torch.float64))
    precision = 8 * torch.finfo(probed.dtype).eps
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=precision, atol=precision)
    return transform if same else None
