"""Attention to what is far: the columns of a tile of tokens (see `routing`), then the results of the leaves they opened."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.routing import count_places, load_rows, places_of, read_columns, tile_rows


@triton.jit(do_not_specialize=["num_tokens", "num_nodes"])
def far_attend(
    q, kbar, vbar, entropy, level_bias, router_mix, opened, rows, records, totals, part, logits, out, lse,
    sqb, sqn, sqh, num_tokens, num_nodes, num_heads, num_key_heads, levels, scale, first_token, columns,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Join unopened summaries and opened leaves with the local result in out and lse, which are replaced.

    rows, records, totals: the columns of `routing.mark`. part, logits (2, pairs, tiles T, TOP_K, G): what
    `leaves.leaf_forward` left of every place; the score sbar (log2) of its summary is stored here. A place's weight is
    W = (1 - beta) mass + beta sbar. Scores are products over AT_ONCE tokens with PLACES places each, of which every row keeps
    its own token's.
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
    qt = tl.load(q + b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
    at_out = ((b * num_tokens + token) * num_heads + head)[:, None] * D + d[None, :]
    at_lse = (b * num_heads + head) * num_tokens + token
    acc = tl.load(out + at_out, row_ok, 0.0).to(tl.float32)
    m = tl.load(lse + at_lse, ok, 0.0) * LOG2E
    total = tl.full((T * GP,), 1.0, tl.float32)
    mask = (1 << t_row)[:, None]
    for step in range(levels):
        level = levels - 1 - step
        bias = tl.load(level_bias + head * levels + level, ok, 0.0) * LOG2E
        table = tile + level * tables
        for begin in tl.range(0, tl.load(totals + table), BC):
            node, h, bits = read_columns(rows, records, table * columns + begin, BC)
            kt = tl.load(kbar + node[:, None] * D + d[None, :], d_ok, 0.0)
            vt = tl.load(vbar + node[:, None] * D + d[None, :], d_ok, 0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E) + h[None, :]
            s = tl.where((bits[None, :] & mask) != 0, s, float("-inf"))
            new = tl.maximum(m, tl.max(s, 1) + bias)
            rescale = tl.exp2(m - new)
            p = tl.exp2(s - (new - bias)[:, None])
            total = total * rescale + tl.sum(p, 1)
            acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision=PREC)
            m = new
    beta = tl.load(router_mix + head, ok, 1.0)
    apart = tables.to(tl.int64) * T * TOP_K * G
    first_row = b * num_nodes * num_key_heads + kh
    bias = tl.load(level_bias + head * levels, ok, 0.0) * LOG2E
    for t_first in tl.static_range(0, T, AT_ONCE):
        leaf, place, t, there = places_of(
            opened + pair * num_tokens * levels * WIDTH, tile * T, t0, t_first, num_tokens, levels,
            T=AT_ONCE, TOP_K=TOP_K, PLACES=PLACES, WIDTH=WIDTH,
        )  # fmt: skip
        kt = load_rows(kbar + first_row * D, leaf, there, num_key_heads * D, d, D)
        h = tl.load(entropy + first_row + leaf * num_key_heads, there, 0.0) * LOG2E
        s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E) + (h[None, :] + bias[:, None])
        mine = (t_row[:, None] == t[None, :]) & there[None, :] & (g < G)[:, None]
        tl.store(logits + apart + place[None, :] * G + g[:, None], s, mine)
    # What one thread stored, others read.
    tl.debug_barrier()
    places = count_places(opened + (pair * num_tokens + t0) * levels * WIDTH, TOP_K)
    for n in tl.range(0, places, num_stages=STAGES):
        at = ((tile.to(tl.int32) * T + t_row) * TOP_K + n) * G + g
        o = tl.load(part + at.to(tl.int64)[:, None] * D + d[None, :], row_ok, 0.0).to(tl.float32)
        mass = tl.load(logits + at, ok, 0.0)
        weight = mass + beta * (tl.load(logits + apart + at, ok, 0.0) - mass)
        new = tl.maximum(m, weight)
        rescale = tl.exp2(m - new)
        share = tl.exp2(weight - new)
        total = total * rescale + share
        acc = acc * rescale[:, None] + o * share[:, None]
        m = new
    tl.store(out + at_out, (acc / total[:, None]).to(out.dtype.element_ty), row_ok)
    tl.store(lse + at_lse, (m + tl.log2(total)) * 0.6931471805599453, ok)
