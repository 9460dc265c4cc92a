"""Gradients of the summaries and of the opened leaf blocks: of the queries per token, of keys and values per node.

With P = exp(W - lse), delta = rowsum(dout * out) - dlse:
  summary: dsbar = P (dout . vbar - delta);
  opened leaf: p = softmax(x), g = p . dp, dW = P (g - delta), dx = P p (dp - g) + (1 - beta) p dW, dsbar = beta dW,
  dbeta = dW (sbar - lse_leaf), dv = P p dout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.cover import list_of_level
from longnet.kernels.routing import column_nodes, count_places, load_rows


@triton.jit
def far_dq(
    q, kbar, vbar, entropy, level_bias, offsets, opened, united, sizes, kept, part, part_dscore, part_dmix,
    dout, lse, delta, dq, dbias, dmix,
    sqb, sqn, sqh, num_tokens, num_nodes, num_heads, num_key_heads, levels, scale, first_token, most, columns,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    BC: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, ADD: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """dq of the far queries, per query dbias (B, N, H, levels) and dmix (B, N, H): the summaries' share, and the sum of the
    places' (part, part_dscore, part_dmix: dq, dsbar and dbeta of `leaves.leaf_backward`). ADD: to what dq holds."""
    LOG2E: tl.constexpr = 1.4426950408889634
    pair = tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    tile = pair * tiles + tl.program_id(0)
    tables = tiles * tl.num_programs(1)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    t0 = first_token + tl.program_id(0) * T
    first = tl.maximum(0, t0 // BLOCK - WINDOW + 1)
    row = tl.arange(0, T * GP)
    t_row = row // GP
    g = row % GP
    token = (t0 + t_row).to(tl.int64)
    head = kh * G + g
    ok = (g < G) & (token < num_tokens)
    d = tl.arange(0, BD)
    row_ok = ok[:, None] & (d < D)[None, :]
    at_scalar = (b * num_tokens + token) * num_heads + head
    at_out = at_scalar[:, None] * D + d[None, :]
    if first > 0:
        acc = tl.zeros((T * GP, BD), tl.float32)
        qt = tl.load(q + b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
        do = tl.load(dout + at_out, row_ok, 0.0)
        at_lse = (b * num_heads + head) * num_tokens + token
        lse2 = tl.load(lse + at_lse, ok, float("inf")) * LOG2E
        dl = tl.load(delta + at_lse, ok, 0.0)
        # After the last level, level 0, they are its sums.
        sums = tl.zeros((T * GP,), tl.float32)
        for step in range(levels):
            level = levels - 1 - step
            lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
            first_row = b * num_nodes + tl.load(offsets + level)
            kbar_base = kbar + (first_row * num_key_heads + kh) * D
            vbar_base = vbar + (first_row * num_key_heads + kh) * D
            entropy_base = entropy + first_row * num_key_heads + kh
            bias = tl.load(level_bias + head * levels + level, ok, 0.0) * LOG2E - lse2
            table = tile + level * tables
            union_size = tl.load(sizes + table, level < levels - 1, 0)
            size = union_size * RADIX + hi - lo
            sums = tl.zeros((T * GP,), tl.float32)
            for begin in tl.range(0, size, BC):
                c = begin + tl.arange(0, BC)
                node = column_nodes(c, union_size, lo, united + table * most, RADIX)
                bits = tl.load(kept + table * columns + c, c < size, 0)
                kt = load_rows(kbar_base, node, c < size, num_key_heads * D, d, D)
                vt = load_rows(vbar_base, node, c < size, num_key_heads * D, d, D)
                h = tl.load(entropy_base + node * num_key_heads, c < size, 0.0) * LOG2E
                s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E) + (
                    h[None, :] + bias[:, None]
                )
                p = tl.where(((bits[None, :] >> t_row[:, None]) & 1) != 0, tl.exp2(s), 0.0)
                ds = p * (tl.dot(do, tl.trans(vt), input_precision=PREC) - dl[:, None])
                acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
                sums += tl.sum(ds, 1)
            tl.store(dbias + at_scalar * levels + level, sums, ok)
        acc = acc * scale
        places = count_places(opened + (pair * num_tokens + t0) * levels * WIDTH, TOP_K)
        dbias_sum = sums
        dmix_sum = tl.zeros((T * GP,), tl.float32)
        for n in tl.range(0, places, num_stages=STAGES):
            place = ((tile * T + t_row) * TOP_K + n) * G + g
            acc += tl.load(part + place[:, None] * D + d[None, :], row_ok, 0.0).to(tl.float32)
            dbias_sum += tl.load(part_dscore + place, ok, 0.0)
            dmix_sum += tl.load(part_dmix + place, ok, 0.0)
        if ADD:
            acc += tl.load(dq + at_out, row_ok, 0.0).to(tl.float32)
        tl.store(dbias + at_scalar * levels, dbias_sum, ok)
        tl.store(dmix + at_scalar, dmix_sum, ok)
        tl.store(dq + at_out, acc.to(dq.dtype.element_ty), row_ok)


@triton.jit
def gather_children(
    opened, child_bits, families, words, entries, levels, level,
    COLUMNS: tl.constexpr, RADIX: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Readers of the nodes of a level, COLUMNS of them (a family) at a time: of every entry (pair, token, place) the family of
    the node opened there one level up, -1 where an earlier entry of the token has the same, and a word: bit c, the token
    sees child c of the family and did not open it."""
    entry = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    slot = entry // BEAM * levels + level
    place = entry % BEAM
    ok = entry < entries
    above = opened + (slot + 1) * WIDTH + place
    parents: tl.constexpr = COLUMNS // RADIX
    node = tl.load(above, ok, -1)
    before = tl.load(above - 1, ok & (place > 0), -1)
    family = node // parents
    first = (node >= 0) & ((before < 0) | (before // parents != family))
    word = tl.zeros((BM,), tl.int64)
    for i in tl.static_range(parents):
        there = ok & (place + i < BEAM)
        sibling = tl.load(above + i, there, -1)
        there = there & (sibling >= 0) & (sibling // parents == family)
        kept = ~tl.load(child_bits + slot * BEAM + place + i, there, -1).to(tl.int64) & ((1 << RADIX) - 1)
        word |= tl.where(there, kept << (tl.where(there, sibling, 0) % parents * RADIX), 0)
    tl.store(families + entry, tl.where(first, family, -1), ok)
    tl.store(words + entry, word, ok)


@triton.jit
def node_dkv(
    q, kbar, vbar, entropy, level_bias, offsets, words, readers, items, dout, lse, delta, partial,
    sqb, sqn, sqh,
    num_tokens, num_nodes, num_heads, num_key_heads, levels, level, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COLUMNS: tl.constexpr, BEAM: tl.constexpr, BM: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Per work item, the gradients of COLUMNS neighbouring summaries over some readers: partial (items, COLUMNS, 2 D + 1).

    items (., 4) int64: pair of sequence and key head (-1: none), number of the family, first and last reader. The readers are
    entries of `gather_children`, in the order of `readers`.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    item = tl.program_id(0).to(tl.int64)
    pair = tl.load(items + item * 4)
    if pair >= 0:
        family = tl.load(items + item * 4 + 1)
        begin = tl.load(items + item * 4 + 2)
        count = (tl.load(items + item * 4 + 3) - begin).to(tl.int32) * G
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        c = tl.arange(0, COLUMNS)
        first_node = tl.load(offsets + level)
        node = (family * COLUMNS).to(tl.int32) + c
        c_ok = node < tl.load(offsets + level + 1) - first_node
        node_row = (b * num_nodes + first_node + node) * num_key_heads + kh
        kt = load_rows(kbar, node_row, c_ok, D, d, D)
        vt = load_rows(vbar, node_row, c_ok, D, d, D)
        h = tl.load(entropy + node_row, c_ok, float("-inf")) * LOG2E
        dk = tl.zeros((COLUMNS, BD), tl.float32)
        dv = tl.zeros((COLUMNS, BD), tl.float32)
        dh = tl.zeros((COLUMNS,), tl.float32)
        row = tl.arange(0, BM)
        for r0 in tl.range(0, count, BM):
            ok = r0 + row < count
            at_reader = begin + (r0 + row) // G
            # Nodes are the rows of the products: their gradients take P and dS from registers.
            entry = tl.load(readers + at_reader, ok, 0)
            token = entry // BEAM - pair * num_tokens
            word = tl.load(words + entry, ok, 0)
            low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
            word = tl.where((c < 32)[:, None], low[None, :], high[None, :])
            keep = ((word >> (c & 31)[:, None]) & 1) != 0
            head = kh * G + (r0 + row) % G
            row_ok = ok[:, None] & (d < D)[None, :]
            qt = tl.load(q + b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
            at_out = ((b * num_tokens + token) * num_heads + head)[:, None] * D + d[None, :]
            do = tl.load(dout + at_out, row_ok, 0.0)
            at_lse = (b * num_heads + head) * num_tokens + token
            # Rows beyond the readers, and nodes beyond the level: exp2(-inf) is 0.
            lse2 = tl.load(lse + at_lse, ok, float("inf")) * LOG2E
            dl = tl.load(delta + at_lse, ok, 0.0)
            bias = tl.load(level_bias + head * levels + level, ok, 0.0) * LOG2E - lse2
            s = tl.dot(kt, tl.trans(qt), input_precision=PREC) * (scale * LOG2E) + (
                h[:, None] + bias[None, :]
            )
            p = tl.where(keep, tl.exp2(s), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
            ds = p * (tl.dot(vt, tl.trans(do), input_precision=PREC) - dl[None, :])
            dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PREC)
            dh += tl.sum(ds, 1)
        at = partial + (item * COLUMNS + c)[:, None] * (2 * D + 1) + d[None, :]
        mask = (d < D)[None, :] & (c >= 0)[:, None]
        tl.store(at, dk * scale, mask)
        tl.store(at + D, dv, mask)
        tl.store(partial + (item * COLUMNS + c) * (2 * D + 1) + 2 * D, dh)


@triton.jit
def sum_items(partial, first_item, out, width, BW: tl.constexpr, ADD: tl.constexpr):
    """out[group] = or += the sum of partial[first_item[group] : first_item[group + 1]], in that order; no atomics."""
    group = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BW + tl.arange(0, BW)
    begin = tl.load(first_item + group)
    end = tl.load(first_item + group + 1)
    total = tl.zeros((BW,), tl.float32)
    if ADD:
        total = tl.load(out + group * width + at, at < width, 0.0)
    for item in range(begin, end):
        total += tl.load(partial + item * width + at, at < width, 0.0)
    tl.store(out + group * width + at, total, at < width)
