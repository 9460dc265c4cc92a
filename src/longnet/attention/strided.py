"""Dilated attention by library attention over strided views: no gather, no padding. CPU, and any GPU torch attends on.

Row m of segment g at offset s is token g w + s + m r, so the rows of equal segments are one strided view of q, k and v.
Causality inside a branch is plain causality among its rows. Every library call yields a partial softmax, merged by its
log-sum-exp; the backward calls get the merged output and log-sum-exp, which makes their gradients those of the mixture.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longnet.attention import pieces
from longnet.attention.merge import merge
from longnet.patterns import DilatedPattern

aten = torch.ops.aten

# Share of the rate-1 rows whose gradients are computed at once. cuDNN keeps dq in fp32, so scratch is 5 share q. At 1 its
# result is taken over without a copy: 4 to 5 % faster (H200, N=262144), but 2.03 times q of scratch.
BACKWARD_SHARE = 0.375


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why library attention cannot take these tensors, or None."""
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"no library attention that returns its log-sum-exp is known for device {q.device.type!r}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"library attention on CUDA takes float16 or bfloat16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"library attention on CUDA takes head widths that are multiples of 8 up to 128, not {q.shape[-1]}"
    return None


def has_cudnn(q: Tensor) -> bool:
    """Whether cuDNN's attention runs at its Hopper rate here."""
    return torch.cuda.get_device_capability(q.device)[0] >= 9 and torch.backends.cuda.cudnn_sdp_enabled()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    pattern: DilatedPattern,
    causal: bool,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor]:
    """out (B, Nq, H, D), lse (B, H, Nq); arguments as in `dilated_attention`, already checked."""
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not q.shape[0]:
        return q.new_empty(q.shape), q.new_empty((0, q.shape[2], q.shape[1]), dtype=statistics)
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    if lengths is not None:
        return _per_sequence_forward(q, k, v, lengths, pattern, causal, scale, start)
    if q.device.type == "cpu" and not (_finite(k) and _finite(v)):
        return _forward_around_broken_keys(q, k, v, pattern, causal, scale, start)
    num_queries, num_heads = q.shape[1:3]
    # CPU merges in fp32 and rounds once; on GPU the merge kernel rounds a row once per branch it lies in (2 on average).
    keep = q.dtype if q.is_cuda else statistics
    out = lse = None
    for piece in pieces.plan(pattern, num_heads, k.shape[2], k.shape[1], num_queries, start, causal):
        for call in pieces.calls(piece, q, k):
            views = (
                x.flatten(0, 1) for x in (pieces.queries(q, call), pieces.keys(k, call), pieces.keys(v, call))
            )
            partial, partial_lse = attend((*views,), piece.causal, scale)
            partial = partial.unflatten(0, (call.sequences, call.segments))
            partial_lse = partial_lse.unflatten(0, (call.sequences, call.segments))
            if out is None or lse is None:
                if pieces.covers_all(call, q) and keep == q.dtype:
                    out = partial.permute(0, 1, 3, 2, 4).reshape(q.shape)
                    lse = (
                        partial_lse.permute(0, 2, 1, 3)
                        .reshape(q.shape[0], num_heads, num_queries)
                        .contiguous()
                    )
                    continue
                out = torch.zeros(q.shape, dtype=keep, device=q.device)
                shape = (q.shape[0], num_heads, num_queries)
                lse = torch.full(shape, -torch.inf, dtype=statistics, device=q.device)
            merge_rows(pieces.queries(out, call), pieces.statistics(lse, call), partial, partial_lse)
    if out is None or lse is None:
        raise AssertionError("a pattern with rate 1 covers every token")
    return out.to(q.dtype), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    pattern: DilatedPattern,
    causal: bool,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). Per branch the library's flash backward, fed with the merged out and lse."""
    if not q.shape[0]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    if lengths is not None:
        return _per_sequence_backward(dout, dlse, q, k, v, out, lse, lengths, pattern, causal, scale, start)
    width = q.shape[-1]
    if dlse is not None:
        q, k, v, out, dout = _fold_lse_gradient(q, k, v, out, dout, dlse)
    dout, out = dout.contiguous(), out.contiguous()
    keep = q.dtype if q.is_cuda or q.dtype == torch.float64 else torch.float32
    gradients: list[Tensor] | None = None
    filled = False
    written = False  # whether the first piece, which holds every token once, has filled the gradients
    for piece in pieces.plan(pattern, q.shape[2], k.shape[2], k.shape[1], q.shape[1], start, causal):
        for call in pieces.calls(piece, q, k, BACKWARD_SHARE if piece.rate == 1 else 1.0):
            views = [
                *(pieces.queries(x, call) for x in (dout, q, out)),
                *(pieces.keys(x, call) for x in (k, v)),
            ]
            statistics = pieces.statistics(lse, call).flatten(0, 1).contiguous()
            flat = tuple(x.flatten(0, 1) for x in views)
            grads = attend_backward(flat, statistics, piece.causal, scale)
            grads = [g.unflatten(0, (call.sequences, call.segments)) for g in grads]
            if gradients is None:
                if keep == q.dtype and q.shape == k.shape and pieces.covers_all(call, q):
                    gradients = [g.permute(0, 1, 3, 2, 4).reshape(q.shape) for g in grads]
                    written = True
                    continue
                make = torch.empty if keep == q.dtype and pieces.fills(piece, q, k) else torch.zeros
                gradients = [make(x.shape, dtype=keep, device=x.device) for x in (q, k, v)]
                filled = make is torch.zeros
            _add_rows(pieces.queries(gradients[0], call), grads[0], read=written or filled)
            for total, grad in zip(gradients[1:], grads[1:], strict=True):
                target = pieces.keys(total, call)
                if target.shape[2] < grad.shape[2]:
                    grad = grad.sum(2, keepdim=True, dtype=torch.promote_types(keep, torch.float32))
                _add_rows(target, grad, read=written or filled)
            # The next call must not find this one's scratch still alive.
            del grads, views, flat, target, grad
        written = True
    assert gradients is not None
    dq, dk, dv = (g[..., :width].to(q.dtype).contiguous() for g in gradients)
    return dq, dk, dv


def _add_rows(total: Tensor, part: Tensor, read: bool) -> None:
    """total <- total + part, or part alone where nothing has been written yet."""
    if total.is_cuda and has_triton():
        from longnet.kernels.merge import add_rows

        add_rows(total, part, read)
    elif read:
        total.add_(part)
    else:
        total.copy_(part)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attend(qkv: tuple[Tensor, ...], causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Library attention of (X, heads, rows, D) views -> out (X, heads, rows, D), lse (X, heads, rows)."""
    q, k, v = qkv
    if scale <= 0:
        # Libraries scale what they have masked with -inf: times 0 that is NaN, times less +inf.
        return attend((q * _sign(scale), k, v), causal, abs(scale) or 1.0)
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q,
            k.expand(-1, q.shape[1], -1, -1),
            v.expand(-1, q.shape[1], -1, -1),
            0.0,
            causal,
            scale=scale,
        )
    if _cudnn_takes(q, k):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.reshape(q.shape[:3])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def attend_backward(views: tuple[Tensor, ...], lse: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """Library backward with the given out and lse; dk and dv have one head per query head, or the heads of k."""
    dout, q, out, k, v = views
    if scale <= 0:
        turned = (dout, q * _sign(scale), out, k, v)
        dq, dk, dv = attend_backward(turned, lse, causal, abs(scale) or 1.0)
        return dq * _sign(scale), dk, dv
    if not q.is_cuda:
        k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    # cuDNN adds up dq with atomics; torch's flash backward obeys the deterministic mode.
    if _cudnn_takes(q, k) and not torch.are_deterministic_algorithms_enabled():
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
            scale=scale,
        )  # fmt: skip
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        state,
        state,
        scale=scale,
    )
    return tuple(g.transpose(1, 2) for g in grads)


def _sign(scale: float) -> float:
    """scale q = (abs(scale) or 1) (_sign(scale) q) for a scale that is not positive."""
    return -1.0 if scale < 0 else 0.0


def _cudnn_takes(q: Tensor, k: Tensor) -> bool:
    """cuDNN compiles a plan per shape: worth it for full segments, which recur, and not for small or ragged rests."""
    return (
        has_cudnn(q) and q.shape[2] == k.shape[2] and q.shape[2] % 128 == 0 and q.shape[1] % k.shape[1] == 0
    )


def merge_rows(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """out, lse (views) <- their merge with a partial softmax over other keys, in place."""
    if out.is_cuda and has_triton():
        from longnet.kernels import merge as kernel

        return kernel.merge_rows(out, lse, partial, partial_lse)
    merged, merged_lse = merge(out, lse, partial, partial_lse.to(lse.dtype))
    out.copy_(merged)
    lse.copy_(merged_lse)
    return None


@functools.cache
def has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def _fold_lse_gradient(q, k, v, out, dout, dlse):
    """Widen the heads so that library backward, which knows no dlse, computes it.

    A further value column of ones whose output gradient is dlse adds dlse to dp = dout . v; its output column is given as
    0, so delta = rowsum(dout * out) stays. Then ds = p (dp + dlse - delta), which is the gradient through lse.
    """
    extra = 8
    q, k = (torch.nn.functional.pad(x, (0, extra)) for x in (q, k))
    v, out = torch.nn.functional.pad(v, (0, extra)), torch.nn.functional.pad(out, (0, extra))
    v[..., -1] = 1
    dout = torch.nn.functional.pad(dout, (0, extra))
    dout[..., -1] = dlse.transpose(1, 2)
    return q, k, v, out, dout


def _finite(x: Tensor) -> bool:
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _forward_around_broken_keys(q, k, v, *spec):
    """Forward when k or v hold NaN or infinity: exactly the (token, head)s that see such a key become NaN.

    The library multiplies masked values by 0, and 0 * NaN would reach queries that cannot see the key. So broken keys are
    blanked, and who sees one follows from uniform attention over an indicator. A CPU path: on GPU the check would stall.
    """
    broken_k, broken_v = (~torch.isfinite(x).all(-1, keepdim=True) for x in (k, v))
    out, lse = forward(q, k.masked_fill(broken_k, 0), v.masked_fill(broken_v, 0), None, *spec)
    for broken, targets in (
        (broken_k, (out, lse.transpose(1, 2)[..., None])),
        (broken_k | broken_v, (out,)),
    ):
        indicator = broken.to(q.dtype).expand(v.shape)
        reached = (
            forward(torch.zeros_like(q), torch.zeros_like(k), indicator.contiguous(), None, *spec)[0] > 0
        )
        for target in targets:
            target.masked_fill_(reached[..., : target.shape[-1]], torch.nan)
    return out, lse


def _valid(q: Tensor, k: Tensor, lengths: Tensor) -> list[tuple[slice, slice, slice]]:
    """(sequence, valid queries, valid keys) of every sequence that has any."""
    rest = k.shape[1] - q.shape[1]
    return [
        (slice(b, b + 1), slice(0, n - rest), slice(0, n))
        for b, n in enumerate(min(int(n), k.shape[1]) for n in lengths.tolist())
        if n > rest
    ]


def _per_sequence_forward(q, k, v, lengths, *spec):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(shape, -torch.inf, dtype=statistics, device=q.device)
    for b, queries, keys in _valid(q, k, lengths):
        out[b, queries], lse[b, :, queries] = forward(q[b, queries], k[b, keys], v[b, keys], None, *spec)
    return out, lse


def _per_sequence_backward(dout, dlse, q, k, v, out, lse, lengths, *spec):
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for b, queries, keys in _valid(q, k, lengths):
        part = backward(
            dout[b, queries], None if dlse is None else dlse[b, :, queries], q[b, queries], k[b, keys], v[b, keys],
            out[b, queries], lse[b, :, queries], None, *spec,
        )  # fmt: skip
        grads[0][b, queries], grads[1][b, keys], grads[2][b, keys] = part
    dq, dk, dv = grads
    return dq, dk, dv
