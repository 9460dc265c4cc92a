"""Dilated attention of one chunk of a sequence that is trained chunk by chunk, with exact gradients.

The forward pass is the cached one. In the backward pass, taken from the last chunk to the first, a chunk's queries add to the
gradients of the rows that earlier chunks left behind, and a chunk's own rows collect what later chunks added to theirs. Every
branch uses the merged out and lse, so nothing is truncated: the sum over chunks is the gradient of the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from longnet.attention import strided
from longnet.attention.cached import Buffers, prefill_attention, rectangles, view, writes
from longnet.patterns import DilatedPattern

# Queries of one explicit softmax tile, where no library backward takes the tensors.
TILE = 1024


class KeptRows(Protocol):
    """Rows that chunks leave behind, of one layer, in the layout of `attention.cached`; a branch that is not kept has none.

    Valid until the next layer asks.
    """

    def rows(self, backward: bool) -> Buffers:
        """Per branch the keys and values of the segment in which the chunk begins."""
        ...

    def gradients(self) -> tuple[Buffers, Buffers]:
        """Gradients of the same, to be added to in place, and of the rows of the segment in which the chunk ends."""
        ...


class ChunkAttention(torch.autograd.Function):
    """out (B, n, H, D) of a chunk at positions start .. start + n - 1.

    apply(q, k, v, pattern, start, kept): `kept` is a `KeptRows`.
    """

    @staticmethod
    def forward(ctx, q, k, v, pattern, start, kept):
        out, lse = prefill_attention(q, k, v, pattern, kept.rows(backward=False), start)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = (pattern, start, kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        pattern, start, kept = ctx.arguments
        before, (before_grads, own_grads) = kept.rows(backward=True), kept.gradients()
        dout = dout.contiguous()
        scale = 1 / math.sqrt(q.shape[3])
        dq, dk, dv = strided.backward(dout, None, q, k, v, out, lse, None, pattern, True, scale, start)
        work = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (x.to(work) for x in (dq, dk, dv))
        runs = rectangles(pattern, q.shape[2], k.shape[2], start, q.shape[1], start)
        statistics = lse.transpose(1, 2)[..., None]
        for run in runs:
            (head, slot, token, _), step = run.first, run.steps
            where = (run.heads, head, step[0], token, step[2], run.tokens, run.rate)
            keys, values = (view(x, run.heads, slot, step[1], 0, 0, run.rows, 1) for x in before[run.branch])
            queries = [view(x, *where) for x in (dout, q, out)]
            gradients = _attend_backward(queries, keys, values, view(statistics, *where)[..., 0], scale)
            view(dq, *where).add_(gradients[0])
            for total, gradient in zip(before_grads[run.branch], gradients[1:], strict=True):
                if step[1] == 0:  # all members read one slot
                    gradient = gradient.sum(1, keepdim=True, dtype=work)
                view(total, gradient.shape[1], slot, step[1], 0, 0, run.rows, 1).add_(gradient)
        for run in writes(pattern, q.shape[2], k.shape[2], start, q.shape[1]):
            if not own_grads[run.branch][0].shape[1]:
                continue
            (key_head, slot, token, row), step = run.first, run.steps
            for total, source in zip((dk, dv), own_grads[run.branch], strict=True):
                target = view(total, run.heads, key_head, step[0], token, step[2], run.tokens, run.rate)
                target.add_(view(source, run.heads, slot, step[1], row, step[3], run.rows, 1))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _attend_backward(
    queries: Sequence[Tensor], keys: Tensor, values: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) where every query sees every key, from the merged out and lse: (dout, q, out) (B, h, n, D), lse (B, h, n)."""
    dout, q, out = queries
    if strided.unsupported(q, keys, values) is None and q.dtype != torch.float64:
        return strided.attend_backward((dout, q, out, keys, values), lse.contiguous(), False, scale)
    work = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (
        torch.zeros_like(q, dtype=work),
        torch.zeros_like(keys, dtype=work),
        torch.zeros_like(values, dtype=work),
    )
    k, v = keys.to(work), values.to(work)
    for begin in range(0, q.shape[2], TILE):
        tile = slice(begin, begin + TILE)
        p = torch.exp(scale * q[:, :, tile].to(work) @ k.mT - lse[:, :, tile, None])
        g = dout[:, :, tile].to(work)
        delta = (g * out[:, :, tile]).sum(-1, keepdim=True)
        ds = scale * p * (g @ v.mT - delta)
        dq[:, :, tile] = ds @ k
        dk += ds.mT @ q[:, :, tile].to(work)
        dv += p.mT @ g
    return dq, dk, dv


def attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, start: int, kept: KeptRows
) -> Tensor:
    """`ChunkAttention` as a function."""
    return ChunkAttention.apply(q, k, v, pattern, start, kept)  # type: ignore[return-value]
