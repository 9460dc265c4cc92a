"""Opened leaf blocks, ordered by block: a program holds one leaf and walks over the tokens that opened it.

Token by token, K and V of every opened block are read again: 4 BLOCK D bytes a place in 16 bits, for the few rows of one
group. By block they are read once; what moves instead is 4 D G bytes a place (a query row in, a result out), and the rows of a
product are (reader, head of the group), full whatever the group. The results go to a buffer of one chunk of tokens and are
joined per token in the order of its places: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def leaf_forward(
    q, k, v, order, items, part, part_lse, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_leaves, num_key_heads, first_token, chunk, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    TOP_K: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Softmax means and log2 of the masses of opened leaves: part (pairs, chunk, TOP_K, G, D), part_lse (pairs, chunk, TOP_K, G).

    items (., 3): leaf numbered through pairs of sequence and key head (-1: none), first and last place in `order`. order:
    positions in (pairs, chunk, TOP_K), sorted by leaf.
    """
    item = tl.program_id(0).to(tl.int64)
    leaf_of_pair = tl.load(items + item * 3)
    if leaf_of_pair >= 0:
        begin = tl.load(items + item * 3 + 1)
        count = (tl.load(items + item * 3 + 2) - begin).to(tl.int32) * G
        pair = leaf_of_pair // num_leaves
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        d_ok = d < D
        at = (leaf_of_pair % num_leaves) * BLOCK + tl.arange(0, BLOCK)
        kt = tl.load(
            k + b * skb + at[:, None] * skn + kh * skh + d[None, :], d_ok[None, :] & (at >= 0)[:, None], 0.0
        )
        vt = tl.load(
            v + b * svb + at[:, None] * svn + kh * svh + d[None, :], d_ok[None, :] & (at >= 0)[:, None], 0.0
        )
        q_base = q + b * sqb + kh * G * sqh
        row = tl.arange(0, BM)
        for r0 in tl.range(0, count, BM):
            ok = r0 + row < count
            place = tl.load(order + begin + (r0 + row) // G, ok, 0).to(tl.int64)
            g = (r0 + row) % G
            token = place // TOP_K - pair * chunk + first_token
            row_ok = ok[:, None] & d_ok[None, :]
            qt = tl.load(q_base + token[:, None] * sqn + g[:, None] * sqh + d[None, :], row_ok, 0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * 1.4426950408889634)
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            mass = tl.sum(p, 1)
            o = tl.dot(p.to(vt.dtype), vt, input_precision=PREC) / mass[:, None]
            to = place * G + g
            tl.store(part + to[:, None] * D + d[None, :], o.to(part.dtype.element_ty), row_ok)
            tl.store(part_lse + to, top + tl.log2(mass), ok)


@triton.jit
def leaf_backward(
    q, k, v, kbar, entropy, level_bias, router_mix, order, items, dout, lse, delta, part, part_score, part_mix, dkv, dnode,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_nodes, num_leaves, num_heads, num_key_heads, levels, first_token, chunk, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    TOP_K: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Of every work item the sums over its readers, dkv (items, 2, BLOCK, D) and dnode (items, D + 1) = dkbar, dH; of every
    place dq in part (pairs, chunk, TOP_K, G, D), and dsbar, dbeta in part_score, part_mix (pairs, chunk, TOP_K, G)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    item = tl.program_id(0).to(tl.int64)
    leaf_of_pair = tl.load(items + item * 3)
    if leaf_of_pair >= 0:
        begin = tl.load(items + item * 3 + 1)
        count = (tl.load(items + item * 3 + 2) - begin).to(tl.int32) * G
        pair = leaf_of_pair // num_leaves
        leaf = leaf_of_pair % num_leaves
        b = pair // num_key_heads
        kh = pair % num_key_heads
        d = tl.arange(0, BD)
        d_ok = d < D
        c = tl.arange(0, BLOCK)
        at = leaf * BLOCK + c
        tile_ok = d_ok[None, :] & (c >= 0)[:, None]
        kt = tl.load(k + b * skb + at[:, None] * skn + kh * skh + d[None, :], tile_ok, 0.0)
        vt = tl.load(v + b * svb + at[:, None] * svn + kh * svh + d[None, :], tile_ok, 0.0)
        node_row = (b * num_nodes + leaf) * num_key_heads + kh
        kb = tl.load(kbar + node_row * D + d, d_ok, 0.0).to(tl.float32)
        h = tl.load(entropy + node_row) * LOG2E
        q_base = q + b * sqb + kh * G * sqh
        dk = tl.zeros((BLOCK, BD), tl.float32)
        dv = tl.zeros((BLOCK, BD), tl.float32)
        dkb = tl.zeros((BD,), tl.float32)
        dh = tl.zeros((BM,), tl.float32)
        row = tl.arange(0, BM)
        for r0 in tl.range(0, count, BM):
            ok = r0 + row < count
            place = tl.load(order + begin + (r0 + row) // G, ok, 0).to(tl.int64)
            g = (r0 + row) % G
            token = place // TOP_K - pair * chunk + first_token
            head = kh * G + g
            row_ok = ok[:, None] & d_ok[None, :]
            qt = tl.load(q_base + token[:, None] * sqn + g[:, None] * sqh + d[None, :], row_ok, 0.0)
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
            lse_leaf = top + tl.log2(mass)
            sbar = tl.sum(qt.to(tl.float32) * kb[None, :], 1) * (scale * LOG2E) + h + bias
            weight = tl.exp2((1 - beta) * lse_leaf + beta * sbar - lse2)
            dp = tl.dot(do, tl.trans(vt), input_precision=PREC)
            mean = tl.sum(p * dp, 1)
            dw = weight * (mean - dl)
            dx = (p * (weight[:, None] * (dp - mean[:, None]) + ((1 - beta) * dw)[:, None])).to(qt.dtype)
            dv = tl.dot(tl.trans((p * weight[:, None]).to(do.dtype)), do, dv, input_precision=PREC)
            dk = tl.dot(tl.trans(dx), qt, dk, input_precision=PREC)
            dsbar = beta * dw
            dkb += tl.sum(dsbar[:, None] * qt.to(tl.float32), 0)
            dh += dsbar
            dq = (tl.dot(dx, kt, input_precision=PREC) + dsbar[:, None] * kb[None, :]) * scale
            to = place * G + g
            tl.store(part + to[:, None] * D + d[None, :], dq.to(part.dtype.element_ty), row_ok)
            tl.store(part_score + to, dsbar, ok)
            tl.store(part_mix + to, dw * (sbar - lse_leaf) * 0.6931471805599453, ok)
        at = dkv + (item * 2 * BLOCK + c)[:, None] * D + d[None, :]
        tl.store(at, dk * scale, tile_ok)
        tl.store(at + BLOCK * D, dv, tile_ok)
        tl.store(dnode + item * (D + 1) + d, dkb * scale, d_ok)
        tl.store(dnode + item * (D + 1) + D, tl.sum(dh, 0))
