"""One token per sequence against a streaming cache: every branch in one launch, positions read on the device.

The buffers of the branches are separate allocations, so the kernels receive a table of their addresses. Tables depend on
the pattern alone and are sent to the device once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet.patterns import DilatedPattern

# Rows of one program: short enough that a step's latency is not that of one long loop.
ROWS = 512


@triton.jit
def _attend_kernel(
    q, addresses, branches, head_table, positions, partial, partial_lse, scale, num_heads, num_branches, sqb, sqh,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    i_bh, i_r, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    w, r = tl.load(branches + i_r * 4), tl.load(branches + i_r * 4 + 1)
    rows, slots = tl.load(branches + i_r * 4 + 2), tl.load(branches + i_r * 4 + 3)
    offset = tl.load(head_table + (i_r * num_heads + i_h) * 2)
    slot = tl.load(head_table + (i_r * num_heads + i_h) * 2 + 1)
    local = tl.load(positions + i_b) % w
    count = tl.where(local % r == offset, local // r + 1, 0)
    begin = i_c * SPAN
    end = tl.minimum(count, begin + SPAN)
    i_p = (i_bh * num_branches + i_r) * tl.num_programs(2) + i_c
    d = tl.arange(0, BD)
    if begin < end:
        keys = tl.load(addresses + i_r * 2).to(tl.pointer_type(q.dtype.element_ty))
        values = tl.load(addresses + i_r * 2 + 1).to(tl.pointer_type(q.dtype.element_ty))
        b_q = tl.load(q + i_b * sqb + i_h * sqh + d, d < D, 0.0).to(tl.float32) * (scale * 1.4426950408889634)
        top = float("-inf")
        total = 0.0
        acc = tl.zeros((BD,), tl.float32)
        for first in range(begin, end, BM):
            m = first + tl.arange(0, BM)
            ok = m < end
            at = ((i_b * rows + m) * slots + slot)[:, None] * D + d[None, :]
            mask = ok[:, None] & (d < D)[None, :]
            k = tl.load(keys + at, mask, 0.0).to(tl.float32)
            v = tl.load(values + at, mask, 0.0).to(tl.float32)
            s = tl.where(ok, tl.sum(k * b_q[None, :], 1), float("-inf"))
            new = tl.maximum(top, tl.max(s, 0))
            p = tl.exp2(s - new)
            rescale = tl.exp2(top - new)
            total = total * rescale + tl.sum(p, 0)
            acc = acc * rescale + tl.sum(p[:, None] * v, 0)
            top = new
        tl.store(partial + i_p * D + d, acc / total, d < D)
        tl.store(partial_lse + i_p, top + tl.log2(total))
    else:
        tl.store(partial + i_p * D + d, tl.zeros((BD,), tl.float32), d < D)
        tl.store(partial_lse + i_p, float("-inf"))


@triton.jit
def _join_kernel(partial, partial_lse, out, parts, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr):
    i_bh = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BP), tl.arange(0, BD)
    lse = tl.load(partial_lse + i_bh * parts + p, p < parts, float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    mask = (p < parts)[:, None] & (d < D)[None, :]
    x = tl.load(partial + (i_bh * parts + p)[:, None] * D + d[None, :], mask, 0.0)
    joined = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + i_bh * D + d, joined.to(out.dtype.element_ty), d < D)


@triton.jit
def _write_kernel(
    k, v, addresses, branches, slot_table, positions, max_slots, skb, skh, svb, svh, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    i_b, i_r, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    w, r = tl.load(branches + i_r * 4), tl.load(branches + i_r * 4 + 1)
    rows, slots = tl.load(branches + i_r * 4 + 2), tl.load(branches + i_r * 4 + 3)
    key_head = tl.load(slot_table + (i_r * max_slots + i_s) * 2)
    local = tl.load(positions + i_b) % w - tl.load(slot_table + (i_r * max_slots + i_s) * 2 + 1)
    if (key_head >= 0) & (local >= 0) & (local % r == 0):
        d = tl.arange(0, BD)
        at = ((i_b * rows + local // r) * slots + i_s) * D + d
        keys = tl.load(addresses + i_r * 2).to(tl.pointer_type(k.dtype.element_ty))
        values = tl.load(addresses + i_r * 2 + 1).to(tl.pointer_type(k.dtype.element_ty))
        tl.store(keys + at, tl.load(k + i_b * skb + key_head * skh + d, d < D), d < D)
        tl.store(values + at, tl.load(v + i_b * svb + key_head * svh + d, d < D), d < D)


@functools.lru_cache(maxsize=1024)
def _tables(
    pattern: DilatedPattern,
    heads: int,
    key_heads: int,
    buffers: tuple[tuple[int, int, int], ...],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """addresses (branches, 2), branches (branches, 4) = w, r, rows, slots, heads (branches, H, 2), slots (branches, S, 2)."""
    addresses = [[keys, values] for keys, values, _ in buffers]
    slots = [pattern.slots(r, heads, key_heads) for _, r in pattern.branches]
    most = max(len(x) for x in slots)
    branches = [
        [w, r, rows, len(x)] for (w, r), (_, _, rows), x in zip(pattern.branches, buffers, slots, strict=True)
    ]
    by_head = [
        [[pattern.offset(h, r, heads), pattern.head_slots(r, heads, key_heads)[h]] for h in range(heads)]
        for _, r in pattern.branches
    ]
    by_slot = [[*map(list, x), *[[-1, 0]] * (most - len(x))] for x in slots]
    return tuple(
        torch.tensor(x, dtype=torch.int64, device=device) for x in (addresses, branches, by_head, by_slot)
    )  # type: ignore[return-value]


def _of(
    pattern: DilatedPattern, buffers: Sequence[tuple[Tensor, Tensor]], heads: int, key_heads: int
) -> tuple[Tensor, ...]:
    key = tuple((k.data_ptr(), v.data_ptr(), k.shape[1]) for k, v in buffers)
    return _tables(pattern, heads, key_heads, key, buffers[0][0].device)


def write_token(
    buffers: Sequence[tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    heads: int,
    positions: Tensor,
) -> None:
    """Keep k, v (B, 1, K, D), tokens at `positions` (B,) int64, in contiguous buffers (B, rows, slots, D)."""
    addresses, branches, _, slots = _of(pattern, buffers, heads, k.shape[2])
    width = k.shape[3]
    _write_kernel[(k.shape[0], len(branches), slots.shape[1])](
        k, v, addresses, branches, slots, positions, slots.shape[1], k.stride(0), k.stride(2), v.stride(0), v.stride(2),
        D=width, BD=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def attend_token(
    q: Tensor,
    pattern: DilatedPattern,
    buffers: Sequence[tuple[Tensor, Tensor]],
    key_heads: int,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Attention of q (B, 1, H, D), whose own key is written: -> (B, 1, H, D). No work depends on the host."""
    batch, _, heads, width = q.shape
    addresses, branches, by_head, _ = _of(pattern, buffers, heads, key_heads)
    spans = triton.cdiv(max(k.shape[1] for k, _ in buffers), ROWS)
    parts = len(branches) * spans
    partial = torch.empty(batch * heads, parts, width, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(batch * heads, parts, dtype=torch.float32, device=q.device)
    block = triton.next_power_of_2(width)
    _attend_kernel[(batch * heads, len(branches), spans)](
        q, addresses, branches, by_head, positions, partial, partial_lse, scale, heads, len(branches), q.stride(0), q.stride(2),
        D=width, BD=block, BM=max(16, 4096 // block), SPAN=ROWS, num_warps=4,
    )  # fmt: skip
    out = torch.empty(batch, 1, heads, width, dtype=q.dtype, device=q.device)
    _join_kernel[(batch * heads,)](
        partial, partial_lse, out, parts, D=width, BD=block, BP=triton.next_power_of_2(parts), num_warps=4
    )
    return out
