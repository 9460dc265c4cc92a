"""Rotary turns of queries and keys in one pass over memory: alone, and in place with the RMS norm before it, for inference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows (a head of a token) of a program.
ROWS = 64


@triton.jit
def _turn_kernel(
    x, out, cos, sin, tokens, heads, sxb, sxn, sxh, scb, scn,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BACK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    half: tl.constexpr = D // 2
    row = tl.arange(0, BM)
    d = tl.arange(0, BD)
    n = (tl.program_id(0) * (BM // BH) + row // BH).to(tl.int64)
    h = (row % BH).to(tl.int64)
    ok = (n < tokens) & (h < heads)
    mask = ok[:, None] & (d < half)[None, :]
    at = x + b * sxb + (n * sxn + h * sxh)[:, None] + d[None, :]
    first = tl.load(at, mask, 0.0).to(tl.float32)
    second = tl.load(at + half, mask, 0.0).to(tl.float32)
    angle = b * scb + n[:, None] * scn + d[None, :]
    c = tl.load(cos + angle, mask, 0.0)
    s = tl.load(sin + angle, mask, 0.0)
    if BACK:
        s = -s
    to = out + ((b * tokens + n) * heads + h)[:, None] * D + d[None, :]
    turned_first = first * c - second * s
    turned_second = second * c + first * s
    if ADD:
        turned_first += tl.load(to, mask, 0.0).to(tl.float32)
        turned_second += tl.load(to + half, mask, 0.0).to(tl.float32)
    tl.store(to, turned_first.to(out.dtype.element_ty), mask)
    tl.store(to + half, turned_second.to(out.dtype.element_ty), mask)


def turned(
    x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool = False, onto: Tensor | None = None
) -> Tensor:
    """The pairs (x[i], x[i + D / 2]) of x (B, N, H, D) turned by their angle, or `back`, rounded to `dtype`.

    cos, sin (B or 1, N, 1, D / 2) fp32. -> (B, N, H, D), contiguous; `onto` (the same, of `dtype`): added to it, in place.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = (y.contiguous() for y in torch.broadcast_tensors(cos, sin))
    batch, tokens, heads, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if onto is None else onto
    if not x.numel():
        return out
    padded = triton.next_power_of_2(heads)
    rows = max(ROWS, padded)
    with torch.cuda.device_of(x):
        _turn_kernel[(triton.cdiv(tokens, rows // padded), batch)](
            x, out, cos, sin, tokens, heads, *x.stride()[:3], cos.stride(0) if cos.shape[0] == batch else 0, cos.stride(1),
            D=width, BD=triton.next_power_of_2(width // 2), BH=padded, BM=rows, BACK=back, ADD=onto is not None,
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _norm_rotary_kernel(
    qk, q_weight, k_weight, cos, sin, tokens, num_queries, heads, stride_n, scn, eps,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # A program turns all query and key heads of one token: the pairs (x[i], x[i + D / 2]) by the angle of i.
    i_n = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = D // 2
    h, d = tl.arange(0, BH), tl.arange(0, BD)
    mask = (h < heads)[:, None] & (d < half)[None, :]
    at = qk + i_n * stride_n + h[:, None] * D + d[None, :]
    a = tl.load(at, mask, 0.0).to(tl.float32)
    b = tl.load(at + half, mask, 0.0).to(tl.float32)
    mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D
    inverse = tl.rsqrt(mean + eps)[:, None]
    is_query = (h < num_queries)[:, None]
    d_ok = d < half
    w_a = tl.where(
        is_query, tl.load(q_weight + d, d_ok, 0.0)[None, :], tl.load(k_weight + d, d_ok, 0.0)[None, :]
    )
    w_b = tl.where(
        is_query,
        tl.load(q_weight + half + d, d_ok, 0.0)[None, :],
        tl.load(k_weight + half + d, d_ok, 0.0)[None, :],
    )
    a = a * inverse * w_a.to(tl.float32)
    b = b * inverse * w_b.to(tl.float32)
    c = tl.load(cos + (i_n % tokens) * scn + d, d_ok, 0.0)[None, :]
    s = tl.load(sin + (i_n % tokens) * scn + d, d_ok, 0.0)[None, :]
    tl.store(at, (a * c - b * s).to(qk.dtype.element_ty), mask)
    tl.store(at + half, (b * c + a * s).to(qk.dtype.element_ty), mask)


def norm_rotary_(
    qkv: Tensor,
    num_queries: int,
    num_keys: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """In place on the first num_queries + num_keys heads of qkv (B, N, heads, D), contiguous: x <- turn(rms_norm(x) weight).

    cos, sin (B or 1, N, 1, D / 2) fp32.
    """
    batch, tokens, _, width = qkv.shape
    heads = num_queries + num_keys
    rows = batch * tokens if cos.shape[0] == batch else tokens
    with torch.cuda.device_of(qkv):
        _norm_rotary_kernel[(batch * tokens,)](
            qkv, q_weight, k_weight, cos, sin, rows, num_queries, heads, qkv.stride(1), cos.stride(1), eps,
            D=width, BH=triton.next_power_of_2(heads), BD=max(16, triton.next_power_of_2(width // 2)),
            num_warps=4 if heads * width > 1024 else 1,
        )  # fmt: skip
