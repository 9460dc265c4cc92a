"""RMS norm and rotary turn of queries and keys in one pass over memory, in place; for inference."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


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
    _norm_rotary_kernel[(batch * tokens,)](
        qkv, q_weight, k_weight, cos, sin, rows, num_queries, heads, qkv.stride(1), cos.stride(1), eps,
        D=width, BH=triton.next_power_of_2(heads), BD=max(16, triton.next_power_of_2(width // 2)),
        num_warps=4 if heads * width > 1024 else 1,
    )  # fmt: skip
