"""Dilated attention over one sequence that is spread over many ranks: equal to one device, forward and backward.

Every rank attends within its shard first; segments that lie inside a shard never communicate. Of a segment that several
ranks keep, each of them picks the dilated rows *first*; these are all-gathered among the ranks of that segment only, joined
to the local result by their denominators, and in backward their gradients are reduce-scattered in fp32 (fp64 for fp64).
The backward of local and remote keys is fed with the one merged out and lse, so gradients are exact. What travels grows
with w / r and with the number of shared branches, not with the sequence (LongNet, arXiv 2307.02486, section 3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longnet.attention import strided
from longnet.attention.cached import Run, _runs, fused_steps, view
from longnet.attention.collectives import Flight, SequenceParallel, all_gather, reduce_scatter
from longnet.attention.dilated import AttentionOutput, _check
from longnet.attention.vectors import add_rows
from longnet.patterns import DilatedPattern
from longnet.schedule import Exchange, RankPlan, Shards, exchanges, rank_plan


def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    parallel: SequenceParallel,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> AttentionOutput:
    """`dilated_attention` of the whole sequence, for the tokens of this rank. A collective: every rank of the group calls it.

    Args:
        q: (B, n, H, D), the n tokens of this rank; k, v: (B, n, K, D). n may be 0 and may differ between ranks.
        pattern: who sees whom, laid over global positions; the same on all ranks.
        parallel: the ranks and their shards.
        causal, scale: as in `dilated_attention`.

    Returns:
        AttentionOutput(out (B, n, H, D), lse (B, H, n)), equal to the rows of one device, as are all gradients.

    Raises:
        ValueError: arguments that do not fit together or with this rank's shard, or tensors that library attention cannot
            take. Raised before anything is sent; other ranks then wait until their timeout.

    Example:
        >>> parallel = SequenceParallel(Shards.even(num_tokens, dist.get_world_size()))  # doctest: +SKIP
        >>> out, lse = sequence_parallel_attention(q, k, v, pattern, parallel)  # doctest: +SKIP
    """
    if q.dim() != 4 or q.shape[1] != parallel.num_tokens:
        raise ValueError(
            f"q: expected the {parallel.num_tokens} tokens of rank {parallel.rank}, positions "
            f"{parallel.shards.span(parallel.rank)}; got shape {tuple(q.shape)}"
        )
    if parallel.num_tokens:
        _check(q, k, v, pattern, False, None, parallel.start, None)
        reason = strided.unsupported(q, k, v)
        if reason is not None:
            raise ValueError(f"sequence parallelism needs library attention: {reason}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return AttentionOutput(*_Attention.apply(q, k, v, pattern, parallel, causal, scale))


class _Index(NamedTuple):
    """Where the rows of one exchange lie, as index tensors."""

    tokens: Tensor  # (padded,) the local token of every row that this rank sends; padding repeats row 0
    heads: Tensor  # (padded,) its key head
    sent: int  # rows that are not padding
    gathered: Tensor  # for every row of the assembled buffer, its place among all members' rows
    assembled: Tensor  # the inverse; padding points behind the end of the buffer
    parts: tuple[tuple[int, int, int], ...]  # of every segment: first assembled row, rows per slot, slots


class _Plan(NamedTuple):
    exchanges: tuple[Exchange, ...]
    indices: tuple[_Index, ...]
    runs: tuple[tuple[Run, ...], ...]
    tokens: Tensor  # the distinct (token, key head) that receive gradients from other ranks
    heads: Tensor
    targets: Tensor  # for every sent row of all exchanges in turn, its place among those


@functools.lru_cache(maxsize=64)
def _plan(
    pattern: DilatedPattern, heads: int, key_heads: int, shards: Shards, rank: int, causal: bool, device: str
) -> _Plan:
    plan: RankPlan = rank_plan(pattern, heads, key_heads, shards, rank, causal)
    runs = []
    for rectangles in plan.rectangles:
        members: dict[tuple[int, int, bool], list] = {}
        for x in rectangles:
            key = (x.segment, x.rate, x.begin > 0)
            coordinates = (x.head, x.slot, x.first, x.begin)
            members.setdefault(key, []).append((coordinates, x.queries, x.end - x.begin))
        runs.append(tuple(run for (i, rate, _), group in members.items() for run in _runs(group, i, rate)))
    indices = tuple(_index(e, rank, shards.borders[rank], device) for e in plan.exchanges)
    sent = [
        pair
        for i in indices
        for pair in zip(i.tokens[: i.sent].tolist(), i.heads[: i.sent].tolist(), strict=True)
    ]
    distinct = {pair: place for place, pair in enumerate(sorted(set(sent)))}
    columns = ([t for t, _ in distinct], [h for _, h in distinct], [distinct[pair] for pair in sent])
    tensors = (torch.tensor(x, dtype=torch.int64, device=device) for x in columns)
    return _Plan(plan.exchanges, indices, tuple(runs), *tensors)


def _index(exchange: Exchange, rank: int, start: int, device: str) -> _Index:
    own, padded = exchange.members.index(rank), exchange.padded
    tokens: list[int] = []
    heads: list[int] = []
    gathered: list[int] = []
    parts = []
    used = [0] * len(exchange.members)  # rows of every member that earlier slots have taken
    for segment in exchange.segments:
        columns = []
        for slot, (key_head, offset) in enumerate(segment.slots):
            first, count = segment.rows[own][slot]
            origin = segment.origin + offset - start
            tokens += [origin + m * segment.rate for m in range(first, first + count)]
            heads += [key_head] * count
            column = []
            for j, member in enumerate(segment.rows):
                column += range(j * padded + used[j], j * padded + used[j] + member[slot][1])
                used[j] += member[slot][1]
            columns.append(column)
        rows = max(map(len, columns))
        parts.append((len(gathered), rows, len(columns)))
        # Row-major (row, slot); a slot that is a row shorter than others is filled with a row that nobody reads.
        gathered += [column[m] if m < len(column) else -1 for m in range(rows) for column in columns]
    assembled = [len(gathered)] * (len(exchange.members) * padded)
    for place, source in enumerate(gathered):
        if source >= 0:
            assembled[source] = place
    sent, rest = len(tokens), padded - len(tokens)
    columns = (
        tokens + tokens[:1] * rest if tokens else [0] * padded,
        heads + heads[:1] * rest if heads else [0] * padded,
        [max(0, x) for x in gathered],
        assembled,
    )
    t, h, g, a = (torch.tensor(x, dtype=torch.int64, device=device) for x in columns)
    return _Index(t, h, sent, g, a, tuple(parts))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pattern, parallel, causal, scale):
        plan = _plan(pattern, q.shape[2], k.shape[2], parallel.shards, parallel.rank, causal, str(q.device))
        everywhere = exchanges(pattern, q.shape[2], k.shape[2], parallel.shards)
        made = parallel.groups(e.members for e in everywhere)
        groups = [made[e.members] for e in plan.exchanges]
        # All gathers are under way while the rank attends within its shard.
        flights = [_gather(k, v, i, g) for i, g in zip(plan.indices, groups, strict=True)]
        out, lse = _local_forward(q, k, v, pattern, causal, scale, parallel.start)
        in_place = fused_steps(out)
        total = out if in_place else out.to(lse.dtype, memory_format=torch.contiguous_format, copy=True)
        buffers: list[Tensor | None] = []
        for index, runs, flight in zip(plan.indices, plan.runs, flights, strict=True):
            if runs:
                buffer = flight.wait()[index.gathered]
                buffers.append(buffer)
                _add_remote(q, buffer, index, runs, total, lse, scale)
            else:
                flight.wait()
                buffers.append(None)
        out = total.to(q.dtype)
        ctx.spec = (pattern, parallel, causal, scale, plan, groups)
        ctx.save_for_backward(q, k, v, out, lse, *buffers)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):  # pyrefly: ignore
        pattern, parallel, causal, scale, plan, groups = ctx.spec
        q, k, v, out, lse, *buffers = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        statistics = torch.promote_types(q.dtype, torch.float32)
        dq_remote = torch.zeros(q.shape, dtype=q.dtype if q.is_cuda else statistics, device=q.device)
        wide = _widened(q, out, dout, dlse)
        # Gradients of remote rows travel while those of the shard's own keys are computed.
        flights = []
        for index, runs, buffer, group in zip(plan.indices, plan.runs, buffers, groups, strict=True):
            shape = (len(index.gathered) + 1, 2, q.shape[0], q.shape[3])
            dbuffer = torch.zeros(shape, dtype=statistics, device=q.device)
            if runs:
                _remote_backward(wide, lse, dlse is not None, buffer, dbuffer, index, runs, dq_remote, scale)
            flights.append(reduce_scatter(dbuffer[index.assembled], group))
        dq, dk, dv = _local_backward(dout, dlse, q, k, v, out, lse, pattern, causal, scale, parallel.start)
        dq = dq_remote.add_(dq).to(q.dtype) if plan.exchanges else dq
        if flights:
            received = torch.cat([x.wait()[: i.sent] for i, x in zip(plan.indices, flights, strict=True)])
            _add_received(plan, received, dk, dv)
        return dq, dk, dv, None, None, None, None


def _local_forward(q, k, v, pattern, causal, scale, start):
    if q.shape[1]:
        out, lse = strided.forward(q, k, v, None, pattern, causal, scale, start)
        return out, lse.contiguous()
    statistics = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], 0, dtype=statistics, device=q.device)


def _local_backward(dout, dlse, q, k, v, out, lse, pattern, causal, scale, start):
    if q.shape[1]:
        return strided.backward(dout, dlse, q, k, v, out, lse, None, pattern, causal, scale, start)
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def _gather(k: Tensor, v: Tensor, index: _Index, group: dist.ProcessGroup) -> Flight:
    """Start the all-gather of this rank's rows: (members * padded, 2, B, D)."""
    rows = torch.stack([x[:, index.tokens, index.heads] for x in (k, v)])  # (2, B, padded, D)
    return all_gather(rows.permute(2, 0, 1, 3), group)


def _sides(buffer: Tensor, index: _Index, run: Run) -> list[Tensor]:
    """Keys and values of one run as (B, heads or 1, rows, D) views of the assembled buffer (rows x slots, 2, B, D)."""
    first, rows, slots = index.parts[run.branch]
    part = buffer[first : first + rows * slots].unflatten(0, (rows, slots))
    (_, slot, _, row), step = run.first, run.steps
    # Heads that share one slot see the same rows.
    heads = 1 if step[1] == 0 and step[3] == 0 else run.heads
    sides = (part[:, :, i].permute(2, 0, 1, 3) for i in (0, 1))  # (B, rows, slots, D)
    return [view(x, heads, slot, step[1], row, step[3], run.rows, 1) for x in sides]


def _query_view(x: Tensor, run: Run) -> Tensor:
    (head, _, token, _), step = run.first, run.steps
    return view(x, run.heads, head, step[0], token, step[2], run.tokens, run.rate)


def _add_remote(
    q: Tensor, buffer: Tensor, index: _Index, runs: Sequence[Run], out: Tensor, lse: Tensor, scale: float
) -> None:
    """out, lse <- their merge with the softmax over other ranks' rows, in place."""
    statistics = lse.transpose(1, 2)[..., None]
    for run in runs:
        keys, values = _sides(buffer, index, run)
        partial, partial_lse = strided.attend((_query_view(q, run), keys, values), False, scale)
        parts = (
            _query_view(out, run),
            _query_view(statistics, run)[..., 0],
            partial,
            partial_lse.to(lse.dtype),
        )
        strided.merge_rows(*(x[:, None] for x in parts))


def _widened(q, out, dout, dlse):
    """As `strided._fold_lse_gradient`, on the side of the queries."""
    if dlse is None:
        return q, out.contiguous(), dout
    q, out, dout = (F.pad(x, (0, 8)) for x in (q, out, dout))
    dout[..., -1] = dlse.transpose(1, 2)
    return q, out, dout


def _remote_backward(wide, lse, has_dlse, buffer, dbuffer, index, runs, dq, scale) -> None:
    """Library backward over other ranks' rows with the merged out and lse: adds to dq and dbuffer, in place."""
    q, out, dout = wide
    width = dq.shape[-1]
    statistics = lse.transpose(1, 2)[..., None]
    for run in runs:
        keys, values = _sides(buffer, index, run)
        if has_dlse:
            keys, values = F.pad(keys, (0, 8)), F.pad(values, (0, 8))
            values[..., -1] = 1
        views = (*(_query_view(x, run) for x in (dout, q, out)), keys, values)
        local = _query_view(statistics, run)[..., 0].contiguous()
        grads = strided.attend_backward(views, local, False, scale)
        _query_view(dq, run).add_(grads[0][..., :width])
        for target, grad in zip(_sides(dbuffer, index, run), grads[1:], strict=True):
            grad = grad[..., :width]
            if target.shape[1] < grad.shape[1]:
                grad = grad.sum(1, keepdim=True, dtype=target.dtype)
            target.add_(grad)


def _add_received(plan: _Plan, received: Tensor, dk: Tensor, dv: Tensor) -> None:
    """dk, dv (B, n, K, D) += the gradients (rows, 2, B, D) that other ranks sent, summed first, rounded once."""
    total = received.new_zeros((len(plan.tokens), *received.shape[1:]))
    add_rows(total, plan.targets, received)
    for i, x in enumerate((dk, dv)):
        here = x[:, plan.tokens, plan.heads].to(total.dtype) + total[:, i].transpose(0, 1)
        x[:, plan.tokens, plan.heads] = here.to(x.dtype)
