"""Readers ordered by what they read: work items of the kernels that own a node, and the sums over a node's items.

A group is what a program owns: a leaf block, or COLUMNS neighbouring nodes of a level (a family), numbered through all pairs
of sequence and key head. Families are numbered apart for every window of tokens: programs at work at the same time then read
the same queries, which stay in the cache. Readers are sorted by group; an item is a group with up to `most` of its readers. No
atomics: an item's sums are stored and added in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_at_least(keys, key, count, steps):
    """Index of the first of `count` ascending keys that is >= key, by `steps` halvings."""
    low = key * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        less = tl.load(keys + middle, low < high, 0) < key
        high = tl.where((low < high) & (less == 0), middle, high)
        low = tl.where((low < high) & less, middle + 1, low)
    return low


@triton.jit
def list_items(keys, items, ranges, count, groups, most, total, steps, BG: tl.constexpr):
    """Work items of `groups` groups from the ascending group numbers of `count` readers; larger keys belong to none.

    items (total, 3) int64: group (-1: no work), first and last reader. ranges (groups, 2) int64: a group's items. Where a
    group's items begin follows from where its readers begin, without a sum over the groups before: up to one item of a
    group stays empty for that.
    """
    group = tl.program_id(0) * BG + tl.arange(0, BG)
    ok = group < groups
    begin = first_at_least(keys, group, count, steps).to(tl.int64)
    end = first_at_least(keys, group + 1, count, steps).to(tl.int64)
    first = begin // most + group
    number = (end - begin + most - 1) // most
    room = end // most + group + 1 - first
    tl.store(ranges + group * 2, first, ok)
    tl.store(ranges + group * 2 + 1, first + number, ok)
    for i in range(tl.max(tl.where(ok, room, 0), 0)):
        at = items + (first + i) * 3
        there = ok & (i < room)
        tl.store(at, tl.where(i < number, group, -1), there)
        tl.store(at + 1, begin + i * most, there)
        tl.store(at + 2, tl.minimum(begin + (i + 1) * most, end), there)
    # What lies behind the last group's items is no work.
    listed = first_at_least(keys, groups, count, steps) // most + groups
    last = tl.num_programs(0) * BG
    for at in range(listed + tl.program_id(0) * BG, total, last):
        rest = at + tl.arange(0, BG)
        tl.store(items + rest.to(tl.int64) * 3, -1, rest < total)


@triton.jit
def gather_children(
    opened, child_bits, family_offsets, keys, words, entries, num_tokens, first_token, tokens, levels, families, window,
    windows, COLUMNS: tl.constexpr, RADIX: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """Readers of the children of nodes that `tokens` tokens from first_token on opened, of all levels: keys (levels - 1, entries)
    and words (levels - 1, entries, WORDS).

    An entry is (pair, token, place of a node opened one level up). Its key: the family of that node's children, numbered through
    windows and pairs; their number where there is none or an earlier entry of the token has the same. Its words: bit c, the
    token sees child c of the family and did not open it; 32 bits each. family_offsets (levels,): families of the levels below,
    of `families` in all.
    """
    level = tl.program_id(1)
    entry = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    pair = entry // BEAM // tokens
    token = entry // BEAM % tokens
    slot = (pair * num_tokens + first_token + token) * levels + level
    place = entry % BEAM
    ok = entry < entries
    above = opened + (slot + 1) * WIDTH + place
    PARENTS: tl.constexpr = COLUMNS // RADIX
    node = tl.load(above, ok, -1)
    before = tl.load(above - 1, ok & (place > 0), -1)
    family = node // PARENTS
    first = (node >= 0) & ((before < 0) | (before // PARENTS != family))
    word = tl.zeros((BM,), tl.int64)
    for i in tl.static_range(PARENTS):
        there = ok & (place + i < BEAM)
        sibling = tl.load(above + i, there, -1)
        there = there & (sibling >= 0) & (sibling // PARENTS == family)
        kept = ~tl.load(child_bits + slot * BEAM + place + i, there, -1).to(tl.int64) & ((1 << RADIX) - 1)
        word |= tl.where(there, kept << (tl.where(there, sibling, 0) % PARENTS * RADIX), 0)
    pairs = entries // BEAM // tokens
    number = pair.to(tl.int32) + (token // window).to(tl.int32) * pairs
    key = number * families + tl.load(family_offsets + level) + family
    to = level.to(tl.int64) * entries + entry
    tl.store(keys + to, tl.where(first, key, windows * pairs * families), ok)
    for i in tl.static_range(WORDS):
        tl.store(words + to * WORDS + i, (word >> (32 * i)).to(tl.int32), ok)


@triton.jit
def level_of(family, family_offsets, levels):
    """The level whose families include number `family`."""
    level = 0
    for above in range(1, levels - 1):
        level += (family >= tl.load(family_offsets + above)).to(tl.int32)
    return level


@triton.jit
def add_children(
    partial, ranges, family_offsets, offsets, dkbar, dvbar, dentropy, num_nodes, num_key_heads, levels, families, windows,
    D: tl.constexpr, BD: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add to dkbar, dvbar (B, nodes, K, D) and dentropy (B, nodes, K) the sums of the groups' items, partial (items, COLUMNS,
    2 D + 1)."""
    WIDTH: tl.constexpr = 2 * D + 1
    group = tl.program_id(0)
    pair = group // families
    family = group % families
    level = level_of(family, family_offsets, levels)
    first = tl.load(offsets + level)
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    node = (family - tl.load(family_offsets + level)) * COLUMNS + c
    c_ok = node < tl.load(offsets + level + 1) - first
    ok = c_ok[:, None] & (d < D)[None, :]
    row = (
        (pair // num_key_heads).to(tl.int64) * num_nodes + first + node
    ) * num_key_heads + pair % num_key_heads
    to = row[:, None] * D + d[None, :]
    dk = tl.load(dkbar + to, ok, 0.0)
    dv = tl.load(dvbar + to, ok, 0.0)
    dh = tl.load(dentropy + row, c_ok, 0.0)
    for w in range(windows):
        at_range = ranges + (w * tl.num_programs(0) + group) * 2
        for item in range(tl.load(at_range), tl.load(at_range + 1)):
            at = partial + (item * COLUMNS + c) * WIDTH
            dk += tl.load(at[:, None] + d[None, :], ok, 0.0)
            dv += tl.load(at[:, None] + D + d[None, :], ok, 0.0)
            dh += tl.load(at + 2 * D, c_ok, 0.0)
    tl.store(dkbar + to, dk, ok)
    tl.store(dvbar + to, dv, ok)
    tl.store(dentropy + row, dh, c_ok)


@triton.jit
def add_leaves(
    partial, partial_node, ranges, dk_sum, dv_sum, dk, dv, dkbar, dentropy,
    num_tokens, num_leaves, num_nodes, num_key_heads,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add the sums of the leaves' items, partial (items, 2, BLOCK, D) to dk_sum, dv_sum (B, N, K, D) fp32 and partial_node
    (items, D + 1) to dkbar (B, nodes, K, D), dentropy (B, nodes, K).

    LAST: the sums are stored to dk, dv instead, rounded. Tokens beyond the leaves included.
    """
    leaf = tl.program_id(0)
    pair = tl.program_id(2)
    b = (pair // num_key_heads).to(tl.int64)
    kh = pair % num_key_heads
    inside = leaf < num_leaves
    group = pair * num_leaves + leaf
    d = tl.arange(0, BD)
    d_ok = d < D
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = leaf * BLOCK + c
    ok = (token < num_tokens)[:, None] & d_ok[None, :]
    at = ((b * num_tokens + token) * num_key_heads + kh)[:, None] * D + d[None, :]
    dk_total = tl.load(dk_sum + at, ok, 0.0)
    dv_total = tl.load(dv_sum + at, ok, 0.0)
    row = (b * num_nodes + leaf) * num_key_heads + kh
    one = (tl.program_id(1) == 0) & inside
    summary = tl.load(dkbar + row * D + d, d_ok & one, 0.0)
    dh = tl.load(dentropy + row, one, 0.0)
    for item in range(tl.load(ranges + group * 2, inside, 0), tl.load(ranges + group * 2 + 1, inside, 0)):
        here = partial + (item * 2 * BLOCK + c)[:, None] * D + d[None, :]
        dk_total += tl.load(here, ok, 0.0)
        dv_total += tl.load(here + BLOCK * D, ok, 0.0)
        summary += tl.load(partial_node + item * (D + 1) + d, d_ok & one, 0.0)
        dh += tl.load(partial_node + item * (D + 1) + D, one, 0.0)
    tl.store(dkbar + row * D + d, summary, d_ok & one)
    tl.store(dentropy + row, dh, one)
    if LAST:
        tl.store(dk + at, dk_total.to(dk.dtype.element_ty), ok)
        tl.store(dv + at, dv_total.to(dv.dtype.element_ty), ok)
    else:
        tl.store(dk_sum + at, dk_total, ok)
        tl.store(dv_sum + at, dv_total, ok)
