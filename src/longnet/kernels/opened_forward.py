"""Attention to what is far: the columns of a tile of tokens (see `routing`), then the results of the leaves they opened."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.cover import list_of_level
from longnet.kernels.routing import column_nodes, count_places, load_rows


@triton.jit
def far_attend(
    q, kbar, vbar, entropy, level_bias, router_mix, offsets, opened, united, sizes, kept,
    part, part_mass, part_score, out, lse,
    sqb, sqn, sqh, num_tokens, num_nodes, num_heads, num_key_heads, levels, scale, first_token, most, columns,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    BC: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Join unopened summaries and opened leaves with the local result in out and lse, which are replaced.

    united, sizes, kept: the tables of `routing`, one level after the other. part, part_mass, part_score: what
    `leaves.leaf_forward` left of every place; its weight is W = (1 - beta) mass + beta score.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    pair = tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    tile = pair * tiles + tl.program_id(0)
    tables = tiles * tl.num_programs(1)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    t0 = first_token + tl.program_id(0) * T
    first = tl.maximum(0, t0 // BLOCK - WINDOW + 1)
    if first > 0:
        row = tl.arange(0, T * GP)
        t_row = row // GP
        g = row % GP
        token = (t0 + t_row).to(tl.int64)
        head = kh * G + g
        ok = (g < G) & (token < num_tokens)
        d = tl.arange(0, BD)
        row_ok = ok[:, None] & (d < D)[None, :]
        qt = tl.load(q + b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
        at_out = ((b * num_tokens + token) * num_heads + head)[:, None] * D + d[None, :]
        at_lse = (b * num_heads + head) * num_tokens + token
        acc = tl.load(out + at_out, row_ok, 0.0).to(tl.float32)
        m = tl.load(lse + at_lse, ok, 0.0) * LOG2E
        total = tl.full((T * GP,), 1.0, tl.float32)
        for step in range(levels):
            level = levels - 1 - step
            lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
            first_row = b * num_nodes + tl.load(offsets + level)
            kbar_base = kbar + (first_row * num_key_heads + kh) * D
            vbar_base = vbar + (first_row * num_key_heads + kh) * D
            entropy_base = entropy + first_row * num_key_heads + kh
            bias = tl.load(level_bias + head * levels + level, ok, 0.0) * LOG2E
            table = tile + level * tables
            union_size = tl.load(sizes + table, level < levels - 1, 0)
            size = union_size * RADIX + hi - lo
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
                s = tl.where(((bits[None, :] >> t_row[:, None]) & 1) != 0, s, float("-inf"))
                new = tl.maximum(m, tl.max(s, 1))
                rescale = tl.exp2(m - new)
                p = tl.exp2(s - new[:, None])
                total = total * rescale + tl.sum(p, 1)
                acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision=PREC)
                m = new
        beta = tl.load(router_mix + head, ok, 1.0)
        places = count_places(opened + (pair * num_tokens + t0) * levels * WIDTH, TOP_K)
        for n in tl.range(0, places, num_stages=STAGES):
            place = ((tile * T + t_row) * TOP_K + n) * G + g
            o = tl.load(part + place[:, None] * D + d[None, :], row_ok, 0.0).to(tl.float32)
            mass = tl.load(part_mass + place, ok, 0.0)
            weight = mass + beta * (tl.load(part_score + place, ok, 0.0) - mass)
            new = tl.maximum(m, weight)
            rescale = tl.exp2(m - new)
            share = tl.exp2(weight - new)
            total = total * rescale + share
            acc = acc * rescale[:, None] + o * share[:, None]
            m = new
        tl.store(out + at_out, (acc / total[:, None]).to(out.dtype.element_ty), row_ok)
        tl.store(lse + at_lse, (m + tl.log2(total)) * 0.6931471805599453, ok)
