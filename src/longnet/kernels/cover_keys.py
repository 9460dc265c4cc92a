"""Gradients of what the base cover reads, per key block and per listed summary: programs walk over the queries that see them.

Keys and nodes are the rows of the products, so that their gradients take P and dS from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.cover import listed_count, listed_nodes, load_tile
from longnet.kernels.routing import load_rows


@triton.jit
def query_tile(
    q, dout, lse, delta, i, head, b, sqb, sqn, sqh, num_tokens, num_heads,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Of block i and one head: q, dout, lse in log 2 (inf beyond the sequence, where the weight then is 0), delta. TMA: the
    first four are descriptors, of (B, N, H, D) and of all (B H N) scalars."""
    token = i * BLOCK + tl.arange(0, BLOCK)
    ok = token < num_tokens
    if TMA:
        sequence = b.to(tl.int32)
        qt = load_tile(q, sequence, i * BLOCK, head, BLOCK, BD)
        do = load_tile(dout, sequence, i * BLOCK, head, BLOCK, BD)
        at = ((b * num_heads + head) * num_tokens + i * BLOCK).to(tl.int32)
        lse2 = tl.where(ok, lse.load([at]) * 1.4426950408889634, float("inf"))
        dl = delta.load([at])
    else:
        d = tl.arange(0, BD)
        at_row = token.to(tl.int64)
        row_ok = ok[:, None] & (d < D)[None, :]
        qt = tl.load(q + b * sqb + at_row[:, None] * sqn + head * sqh + d[None, :], row_ok, 0.0)
        at_out = (b * num_tokens + at_row) * num_heads + head
        do = tl.load(dout + at_out[:, None] * D + d[None, :], row_ok, 0.0)
        at_lse = (b * num_heads + head) * num_tokens + token
        lse2 = tl.load(lse + at_lse, ok, float("inf")) * 1.4426950408889634
        dl = tl.load(delta + at_lse, ok, 0.0)
    return qt, do, lse2, dl


@triton.jit
def _dkv_step(
    i, head, kt, vt, dk_acc, dv_acc, q, dout, lse, delta, b, at_key, sqb, sqn, sqh, num_tokens, num_heads, scale2,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    qt, do, lse2, dl = query_tile(
        q, dout, lse, delta, i, head, b, sqb, sqn, sqh, num_tokens, num_heads, D, BD, BLOCK, TMA
    )
    p = tl.exp2(tl.dot(kt, tl.trans(qt), input_precision=PREC) * scale2 - lse2[None, :])
    if MASK:
        p = tl.where(at_key[:, None] <= (i * BLOCK + tl.arange(0, BLOCK))[None, :], p, 0.0)
    dv_acc = tl.dot(p.to(do.dtype), do, dv_acc, input_precision=PREC)
    ds = p * (tl.dot(vt, tl.trans(do), input_precision=PREC) - dl[None, :])
    return tl.dot(ds.to(qt.dtype), qt, dk_acc, input_precision=PREC), dv_acc


@triton.jit(do_not_specialize=["num_tokens"])
def window_dkv(
    k_local, v, q_local, dout, lse, delta, dk, dv,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_heads, num_key_heads, scale,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of the local keys and of the values: a program owns a key block and walks the query blocks that see it."""
    pid = tl.program_id(0)
    # Key heads first: programs at work at the same time read the same tokens.
    j, kh = pid // num_key_heads, pid % num_key_heads
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    col = tl.arange(0, BLOCK)
    at = (j * BLOCK + col).to(tl.int64)
    at_ok = (at < num_tokens)[:, None] & (d < D)[None, :]
    kt = tl.load(k_local + b * skb + at[:, None] * skn + kh * skh + d[None, :], at_ok, 0.0)
    vt = tl.load(v + b * svb + at[:, None] * svn + kh * svh + d[None, :], at_ok, 0.0)
    at_key = j * BLOCK + col
    scale2 = scale * 1.4426950408889634
    dk_acc = tl.zeros((BLOCK, BD), tl.float32)
    dv_acc = tl.zeros((BLOCK, BD), tl.float32)
    blocks = tl.minimum(WINDOW, tl.cdiv(num_tokens, BLOCK) - j)
    # Not the constant G: a loop of one step would be unrolled, and the products around it wait for each other then.
    group = num_heads // num_key_heads
    for step in tl.range(0, group):
        dk_acc, dv_acc = _dkv_step(
            j + step // group, kh * group + step % group, kt, vt, dk_acc, dv_acc, q_local, dout, lse, delta, b,
            at_key,
            sqb, sqn, sqh, num_tokens, num_heads, scale2, D=D, BD=BD, BLOCK=BLOCK, MASK=True, TMA=TMA, PREC=PREC,
        )  # fmt: skip
    for step in tl.range(group, blocks * group):
        dk_acc, dv_acc = _dkv_step(
            j + step // group, kh * group + step % group, kt, vt, dk_acc, dv_acc, q_local, dout, lse, delta, b,
            at_key,
            sqb, sqn, sqh, num_tokens, num_heads, scale2, D=D, BD=BD, BLOCK=BLOCK, MASK=False, TMA=TMA, PREC=PREC,
        )  # fmt: skip
    at_grad = ((b * num_tokens + at) * num_key_heads + kh)[:, None] * D + d[None, :]
    tl.store(dk + at_grad, (dk_acc * scale).to(dk.dtype.element_ty), at_ok)
    tl.store(dv + at_grad, dv_acc.to(dv.dtype.element_ty), at_ok)


@triton.jit(do_not_specialize=["num_tokens", "num_nodes"])
def listed_dkv(
    kbar, vbar, entropy, level_bias, base_bits, q, dout, lse, delta, partial,
    sqb, sqn, sqh, num_tokens, num_nodes, num_heads, num_key_heads, columns, scale,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NODES: tl.constexpr,
    TMA: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr, LEVELS: tl.constexpr,
    MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of NODES listed summaries over the tokens of BLOCKS blocks: partial (pairs, epochs, RADIX / BLOCKS, columns,
    2 D + 1).

    An epoch is RADIX blocks whose far boundaries have the same parent: their lists differ by the end of the finest one only, so
    the lists of all levels fit into one or two products. MASKED: without what a token opened.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    parts: tl.constexpr = RADIX // BLOCKS
    item = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * NODES
    pair = tl.program_id(2).to(tl.int64)
    epoch = (item // parts).to(tl.int32)
    b = pair // num_key_heads
    kh = pair % num_key_heads
    first = tl.minimum(epoch * RADIX + RADIX - 1, tl.cdiv(num_tokens, BLOCK) - WINDOW)
    if begin < listed_count(first, LEVELS=LEVELS, RADIX=RADIX, GUARD=GUARD):
        c = begin + tl.arange(0, NODES)
        node, level, place = listed_nodes(
            c, first, num_tokens // BLOCK, LEVELS=LEVELS, RADIX=RADIX, GUARD=GUARD
        )
        c_ok = c < listed_count(first, LEVELS=LEVELS, RADIX=RADIX, GUARD=GUARD)
        d = tl.arange(0, BD)
        node_row = (b * num_nodes + node) * num_key_heads + kh
        kt = load_rows(kbar, node_row, c_ok, D, d, D)
        vt = load_rows(vbar, node_row, c_ok, D, d, D)
        h = tl.load(entropy + node_row, c_ok, float("-inf")) * LOG2E
        # Leaves count from 0, so a token lists those before its far boundary; of coarser levels every one here.
        leaf = tl.where(level > 0, -1, node)
        dk = tl.zeros((NODES, BD), tl.float32)
        dv = tl.zeros((NODES, BD), tl.float32)
        dh = tl.zeros((NODES,), tl.float32)
        i0 = epoch * RADIX + WINDOW - 1 + (item % parts).to(tl.int32) * BLOCKS
        group = num_heads // num_key_heads
        steps = tl.minimum(BLOCKS, tl.cdiv(num_tokens, BLOCK) - i0) * group
        for step in tl.range(0, steps):
            i = i0 + step // group
            head = (kh * group).to(tl.int32) + step % group
            qt, do, lse2, dl = query_tile(
                q,
                dout,
                lse,
                delta,
                i,
                head,
                b,
                sqb,
                sqn,
                sqh,
                num_tokens,
                num_heads,
                D,
                BD,
                BLOCK,
                TMA,
            )
            addend = h + tl.load(level_bias + head * LEVELS + level, c_ok, 0.0) * LOG2E
            addend = tl.where(leaf <= i - WINDOW, addend, float("-inf"))
            s = tl.dot(kt, tl.trans(qt), input_precision=PREC) * (scale * LOG2E)
            p = tl.exp2(s + (addend[:, None] - lse2[None, :]))
            if MASKED:
                token = i * BLOCK + tl.arange(0, BLOCK)
                for at in tl.static_range(LEVELS):
                    at_bits = (pair * num_tokens + token) * LEVELS + at
                    bits = tl.load(base_bits + at_bits, token < num_tokens, 0)
                    opened = (bits[None, :] >> (place & 31)[:, None]) & 1
                    p = tl.where((opened != 0) & (level == at)[:, None], 0.0, p)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
            ds = p * (tl.dot(vt, tl.trans(do), input_precision=PREC) - dl[None, :])
            dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PREC)
            dh += tl.sum(ds, 1)
        to = partial + (pair * tl.num_programs(0) + item) * columns * (2 * D + 1)
        at_node = c * (2 * D + 1)
        mask = (d < D)[None, :] & c_ok[:, None]
        tl.store(to + at_node[:, None] + d[None, :], dk * scale, mask)
        tl.store(to + D + at_node[:, None] + d[None, :], dv, mask)
        tl.store(to + 2 * D + at_node, dh, c_ok)


@triton.jit
def sum_listed(
    partial, readers, places, dkbar, dvbar, dentropy, items, parts, columns, num_nodes, num_key_heads, levels,
    D: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """dkbar, dvbar (B, nodes, K, D), dentropy (B, nodes, K), fp32: for every node the sum over the epochs that list it, in
    their order; no atomics.

    readers (nodes, 3): first and last epoch, level. places (epochs, levels): what leads from a node to its column.
    """
    node = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BW + tl.arange(0, BW)
    begin = tl.load(readers + node * 3) * parts
    end = tl.load(readers + node * 3 + 1) * parts
    level = tl.load(readers + node * 3 + 2)
    total = tl.zeros((BW,), tl.float32)
    for t0 in tl.range(begin, end, BT):
        t = t0 + tl.arange(0, BT)
        column = node + tl.load(places + t // parts * levels + level, t < end, 0)
        row = (pair * items + t) * columns + column
        mask = (t < end)[:, None] & (at <= 2 * D)[None, :]
        total += tl.sum(tl.load(partial + row[:, None] * (2 * D + 1) + at[None, :], mask, 0.0), 0)
    to = (pair // num_key_heads * num_nodes + node) * num_key_heads + pair % num_key_heads
    tl.store(dkbar + to * D + at, total, at < D)
    tl.store(dvbar + to * D + at - D, total, (at >= D) & (at < 2 * D))
    tl.store(dentropy + to + at - 2 * D, total, at == 2 * D)
