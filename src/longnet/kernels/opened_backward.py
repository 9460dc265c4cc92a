"""Gradients of the summaries and of the opened leaf blocks: of the queries per token, of keys and values per node.

With P = exp(W - lse), delta = rowsum(dout * out) - dlse:
  summary: dsbar = P (dout . vbar - delta);
  opened leaf: p = softmax(x), g = p . dp, dW = P (g - delta), dx = P p (dp - g) + (1 - beta) p dW, dsbar = beta dW,
  dbeta = dW (sbar - lse_leaf), dv = P p dout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.readers import level_of
from longnet.kernels.routing import count_places, load_rows, places_of, read_columns, tile_rows


@triton.jit
def far_dq(
    q, kbar, vbar, level_bias, opened, rows, records, totals, part, slopes,
    dout, lse, delta, dq, dparameters, rises, rise_sums,
    sqb, sqn, sqh, num_tokens, num_nodes, num_heads, num_key_heads, levels, scale, first_token, columns,
    first_tile, all_tiles,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Adds to dq what the far queries get: the summaries' share, and the sum of the places' (part, slopes of
    `leaves.leaf_backward`); per tile dparameters (pairs, all_tiles, levels + 1, G), of the level biases and the mix.

    Of every place also what its leaf's summary gets, rises (pairs, tiles T, TOP_K, D) and without D rise_sums: products over
    AT_ONCE tokens with PLACES places each, of which every row has its own token's.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    pair = tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    tile = pair * tiles + tl.program_id(0)
    tables = tiles * tl.num_programs(1)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    t0 = first_token + tl.program_id(0) * T
    t_row, g, token, head, ok = tile_rows(t0, kh, num_tokens, G, GP, T)
    d = tl.arange(0, BD)
    d_ok = (d < D)[None, :]
    row_ok = ok[:, None] & d_ok
    mask = (1 << t_row)[:, None]
    at_row = (b * num_tokens + token) * num_heads + head
    at_out = at_row[:, None] * D + d[None, :]
    one = tl.arange(0, GP)
    to = dparameters + ((pair * all_tiles + first_tile + tl.program_id(0)) * (levels + 1)) * G + one
    acc = tl.zeros((T * GP, BD), tl.float32)
    qt = tl.load(q + b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
    do = tl.load(dout + at_out, row_ok, 0.0)
    lse2 = tl.load(lse + at_row, ok, float("inf")) * LOG2E
    dl = tl.load(delta + at_row, ok, 0.0)
    # After the last level, level 0, they are its sums.
    sums = tl.zeros((T * GP,), tl.float32)
    for step in range(levels):
        level = levels - 1 - step
        bias = tl.load(level_bias + head * levels + level, ok, 0.0) * LOG2E - lse2
        table = tile + level * tables
        sums = tl.zeros((T * GP,), tl.float32)
        for begin in tl.range(0, tl.load(totals + table), BC):
            node, h, bits = read_columns(rows, records, table * columns + begin, BC)
            kt = tl.load(kbar + node[:, None] * D + d[None, :], d_ok, 0.0)
            vt = tl.load(vbar + node[:, None] * D + d[None, :], d_ok, 0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E) + (
                h[None, :] + bias[:, None]
            )
            p = tl.where((bits[None, :] & mask) != 0, tl.exp2(s), 0.0)
            ds = p * (tl.dot(do, tl.trans(vt), input_precision=PREC) - dl[:, None])
            acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
            sums += tl.sum(ds, 1)
        if level > 0:
            tl.store(to + level * G, tl.sum(tl.reshape(sums, (T, GP)), 0), one < G)
    kbar_base = kbar + (b * num_nodes * num_key_heads + kh) * D
    for t_first in tl.static_range(0, T, AT_ONCE):
        leaf, place, t, there = places_of(
            opened + pair * num_tokens * levels * WIDTH, tile * T, t0, t_first, num_tokens, levels,
            T=AT_ONCE, TOP_K=TOP_K, PLACES=PLACES, WIDTH=WIDTH,
        )  # fmt: skip
        mine = (t_row[:, None] == t[None, :]) & there[None, :] & (g < G)[:, None]
        ds = tl.load(slopes + place[None, :] * G + g[:, None], mine, 0.0)
        sums += tl.sum(ds, 1)
        kt = load_rows(kbar_base, leaf, there, num_key_heads * D, d, D)
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
        rise = tl.dot(tl.trans(qt), ds.to(qt.dtype), input_precision=PREC) * scale
        rise_ok = there[:, None] & d_ok
        to_rise = rises + place.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(to_rise, tl.trans(rise).to(rises.dtype.element_ty), rise_ok)
        tl.store(rise_sums + place, tl.sum(ds, 0), there)
    acc = acc * scale
    apart = tables.to(tl.int64) * T * TOP_K * G
    places = count_places(opened + (pair * num_tokens + t0) * levels * WIDTH, TOP_K)
    mix_sums = tl.zeros((T * GP,), tl.float32)
    for n in tl.range(0, places, num_stages=STAGES):
        at = ((tile.to(tl.int32) * T + t_row) * TOP_K + n) * G + g
        acc += tl.load(part + at.to(tl.int64)[:, None] * D + d[None, :], row_ok, 0.0).to(tl.float32)
        mix_sums += tl.load(slopes + apart + at, ok, 0.0)
    acc += tl.load(dq + at_out, row_ok, 0.0).to(tl.float32)
    tl.store(to, tl.sum(tl.reshape(sums, (T, GP)), 0), one < G)
    tl.store(to + levels * G, tl.sum(tl.reshape(mix_sums, (T, GP)), 0), one < G)
    tl.store(dq + at_out, acc.to(dq.dtype.element_ty), row_ok)


@triton.jit
def children_dkv(
    q, kbar, vbar, entropy, level_bias, offsets, family_offsets, words, order, items, dout, lse, delta, partial,
    sqb, sqn, sqh, num_tokens, num_nodes, num_heads, num_key_heads, levels, num_pairs, families, entries, first_token, tokens,
    scale, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COLUMNS: tl.constexpr, BEAM: tl.constexpr,
    WORDS: tl.constexpr, BM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Per work item, the gradients of the COLUMNS nodes of a family over readers that opened a parent: partial (items, COLUMNS,
    2 D + 1).

    items (., 3), order: `readers.list_items` of the entries of `readers.gather_children`, of tokens [first_token, first_token +
    tokens). words (levels - 1, entries, WORDS).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    READERS: tl.constexpr = BM // GP
    item = tl.program_id(0).to(tl.int64)
    group = tl.load(items + item * 3)
    if group >= 0:
        begin = tl.load(items + item * 3 + 1)
        count = (tl.load(items + item * 3 + 2) - begin).to(tl.int32)
        pair = group // families % num_pairs
        family = (group % families).to(tl.int32)
        level = level_of(family, family_offsets, levels)
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        c = tl.arange(0, COLUMNS)
        row = tl.arange(0, BM)
        g = row % GP
        reader = row // GP
        order += begin
        # Entries count from the pair's first one of the level on.
        ahead = level.to(tl.int64) * entries + pair * tokens * BEAM
        words += ahead * WORDS
        entry = (tl.load(order + reader, reader < count, ahead) - ahead).to(tl.int32)
        first_node = tl.load(offsets + level)
        node = (family - tl.load(family_offsets + level)) * COLUMNS + c
        c_ok = node < tl.load(offsets + level + 1) - first_node
        node_row = (b * num_nodes + first_node + node) * num_key_heads + kh
        kt = load_rows(kbar, node_row, c_ok, D, d, D)
        vt = load_rows(vbar, node_row, c_ok, D, d, D)
        # Nodes beyond the level: exp2(-inf) is 0. Rows beyond the readers: their word is 0.
        h = tl.load(entropy + node_row, c_ok, float("-inf")) * LOG2E
        head = kh * G + g
        bias = tl.load(level_bias + head * levels + level, g < G, 0.0) * LOG2E
        q += b * sqb + first_token.to(tl.int64) * sqn + kh * G * sqh
        at_pair = (b * num_tokens + first_token) * num_heads + kh * G
        dk = tl.zeros((BD, COLUMNS), tl.float32)
        dv = tl.zeros((BD, COLUMNS), tl.float32)
        # Summed over the rows at the end: in the loop that would cost a barrier.
        dh = tl.zeros((BM, COLUMNS), tl.float32)
        for r0 in tl.range(0, count, READERS):
            ok = (r0 + reader < count) & (g < G)
            row_ok = ok[:, None] & (d < D)[None, :]
            token = (entry // BEAM).to(tl.int64)
            qt = tl.load(q + (token * sqn + g * sqh)[:, None] + d[None, :], row_ok, 0.0)
            at = at_pair + token * num_heads + g
            do = tl.load(dout + at[:, None] * D + d[None, :], row_ok, 0.0)
            lse2 = tl.load(lse + at, ok, 0.0) * LOG2E
            dl = tl.load(delta + at, ok, 0.0)
            word = tl.load(words + entry * WORDS, ok, 0)
            if WORDS == 2:
                word = tl.where(
                    (c < 32)[None, :], word[:, None], tl.load(words + entry * 2 + 1, ok, 0)[:, None]
                )
            else:
                word = word[:, None]
            beyond = r0 + READERS + reader
            entry = (tl.load(order + beyond, beyond < count, ahead) - ahead).to(tl.int32)
            keep = ((word >> (c & 31)[None, :]) & 1) != 0
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
            p = tl.where(keep, tl.exp2(s + (h[None, :] + (bias - lse2)[:, None])), 0.0)
            dv = tl.dot(tl.trans(do), p.to(do.dtype), dv, input_precision=PREC)
            ds = p * (tl.dot(do, tl.trans(vt), input_precision=PREC) - dl[:, None])
            dk = tl.dot(tl.trans(qt), ds.to(qt.dtype), dk, input_precision=PREC)
            dh += ds
        at = partial + (item * COLUMNS + c)[:, None] * (2 * D + 1) + d[None, :]
        mask = (d < D)[None, :] & (c >= 0)[:, None]
        tl.store(at, tl.trans(dk) * scale, mask)
        tl.store(at + D, tl.trans(dv), mask)
        tl.store(partial + (item * COLUMNS + c) * (2 * D + 1) + 2 * D, tl.sum(dh, 0))
