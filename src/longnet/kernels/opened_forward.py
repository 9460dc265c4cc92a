"""Relevance: every token scores the summaries it can see, opens the best and attends to what it opened.

A program serves one token and one key head, all `G` query heads of the group together (padded to the 16 rows a matrix
instruction wants). Candidates of a level are the children of the nodes opened one level up, then the listed nodes: both
ascend, so candidate c of a level is found by arithmetic and ties by order.
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
def candidates(c, parents, lo, opened_above, RADIX: tl.constexpr):
    """Node number of candidate c of a level."""
    is_child = c < parents * RADIX
    parent = tl.load(opened_above + c // RADIX, is_child, 0)
    return tl.where(is_child, parent * RADIX + c % RADIX, lo + c - parents * RADIX)


@triton.jit
def unopened(c, parents, total, base_word, child_words, RADIX: tl.constexpr):
    """Whether candidate c exists and stays a summary, from the bit masks of what was opened."""
    is_child = c < parents * RADIX
    word = tl.load(child_words + c // RADIX, is_child, 0)
    bit = tl.where(is_child, word >> (c % RADIX), base_word >> tl.where(is_child, 0, c - parents * RADIX))
    return (c < total) & ((bit & 1) == 0)


@triton.jit
def route(
    q, kbar, entropy, level_bias, offsets, scratch, opened, base_bits, child_bits,
    sqb, sqn, sqh, num_tokens, num_nodes, num_heads, num_key_heads, levels, scale, items,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
    RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr, MOST: tl.constexpr,
    TOP_K: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Which nodes every token opens.

    opened (B, K, N, levels, WIDTH) int32, ascending node numbers, -1 filled; base_bits (B, K, N, levels) int32, bit c: the
    c-th listed node is opened; child_bits (B, K, N, levels, BEAM) int32, bit c of entry e at level l: child c of the e-th
    node opened at l + 1 is opened. scratch: MOST floats a program, the scores of one level.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    g = tl.arange(0, GP)
    g_ok = g < G
    d = tl.arange(0, BD)
    row_ok = g_ok[:, None] & (d < D)[None, :]
    scores = scratch + tl.program_id(0).to(tl.int64) * MOST
    everyone = tl.arange(0, MOST)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        token = (item % num_tokens).to(tl.int64)
        pair = (item // num_tokens).to(tl.int64)
        b = pair // num_key_heads
        kh = pair % num_key_heads
        first = tl.maximum(0, (item % num_tokens) // BLOCK - WINDOW + 1)
        if first > 0:
            head = kh * G + g
            qt = tl.load(q + b * sqb + token * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
            kbar_base = kbar + (b * num_nodes * num_key_heads + kh) * D
            entropy_base = entropy + b * num_nodes * num_key_heads + kh
            slot = (pair * num_tokens + token) * levels
            for step in range(levels):
                level = levels - 1 - step
                lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
                offset = tl.load(offsets + level)
                bias = tl.load(level_bias + head * levels + level, g_ok, 0.0) * LOG2E
                above = opened + (slot + tl.minimum(level + 1, levels - 1)) * WIDTH
                parents = count_opened(above, level, levels, BEAM)
                total = parents * RADIX + hi - lo
                count = tl.where(level == 0, TOP_K, BEAM)
                top = tl.full((GP,), float("-inf"), tl.float32)
                mass = tl.zeros((GP,), tl.float32)
                # With no more candidates than places all are opened, and nobody asks for scores.
                scored = tl.where(total > count, total, 0)
                for begin in range(0, scored, BC):
                    c = begin + tl.arange(0, BC)
                    ok = c < total
                    node = offset + candidates(c, parents, lo, above, RADIX)
                    kt = load_rows(kbar_base, node, ok, num_key_heads * D, d, D)
                    h = tl.load(entropy_base + node * num_key_heads, ok, 0.0) * LOG2E
                    s = (
                        tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
                        + h[None, :]
                        + bias[:, None]
                    )
                    s = tl.where(ok[None, :], s, float("-inf"))
                    new = tl.maximum(top, tl.max(s, 1))
                    mass = mass * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
                    top = new
                share = tl.where(g_ok, 1.0 / (tl.where(mass > 0, mass, 1.0) * G), 0.0)
                for begin in range(0, scored, BC):
                    c = begin + tl.arange(0, BC)
                    ok = c < total
                    node = offset + candidates(c, parents, lo, above, RADIX)
                    kt = load_rows(kbar_base, node, ok, num_key_heads * D, d, D)
                    h = tl.load(entropy_base + node * num_key_heads, ok, 0.0) * LOG2E
                    s = (
                        tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
                        + h[None, :]
                        + bias[:, None]
                    )
                    tl.store(scores + c, tl.sum(tl.exp2(s - top[:, None]) * share[:, None], 0), ok)
                tl.debug_barrier()
                # The scores are at least 0, so their bits order like integers.
                score = tl.load(scores + everyone, everyone < scored, 0.0).to(tl.int32, bitcast=True)
                score = tl.where(everyone < total, score, -1)
                least = 0
                most = tl.where(scored > 0, tl.max(score, 0) + 1, 1)
                while most - least > 1:
                    middle = least + (most - least) // 2
                    found = tl.sum((score >= middle).to(tl.int32), 0)
                    least = tl.where(found >= count, middle, least)
                    most = tl.where(found == count, middle + 1, tl.where(found > count, most, middle))
                # `least` is the score of the last place; of several candidates with it the first ones get in.
                better = (score > least).to(tl.int32)
                equal = (score == least).to(tl.int32)
                free = count - tl.sum(better, 0)
                taken = (score > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= free))
                taken = tl.where(scored > 0, taken, everyone < total)
                node = candidates(everyone, parents, lo, above, RADIX)
                place = tl.cumsum(taken.to(tl.int32), 0) - 1
                tl.store(opened + (slot + level) * WIDTH + place, node, taken)
                is_child = everyone < parents * RADIX
                listed = everyone - parents * RADIX
                word = tl.where(taken & (listed >= 0), 1, 0) << tl.where(listed >= 0, listed & 31, 0)
                tl.store(base_bits + slot + level, tl.sum(word, 0))
                word = tl.where(taken & is_child, 1, 0) << (everyone % RADIX)
                words = tl.sum(tl.reshape(word, (MOST // RADIX, RADIX)), 1)
                entry = tl.arange(0, MOST // RADIX)
                tl.store(child_bits + (slot + level) * BEAM + entry, words, entry < BEAM)
                # The next level reads what this one opened, and overwrites the scores.
                tl.debug_barrier()


@triton.jit
def opened_attend(
    q, k, v, kbar, vbar, entropy, level_bias, router_mix, offsets, opened, base_bits, child_bits, out, lse,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_nodes, num_heads, num_key_heads, levels, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
    RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    TOP_K: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Attend to unopened summaries and opened leaves, joined with the local result in out and lse, which are replaced."""
    LOG2E: tl.constexpr = 1.4426950408889634
    t = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    first = tl.maximum(0, t // BLOCK - WINDOW + 1)
    if first > 0:
        g = tl.arange(0, GP)
        g_ok = g < G
        head = kh * G + g
        d = tl.arange(0, BD)
        token = t.to(tl.int64)
        row_ok = g_ok[:, None] & (d < D)[None, :]
        qt = tl.load(q + b * sqb + token * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
        at_out = ((b * num_tokens + token) * num_heads + head)[:, None] * D + d[None, :]
        at_lse = (b * num_heads + head) * num_tokens + token
        acc = tl.load(out + at_out, row_ok, 0.0).to(tl.float32)
        m = tl.load(lse + at_lse, g_ok, 0.0) * LOG2E
        total = tl.full((GP,), 1.0, tl.float32)
        node_stride = num_key_heads * D
        kbar_base = kbar + (b * num_nodes * num_key_heads + kh) * D
        vbar_base = vbar + (b * num_nodes * num_key_heads + kh) * D
        entropy_base = entropy + b * num_nodes * num_key_heads + kh
        slot = (pair * num_tokens + token) * levels
        for step in range(levels):
            level = levels - 1 - step
            lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
            offset = tl.load(offsets + level)
            bias = tl.load(level_bias + head * levels + level, g_ok, 0.0) * LOG2E
            above = opened + (slot + tl.minimum(level + 1, levels - 1)) * WIDTH
            parents = count_opened(above, level, levels, BEAM)
            size = parents * RADIX + hi - lo
            base_word = tl.load(base_bits + slot + level)
            child_words = child_bits + (slot + level) * BEAM
            for begin in tl.range(0, size, BC):
                c = begin + tl.arange(0, BC)
                keep = unopened(c, parents, size, base_word, child_words, RADIX)
                node = offset + candidates(c, parents, lo, above, RADIX)
                kt = load_rows(kbar_base, node, keep, node_stride, d, D)
                vt = load_rows(vbar_base, node, keep, node_stride, d, D)
                h = tl.load(entropy_base + node * num_key_heads, keep, 0.0) * LOG2E
                s = (
                    tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
                    + h[None, :]
                    + bias[:, None]
                )
                s = tl.where(keep[None, :], s, float("-inf"))
                new = tl.maximum(m, tl.max(s, 1))
                rescale = tl.exp2(m - new)
                p = tl.exp2(s - new[:, None])
                total = total * rescale + tl.sum(p, 1)
                acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision=PREC)
                m = new
        beta = tl.load(router_mix + head, g_ok, 1.0)
        bias = tl.load(level_bias + head * levels, g_ok, 0.0) * LOG2E
        c_leaf = tl.arange(0, BLOCK)
        for n in tl.range(0, TOP_K):
            leaf = tl.load(opened + slot * WIDTH + n)
            ok = leaf >= 0
            at = leaf * BLOCK + c_leaf
            kt = load_rows(k + b * skb + kh * skh, at, ok & (c_leaf >= 0), skn, d, D)
            vt = load_rows(v + b * svb + kh * svh, at, ok & (c_leaf >= 0), svn, d, D)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            mass = tl.sum(p, 1)
            kb = tl.load(kbar_base + leaf.to(tl.int64) * node_stride + d, ok & (d < D), 0.0)
            h = tl.load(entropy_base + leaf.to(tl.int64) * num_key_heads, ok, 0.0) * LOG2E
            sbar = tl.sum(qt.to(tl.float32) * kb.to(tl.float32)[None, :], 1) * (scale * LOG2E) + h + bias
            weight = (1 - beta) * (top + tl.log2(mass)) + beta * sbar
            weight = tl.where(ok, weight, float("-inf"))
            new = tl.maximum(m, weight)
            rescale = tl.exp2(m - new)
            share = tl.exp2(weight - new)
            total = total * rescale + share
            o = tl.dot(p.to(vt.dtype), vt, input_precision=PREC)
            acc = acc * rescale[:, None] + o * (share / mass)[:, None]
            m = new
        tl.store(out + at_out, (acc / total[:, None]).to(out.dtype.element_ty), row_ok)
        tl.store(lse + at_lse, (m + tl.log2(total)) * 0.6931471805599453, g_ok)
