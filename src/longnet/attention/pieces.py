"""Dilated attention cut into library calls: which strided views of q, k, v, out and lse one call takes. Integers and views."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from longnet.patterns import DilatedPattern

# Library kernels lay the batch out along a launch dimension that ends here (CUDA: gridDim.y and .z).
BATCH_LIMIT = 65535


class Rows(NamedTuple):
    """Rows of one head in one segment: `count` tokens first, first + r, ..."""

    first: int
    count: int


class Piece(NamedTuple):
    """One family of library calls: equal segments x heads that are evenly spaced in memory, with equally many rows."""

    rate: int
    period: int  # tokens from one segment to the next
    segments: int
    head: int
    head_step: int
    heads: int
    key_head: int
    key_head_step: int  # 0: one key head serves all
    shift: int  # tokens by which the next head's rows start later
    queries: Rows
    keys: Rows
    causal: bool


class Span(NamedTuple):
    """`segments` equal segments of length w: local token ranges of the first, relative to the window's first key."""

    origin: int  # local index of the segment's own first token; negative when it began before the window
    segments: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool


@functools.lru_cache(maxsize=256)
def plan(
    pattern: DilatedPattern,
    num_heads: int,
    num_key_heads: int,
    num_keys: int,
    num_queries: int,
    start: int,
    causal: bool,
) -> tuple[Piece, ...]:
    """The library calls that make up dilated attention, dense branches first."""
    pieces = []
    for w, r in sorted(pattern.branches, key=lambda branch: branch[1]):
        for span in _spans(w, num_keys, num_queries, start, causal):
            heads = []
            for h in range(num_heads):
                s = pattern.offset(h, r, num_heads)
                queries, keys = (
                    _rows(span.origin, s, r, *span.queries),
                    _rows(span.origin, s, r, *span.keys),
                )
                if queries.count and keys.count:
                    queries = queries._replace(first=queries.first - (num_keys - num_queries))
                    heads.append((h, h // (num_heads // num_key_heads), queries, keys))
            # Heads of one offset together, or one head of every offset: whichever takes fewer calls.
            orders = (_runs(heads), _runs(sorted(heads, key=lambda x: (x[2].first % r, x[0]))))
            for run in min(orders, key=len):
                pieces.append(_piece(run, span, w, r))
    return tuple(pieces)


def _spans(w: int, num_keys: int, num_queries: int, start: int, causal: bool) -> list[Span]:
    """Segments of one branch that hold queries, grouped so that all segments of a span look alike."""
    first = num_keys - num_queries
    spans = []

    def partial(origin: int) -> None:
        begin, end = max(0, origin), min(num_keys, origin + w)
        query = max(begin, first)
        if causal and begin < query:
            spans.append(Span(origin, 1, (query, end), (begin, query), False))
        spans.append(Span(origin, 1, (query, end), (query if causal else begin, end), causal))

    segment = (start + first) // w
    if segment * w < start + first:
        partial(segment * w - start)
        segment += 1
    full = (start + num_keys) // w - segment
    origin = segment * w - start
    if full > 0:
        spans.append(Span(origin, full, (origin, origin + w), (origin, origin + w), causal))
        origin += full * w
    if origin < num_keys and full >= 0:
        partial(origin)
    return spans


def _rows(origin: int, offset: int, rate: int, begin: int, end: int) -> Rows:
    first = origin + offset
    if first < begin:
        first += -(-(begin - first) // rate) * rate
    return Rows(first, max(0, -(-(end - first) // rate)))


def _runs(heads: list) -> list[list]:
    """Cut a list of (head, key head, queries, keys) into runs in which all four advance evenly."""
    runs: list[list] = []
    steps = None
    for head in heads:
        if runs:
            last = runs[-1][-1]
            step = (head[0] - last[0], head[1] - last[1], head[2].first - last[2].first)
            even = step[2] == head[3].first - last[3].first
            even = even and (head[2].count, head[3].count) == (last[2].count, last[3].count)
            if even and step[0] > 0 and min(step) >= 0 and (len(runs[-1]) == 1 or step == steps):
                runs[-1].append(head)
                steps = step
                continue
        runs.append([head])
        steps = None
    return runs


def _piece(run: list, span: Span, w: int, r: int) -> Piece:
    (h, kh, queries, keys), second = run[0], run[1] if len(run) > 1 else None
    steps = (second[0] - h, second[1] - kh, second[2].first - queries.first) if second else (1, 0, 0)
    return Piece(
        r,
        w,
        span.segments,
        h,
        steps[0],
        len(run),
        kh,
        steps[1],
        steps[2],
        queries,
        keys,
        span.causal,
    )


class Call(NamedTuple):
    """One library call: a piece restricted to some sequences and some of its segments."""

    piece: Piece
    sequence: int
    sequences: int
    segment: int
    segments: int


def calls(piece: Piece, q: Tensor, k: Tensor, share: float = 1.0) -> list[Call]:
    """Library attention has one batch dimension: fold sequences and segments into it, or walk over the fewer of the two."""
    batch = q.shape[0]
    whole = piece.segments * piece.period
    fold = all(x.shape[1] == whole and x.stride(0) == whole * x.stride(1) for x in (q, k))
    if (piece.segments == 1 or (fold and share >= 1)) and batch * piece.segments <= BATCH_LIMIT:
        return [Call(piece, 0, batch, 0, piece.segments)]
    if batch > piece.segments:
        return [
            Call(piece, b, min(BATCH_LIMIT, batch - b), g, 1)
            for g in range(piece.segments)
            for b in range(0, batch, BATCH_LIMIT)
        ]
    size = min(BATCH_LIMIT, max(1, int(piece.segments * share)))
    return [
        Call(piece, b, 1, g, min(size, piece.segments - g))
        for b in range(batch)
        for g in range(0, piece.segments, size)
    ]


def _view(x: Tensor, call: Call, rows: Rows, head: int, heads: int, head_step: int, shift: int) -> Tensor:
    """(sequences, segments, heads, rows, D) view of x (B, N, heads, D). Only indices: no element is copied."""
    piece = call.piece
    sb, sn, sh, sd = x.stride()
    token = rows.first + call.segment * piece.period
    return x.as_strided(
        (call.sequences, call.segments, heads, rows.count, x.shape[3]),
        (sb, piece.period * sn, head_step * sh + shift * sn, piece.rate * sn, sd),
        x.storage_offset() + call.sequence * sb + token * sn + head * sh,
    )


def queries(x: Tensor, call: Call) -> Tensor:
    piece = call.piece
    return _view(x, call, piece.queries, piece.head, piece.heads, piece.head_step, piece.shift)


def keys(x: Tensor, call: Call) -> Tensor:
    """As `_queries`, with one head where one key head serves them all."""
    piece = call.piece
    shared = piece.key_head_step == 0 and piece.shift == 0
    heads = 1 if shared else piece.heads
    return _view(x, call, piece.keys, piece.key_head, heads, piece.key_head_step, piece.shift)


def statistics(lse: Tensor, call: Call) -> Tensor:
    """(sequences, segments, heads, rows) view of lse (B, H, Nq)."""
    return queries(lse.transpose(1, 2)[..., None], call)[..., 0]


def covers_all(call: Call, q: Tensor) -> bool:
    """Whether the call's queries are all of q in order, so that its result can be taken over without a copy."""
    piece = call.piece
    in_order = piece.rate == 1 and piece.heads == q.shape[2] and piece.queries.first == 0
    every = call.sequences == q.shape[0] and call.segments * piece.queries.count == q.shape[1]
    return in_order and every


def fills(piece: Piece, q: Tensor, k: Tensor) -> bool:
    """Whether the piece holds every (token, head) of q and of k exactly once."""
    # Counted in rows, not periods: a window of w tokens that begins inside a segment holds two partial segments.
    rows = (piece.segments * piece.queries.count, piece.segments * piece.keys.count)
    whole = piece.rate == 1 and rows == (q.shape[1], k.shape[1])
    return whole and piece.heads == q.shape[2] == k.shape[2]
