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
from longnet.kernels.opened_forward import candidates, count_opened, load_rows, unopened


@triton.jit
def opened_dq(
    q, k, v, kbar, vbar, entropy, level_bias, router_mix, offsets, opened, base_bits, child_bits,
    dout, lse, delta, dq, dbias, dmix,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_nodes, num_heads, num_key_heads, levels, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BC: tl.constexpr,
    RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    TOP_K: tl.constexpr, BEAM: tl.constexpr, WIDTH: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq of the far queries, per query dbias (B, N, H, levels) and dmix (B, N, H)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    t = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    i = t // BLOCK
    first = tl.maximum(0, i - WINDOW + 1)
    g = tl.arange(0, GP)
    g_ok = g < G
    head = kh * G + g
    d = tl.arange(0, BD)
    token = t.to(tl.int64)
    row_ok = g_ok[:, None] & (d < D)[None, :]
    at_out = ((b * num_tokens + token) * num_heads + head)[:, None] * D + d[None, :]
    at_scalar = (b * num_tokens + token) * num_heads + head
    acc = tl.zeros((GP, BD), tl.float32)
    if first > 0:
        at_lse = (b * num_heads + head) * num_tokens + token
        lse2 = tl.load(lse + at_lse, g_ok, float("inf")) * LOG2E
        dl = tl.load(delta + at_lse, g_ok, 0.0)
        node_stride = num_key_heads * D
        kbar_base = kbar + (b * num_nodes * num_key_heads + kh) * D
        vbar_base = vbar + (b * num_nodes * num_key_heads + kh) * D
        entropy_base = entropy + b * num_nodes * num_key_heads + kh
        slot = (pair * num_tokens + token) * levels
        qt = tl.load(q + b * sqb + token * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
        do = tl.load(dout + at_out, row_ok, 0.0)
        for step in range(levels):
            level = levels - 1 - step
            lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
            offset = tl.load(offsets + level)
            bias = tl.load(level_bias + head * levels + level, g_ok, 0.0) * LOG2E - lse2
            above = opened + (slot + tl.minimum(level + 1, levels - 1)) * WIDTH
            parents = count_opened(above, level, levels, BEAM)
            size = parents * RADIX + hi - lo
            base_word = tl.load(base_bits + slot + level)
            child_words = child_bits + (slot + level) * BEAM
            sums = tl.zeros((GP,), tl.float32)
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
                p = tl.where(keep[None, :], tl.exp2(s), 0.0)
                ds = p * (tl.dot(do, tl.trans(vt), input_precision=PREC) - dl[:, None])
                acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
                sums += tl.sum(ds, 1)
            tl.store(dbias + at_scalar * levels + level, sums, g_ok)
        beta = tl.load(router_mix + head, g_ok, 1.0)
        bias = tl.load(level_bias + head * levels, g_ok, 0.0) * LOG2E
        dmix_sum = tl.zeros((GP,), tl.float32)
        dbias_sum = tl.zeros((GP,), tl.float32)
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
            p = p / mass[:, None]
            lse_leaf = top + tl.log2(mass)
            kb = tl.load(kbar_base + leaf.to(tl.int64) * node_stride + d, ok & (d < D), 0.0).to(tl.float32)
            h = tl.load(entropy_base + leaf.to(tl.int64) * num_key_heads, ok, 0.0) * LOG2E
            sbar = tl.sum(qt.to(tl.float32) * kb[None, :], 1) * (scale * LOG2E) + h + bias
            weight = tl.exp2((1 - beta) * lse_leaf + beta * sbar - lse2)
            weight = tl.where(ok, weight, 0.0)
            dp = tl.dot(do, tl.trans(vt), input_precision=PREC)
            mean = tl.sum(p * dp, 1)
            dw = weight * (mean - dl)
            dx = p * (weight[:, None] * (dp - mean[:, None]) + ((1 - beta) * dw)[:, None])
            acc = tl.dot(dx.to(kt.dtype), kt, acc, input_precision=PREC)
            dsbar = beta * dw
            acc += dsbar[:, None] * kb[None, :]
            dbias_sum += dsbar
            dmix_sum += dw * (sbar - lse_leaf) * 0.6931471805599453
        at = dbias + at_scalar * levels
        tl.store(at, tl.load(at, g_ok, 0.0) + dbias_sum, g_ok)
        tl.store(dmix + at_scalar, dmix_sum, g_ok)
    else:
        for level in range(levels):
            tl.store(dbias + at_scalar * levels + level, tl.zeros((GP,), tl.float32), g_ok)
        tl.store(dmix + at_scalar, tl.zeros((GP,), tl.float32), g_ok)
    tl.store(dq + at_out, (acc * scale).to(dq.dtype.element_ty), row_ok)


@triton.jit
def leaf_dkv(
    q, k, v, kbar, entropy, level_bias, router_mix, readers, items, dout, lse, delta, dkv, dnode,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_nodes, num_leaves, num_heads, num_key_heads, levels, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Per work item, the sums over some readers of one leaf: dkv (items, 2, BLOCK, D) and dnode (items, D + 1) = dkbar, dH.

    items (., 4) int64: leaf (numbered through pairs of sequence and key head), first and last reader, 0.
    readers: tokens, sorted by the leaf they opened.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    item = tl.program_id(0).to(tl.int64)
    leaf_of_pair = tl.load(items + item * 4)
    if leaf_of_pair >= 0:
        begin = tl.load(items + item * 4 + 1)
        end = tl.load(items + item * 4 + 2)
        pair = leaf_of_pair // num_leaves
        leaf = leaf_of_pair % num_leaves
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        c = tl.arange(0, BLOCK)
        at = leaf * BLOCK + c
        d_ok = d < D
        kt = tl.load(
            k + b * skb + at[:, None] * skn + kh * skh + d[None, :], (c >= 0)[:, None] & d_ok[None, :], 0.0
        )
        vt = tl.load(
            v + b * svb + at[:, None] * svn + kh * svh + d[None, :], (c >= 0)[:, None] & d_ok[None, :], 0.0
        )
        node_row = (b * num_nodes + leaf) * num_key_heads + kh
        kb = tl.load(kbar + node_row * D + d, d_ok, 0.0).to(tl.float32)
        h = tl.load(entropy + node_row) * LOG2E
        dk = tl.zeros((BLOCK, BD), tl.float32)
        dv = tl.zeros((BLOCK, BD), tl.float32)
        dkb = tl.zeros((BD,), tl.float32)
        dh = tl.zeros((BM,), tl.float32)
        row = tl.arange(0, BM)
        count = (end - begin) * G
        for r0 in range(0, count, BM):
            at_reader = r0 + row
            ok = at_reader < count
            token = tl.load(readers + begin + at_reader // G, ok, 0).to(tl.int64)
            head = kh * G + at_reader % G
            row_ok = ok[:, None] & d_ok[None, :]
            qt = tl.load(q + b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
            do = tl.load(
                dout + ((b * num_tokens + token) * num_heads + head)[:, None] * D + d[None, :], row_ok, 0.0
            )
            at_lse = (b * num_heads + head) * num_tokens + token
            lse2 = tl.load(lse + at_lse, ok, float("inf")) * LOG2E
            dl = tl.load(delta + at_lse, ok, 0.0)
            beta = tl.load(router_mix + head, ok, 1.0)
            bias = tl.load(level_bias + head * levels, ok, 0.0) * LOG2E
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            mass = tl.sum(p, 1)
            p = p / mass[:, None]
            sbar = tl.sum(qt.to(tl.float32) * kb[None, :], 1) * (scale * LOG2E) + h + bias
            weight = tl.exp2((1 - beta) * (top + tl.log2(mass)) + beta * sbar - lse2)
            dp = tl.dot(do, tl.trans(vt), input_precision=PREC)
            mean = tl.sum(p * dp, 1)
            dw = weight * (mean - dl)
            dx = p * (weight[:, None] * (dp - mean[:, None]) + ((1 - beta) * dw)[:, None])
            dk = tl.dot(tl.trans(dx.to(qt.dtype)), qt, dk, input_precision=PREC)
            dv = tl.dot(tl.trans((p * weight[:, None]).to(do.dtype)), do, dv, input_precision=PREC)
            dsbar = beta * dw
            dkb += tl.sum(dsbar[:, None] * qt.to(tl.float32), 0)
            dh += dsbar
        at = dkv + (item * 2 * BLOCK + c)[:, None] * D + d[None, :]
        tl.store(at, dk * scale, (c >= 0)[:, None] & d_ok[None, :])
        tl.store(at + BLOCK * D, dv, (c >= 0)[:, None] & d_ok[None, :])
        tl.store(dnode + item * (D + 1) + d, dkb * scale, d_ok)
        tl.store(dnode + item * (D + 1) + D, tl.sum(dh, 0))


@triton.jit
def node_dkv(
    q, kbar, vbar, entropy, level_bias, offsets, opened, base_bits, child_bits, readers, items, dout, lse, delta, partial,
    sqb, sqn, sqh,
    num_tokens, num_nodes, num_heads, num_key_heads, levels, level, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, RADIX: tl.constexpr, RP: tl.constexpr,
    WINDOW: tl.constexpr, GUARD: tl.constexpr, BEAM: tl.constexpr, BM: tl.constexpr,
    LISTED: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Per work item, the gradients of RADIX sibling summaries over some readers: partial (items, RADIX, 2 D + 1).

    items (., 4) int64: pair of sequence and key head (-1: none), number of the sibling group, first and last reader.
    LISTED: readers are the tokens first .. last - 1, which list some of the siblings; else they stand in `readers` as
    token * BEAM + e, where e is the place at which the parent was opened. MASKED: opened siblings are left out.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    item = tl.program_id(0).to(tl.int64)
    pair = tl.load(items + item * 4)
    if pair >= 0:
        group = tl.load(items + item * 4 + 1)
        begin = tl.load(items + item * 4 + 2)
        end = tl.load(items + item * 4 + 3)
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        d_ok = d < D
        c = tl.arange(0, RP)
        first_node = tl.load(offsets + level)
        level_size = tl.load(offsets + level + 1) - first_node
        node = group * RADIX + c
        c_ok = (c < RADIX) & (node < level_size)
        node_row = (b * num_nodes + first_node + node) * num_key_heads + kh
        kt = tl.load(kbar + node_row[:, None] * D + d[None, :], c_ok[:, None] & d_ok[None, :], 0.0)
        vt = tl.load(vbar + node_row[:, None] * D + d[None, :], c_ok[:, None] & d_ok[None, :], 0.0)
        h = tl.load(entropy + node_row, c_ok, 0.0) * LOG2E
        dk = tl.zeros((RP, BD), tl.float32)
        dv = tl.zeros((RP, BD), tl.float32)
        dh = tl.zeros((RP,), tl.float32)
        row = tl.arange(0, BM)
        count = (end - begin) * G
        for r0 in range(0, count, BM):
            at_reader = r0 + row
            ok = at_reader < count
            if LISTED:
                token = begin + at_reader // G
                first = tl.maximum(0, token // BLOCK - WINDOW + 1)
                lo, hi = list_of_level(first, level, levels, RADIX, GUARD)
                keep = (node[None, :] >= lo[:, None]) & (node[None, :] < hi[:, None])
                if MASKED:
                    bits = tl.load(base_bits + (pair * num_tokens + token) * levels + level, ok, 0)
                    place = node[None, :] - lo[:, None]
                    bit = (bits[:, None] >> tl.where(keep, place, 0).to(tl.int32)) & 1
                    keep = keep & (bit == 0)
            else:
                entry = tl.load(readers + begin + at_reader // G, ok, 0).to(tl.int64)
                token = entry // BEAM
                bits = tl.load(
                    child_bits + ((pair * num_tokens + token) * levels + level) * BEAM + entry % BEAM, ok, 0
                )
                keep = ((bits[:, None] >> c[None, :]) & 1) == 0
            keep = keep & c_ok[None, :] & ok[:, None]
            head = kh * G + at_reader % G
            row_ok = ok[:, None] & d_ok[None, :]
            qt = tl.load(q + b * sqb + token[:, None] * sqn + head[:, None] * sqh + d[None, :], row_ok, 0.0)
            do = tl.load(
                dout + ((b * num_tokens + token) * num_heads + head)[:, None] * D + d[None, :], row_ok, 0.0
            )
            at_lse = (b * num_heads + head) * num_tokens + token
            lse2 = tl.load(lse + at_lse, ok, float("inf")) * LOG2E
            dl = tl.load(delta + at_lse, ok, 0.0)
            bias = tl.load(level_bias + head * levels + level, ok, 0.0) * LOG2E
            s = (
                tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
                + h[None, :]
                + (bias - lse2)[:, None]
            )
            p = tl.where(keep, tl.exp2(s), 0.0)
            ds = p * (tl.dot(do, tl.trans(vt), input_precision=PREC) - dl[:, None])
            dk = tl.dot(tl.trans(ds.to(qt.dtype)), qt, dk, input_precision=PREC)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PREC)
            dh += tl.sum(ds, 0)
        at = partial + (item * RADIX + c)[:, None] * (2 * D + 1) + d[None, :]
        mask = (c < RADIX)[:, None] & d_ok[None, :]
        tl.store(at, dk * scale, mask)
        tl.store(at + D, dv, mask)
        tl.store(partial + (item * RADIX + c) * (2 * D + 1) + 2 * D, dh, c < RADIX)


@triton.jit
def sum_items(partial, first_item, out, width, BW: tl.constexpr):
    """out[group] = the sum of partial[first_item[group] : first_item[group + 1]], in that order; no atomics."""
    group = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BW + tl.arange(0, BW)
    begin = tl.load(first_item + group)
    end = tl.load(first_item + group + 1)
    total = tl.zeros((BW,), tl.float32)
    for item in range(begin, end):
        total += tl.load(partial + item * width + at, at < width, 0.0)
    tl.store(out + group * width + at, total, at < width)
