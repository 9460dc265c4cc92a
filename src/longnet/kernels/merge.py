"""Joining the result of one library call to strided rows of a whole tensor, in place, in one pass over the rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

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


@triton.jit
def _small(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def _join_kernel(
    out, lse, parts, sums, table, num_tokens, heads, o0, o1, o2, l0, l1, l2,
    SOURCES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % heads
    first_t = (tl.program_id(0) // heads) * BT
    i_b = tl.program_id(1)
    o_t = first_t + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None]
    b_top = tl.full((BT,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BT,), tl.float32)
    b_o = tl.zeros((BT, BD), tl.float32)
    b_touched = tl.zeros((BT,), tl.int32)
    for i in tl.static_range(SOURCES):
        row = table + i * 19
        head, step, members = _small(row), _small(row + 1), _small(row + 2)
        first, shift, rate = _small(row + 3), _small(row + 4), _small(row + 5)
        period, segments, count = _small(row + 6), _small(row + 7), _small(row + 8)
        i_s, sequences = i_b - _small(row + 9), _small(row + 10)
        i_a = (i_h - head) // step
        mine = (i_h >= head) & ((i_h - head) % step == 0) & (i_a < members) & (i_s >= 0) & (i_s < sequences)
        first += i_a * shift
        at = first_t - first
        # Rows lie `rate` apart: the tile holds one, begins before the first, or crosses into the next segment.
        inside = tl.maximum(at, 0) % period
        near = ((rate - inside % rate) % rate < BT) | (at < 0) | (inside + BT > period)
        if mine & near & (at + BT > 0) & (at < segments * period):
            x = o_t - first
            segment = x // period
            y = x - segment * period
            m = y // rate
            hit = (x >= 0) & (segment < segments) & (y == m * rate) & (m < count) & (o_t < num_tokens)
            p_p = parts[i] + tl.load(row + 11) * i_s + tl.load(row + 13) * i_a
            p_s = sums[i] + tl.load(row + 15) * i_s + tl.load(row + 17) * i_a
            p_p += segment * tl.load(row + 12) + m * tl.load(row + 14)
            p_s += segment * tl.load(row + 16) + m * tl.load(row + 18)
            b_s = tl.load(p_s, hit, float("-inf"))
            b_p = tl.load(p_p[:, None] + o_d[None], hit[:, None] & m_d, 0.0).to(tl.float32)
            b_new = tl.maximum(b_top, b_s)
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_w, b_old = tl.exp(b_s - b_safe), tl.exp(b_top - b_safe)
            b_o = b_o * b_old[:, None] + tl.where((b_w == 0.0)[:, None], 0.0, b_p * b_w[:, None])
            b_sum = b_sum * b_old + b_w
            b_top = b_new
            b_touched = b_touched | hit.to(tl.int32)
    m_t = b_touched != 0
    t64 = o_t.to(tl.int64)
    p_l = lse + i_b.to(tl.int64) * l0 + i_h * l1 + t64 * l2
    p_o = out + i_b.to(tl.int64) * o0 + t64[:, None] * o1 + i_h * o2 + o_d[None]
    b_s = tl.load(p_l, m_t, float("-inf"))
    b_p = tl.load(p_o, m_t[:, None] & m_d, 0.0).to(tl.float32)
    b_new = tl.maximum(b_top, b_s)
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_w, b_old = tl.exp(b_s - b_safe), tl.exp(b_top - b_safe)
    b_sum = b_sum * b_old + b_w
    b_norm = tl.where(b_sum == 0.0, 1.0, b_sum)
    # A weight of 0 must silence its side even where that side holds no number.
    b_o = b_o * (b_old / b_norm)[:, None] + tl.where(
        (b_w == 0.0)[:, None], 0.0, b_p * (b_w / b_norm)[:, None]
    )
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_t[:, None] & m_d)
    tl.store(p_l, tl.where(b_sum == 0.0, float("-inf"), tl.log(b_norm) + b_safe), mask=m_t)


def join_rows(out: Tensor, lse: Tensor, parts: Sequence[tuple[tuple[int, ...], Tensor, Tensor]]) -> None:
    """In place: out, lse <- their merge with all `parts` (place, partial, partial lse), rounded once.

    out (B, N, H, D); lse (B, H, N) fp32; N < 2^31. A partial (sequences, segments, heads, rows, D) and its place
    (head, head step, first token, shift, rate, period, sequence): row m of its head a in segment g of its sequence b is token
    first + a shift + g period + m rate of head `head + a head_step` of sequence `sequence + b`.
    """
    batch, num_tokens, heads, width = out.shape
    parts = [(a, p if p.stride(-1) == 1 else p.contiguous(), s) for a, p, s in parts]
    rows = tuple(
        (
            head, step, p.shape[2], first, shift, rate, min(period, 2**31 - 1), p.shape[1], p.shape[3],
            sequence, p.shape[0], *p.stride()[:4], *s.stride(),
        )
        for (head, step, first, shift, rate, period, sequence), p, s in parts
    )  # fmt: skip
    block = 32
    grid = (triton.cdiv(num_tokens, block) * heads, batch)
    with torch.cuda.device(out.device) if out.is_cuda else torch.no_grad():
        _join_kernel[grid](
            out, lse, tuple(p for _, p, _ in parts), tuple(s for _, _, s in parts), _table(rows, out.device), num_tokens, heads,
            *out.stride()[:3], *lse.stride(), SOURCES=len(parts), D=width, BD=triton.next_power_of_2(width), BT=block,
            num_warps=4,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device=device)
