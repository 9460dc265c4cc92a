"""Dilated attention when older keys live in a streaming cache. Plain tensors, any device and dtype, no autograd.

Per branch i a key buffer and a value buffer (B, rows, S, D), S = len(pattern.slots(r, H, K)). Row m of a slot with offset
s holds token g w + s + m r of the *current* segment g of its sequence. Older rows are stale; they are never read, because
the count of valid rows follows from the position. Buffers may hold fewer than ceil(w / r) rows as long as the stream fits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention import strided
from longnet.attention.dilated import AttentionOutput, dilated_attention
from longnet.patterns import DilatedPattern

Buffers = Sequence[tuple[Tensor, Tensor]]

# Queries of one explicit softmax tile: bounds the fp32 scores where no library attention exists.
TILE = 1024


class Run(NamedTuple):
    """`heads` members (query heads or slots) evenly spaced in memory, with equally many rows on both sides."""

    branch: int
    rate: int
    heads: int
    first: tuple[
        int, ...
    ]  # head or key head, slot, token (in the chunk), row (in the buffer) of the first member
    steps: tuple[int, ...]  # by how much each of them advances from member to member
    tokens: int
    rows: int


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, buffers: Buffers, start: int
) -> AttentionOutput:
    """Attention of a chunk at positions start .. start+n-1, all sequences alike; `buffers` hold the tokens before it.

    q (B, n, H, D); k, v (B, n, K, D) -> out (B, n, H, D), lse (B, H, n). The chunk's own keys and, per branch, the rows of
    the segment that began before `start` (a rectangle: every such row is visible) are joined by their denominators.
    """
    out, lse = dilated_attention(q, k, v, pattern, causal=True, start=start)
    runs = rectangles(pattern, q.shape[2], k.shape[2], start, q.shape[1], start)
    if not runs:
        return AttentionOutput(out, lse)
    if fused_steps(out) and not out.requires_grad:
        total = out  # the joining kernel works in fp32 and rounds once a branch, as within a single pass
    else:
        total = out.to(lse.dtype, memory_format=torch.contiguous_format, copy=True)
        lse = lse.clone(memory_format=torch.contiguous_format)
    _addrectangles(q, buffers, runs, total, lse)
    return AttentionOutput(total.to(q.dtype), lse)


def fused_steps(x: Tensor) -> bool:
    """Whether the kernels for single tokens and in-place joins can run on the device of x."""
    return x.is_cuda and x.dtype != torch.float64 and strided.has_triton()


def decode_attention(
    q: Tensor,
    pattern: DilatedPattern,
    buffers: Buffers,
    positions: Tensor,
    position: int | None = None,
    max_position: int | None = None,
) -> Tensor:
    """Attention of one token per sequence, whose own key is already written: (B, 1, H, D) -> (B, 1, H, D).

    Args:
        positions: (B,) int64 on the device of q, the position of every sequence's token. Never read on the host.
        position: the position, if the host knows that it is the same for all: then only valid rows are touched, as views.
        max_position: an upper bound of `positions` known to the host: fewer rows are read early in a stream.

    Cost: of a branch at most ceil(w / r) rows for each of at most ceil(H / r) heads, whatever has been read before.
    """
    batch, _, num_heads, _ = q.shape
    # Every pattern has a branch of rate 1, whose slots are the key heads.
    num_key_heads = buffers[pattern.dilation_rates.index(1)][0].shape[2]
    if fused_steps(q):
        from longnet.kernels.decode import attend_token

        return attend_token(q, pattern, buffers, num_key_heads, positions, 1 / math.sqrt(q.shape[3]))
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    if position is None:
        return _decode_ragged(q, pattern, buffers, positions, num_key_heads, max_position, work)
    runs = rectangles(pattern, num_heads, num_key_heads, position, 1, position + 1)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    lse = torch.full((batch, num_heads, 1), -torch.inf, dtype=work, device=q.device)
    _addrectangles(q, buffers, runs, out, lse)
    return out.to(q.dtype)


def write_rows(
    buffers: Buffers,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    num_heads: int,
    start: int,
    lengths: Sequence[int] | Tensor | None = None,
) -> None:
    """Keep a chunk k, v (B, n, K, D) that begins at `start` in all sequences; only the first lengths[b] tokens of b.

    Of every branch only the tokens of the segment in which a sequence ends are written, and none if its buffer has no rows.
    `lengths` is read on the host.
    """
    host = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if host is None or all(n == k.shape[1] for n in host):
        host = [k.shape[1]]
        parts = [slice(None)]
    else:
        parts = [slice(b, b + 1) for b in range(k.shape[0])]
    for part, n in zip(parts, host, strict=True):
        for run in writes(pattern, num_heads, k.shape[2], start, n):
            if not buffers[run.branch][0].shape[1]:
                continue  # a branch that is not kept
            for buffer, x in zip(buffers[run.branch], (k, v), strict=True):
                (key_head, slot, token, row), step = run.first, run.steps
                source = view(x[part], run.heads, key_head, step[0], token, step[2], run.tokens, run.rate)
                view(buffer[part], run.heads, slot, step[1], row, step[3], run.rows, 1).copy_(source)


def write_step(
    buffers: Buffers,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    num_heads: int,
    positions: Tensor,
    position: int | None = None,
) -> None:
    """Keep one token per sequence, k, v (B, 1, K, D) at positions (B,). No host synchronisation.

    `position`: the position, if the host knows that it is the same for all sequences.
    """
    if fused_steps(k):
        from longnet.kernels.decode import write_token

        return write_token(buffers, k, v, pattern, num_heads, positions)
    if position is not None:
        return write_rows(buffers, k, v, pattern, num_heads, position)
    sequence = torch.arange(k.shape[0], device=k.device)[:, None]
    for (w, r), pair in zip(pattern.branches, buffers, strict=True):
        slots = pattern.slots(r, num_heads, k.shape[2])
        key_heads, offsets = (_constant(tuple(x), k.device) for x in zip(*slots, strict=True))
        local = (positions % w)[:, None] - offsets
        takes = (local % r == 0) & (local >= 0)
        # A slot that does not take part rewrites what it holds: every (sequence, slot) has one target, so no collisions.
        row = torch.where(takes, local // r, 0)
        slot = torch.arange(len(slots), device=k.device)
        for buffer, x in zip(pair, (k, v), strict=True):
            new = torch.where(
                takes[..., None], x[:, 0].index_select(1, key_heads), buffer[sequence, row, slot]
            )
            buffer[sequence, row, slot] = new
    return None


@functools.lru_cache(maxsize=256)
def rectangles(
    pattern: DilatedPattern, num_heads: int, num_key_heads: int, start: int, n: int, seen: int
) -> tuple[Run, ...]:
    """Queries start .. start+n-1 against rows of the tokens before `seen`, in the segment that holds token `start`."""
    runs = []
    for i, (w, r) in enumerate(pattern.branches):
        begin = start // w * w
        end = min(begin + w, start + n)
        slots = pattern.head_slots(r, num_heads, num_key_heads)
        members = []
        for h in range(num_heads):
            s = pattern.offset(h, r, num_heads)
            token, tokens = _tokens(begin + s, r, start, end)
            rows = _tokens(begin + s, r, begin, seen)[1]
            if tokens and rows:
                members.append(((h, slots[h], token - start, 0), tokens, rows))
        runs += _runs(members, i, r)
    return tuple(runs)


@functools.lru_cache(maxsize=256)
def writes(
    pattern: DilatedPattern, num_heads: int, num_key_heads: int, start: int, n: int
) -> tuple[Run, ...]:
    """Copies from a chunk at `start` into the buffers: of every slot the tokens of the segment in which it ends."""
    runs = []
    if n < 1:
        return ()
    for i, (w, r) in enumerate(pattern.branches):
        begin = (start + n - 1) // w * w
        members = []
        for slot, (key_head, s) in enumerate(pattern.slots(r, num_heads, num_key_heads)):
            token, tokens = _tokens(begin + s, r, max(begin, start), start + n)
            if tokens:
                row = (token - begin - s) // r
                members.append(((key_head, slot, token - start, row), tokens, tokens))
        runs += _runs(members, i, r)
    return tuple(runs)


def _tokens(origin: int, rate: int, begin: int, end: int) -> tuple[int, int]:
    """(first, count) of the tokens origin, origin + rate, ... in [begin, end)."""
    first = origin + max(0, -(-(begin - origin) // rate)) * rate
    return first, max(0, -(-(end - first) // rate))


def _runs(members: list, branch: int, rate: int) -> list[Run]:
    """Cut members into evenly advancing runs, in the order (by head, or by token then head) that needs fewer."""

    def cut(ordered: list) -> list[list]:
        groups: list[list] = []
        steps: tuple[int, ...] | None = None
        for member in ordered:
            if groups and groups[-1][-1][1:] == member[1:]:
                step = tuple(b - a for a, b in zip(groups[-1][-1][0], member[0], strict=True))
                # Strides of a view must not be negative.
                if min(step) >= 0 and (len(groups[-1]) == 1 or step == steps):
                    groups[-1].append(member)
                    steps = step
                    continue
            groups.append([member])
        return groups

    best = min(cut(members), cut(sorted(members, key=lambda m: (m[0][2], m[0][0]))), key=len)
    runs = []
    for group in best:
        first, tokens, rows = group[0]
        second = group[1][0] if len(group) > 1 else first
        steps = tuple(b - a for a, b in zip(first, second, strict=True))
        runs.append(Run(branch, rate, len(group), first, steps, tokens, rows))
    return runs


def view(
    x: Tensor, heads: int, head: int, head_step: int, row: int, shift: int, rows: int, rate: int
) -> Tensor:
    """(B, heads, rows, D) strided view of x (B, N, heads, D): member j is head + j step, its rows begin at row + j shift."""
    sb, sn, sh, sd = x.stride()
    return x.as_strided(
        (x.shape[0], heads, rows, x.shape[3]),
        (sb, head_step * sh + shift * sn, rate * sn, sd),
        x.storage_offset() + row * sn + head * sh,
    )


def _addrectangles(q: Tensor, buffers: Buffers, runs: Sequence[Run], out: Tensor, lse: Tensor) -> None:
    """out (B, n, H, D), lse (B, H, n), contiguous <- their merge with every run's softmax over cached rows, in place."""
    scale = 1 / math.sqrt(q.shape[3])
    statistics = lse.transpose(1, 2)[..., None]
    for run in runs:
        (head, slot, token, _), step = run.first, run.steps
        where = (run.heads, head, step[0], token, step[2], run.tokens, run.rate)
        keys, values = (view(x, run.heads, slot, step[1], 0, 0, run.rows, 1) for x in buffers[run.branch])
        partial, partial_lse = _attend(view(q, *where), keys, values, scale)
        total, denominator = view(out, *where), view(statistics, *where)[..., 0]
        parts = (total, denominator, partial, partial_lse.to(lse.dtype))
        strided.merge_rows(*(x[:, None] for x in parts))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query sees every key: q (B, h, n, D), k, v (B, h, m, D) -> out (B, h, n, D), lse (B, h, n)."""
    if strided.unsupported(q, k, v) is None and q.stride(-1) == k.stride(-1) == 1:
        out, lse, *_ = strided.attend((q, k, v), False, scale)
        return out, lse
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, sums = [], []
    for tile in q.split(TILE, 2):
        scores = (tile @ k.transpose(-1, -2)).to(work) * scale
        sums.append(torch.logsumexp(scores, -1))
        outs.append(torch.softmax(scores, -1).to(v.dtype) @ v)
    return torch.cat(outs, 2), torch.cat(sums, 2)


@functools.lru_cache(maxsize=256)
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A small index tensor, sent to the device once."""
    with torch.inference_mode(False):  # it outlives the call, which may be followed by one with gradients
        return torch.tensor(values, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=256)
def _participants(pattern: DilatedPattern, rate: int, num_heads: int, num_key_heads: int) -> tuple:
    """For every offset (heads, slots) padded to ceil(H / r) entries with head H (nobody) and slot 0; flat tuples."""
    width = -(-num_heads // rate)
    slots = pattern.head_slots(rate, num_heads, num_key_heads)
    heads_flat: list[int] = []
    slots_flat: list[int] = []
    for s in range(rate):
        heads = [h for h in range(num_heads) if pattern.offset(h, rate, num_heads) == s]
        heads_flat += heads + [num_heads] * (width - len(heads))
        slots_flat += [slots[h] for h in heads] + [0] * (width - len(heads))
    return width, tuple(heads_flat), tuple(slots_flat)


def _decode_ragged(
    q: Tensor,
    pattern: DilatedPattern,
    buffers: Buffers,
    positions: Tensor,
    num_key_heads: int,
    max_position: int | None,
    work: torch.dtype,
) -> Tensor:
    """`decode_attention` where every sequence is at a position of its own, known to the device only."""
    batch, _, num_heads, width = q.shape
    padded = torch.cat((q[:, 0], q.new_zeros(batch, 1, width)), 1)
    outs, sums = [], []
    for (w, r), (keys, values) in zip(pattern.branches, buffers, strict=True):
        bound = keys.shape[1] if max_position is None else min(keys.shape[1], max_position // r + 1)
        heads, slots = _present(pattern, r, num_heads, num_key_heads, positions % w % r)
        # Own row included: tokens s, s + r, ... up to this one, which lies at row (t - g w) // r.
        count = positions % w // r + 1
        present = torch.gather(padded, 1, heads[..., None].expand(-1, -1, width))
        chosen_keys, chosen_values = (_choose(x[:, :bound], slots, r) for x in (keys, values))
        scores = (present[:, :, None] @ chosen_keys.transpose(-1, -2))[:, :, 0].to(work)
        hidden = torch.arange(bound, device=q.device) >= count[:, None]
        scores = (scores / math.sqrt(width)).masked_fill(hidden[:, None], -torch.inf)
        out = (torch.softmax(scores, -1).to(q.dtype)[:, :, None] @ chosen_values)[:, :, 0].to(work)
        # Into a slot per head; padding members go to head H, which is cut off.
        target = torch.zeros(batch, num_heads + 1, width, dtype=work, device=q.device)
        outs.append(target.scatter_(1, heads[..., None].expand_as(out), out)[:, :num_heads])
        lse = torch.full((batch, num_heads + 1), -torch.inf, dtype=work, device=q.device)
        lse = lse.scatter_(1, heads, torch.logsumexp(scores, -1))
        sums.append(lse[:, :num_heads])
    # A rate of 1 covers every head, so no column of weights is all -inf.
    weights = torch.softmax(torch.stack(sums), 0)
    return (weights[..., None] * torch.stack(outs)).sum(0).to(q.dtype)[:, None]


def _present(
    pattern: DilatedPattern, rate: int, num_heads: int, num_key_heads: int, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """(heads, slots), both (B, ceil(H / r)): who takes part at the offsets (B,) of this step."""
    width, heads, slots = _participants(pattern, rate, num_heads, num_key_heads)
    tables = (_constant(x, offsets.device).view(rate, width) for x in (heads, slots))
    chosen_heads, chosen_slots = (x.index_select(0, offsets) for x in tables)
    return chosen_heads, chosen_slots


def _choose(x: Tensor, slots: Tensor, rate: int) -> Tensor:
    """(B, P, rows, D): the chosen slots of x (B, rows, S, D); a view where every slot is its own head's (rate 1, MHA)."""
    by_slot = x.transpose(1, 2)
    if rate == 1 and slots.shape[1] == x.shape[2]:
        return by_slot
    return by_slot[torch.arange(x.shape[0], device=x.device)[:, None], slots]
