"""Relevance: every token scores the summaries it can see, opens the best and attends to what it opened.

One program serves one token and one key head, all `G` query heads of the group together (padded to the 16 rows a matrix
instruction wants). It descends from the coarsest level: candidates are the listed nodes and the children of the nodes opened
one level up; the best are opened, the others stay in the softmax as summaries; opened leaf blocks end as tokens.
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
def gathered_dot(
    rows_base, row_stride, at_row, row_ok, base, index, ok, stride,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """rows . matrix[index]^T (R, C), the width taken in chunks so that many gathered rows fit in shared memory."""
    acc = tl.zeros((R, C), tl.float32)
    for c0 in tl.static_range(0, BD, CHUNK):
        d = c0 + tl.arange(0, CHUNK)
        a = tl.load(
            rows_base + at_row[:, None] * row_stride + d[None, :], row_ok[:, None] & (d < D)[None, :], 0.0
        )
        kt = tl.load(
            base + index.to(tl.int64)[None, :] * stride + d[:, None], ok[None, :] & (d < D)[:, None], 0.0
        )
        acc = tl.dot(a, kt, acc, input_precision=PREC)
    return acc


@triton.jit
def select_best(
    base_score, base_node, child_score, child_node, opened, count,
):  # fmt: skip
    """Write the `count` best candidates (score descending, ties to the lower node; -1 when there are no more) to `opened`.

    Candidates carry scores >= 0, others -1. Returns the scores with -1 in the place of what was opened.
    """
    nowhere = 2147483647
    for n in range(count):
        best = tl.maximum(tl.max(base_score, 0), tl.max(child_score, 0))
        in_base = tl.min(tl.where(base_score == best, base_node, nowhere), 0)
        in_children = tl.min(tl.where(child_score == best, child_node, nowhere), 0)
        node = tl.where(best >= 0, tl.minimum(in_base, in_children), -1)
        tl.store(opened + n, node)
        # node is -1 when nothing is left; negative nodes are places without a candidate, whose score is -1 already.
        base_score = tl.where(base_node == node, -1.0, base_score)
        child_score = tl.where(child_node == node, -1.0, child_score)
    return base_score, child_score


@triton.jit
def opened_forward(
    q, k, v, kbar, vbar, entropy, level_bias, router_mix, offsets, opened, base_bits, child_bits, out, lse,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_nodes, num_heads, num_key_heads, levels, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr, LISTED: tl.constexpr,
    TOP_K: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, GIVEN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Route, attend, and join with the local result that out and lse hold; out and lse are replaced.

    opened (B, K, N, levels, WIDTH) int32, node numbers, -1 filled; base_bits (B, K, N, levels) int32, bit c: the c-th listed
    node is opened; child_bits (B, K, N, levels, BEAM) int32, bit c of entry e at level l: child c of the node e opened at l + 1
    is opened. If GIVEN, `opened` is an input and only attention is done.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    t = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    i = t // BLOCK
    first = tl.maximum(0, i - WINDOW + 1)
    if first > 0:
        g = tl.arange(0, GP)
        g_ok = g < G
        head = kh * G + g
        d = tl.arange(0, BD)
        token = t.to(tl.int64)
        q_base = q + b * sqb + token * sqn
        row_ok = g_ok[:, None] & (d < D)[None, :]
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
        c_list = tl.arange(0, LISTED)
        c_child = tl.arange(0, BEAM * RADIX)
        for step in range(levels):
            level = levels - 1 - step
            lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
            offset = tl.load(offsets + level)
            bias = tl.load(level_bias + head * levels + level, g_ok, 0.0) * LOG2E
            base_node = lo + c_list
            base_ok = base_node < hi
            kt = load_rows(kbar_base, offset + base_node, base_ok, node_stride, d, D)
            qt = tl.load(q_base + head[:, None] * sqh + d[None, :], row_ok, 0.0)
            h = tl.load(entropy_base + (offset + base_node) * num_key_heads, base_ok, 0.0) * LOG2E
            s_base = (
                tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E) + h[None, :] + bias[:, None]
            )
            s_base = tl.where(base_ok[None, :], s_base, float("-inf"))
            above = tl.minimum(level + 1, levels - 1)
            parent = tl.load(opened + (slot + above) * WIDTH + c_child // RADIX, level < levels - 1, -1)
            child_ok = parent >= 0
            child_node = parent * RADIX + c_child % RADIX
            s_child = gathered_dot(q_base, sqh, head, g_ok, kbar_base, offset + child_node, child_ok, node_stride,
                                   GP, BEAM * RADIX, D, BD, CHUNK, PREC)  # fmt: skip
            h = tl.load(entropy_base + (offset + child_node) * num_key_heads, child_ok, 0.0) * LOG2E
            s_child = s_child * (scale * LOG2E) + h[None, :] + bias[:, None]
            s_child = tl.where(child_ok[None, :], s_child, float("-inf"))
            top = tl.maximum(tl.max(s_base, 1), tl.max(s_child, 1))
            some = top > float("-inf")
            safe = tl.where(some, top, 0.0)
            p_base = tl.exp2(s_base - safe[:, None])
            p_child = tl.exp2(s_child - safe[:, None])
            if GIVEN:
                bits = tl.load(base_bits + slot + level)
                base_keep = base_ok & (((bits >> c_list) & 1) == 0)
                bits = tl.load(child_bits + (slot + level) * BEAM + c_child // RADIX)
                child_keep = child_ok & (((bits >> (c_child % RADIX)) & 1) == 0)
            else:
                mass = tl.sum(p_base, 1) + tl.sum(p_child, 1)
                share = tl.where(g_ok & some, 1.0 / (tl.where(some, mass, 1.0) * G), 0.0)
                score_base = tl.where(base_ok, tl.sum(p_base * share[:, None], 0), -1.0)
                score_child = tl.where(child_ok, tl.sum(p_child * share[:, None], 0), -1.0)
                count = tl.where(level == 0, TOP_K, BEAM)
                score_base, score_child = select_best(
                    score_base, base_node, score_child, child_node, opened + (slot + level) * WIDTH, count
                )
                base_keep = base_ok & (score_base >= 0)
                child_keep = child_ok & (score_child >= 0)
                one = tl.where(base_ok & (score_base < 0), 1, 0) << c_list
                tl.store(base_bits + slot + level, tl.sum(one, 0))
                one = tl.where(child_ok & (score_child < 0), 1, 0) << (c_child % RADIX)
                one = tl.sum(tl.reshape(one, (BEAM, RADIX)), 1)
                tl.store(child_bits + (slot + level) * BEAM + tl.arange(0, BEAM), one)
                # The next level reads what this one opened, by other threads.
                tl.debug_barrier()
            p_base = tl.where(base_keep[None, :], p_base, 0.0)
            p_child = tl.where(child_keep[None, :], p_child, 0.0)
            # The bound of the softmax may belong to an opened node: a larger bound than needed is still a bound.
            new = tl.maximum(m, top)
            part = tl.exp2(safe - new)
            part = tl.where(some, part, 0.0)
            rescale = tl.exp2(m - new)
            total = total * rescale + (tl.sum(p_base, 1) + tl.sum(p_child, 1)) * part
            vt = load_rows(vbar_base, offset + base_node, base_ok, node_stride, d, D)
            o = tl.dot(p_base.to(vt.dtype), vt, input_precision=PREC)
            if level < levels - 1:
                vt_child = load_rows(vbar_base, offset + child_node, child_ok, node_stride, d, D)
                o = tl.dot(p_child.to(vt_child.dtype), vt_child, o, input_precision=PREC)
            acc = acc * rescale[:, None] + o * part[:, None]
            m = new
        beta = tl.load(router_mix + head, g_ok, 1.0)
        bias = tl.load(level_bias + head * levels, g_ok, 0.0) * LOG2E
        qt = tl.load(q_base + head[:, None] * sqh + d[None, :], row_ok, 0.0)
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
