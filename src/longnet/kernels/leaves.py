"""Opened leaf blocks, ordered by block: a program holds one leaf and walks over the tokens that opened it.

Token by token, K and V of every opened block are read again: 4 BLOCK D bytes a place in 16 bits, for the few rows of one
group. By block they are read once; what moves instead is 4 D G bytes a place (a query row in, a result out), and the rows of a
product are (reader, head of the group), full whatever the group. The results go to a buffer of one chunk of tokens and are
joined per token in the order of its places: no atomics.

The number of a tile's readers is loaded a tile ahead: were it loaded in place, the rows that it points to would be asked for
only after the products of the tile before, and nothing would hide their way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.routing import load_rows


@triton.jit(do_not_specialize=["num_leaves", "chunk"])
def leaf_forward(
    q, k, v, order, items, part, logits, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_leaves, num_key_heads, first_token, chunk, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    TOP_K: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Of opened leaves the softmax means, part (pairs, chunk, TOP_K, G, D), and the log2 of their mass, logits (pairs, chunk,
    TOP_K, G).

    items (., 3): leaf numbered through pairs of sequence and key head (-1: none), first and last place in `order`. order:
    positions in (pairs, chunk, TOP_K), sorted by leaf.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    READERS: tl.constexpr = BM // GP
    item = tl.program_id(0).to(tl.int64)
    group = tl.load(items + item * 3)
    if group >= 0:
        begin = tl.load(items + item * 3 + 1)
        count = (tl.load(items + item * 3 + 2) - begin).to(tl.int32)
        pair = group // num_leaves
        leaf = group % num_leaves
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        d_ok = d < D
        at = leaf * BLOCK + tl.arange(0, BLOCK)
        row = tl.arange(0, BM)
        g = row % GP
        reader = row // GP
        order += begin
        place = tl.load(order + reader, reader < count, 0).to(tl.int64)
        kt = load_rows(k + b * skb + kh * skh, at, at >= 0, skn, d, D)
        vt = load_rows(v + b * svb + kh * svh, at, at >= 0, svn, d, D)
        q += b * sqb + (first_token - pair * chunk) * sqn + kh * G * sqh
        for r0 in tl.range(0, count, READERS):
            ok = (r0 + reader < count) & (g < G)
            row_ok = ok[:, None] & d_ok[None, :]
            qt = tl.load(q + (place // TOP_K * sqn + g * sqh)[:, None] + d[None, :], row_ok, 0.0)
            to = place * G + g
            ahead = r0 + READERS + reader
            place = tl.load(order + ahead, ahead < count, 0).to(tl.int64)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            mass = tl.sum(p, 1)
            o = tl.dot(p.to(vt.dtype), vt, input_precision=PREC) * (1 / mass)[:, None]
            tl.store(part + to[:, None] * D + d[None, :], o.to(part.dtype.element_ty), row_ok)
            tl.store(logits + to, top + tl.log2(mass), ok)


@triton.jit
def leaf_backward(
    q, k, v, router_mix, order, items, logits, dout, lse, delta, part, slopes, dkv,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_leaves, num_heads, num_key_heads, first_token, chunk, apart, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    TOP_K: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Of every work item the sums over its readers, dkv (items, 2, BLOCK, D); of every place dq (without the summary's share) in
    part (pairs, chunk, TOP_K, G, D), and dsbar, dbeta in slopes (2, pairs, chunk, TOP_K, G). lse, delta (B, N, H).

    The summary's own gradients are left to the kernels over tokens and places: here they would be products of one column.
    Numbers within a chunk have 32 bits, but for the offsets of results: registers are what this kernel lacks.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    READERS: tl.constexpr = BM // GP
    item = tl.program_id(0).to(tl.int64)
    group = tl.load(items + item * 3)
    if group >= 0:
        begin = tl.load(items + item * 3 + 1)
        count = (tl.load(items + item * 3 + 2) - begin).to(tl.int32)
        pair = group // num_leaves
        leaf = group % num_leaves
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        d_ok = d < D
        c = tl.arange(0, BLOCK)
        at = leaf * BLOCK + c
        row = tl.arange(0, BM)
        g = row % GP
        reader = row // GP
        order += begin
        first_place = pair * chunk * TOP_K
        place = (tl.load(order + reader, reader < count, first_place) - first_place).to(tl.int32)
        kt = load_rows(k + b * skb + kh * skh, at, c >= 0, skn, d, D)
        vt = load_rows(v + b * svb + kh * svh, at, c >= 0, svn, d, D)
        q += b * sqb + first_token.to(tl.int64) * sqn + kh * G * sqh
        at_pair = (b * num_tokens + first_token) * num_heads + kh * G
        dout += at_pair * D
        lse += at_pair
        delta += at_pair
        part += first_place * G * D
        logits += first_place * G
        slopes += first_place * G
        beta = tl.load(router_mix + kh * G + g, g < G, 1.0)
        dk = tl.zeros((BD, BLOCK), tl.float32)
        dv = tl.zeros((BD, BLOCK), tl.float32)
        for r0 in tl.range(0, count, READERS):
            ok = (r0 + reader < count) & (g < G)
            row_ok = ok[:, None] & d_ok[None, :]
            token = place // TOP_K
            qt = tl.load(q + (token * sqn + g * sqh)[:, None] + d[None, :], row_ok, 0.0)
            at_out = token * num_heads + g
            do = tl.load(dout + (at_out * D)[:, None] + d[None, :], row_ok, 0.0)
            # Rows beyond the readers: their weight is exp2(-inf).
            lse2 = tl.load(lse + at_out, ok, float("inf")) * LOG2E
            dl = tl.load(delta + at_out, ok, 0.0)
            to = place * G + g
            mass = tl.load(logits + to, ok, 0.0)
            sbar = tl.load(logits + apart + to, ok, 0.0)
            later = r0 + READERS + reader
            place = (tl.load(order + later, later < count, first_place) - first_place).to(tl.int32)
            log_weight = mass + beta * (sbar - mass) - lse2
            weight = tl.exp2(log_weight)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
            # P p of every token, and its sum with dp: P times the mean. A weight of 0 has none.
            p = tl.exp2(s + (log_weight - mass)[:, None])
            dv = tl.dot(tl.trans(do), p.to(do.dtype), dv, input_precision=PREC)
            dp = tl.dot(do, tl.trans(vt), input_precision=PREC)
            mean = tl.sum(p * dp, 1)
            dw = mean - weight * dl
            tl.store(slopes + to, beta * dw, ok)
            tl.store(slopes + apart + to, dw * (sbar - mass) * 0.6931471805599453, ok)
            mean = beta * mean / tl.maximum(weight, 1e-30) + (1 - beta) * dl
            dx = (p * (dp - mean[:, None])).to(qt.dtype)
            dk = tl.dot(tl.trans(qt), dx, dk, input_precision=PREC)
            dq = tl.dot(dx, kt, input_precision=PREC) * scale
            tl.store(part + (to.to(tl.int64) * D)[:, None] + d[None, :], dq.to(part.dtype.element_ty), row_ok)
        at = dkv + (item * 2 * BLOCK + c)[:, None] * D + d[None, :]
        tile_ok = d_ok[None, :] & (c >= 0)[:, None]
        tl.store(at, tl.trans(dk) * scale, tile_ok)
        tl.store(at + BLOCK * D, tl.trans(dv), tile_ok)


@triton.jit
def sum_places(rises, rise_sums, order, items, dnode, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """Of every work item the sums over its readers of what they give to the leaf's summary: dnode (items, D + 1) = dkbar, dH
    from rises (pairs, chunk, TOP_K, D), rise_sums alike without D (`opened_backward.far_dq`)."""
    item = tl.program_id(0).to(tl.int64)
    if tl.load(items + item * 3) >= 0:
        begin = tl.load(items + item * 3 + 1)
        end = tl.load(items + item * 3 + 2)
        d = tl.arange(0, BD)
        total = tl.zeros((BR, BD), tl.float32)
        sums = tl.zeros((BR,), tl.float32)
        for r0 in range(begin, end, BR):
            reader = r0 + tl.arange(0, BR)
            ok = reader < end
            place = tl.load(order + reader, ok, 0)
            total += load_rows(rises, place, ok, D, d, D).to(tl.float32)
            sums += tl.load(rise_sums + place, ok, 0.0)
        tl.store(dnode + item * (D + 1) + d, tl.sum(total, 0), d < D)
        tl.store(dnode + item * (D + 1) + D, tl.sum(sums, 0))
