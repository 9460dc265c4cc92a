"""Which rank keeps which tokens and sends which dilated rows to whom: a sequence over many devices, in integers. No torch.

`attention/sequence_parallel.py` and `attention/hierarchical_parallel.py` execute exactly what this module plans, so bytes and
work of a job of 1024 devices can be counted on a laptop.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from longnet.patterns import DilatedPattern, HierarchicalPattern


@dataclass(frozen=True)
class Shards:
    """Rank i keeps the tokens at positions borders[i] <= t < borders[i + 1]; shards may differ in length or be empty.

    Raises:
        ValueError: borders that fall, a negative first position, no rank or no token at all.

    Example:
        >>> Shards.even(10, 4).borders
        (0, 3, 6, 8, 10)
    """

    borders: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = all(a <= b for a, b in zip(self.borders, self.borders[1:], strict=False))
        if len(self.borders) < 2 or not rising or self.borders[0] < 0 or self.borders[0] == self.borders[-1]:
            raise ValueError(
                "borders: expected one more non-falling positions >= 0 than ranks, with at least one token; got "
                f"{self.borders}"
            )

    @classmethod
    def even(cls, num_tokens: int, ranks: int, start: int = 0, block: int = 1) -> Shards:
        """Contiguous shards whose lengths, in blocks, differ by at most one; the first are the longer ones."""
        if ranks < 1 or num_tokens < 1 or block < 1:
            raise ValueError(
                f"expected at least one rank, one token and blocks of one; got {ranks} ranks, {num_tokens} tokens, {block}"
            )
        length, longer = divmod(-(-num_tokens // block), ranks)
        inner = (block * (i * length + min(i, longer)) for i in range(ranks + 1))
        return cls(tuple(start + min(x, num_tokens) for x in inner))

    @property
    def ranks(self) -> int:
        return len(self.borders) - 1

    def span(self, rank: int) -> tuple[int, int]:
        """(first position, position after the last) of a rank."""
        return self.borders[rank], self.borders[rank + 1]

    def owners(self, begin: int, end: int) -> tuple[int, ...]:
        """The ranks that keep at least one of the tokens [begin, end)."""
        b = self.borders
        first, last = max(0, bisect_right(b, begin) - 1), min(self.ranks, bisect_left(b, end))
        return tuple(i for i in range(first, last) if max(b[i], begin) < min(b[i + 1], end))


class SharedSegment(NamedTuple):
    """A segment of a branch that more than one rank keeps: its dilated rows travel between them.

    rows[j][slot] = (first row, count) that member j keeps; row m of a slot with offset s is token origin + s + m rate.
    """

    rate: int
    origin: int
    slots: tuple[tuple[int, int], ...]  # (key head, offset)
    rows: tuple[tuple[tuple[int, int], ...], ...]


class Exchange(NamedTuple):
    """One all-gather of keys and values (backward: one reduce-scatter) among the ranks that keep `segments`."""

    members: tuple[int, ...]
    segments: tuple[SharedSegment, ...]
    padded: int  # rows that every member sends: the most that one of them keeps


class Rectangle(NamedTuple):
    """Queries of a head (local token first, first + rate, ...) that see rows [begin, end) of a slot, all of them."""

    segment: int  # index into the segments of its exchange
    slot: int
    head: int
    rate: int
    first: int
    queries: int
    begin: int  # counted from the first row of this slot that anybody keeps
    end: int


class RankPlan(NamedTuple):
    """What one rank does beyond attention within its own shard. The order of exchanges is the same on all ranks."""

    exchanges: tuple[Exchange, ...]
    rectangles: tuple[tuple[Rectangle, ...], ...]  # one tuple an exchange


@functools.lru_cache(maxsize=64)
def exchanges(
    pattern: DilatedPattern, num_heads: int, num_key_heads: int, shards: Shards
) -> tuple[Exchange, ...]:
    """All exchanges of a layer. Segments within one shard take no part; segments of the same ranks travel together."""
    return _exchanges_at(pattern, num_heads, num_key_heads, shards, shards.borders[1:-1])


@functools.lru_cache(maxsize=256)
def rank_exchanges(
    pattern: DilatedPattern, num_heads: int, num_key_heads: int, shards: Shards, rank: int
) -> tuple[Exchange, ...]:
    """Those of `exchanges` that `rank` takes part in, without looking at the others.

    A segment that it shares holds one of the two borders of its shard.
    """
    found = _exchanges_at(pattern, num_heads, num_key_heads, shards, shards.span(rank))
    return tuple(e for e in found if rank in e.members)


def _exchanges_at(
    pattern: DilatedPattern, num_heads: int, num_key_heads: int, shards: Shards, borders: tuple[int, ...]
) -> tuple[Exchange, ...]:
    """Exchanges of the segments that hold one of `borders`."""
    groups: dict[tuple[int, ...], list[tuple[SharedSegment, tuple[int, ...]]]] = {}
    for w, r in pattern.branches:
        # Only segments that hold a border between two tokens can be shared.
        origins = {b // w * w for b in borders if shards.borders[0] < b < shards.borders[-1]}
        for origin in sorted(origins):
            slots = pattern.slots(r, num_heads, num_key_heads)
            members, segment, counts = _shared_segment(slots, w, r, origin, shards)
            if len(members) > 1:
                groups.setdefault(members, []).append((segment, counts))
    return tuple(
        Exchange(
            members,
            tuple(segment for segment, _ in groups[members]),
            max(sum(of_member) for of_member in zip(*(counts for _, counts in groups[members]), strict=True)),
        )
        for members in sorted(groups)
    )


@functools.lru_cache(maxsize=8192)
def _shared_segment(
    slots: tuple[tuple[int, int], ...], w: int, r: int, origin: int, shards: Shards
) -> tuple[tuple[int, ...], SharedSegment, tuple[int, ...]]:
    """The ranks that keep a part of the segment at `origin`, which rows each keeps, and how many. All its ranks ask for it."""
    members = shards.owners(origin, origin + w)
    rows = tuple(
        tuple(_rows(origin + s, r, max(a, origin), min(b, origin + w)) for _, s in slots)
        for a, b in map(shards.span, members)
    )
    counts = tuple(sum(count for _, count in of_member) for of_member in rows)
    return members, SharedSegment(r, origin, slots, rows), counts


@functools.lru_cache(maxsize=256)
def rank_plan(
    pattern: DilatedPattern, num_heads: int, num_key_heads: int, shards: Shards, rank: int, causal: bool
) -> RankPlan:
    """The exchanges that `rank` takes part in, and what its queries see of the other ranks' rows."""
    mine = rank_exchanges(pattern, num_heads, num_key_heads, shards, rank)
    return RankPlan(
        mine,
        tuple(
            tuple(
                rectangle
                for i, segment in enumerate(exchange.segments)
                for rectangle in _rectangles(
                    pattern, num_heads, num_key_heads, shards, rank, causal, exchange.members, i, segment
                )
            )
            for exchange in mine
        ),
    )


def _rectangles(pattern, num_heads, num_key_heads, shards, rank, causal, members, index, segment):
    """Own rows are left out (attention within the shard sees them): before them, and after them unless causal."""
    own = members.index(rank)
    slot_of = pattern.head_slots(segment.rate, num_heads, num_key_heads)
    for head in range(num_heads):
        slot = slot_of[head]
        first, count = segment.rows[own][slot]
        if not count:
            continue
        before = sum(member[slot][1] for member in segment.rows[:own])
        total = sum(member[slot][1] for member in segment.rows)
        token = segment.origin + segment.slots[slot][1] + first * segment.rate - shards.borders[rank]
        query = (index, slot, head, segment.rate, token, count)
        if before:
            yield Rectangle(*query, 0, before)
        if not causal and before + count < total:
            yield Rectangle(*query, before + count, total)


def _rows(origin: int, rate: int, begin: int, end: int) -> tuple[int, int]:
    """(first m, count) of the tokens origin + m rate in [begin, end)."""
    first = max(0, -((origin - begin) // rate))
    return first, max(0, -((origin - end) // rate) - first)


class Traffic(NamedTuple):
    """Bytes that one rank receives in one layer."""

    forward: int
    backward: int


def traffic(
    pattern: DilatedPattern,
    num_heads: int,
    num_key_heads: int,
    head_width: int,
    shards: Shards,
    rank: int,
    *,
    batch: int = 1,
    element_size: int = 2,
    gradient_size: int = 4,
) -> Traffic:
    """What the collectives of a layer bring to `rank`, padding included: forward keys and values in `element_size` bytes,
    backward their gradients in `gradient_size` bytes (4: reduced in fp32). Independent of the sequence length at equal w / r.
    """
    rows = sum(
        (len(e.members) - 1) * e.padded
        for e in rank_exchanges(pattern, num_heads, num_key_heads, shards, rank)
    )
    numbers = 2 * batch * head_width * rows
    return Traffic(numbers * element_size, numbers * gradient_size)


class Work(NamedTuple):
    """(query, key) pairs that one rank computes in one layer and sequence, summed over heads."""

    local: int
    remote: int


def work(
    pattern: DilatedPattern,
    num_heads: int,
    num_key_heads: int,
    shards: Shards,
    rank: int,
    causal: bool = True,
) -> Work:
    """Pairs within the shard, and pairs with rows of other ranks. Over all ranks they add up to the pattern's pairs."""
    begin, end = shards.span(rank)
    local = 0
    for w, r in pattern.branches:
        for head in range(num_heads):
            s = pattern.offset(head, r, num_heads)
            first, last = -(-begin // w), end // w  # whole segments
            if first <= last:
                pieces = [(first, first * w, first * w + w, last - first)]
                pieces += [(first - 1, begin, first * w, 1), (last, last * w, end, 1)]
            else:
                pieces = [(last, begin, end, 1)]
            for segment, a, b, repeats in pieces:
                m = _rows(segment * w + s, r, a, b)[1]
                local += repeats * (m * (m + 1) // 2 if causal else m * m)
    plan = rank_plan(pattern, num_heads, num_key_heads, shards, rank, causal)
    remote = sum(x.queries * (x.end - x.begin) for each in plan.rectangles for x in each)
    return Work(local, remote)


class Halo(NamedTuple):
    """The tokens right before a shard, fetched from the ranks that keep them, each from one.

    begin: the first position that arrives. received[i]: how many come from rank i, in the order of positions. sent[i]: the
    local tokens [first, end) that rank i gets.
    """

    begin: int
    received: tuple[int, ...]
    sent: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=256)
def halo(shards: Shards, reach: int, rank: int) -> Halo:
    """The `reach` tokens before every shard, as far as the sequence goes back. An empty shard gets none."""

    def wanted(of: int) -> tuple[int, int]:
        begin, end = shards.span(of)
        return (max(shards.borders[0], begin - reach) if begin < end else begin), begin

    def common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        first = max(a[0], b[0])
        return first, max(first, min(a[1], b[1]))

    mine = shards.span(rank)
    spans = [shards.span(i) for i in range(shards.ranks)]
    received = (common(span, wanted(rank)) for span in spans)
    sent = (common(mine, wanted(i)) for i in range(shards.ranks))
    return Halo(
        wanted(rank)[0], tuple(b - a for a, b in received), tuple((a - mine[0], b - mine[0]) for a, b in sent)
    )


def leaf_counts(pattern: HierarchicalPattern, shards: Shards) -> tuple[int, ...]:
    """Complete leaf blocks of every rank.

    Raises:
        ValueError: the sequence does not begin at 0, or a shard with tokens not at a multiple of the block.
    """
    begins = [a for a, b in zip(shards.borders, shards.borders[1:], strict=False) if a < b]
    if shards.borders[0] or any(a % pattern.block for a in begins):
        raise ValueError(
            f"shards: expected borders 0, .. at multiples of the leaf block of {pattern.block} tokens; got {shards.borders}; "
            "use Shards.even(num_tokens, ranks, block=pattern.block)"
        )
    # The last shard alone may end within a block, which no query sees as a summary.
    return tuple((b - a) // pattern.block for a, b in zip(shards.borders, shards.borders[1:], strict=False))


def hierarchical_traffic(
    pattern: HierarchicalPattern,
    num_key_heads: int,
    head_width: int,
    shards: Shards,
    rank: int,
    fetched: int = 0,
    asked: int = 0,
    *,
    batch: int = 1,
    element_size: int = 2,
    gradient_size: int = 4,
) -> Traffic:
    """What a hierarchical layer brings to `rank`, but for the 8 bytes of a block's number: the keys and values of the window's
    halo, all leaf summaries, and the opened blocks. Backward their gradients: of the tokens that this rank lent, of its leaves.

    fetched: distinct (sequence, block, key head) that this rank opens and other ranks keep; asked: those that it keeps and
    other ranks open, counted once a rank. Mass and entropy of a leaf take `gradient_size` bytes, as do all gradients.
    """
    plan = halo(shards, (pattern.window_blocks - 1) * pattern.block, rank)
    lent = sum(b - a for a, b in plan.sent)
    leaves = (shards.ranks - 1) * max(leaf_counts(pattern, shards)) * batch * num_key_heads
    pair = 2 * head_width
    blocks = pair * pattern.block
    return Traffic(
        element_size * (pair * sum(plan.received) * batch * num_key_heads + pair * leaves + blocks * fetched)
        + 2 * gradient_size * leaves,
        gradient_size * (pair * lent * batch * num_key_heads + (pair + 2) * leaves + blocks * asked),
    )
