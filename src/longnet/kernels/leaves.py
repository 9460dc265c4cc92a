"""Opened leaf blocks, ordered by block: a program holds one leaf and walks over the tokens that opened it.

Token by token, K and V of every opened block are read again: 4 BLOCK D bytes a place in 16 bits, for the few rows of one
group. By block they are read once; what moves instead is 4 D G bytes a place (a query row in, a result out), and the rows of a
product are (reader, head of the group), full whatever the group. The results go to a buffer of one chunk of tokens and are
joined per token in the order of its places: no atomics. Of every place and head the forward pass keeps two numbers, the log2 of
the leaf's mass and the router's score: with them the backward pass normalises without looking for maximum and sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.routing import load_rows


@triton.jit
def load_summary(at, d, D: tl.constexpr):
    """A leaf's summary as the first of 16 rows, the others zero: the least that a tensor-core product takes."""
    row = tl.arange(0, 16)
    return tl.load(at + row[:, None] + d[None, :], (row == 0)[:, None] & (d < D)[None, :], 0.0)


@triton.jit
def leaf_forward(
    q, k, v, kbar, entropy, level_bias, order, items, part, part_mass, part_score, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_nodes, num_leaves, num_key_heads, levels, first_token, chunk, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    TOP_K: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Of opened leaves the softmax means, the log2 of their mass and their score sbar in log2: part (pairs, chunk, TOP_K, G, D),
    part_mass and part_score alike without D.

    items (., 3): leaf numbered through pairs of sequence and key head (-1: none), first and last place in `order`. order:
    positions in (pairs, chunk, TOP_K), sorted by leaf.
    """
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
        at = leaf * BLOCK + tl.arange(0, BLOCK)
        kt = load_rows(k + b * skb + kh * skh, at, at >= 0, skn, d, D)
        vt = load_rows(v + b * svb + kh * svh, at, at >= 0, svn, d, D)
        node_row = (b * num_nodes + leaf) * num_key_heads + kh
        kb = load_summary(kbar + node_row * D, d, D)
        h = tl.load(entropy + node_row) * LOG2E
        q_base = q + b * sqb + kh * G * sqh
        row = tl.arange(0, BM)
        for r0 in tl.range(0, count, BM):
            ok = r0 + row < count
            g = (r0 + row) % G
            place = tl.load(order + begin + (r0 + row) // G, ok, 0)
            token = place // TOP_K - pair * chunk + first_token
            row_ok = ok[:, None] & d_ok[None, :]
            qt = tl.load(q_base + token[:, None] * sqn + g[:, None] * sqh + d[None, :], row_ok, 0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            mass = tl.sum(p, 1)
            sbar = tl.sum(tl.dot(qt, tl.trans(kb), input_precision=PREC), 1) * (scale * LOG2E) + h
            sbar += tl.load(level_bias + (kh * G + g) * levels, ok, 0.0) * LOG2E
            o = tl.dot(p.to(vt.dtype), vt, input_precision=PREC) / mass[:, None]
            to = place * G + g
            tl.store(part + to[:, None] * D + d[None, :], o.to(part.dtype.element_ty), row_ok)
            tl.store(part_mass + to, top + tl.log2(mass), ok)
            tl.store(part_score + to, sbar, ok)


@triton.jit
def leaf_backward(
    q, k, v, kbar, router_mix, order, items, part_mass, part_score, dout, lse, delta,
    part, part_dscore, part_dmix, dkv, dnode, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_nodes, num_leaves, num_heads, num_key_heads, first_token, chunk, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    TOP_K: tl.constexpr, ACROSS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Of every work item the sums over its readers, dkv (items, 2, BLOCK, D) and dnode (items, D + 1) = dkbar, dH; of every
    place dq in part (pairs, chunk, TOP_K, G, D), and dsbar, dbeta in part_dscore, part_dmix (pairs, chunk, TOP_K, G).

    The leaf's tokens are the rows of the products, so that dk and dv take P and dX from registers.
    """
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
        kt = load_rows(k + b * skb + kh * skh, at, c >= 0, skn, d, D)
        vt = load_rows(v + b * svb + kh * svh, at, c >= 0, svn, d, D)
        kb = load_summary(kbar + ((b * num_nodes + leaf) * num_key_heads + kh) * D, d, D)
        q_base = q + b * sqb + kh * G * sqh
        dk = tl.zeros((BLOCK, BD), tl.float32)
        dv = tl.zeros((BLOCK, BD), tl.float32)
        dkb = tl.zeros((BD, 16), tl.float32)
        dh = tl.zeros((BM,), tl.float32)
        row = tl.arange(0, BM)
        first = (tl.arange(0, 16) == 0)[None, :]
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
            # Rows beyond the readers: their weight is exp2(-inf).
            lse2 = tl.load(lse + at_lse, ok, float("inf")) * LOG2E
            dl = tl.load(delta + at_lse, ok, 0.0)
            beta = tl.load(router_mix + head, ok, 1.0)
            to = place * G + g
            mass = tl.load(part_mass + to, ok, 0.0)
            sbar = tl.load(part_score + to, ok, 0.0)
            w2 = mass + beta * (sbar - mass) - lse2
            weight = tl.exp2(w2)
            if ACROSS:
                s = tl.dot(kt, tl.trans(qt), input_precision=PREC) * (scale * LOG2E)
                # W P of every token, and its sum with dP: W times the mean. A weight of 0 has P = 0 too.
                p = tl.exp2(s + (w2 - mass)[None, :])
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
                dp = tl.dot(vt, tl.trans(do), input_precision=PREC)
                mean = tl.sum(p * dp, 0)
                dw = mean - weight * dl
                mean = beta * mean / tl.maximum(weight, 1e-30) + (1 - beta) * dl
                dx = (p * (dp - mean[None, :])).to(qt.dtype)
                dk = tl.dot(dx, qt, dk, input_precision=PREC)
            else:
                s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * (scale * LOG2E)
                p = tl.exp2(s + (w2 - mass)[:, None])
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PREC)
                dp = tl.dot(do, tl.trans(vt), input_precision=PREC)
                mean = tl.sum(p * dp, 1)
                dw = mean - weight * dl
                mean = beta * mean / tl.maximum(weight, 1e-30) + (1 - beta) * dl
                dx = (p * (dp - mean[:, None])).to(qt.dtype)
                dk = tl.dot(tl.trans(dx), qt, dk, input_precision=PREC)
            dsbar = beta * dw
            dh += dsbar
            ds = tl.where(first, dsbar[:, None], 0.0).to(qt.dtype)
            dkb = tl.dot(tl.trans(qt), ds, dkb, input_precision=PREC)
            if ACROSS:
                dq = tl.dot(tl.trans(kt), dx, input_precision=PREC)
                dq = tl.trans(tl.dot(tl.trans(kb), tl.trans(ds), dq, input_precision=PREC)) * scale
            else:
                dq = tl.dot(dx, kt, input_precision=PREC)
                dq = tl.dot(ds, kb, dq, input_precision=PREC) * scale
            tl.store(part + to[:, None] * D + d[None, :], dq.to(part.dtype.element_ty), row_ok)
            tl.store(part_dscore + to, dsbar, ok)
            tl.store(part_dmix + to, dw * (sbar - mass) * 0.6931471805599453, ok)
        at = dkv + (item * 2 * BLOCK + c)[:, None] * D + d[None, :]
        tile_ok = d_ok[None, :] & (c >= 0)[:, None]
        tl.store(at, dk * scale, tile_ok)
        tl.store(at + BLOCK * D, dv, tile_ok)
        tl.store(dnode + item * (D + 1) + d, tl.sum(dkb, 1) * scale, d_ok)
        tl.store(dnode + item * (D + 1) + D, tl.sum(dh, 0))
