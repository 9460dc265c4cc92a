"""Relevance: every token scores the summaries it can see and opens the best.

A tile is T consecutive tokens of one block with all query heads of one key head. What its tokens see at a level are the
tile's *columns*: the children of every node that any of them opened one level up (the union, ascending), then the listed
nodes, which they share. A column's summary is read once for the tile; a bit per token says who sees it. A token's own
candidates keep their order: the children of the nodes it opened, by place, then the listed nodes.

Tokens are counted from the first query, which stands at position `start` of its text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.cover import list_of_level


@triton.jit
def load_rows(base, index, ok, stride, d, D: tl.constexpr):
    """Rows `index` of a matrix with unit last stride, zero where not ok: (len(index), len(d))."""
    return tl.load(
        base + index.to(tl.int64)[:, None] * stride + d[None, :], ok[:, None] & (d < D)[None, :], 0.0
    )


@triton.jit
def count_opened(opened_above, level, levels, BEAM: tl.constexpr):
    """How many nodes were opened one level up; lists are filled from the front."""
    above = tl.load(opened_above + tl.arange(0, BEAM), (tl.arange(0, BEAM) >= 0) & (level < levels - 1), -1)
    return tl.sum((above >= 0).to(tl.int32), 0)


@triton.jit
def count_places(opened, TOP_K: tl.constexpr):
    """How many leaves a token opened; tokens of one block open equally many."""
    count = 0
    for n in tl.static_range(TOP_K):
        count += (tl.load(opened + n) >= 0).to(tl.int32)
    return count


@triton.jit
def places_of(
    opened, first_tile_token, t0, t_first, num_tokens, levels,
    T: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The places of tokens t0 + t_first .. of a tile, T of them with PLACES columns each: the leaf opened there, the place's
    number in (pairs, tiles, tile, TOP_K), the token's in the tile, and whether there is one."""
    c = tl.arange(0, T * PLACES)
    t = t_first + c // PLACES
    n = c % PLACES
    there = (n < TOP_K) & (t0 + t < num_tokens)
    leaf = tl.load(opened + (t0 + t).to(tl.int64) * levels * WIDTH + n, there, -1)
    return leaf, (first_tile_token.to(tl.int32) + t) * TOP_K + n, t, leaf >= 0


@triton.jit(do_not_specialize=["num_tokens"])
def unite(
    opened, scratch, united, members, places, sizes, num_tokens, levels, first_level, first_token, most,
    T: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The nodes of a level, first_level + z, that any token of a tile opened: the columns of the level below it.

    Tables of the level below, one level after the other: united (pairs, tiles, most) int32, ascending; sizes (pairs, tiles)
    int32; members (pairs, tiles, most) int32: bit t, token t opened it; places (pairs, tiles, most, T) int16: at which place,
    where it did. scratch (., pairs, tiles, T BEAM), int64 if WIDE: numbers of nodes times T BEAM need it. BITS: those of a sum
    of BEAM sets of tokens.
    """
    E: tl.constexpr = T * BEAM
    NOTHING: tl.constexpr = (1 << 60) if WIDE else (1 << 31) - 1
    pair = tl.program_id(1).to(tl.int64)
    level = first_level + tl.program_id(2)
    tables = tl.num_programs(0) * tl.num_programs(1)
    tile = pair * tl.num_programs(0) + tl.program_id(0)
    scratch += (tl.program_id(2) * tables + tile) * E
    tile += (level - 1) * tables
    united += tile * most
    members += tile * most
    places += tile * most * T
    e = tl.arange(0, E)
    t0 = first_token + tl.program_id(0) * T
    opened += ((pair * num_tokens + t0) * levels + level) * WIDTH
    node = tl.load(opened + e // BEAM * levels * WIDTH + e % BEAM, t0 + e // BEAM < num_tokens, -1)
    if WIDE:
        node = node.to(tl.int64)
    key = tl.sort(tl.where(node >= 0, node * E + e, NOTHING))
    tl.store(scratch + e, key)
    tl.debug_barrier()
    some = key < NOTHING
    node = key // E
    new = some & (tl.load(scratch + e - 1, e > 0, NOTHING) // E != node)
    last = some & (tl.load(scratch + e + 1, e < E - 1, NOTHING) // E != node)
    entry = (key % E).to(tl.int32)
    # One running sum counts the nodes and, in its lower BITS, adds up the tokens; a node's set is the difference along its run.
    token = tl.where(some, 1 << (entry // BEAM), 0).to(tl.int64)
    total = tl.cumsum((new.to(tl.int64) << BITS) + token, 0)
    u = (total >> BITS).to(tl.int32) - 1
    tokens = total & ((1 << BITS) - 1)
    tl.store(sizes + tile, tl.sum(new.to(tl.int32), 0))
    tl.store(united + u, node.to(tl.int32), new)
    tl.store(places + u * T + entry // BEAM, (entry % BEAM).to(tl.int16), some)
    tl.store(members + u, (tokens - token).to(tl.int32), new)
    tl.debug_barrier()
    before = tl.load(members + u, last, 0)
    tl.store(members + u, tokens.to(tl.int32) - before, last)


@triton.jit
def store_columns(rows, records, c, row, h, bits, ok):
    """Columns c: the rows of their summaries, and as records the entropies (log2) and who sees them."""
    h *= 1.4426950408889634
    record = (h.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    tl.store(rows + c, row, ok)
    tl.store(records + c, record, ok)


@triton.jit(do_not_specialize=["num_tokens", "num_nodes"])
def mark(
    base_bits, child_bits, united, members, places, sizes, offsets, entropy, rows, records, totals,
    num_tokens, num_nodes, num_key_heads, levels, first_level, first_token, start, most, columns,
    BLOCK: tl.constexpr, T: tl.constexpr, PARENTS: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr,
    GUARD: tl.constexpr, BEAM: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The columns of level first_level + z, as the kernels over tiles read them, PAD at a time.

    rows (levels, pairs, tiles, columns) int32: the row of a column's summary. records alike, int64: above, its entropy (log2)
    as fp32; below, bit t: token t of the tile sees it and, if KEPT, did not open it. totals (levels, pairs, tiles): columns.
    REST: a power of two that listed nodes and PAD together do not exceed.
    """
    TOGETHER: tl.constexpr = T if T * RADIX <= 64 else 64 // RADIX
    pair = tl.program_id(1).to(tl.int64)
    kh = (pair % num_key_heads).to(tl.int32)
    level = first_level + tl.program_id(2)
    tile = (level * tl.num_programs(1) + pair) * tl.num_programs(0) + tl.program_id(0)
    t0 = first_token + tl.program_id(0) * T
    slot = (pair * num_tokens + t0) * levels + level
    lo, hi = list_of_level(tl.maximum(0, (start + t0) // BLOCK - WINDOW + 1), level, levels, RADIX, GUARD)
    union_size = tl.load(sizes + tile, level < levels - 1, 0)
    size = union_size * RADIX + hi - lo
    tl.store(totals + tile, size)
    first_row = (pair // num_key_heads).to(tl.int32) * num_nodes + tl.load(offsets + level)
    rows += tile * columns
    records += tile * columns
    united += tile * most
    members += tile * most
    places += tile * most * T
    child = tl.arange(0, RADIX)[None, :]
    for begin in range(0, union_size, PARENTS):
        p = begin + tl.arange(0, PARENTS)
        ok = p < union_size
        member = tl.load(members + p, ok, 0)
        if KEPT:
            bits = tl.zeros((PARENTS, RADIX), tl.int32)
            for first in tl.static_range(0, T, TOGETHER):
                # The children that tokens first, first + 1, .. did not open, RADIX bits each.
                words = tl.zeros((PARENTS,), tl.int64)
                for i in tl.static_range(TOGETHER):
                    opens = ok & ((member >> (first + i)) & 1 != 0)
                    place = tl.load(places + p * T + first + i, opens, 0).to(tl.int32)
                    word = tl.load(child_bits + (slot + (first + i) * levels) * BEAM + place, opens, -1)
                    words |= (~word.to(tl.int64) & ((1 << RADIX) - 1)) << (RADIX * i)
                for i in tl.static_range(TOGETHER):
                    bits |= ((words[:, None] >> (RADIX * i + child)) & 1).to(tl.int32) << (first + i)
        else:
            bits = member[:, None] + tl.zeros((PARENTS, RADIX), tl.int32)
        row = (first_row + tl.load(united + p, ok, 0)[:, None] * RADIX + child) * num_key_heads + kh
        here = ok[:, None] & (child >= 0)
        h = tl.load(entropy + row, here, 0.0)
        store_columns(rows, records, p[:, None] * RADIX + child, row, h, bits, here)
    listed = tl.arange(0, REST)
    is_listed = listed < hi - lo
    bits = tl.where(is_listed, -1, 0)
    if KEPT:
        for t in tl.static_range(T):
            word = tl.load(base_bits + slot + t * levels, t0 + t < num_tokens, -1)
            bits ^= tl.where(is_listed, ((word >> (listed & 31)) & 1) << t, 0)
    row = tl.where(is_listed, (first_row + lo + listed) * num_key_heads + kh, 0)
    h = tl.load(entropy + row)
    c = union_size * RADIX + listed
    store_columns(rows, records, c, row, h, bits, c < (size + PAD - 1) // PAD * PAD)


@triton.jit
def tile_rows(t0, kh, num_tokens, G: tl.constexpr, GP: tl.constexpr, T: tl.constexpr):
    """The rows of a tile of T tokens from t0 on with the heads of one key head, each group padded to GP: the token's number in
    the tile, the head's in its group, token and head themselves, and whether there is such a row."""
    row = tl.arange(0, T * GP)
    t_row = row // GP
    g = row % GP
    token = (t0 + t_row).to(tl.int64)
    return t_row, g, token, kh * G + g, (g < G) & (token < num_tokens)


@triton.jit
def read_columns(rows, records, at, BC: tl.constexpr):
    """Of the columns from `at` on: their summaries' rows, entropies (log2), and bits."""
    c = at + tl.arange(0, BC)
    record = tl.load(records + c)
    h = (record >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(rows + c).to(tl.int64), h, record.to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens"])
def score(
    q, kbar, opened, places, sizes, rows, records, scores,
    sqb, sqn, sqh, num_tokens, num_key_heads, levels, level, scale, first_token, start, most, columns, width,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    BC: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    TOP_K: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """scores (pairs, tiles T, width) fp32 of every token's candidates at a level: the mean over the group of their softmax.

    A level's bias moves all logits of a head alike and so no score. Tokens with no more candidates than places open them
    all: nobody asks for their scores.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    pair = tl.program_id(1).to(tl.int64)
    tile = pair * tl.num_programs(0) + tl.program_id(0)
    scores += tile * T * width
    tile += level * tl.num_programs(0) * tl.num_programs(1)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    t0 = first_token + tl.program_id(0) * T
    first = tl.maximum(0, (start + t0) // BLOCK - WINDOW + 1)
    lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
    above = opened + ((pair * num_tokens + t0) * levels + tl.minimum(level + 1, levels - 1)) * WIDTH
    parents = count_opened(above, level, levels, BEAM)
    if parents * RADIX + hi - lo > tl.where(level == 0, TOP_K, BEAM):
        row = tl.arange(0, T * GP)
        token = (t0 + row // GP).to(tl.int64)
        head = kh * G + row % GP
        row_ok = (row % GP < G) & (token < num_tokens)
        d = tl.arange(0, BD)
        at_q = b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :]
        qt = tl.load(q + at_q, row_ok[:, None] & (d < D)[None, :], 0.0)
        union_size = tl.load(sizes + tile, level < levels - 1, 0)
        size = union_size * RADIX + hi - lo
        mask = (1 << (row // GP))[:, None]
        # Finite: a row may see nothing of the first columns.
        top = tl.full((T * GP,), -1e30, tl.float32)
        mass = tl.zeros((T * GP,), tl.float32)
        for begin in tl.range(0, size, BC):
            node, h, bits = read_columns(rows, records, tile * columns + begin, BC)
            kt = tl.load(kbar + node[:, None] * D + d[None, :], (d < D)[None, :], 0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E) + h[None, :]
            s = tl.where((bits[None, :] & mask) != 0, s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            mass = mass * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
            top = new
        share = tl.where(row_ok & (mass > 0), 1.0 / (tl.where(mass > 0, mass, 1.0) * G), 0.0)
        t = tl.arange(0, T)
        to = scores + t[:, None] * width
        for begin in tl.range(0, size, BC):
            node, h, bits = read_columns(rows, records, tile * columns + begin, BC)
            kt = tl.load(kbar + node[:, None] * D + d[None, :], (d < D)[None, :], 0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E) + h[None, :]
            p = tl.exp2(tl.minimum(s - top[:, None], 0.0)) * share[:, None]
            p = tl.sum(tl.reshape(p, (T, GP, BC)), 1)
            c = begin + tl.arange(0, BC)
            is_child = (c < union_size * RADIX)[None, :]
            sees = (bits[None, :] >> t[:, None]) & 1 != 0
            at_place = places + (tile * most + c // RADIX)[None, :] * T + t[:, None]
            place = tl.load(at_place, sees & is_child, 0).to(tl.int32)
            listed = (parents * RADIX + c - union_size * RADIX)[None, :]
            at = tl.where(is_child, place * RADIX + (c % RADIX)[None, :], listed)
            tl.store(to + at, p, sees & (t0 + t < num_tokens)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "num_leaves"])
def select(
    scores, opened, base_bits, child_bits, leaves, num_tokens, levels, level, first_token, start, num_leaves, width,
    BLOCK: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    PARENTS: tl.constexpr, LISTED: tl.constexpr, TOP_K: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """Which of its candidates of a level every token opens: the best scores, of equal ones the first.

    PARENTS, LISTED, PLACES: powers of two that no token's opened parents, listed nodes and WIDTH exceed. opened (B, K, N, levels,
    WIDTH) int32, ascending node numbers, -1 filled; base_bits (B, K, N, levels) int32, bit c: the c-th listed node is opened;
    child_bits (B, K, N, levels, BEAM) int32, bit c of entry e at level l: child c of the e-th node opened at l + 1 is opened.
    leaves (pairs, tokens of the chunk, TOP_K) int32, at level 0: the opened leaf numbered through all pairs, or their number
    where there is none.
    """
    token = first_token + tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    first = tl.maximum(0, (start + token) // BLOCK - WINDOW + 1)
    mine = pair * tl.num_programs(0) + tl.program_id(0)
    leaves += mine * TOP_K
    nothing = num_leaves * tl.num_programs(1)
    place = tl.arange(0, PLACES)
    if token >= num_tokens:
        tl.store(leaves + place, nothing, (place < TOP_K) & (level == 0))
    else:
        slot = (pair * num_tokens + token) * levels
        lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
        above = opened + (slot + tl.minimum(level + 1, levels - 1)) * WIDTH
        parents = count_opened(above, level, levels, BEAM)
        child = tl.arange(0, PARENTS * RADIX)
        is_child = child < parents * RADIX
        listed = tl.arange(0, LISTED)
        is_listed = listed < hi - lo
        total = parents * RADIX + hi - lo
        count = tl.where(level == 0, TOP_K, BEAM)
        search = total > count
        # The scores are at least 0, so their bits order like integers.
        scores += mine * width
        of_child = tl.load(scores + child, is_child & search, 0.0).to(tl.int32, bitcast=True)
        of_child = tl.where(is_child, of_child, -1)
        of_listed = tl.load(scores + parents * RADIX + listed, is_listed & search, 0.0).to(
            tl.int32, bitcast=True
        )
        of_listed = tl.where(is_listed, of_listed, -1)
        least = 0
        most = tl.where(search, tl.maximum(tl.max(of_child, 0), tl.max(of_listed, 0)) + 1, 1)
        while most - least > 1:
            middle = least + (most - least) // 2
            found = tl.sum((of_child >= middle).to(tl.int32), 0) + tl.sum(
                (of_listed >= middle).to(tl.int32), 0
            )
            least = tl.where(found >= count, middle, least)
            most = tl.where(found == count, middle + 1, tl.where(found > count, most, middle))
        # `least` is the score of the last place; of several candidates with it the first ones get in, children before listed.
        free = (
            count - tl.sum((of_child > least).to(tl.int32), 0) - tl.sum((of_listed > least).to(tl.int32), 0)
        )
        equal = (of_child == least).to(tl.int32)
        takes_child = (of_child > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= free))
        takes_child = tl.where(search, takes_child, is_child)
        free -= tl.sum(equal, 0)
        equal = (of_listed == least).to(tl.int32)
        takes_listed = (of_listed > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= free))
        takes_listed = tl.where(search, takes_listed, is_listed)
        parent = tl.load(above + child // RADIX, takes_child, 0)
        child_node = parent * RADIX + child % RADIX
        to = opened + (slot + level) * WIDTH
        at_child = tl.cumsum(takes_child.to(tl.int32), 0) - 1
        children = tl.sum(takes_child.to(tl.int32), 0)
        at_listed = children + tl.cumsum(takes_listed.to(tl.int32), 0) - 1
        taken = children + tl.sum(takes_listed.to(tl.int32), 0)
        tl.store(to + at_child, child_node, takes_child)
        tl.store(to + at_listed, lo + listed, takes_listed)
        tl.store(to + place, -1, (place >= taken) & (place < WIDTH))
        if level == 0:
            number = tl.program_id(1) * num_leaves
            tl.store(leaves + at_child, number + child_node, takes_child)
            tl.store(leaves + at_listed, number + lo + listed, takes_listed)
            tl.store(leaves + place, nothing, (place >= taken) & (place < TOP_K))
        tl.store(base_bits + slot + level, tl.sum(takes_listed.to(tl.int32) << listed, 0))
        words = tl.sum(tl.reshape(takes_child.to(tl.int32) << (child % RADIX), (PARENTS, RADIX)), 1)
        entry = tl.arange(0, PARENTS)
        tl.store(child_bits + (slot + level) * BEAM + entry, words, entry < BEAM)
