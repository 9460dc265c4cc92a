"""Joining the result of one library call to strided rows of a whole tensor, in place, in one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_kernel(
    out, lse, partial, partial_lse, rows, heads, segments,
    o0, o1, o2, o3, l0, l1, l2, l3, p0, p1, p2, p3, s0, s1, s2, s3,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # x: row tiles, y: heads, z: sequence * segment. Addresses are 64-bit: a tensor may pass 2^31 elements.
    tiles = tl.cdiv(rows, BM)
    i_x = tl.program_id(0).to(tl.int64)
    o_m = (i_x % tiles) * BM + tl.arange(0, BM)
    i_h = (i_x // tiles) % heads
    i_z = i_x // (tiles * heads)
    i_s, i_b = i_z % segments, i_z // segments
    o_d = tl.arange(0, BD)
    m_m = o_m < rows
    m_md = m_m[:, None] & (o_d < D)[None]
    p_l = lse + i_b * l0 + i_s * l1 + i_h * l2 + o_m * l3
    p_s = partial_lse + i_b * s0 + i_s * s1 + i_h * s2 + o_m * s3
    p_o = out + i_b * o0 + i_s * o1 + i_h * o2 + o_m[:, None] * o3 + o_d[None]
    p_p = partial + i_b * p0 + i_s * p1 + i_h * p2 + o_m[:, None] * p3 + o_d[None]
    b_a = tl.load(p_l, mask=m_m, other=0.0)
    b_b = tl.load(p_s, mask=m_m, other=0.0)
    b_top = tl.maximum(b_a, b_b)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_wa, b_wb = tl.exp(b_a - b_top), tl.exp(b_b - b_top)
    b_sum = b_wa + b_wb
    b_norm = tl.where(b_sum == 0.0, 1.0, b_sum)
    # A weight of 0 must silence its side even where that side holds no number.
    b_o = tl.load(p_o, mask=m_md, other=0.0).to(tl.float32)
    b_p = tl.load(p_p, mask=m_md, other=0.0).to(tl.float32)
    b_o = tl.where((b_wa == 0.0)[:, None], 0.0, b_o * (b_wa / b_norm)[:, None])
    b_p = tl.where((b_wb == 0.0)[:, None], 0.0, b_p * (b_wb / b_norm)[:, None])
    tl.store(p_o, (b_o + b_p).to(out.dtype.element_ty), mask=m_md)
    tl.store(p_l, tl.where(b_sum == 0.0, float("-inf"), tl.log(b_norm) + b_top), mask=m_m)


def merge_rows(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """In place: lse <- log(e^lse + e^partial_lse), out <- the mean of both sides weighted by e^(side - lse).

    out, partial: (sequences, segments, heads, rows, D) views with unit last stride; lse, partial_lse the same without D, fp32.
    """
    sequences, segments, heads, rows, width = out.shape
    if partial.stride(-1) != 1:
        partial = partial.contiguous()
    block = 32
    grid = (triton.cdiv(rows, block) * heads * segments * sequences,)
    with torch.cuda.device(out.device) if out.is_cuda else torch.no_grad():
        _merge_kernel[grid](
            out, lse, partial, partial_lse, rows, heads, segments,
            *out.stride()[:4], *lse.stride(), *partial.stride()[:4], *partial_lse.stride(),
            D=width, BD=triton.next_power_of_2(width), BM=block, num_warps=4,
        )  # fmt: skip


@triton.jit
def _add_kernel(
    total, part, rows, heads, segments, t0, t1, t2, t3, p0, p1, p2, p3,
    READ: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, BM)
    i_x = tl.program_id(0).to(tl.int64)
    o_m = (i_x % tiles) * BM + tl.arange(0, BM)
    i_h = (i_x // tiles) % heads
    i_z = i_x // (tiles * heads)
    i_s, i_b = i_z % segments, i_z // segments
    o_d = tl.arange(0, BD)
    m_md = (o_m < rows)[:, None] & (o_d < D)[None]
    p_t = total + i_b * t0 + i_s * t1 + i_h * t2 + o_m[:, None] * t3 + o_d[None]
    p_p = part + i_b * p0 + i_s * p1 + i_h * p2 + o_m[:, None] * p3 + o_d[None]
    b_x = tl.load(p_p, mask=m_md, other=0.0)
    if READ:
        b_x = b_x.to(tl.float32) + tl.load(p_t, mask=m_md, other=0.0).to(tl.float32)
    tl.store(p_t, b_x.to(total.dtype.element_ty), mask=m_md)


def add_rows(total: Tensor, part: Tensor, read: bool) -> None:
    """In place: total <- total + part (read) or part (not read). Both (sequences, segments, heads, rows, D) views."""
    sequences, segments, heads, rows, width = total.shape
    if part.stride(-1) != 1:
        part = part.contiguous()
    block = 64
    grid = (triton.cdiv(rows, block) * heads * segments * sequences,)
    with torch.cuda.device(total.device) if total.is_cuda else torch.no_grad():
        _add_kernel[grid](
            total, part, rows, heads, segments, *total.stride()[:4], *part.stride()[:4],
            READ=read, D=width, BD=triton.next_power_of_2(width), BM=block, num_warps=4,
        )  # fmt: skip
