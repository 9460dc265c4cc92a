"""The data-independent part of hierarchical attention: a local window and, without opening, the lists of summaries.

A program owns `BLOCK` query tokens of `HG` heads that share a key head. All of them see the same key blocks and the same
nodes (the cover depends on the query's block only), so no tile needs a mask except the diagonal one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def list_begin(hi, level, levels, RADIX: tl.constexpr, GUARD: tl.constexpr):
    """First node of the level's list whose end is `hi`; the last level lists everything."""
    lo = RADIX * tl.maximum(0, hi // RADIX - GUARD)
    return tl.where(level == levels - 1, 0, lo)


@triton.jit
def list_of_level(first, level, levels, RADIX: tl.constexpr, GUARD: tl.constexpr):
    """[lo, hi) of nodes that queries with far boundary `first` (in blocks) list at a level (0 = leaf blocks)."""
    hi = first
    for above in range(level):
        hi = list_begin(hi, above, levels, RADIX, GUARD) // RADIX
    return list_begin(hi, level, levels, RADIX, GUARD), hi


@triton.jit
def listed_nodes(c, first, offsets, levels, RADIX: tl.constexpr, GUARD: tl.constexpr):
    """Row in the concatenated pyramid and level of the c-th listed node, levels one after the other."""
    node = tl.zeros_like(c)
    level = tl.zeros_like(c)
    begin = 0
    hi = first
    for at in range(levels):
        lo = list_begin(hi, at, levels, RADIX, GUARD)
        inside = (c >= begin) & (c < begin + hi - lo)
        node = tl.where(inside, tl.load(offsets + at) + lo + c - begin, node)
        level = tl.where(inside, at, level)
        begin += hi - lo
        hi = lo // RADIX
    return node, level


@triton.jit
def count_listed(first, levels, RADIX: tl.constexpr, GUARD: tl.constexpr):
    total = 0
    hi = first
    for at in range(levels):
        lo = list_begin(hi, at, levels, RADIX, GUARD)
        total += hi - lo
        hi = lo // RADIX
    return total


@triton.jit
def cover_forward(
    q_local, k_local, v, q, kbar, vbar, entropy, level_bias, offsets, out, lse,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sfb, sfn, sfh,
    num_tokens, num_nodes, num_heads, num_key_heads, levels, scale,
    G: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr, LISTS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out and lse (natural) of one softmax over the local window, BK keys (whole blocks) at a time, and, if LISTS, all listed
    summaries."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) * HG
    b = tl.program_id(2).to(tl.int64)
    kh = head // G
    row = tl.arange(0, BLOCK * HG)
    token = i * BLOCK + row % BLOCK
    heads = head + row // BLOCK
    d = tl.arange(0, BD)
    at_row = token.to(tl.int64)[:, None]
    row_ok = (token < num_tokens)[:, None] & (d < D)[None, :]
    qt = tl.load(q_local + b * sqb + at_row * sqn + heads[:, None] * sqh + d[None, :], row_ok, 0.0)
    scale2 = scale * 1.4426950408889634
    first = tl.maximum(0, i - WINDOW + 1)
    m = tl.full((BLOCK * HG,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK * HG,), tl.float32)
    acc = tl.zeros((BLOCK * HG, BD), tl.float32)
    col = tl.arange(0, BK)
    k_base = k_local + b * skb + kh * skh
    v_base = v + b * svb + kh * svh
    # The last keys, the query's own block among them, need a mask.
    last = first + (i - first) // (BK // BLOCK) * (BK // BLOCK)
    for j in tl.range(first, last, BK // BLOCK):
        at = (j * BLOCK + col).to(tl.int64)
        kt = tl.load(k_base + at[None, :] * skn + d[:, None], (d < D)[:, None], 0.0)
        vt = tl.load(v_base + at[:, None] * svn + d[None, :], (d < D)[None, :], 0.0)
        s = tl.dot(qt, kt, input_precision=PREC) * scale2
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        rescale = tl.exp2(m - new)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision=PREC)
        m = new
    at = (last * BLOCK + col).to(tl.int64)
    at_ok = at < num_tokens
    kt = tl.load(k_base + at[None, :] * skn + d[:, None], at_ok[None, :] & (d < D)[:, None], 0.0)
    vt = tl.load(v_base + at[:, None] * svn + d[None, :], at_ok[:, None] & (d < D)[None, :], 0.0)
    s = tl.dot(qt, kt, input_precision=PREC) * scale2
    s = tl.where(last * BLOCK + col[None, :] <= token[:, None], s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    rescale = tl.exp2(m - new)
    total = total * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision=PREC)
    m = new
    if LISTS:
        listed = count_listed(first, levels, RADIX, GUARD)
        if listed > 0:
            qf = tl.load(q + b * sfb + at_row * sfn + heads[:, None] * sfh + d[None, :], row_ok, 0.0)
            for begin in range(0, listed, BN):
                c = begin + tl.arange(0, BN)
                node, level = listed_nodes(c, first, offsets, levels, RADIX, GUARD)
                node_row = (b * num_nodes + node) * num_key_heads + kh
                ok = c < listed
                k_far = tl.load(
                    kbar + node_row[None, :] * D + d[:, None], ok[None, :] & (d < D)[:, None], 0.0
                )
                v_far = tl.load(
                    vbar + node_row[:, None] * D + d[None, :], ok[:, None] & (d < D)[None, :], 0.0
                )
                bias = tl.load(entropy + node_row, ok, 0.0)[None, :]
                bias += tl.load(level_bias + heads[:, None] * levels + level[None, :])
                s_far = tl.dot(qf, k_far, input_precision=PREC) * scale2 + bias * 1.4426950408889634
                s_far = tl.where(ok[None, :], s_far, float("-inf"))
                new = tl.maximum(m, tl.max(s_far, 1))
                p_far = tl.exp2(s_far - new[:, None])
                rescale = tl.exp2(m - new)
                total = total * rescale + tl.sum(p_far, 1)
                acc = tl.dot(p_far.to(v_far.dtype), v_far, acc * rescale[:, None], input_precision=PREC)
                m = new
    at_out = (b * num_tokens + at_row) * num_heads + heads[:, None]
    tl.store(out + at_out * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), row_ok)
    at_lse = (b * num_heads + heads) * num_tokens + token
    tl.store(lse + at_lse, (m + tl.log2(total)) * 0.6931471805599453, token < num_tokens)


@triton.jit
def cover_dq(
    q_local, k_local, v, q, kbar, vbar, entropy, level_bias, offsets, dout, lse, delta, dq_local, dq, dbias,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sfb, sfn, sfh,
    num_tokens, num_nodes, num_heads, num_key_heads, levels, scale,
    G: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr, LISTS: tl.constexpr, JOINT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of the local queries, and if LISTS of the far queries and (per query) of the level biases. JOINT: both are
    the same queries, and the sum goes to dq.

    dbias (B, N, H, levels), zeros, receives the sums of the logit gradients of every level.
    """
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) * HG
    b = tl.program_id(2).to(tl.int64)
    kh = head // G
    row = tl.arange(0, BLOCK * HG)
    token = i * BLOCK + row % BLOCK
    heads = head + row // BLOCK
    d = tl.arange(0, BD)
    at_row = token.to(tl.int64)[:, None]
    token_ok = token < num_tokens
    row_ok = token_ok[:, None] & (d < D)[None, :]
    at_out = (b * num_tokens + at_row) * num_heads + heads[:, None]
    at_lse = (b * num_heads + heads) * num_tokens + token
    qt = tl.load(q_local + b * sqb + at_row * sqn + heads[:, None] * sqh + d[None, :], row_ok, 0.0)
    do = tl.load(dout + at_out * D + d[None, :], row_ok, 0.0)
    # Rows beyond the sequence: exp2(s - inf) is 0.
    lse2 = tl.load(lse + at_lse, token_ok, float("inf")) * 1.4426950408889634
    dl = tl.load(delta + at_lse, token_ok, 0.0)
    scale2 = scale * 1.4426950408889634
    first = tl.maximum(0, i - WINDOW + 1)
    col = tl.arange(0, BLOCK)
    k_base = k_local + b * skb + kh * skh
    v_base = v + b * svb + kh * svh
    acc = tl.zeros((BLOCK * HG, BD), tl.float32)
    for j in tl.range(first, i):
        at = (j * BLOCK + col).to(tl.int64)
        kt = tl.load(k_base + at[:, None] * skn + d[None, :], (d < D)[None, :], 0.0)
        vt = tl.load(v_base + at[None, :] * svn + d[:, None], (d < D)[:, None], 0.0)
        s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * scale2
        p = tl.exp2(s - lse2[:, None])
        ds = p * (tl.dot(do, vt, input_precision=PREC) - dl[:, None])
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
    at = (i * BLOCK + col).to(tl.int64)
    at_ok = at < num_tokens
    kt = tl.load(k_base + at[:, None] * skn + d[None, :], at_ok[:, None] & (d < D)[None, :], 0.0)
    vt = tl.load(v_base + at[None, :] * svn + d[:, None], at_ok[None, :] & (d < D)[:, None], 0.0)
    s = tl.dot(qt, tl.trans(kt), input_precision=PREC) * scale2
    p = tl.where(col[None, :] <= (row % BLOCK)[:, None], tl.exp2(s - lse2[:, None]), 0.0)
    ds = p * (tl.dot(do, vt, input_precision=PREC) - dl[:, None])
    acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
    if not JOINT:
        tl.store(dq_local + at_out * D + d[None, :], (acc * scale).to(dq_local.dtype.element_ty), row_ok)
    if LISTS:
        qf = tl.load(q + b * sfb + at_row * sfn + heads[:, None] * sfh + d[None, :], row_ok, 0.0)
        if not JOINT:
            acc = tl.zeros((BLOCK * HG, BD), tl.float32)
        listed = count_listed(first, levels, RADIX, GUARD)
        at_bias = ((b * num_tokens + token) * num_heads + heads) * levels
        for begin in range(0, listed, BN):
            c = begin + tl.arange(0, BN)
            node, level = listed_nodes(c, first, offsets, levels, RADIX, GUARD)
            node_row = (b * num_nodes + node) * num_key_heads + kh
            ok = c < listed
            k_far = tl.load(kbar + node_row[:, None] * D + d[None, :], ok[:, None] & (d < D)[None, :], 0.0)
            v_far = tl.load(vbar + node_row[None, :] * D + d[:, None], ok[None, :] & (d < D)[:, None], 0.0)
            bias = tl.load(entropy + node_row, ok, 0.0)[None, :]
            bias += tl.load(level_bias + heads[:, None] * levels + level[None, :])
            s_far = tl.dot(qf, tl.trans(k_far), input_precision=PREC) * scale2 + bias * 1.4426950408889634
            p_far = tl.where(ok[None, :], tl.exp2(s_far - lse2[:, None]), 0.0)
            ds_far = p_far * (tl.dot(do, v_far, input_precision=PREC) - dl[:, None])
            acc = tl.dot(ds_far.to(k_far.dtype), k_far, acc, input_precision=PREC)
            for at_level in range(levels):
                sums = tl.sum(tl.where(level[None, :] == at_level, ds_far, 0.0), 1)
                so_far = tl.load(dbias + at_bias + at_level, token_ok, 0.0)
                tl.store(dbias + at_bias + at_level, so_far + sums, token_ok)
        tl.store(dq + at_out * D + d[None, :], (acc * scale).to(dq.dtype.element_ty), row_ok)


@triton.jit
def window_dkv(
    q_local, k_local, v, dout, lse, delta, dk, dv,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_tokens, num_heads, num_key_heads, scale,
    G: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of the local keys and of the values: a program owns a key block and walks the query blocks that see it."""
    j = tl.program_id(0)
    kh = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    col = tl.arange(0, BLOCK)
    at = (j * BLOCK + col).to(tl.int64)
    at_ok = (at < num_tokens)[:, None] & (d < D)[None, :]
    kt = tl.load(k_local + b * skb + at[:, None] * skn + kh * skh + d[None, :], at_ok, 0.0)
    vt = tl.load(v + b * svb + at[:, None] * svn + kh * svh + d[None, :], at_ok, 0.0)
    row = tl.arange(0, BLOCK * HG)
    scale2 = scale * 1.4426950408889634
    dk_acc = tl.zeros((BLOCK, BD), tl.float32)
    dv_acc = tl.zeros((BLOCK, BD), tl.float32)
    blocks = tl.minimum(WINDOW, tl.cdiv(num_tokens, BLOCK) - j)
    for step in tl.range(0, blocks * (G // HG)):
        i = j + step // (G // HG)
        heads = kh * G + (step % (G // HG)) * HG + row // BLOCK
        token = i * BLOCK + row % BLOCK
        at_row = token.to(tl.int64)
        token_ok = token < num_tokens
        row_ok = token_ok[:, None] & (d < D)[None, :]
        qt = tl.load(
            q_local + b * sqb + at_row[:, None] * sqn + heads[:, None] * sqh + d[None, :], row_ok, 0.0
        )
        at_out = (b * num_tokens + at_row) * num_heads + heads
        do = tl.load(dout + at_out[:, None] * D + d[None, :], row_ok, 0.0)
        at_lse = (b * num_heads + heads) * num_tokens + token
        lse2 = tl.load(lse + at_lse, token_ok, float("inf")) * 1.4426950408889634
        dl = tl.load(delta + at_lse, token_ok, 0.0)
        s = tl.dot(kt, tl.trans(qt), input_precision=PREC) * scale2
        p = tl.exp2(s - lse2[None, :])
        p = tl.where((j * BLOCK + col)[:, None] <= token[None, :], p, 0.0)
        dv_acc = tl.dot(p.to(do.dtype), do, dv_acc, input_precision=PREC)
        ds = p * (tl.dot(vt, tl.trans(do), input_precision=PREC) - dl[None, :])
        dk_acc = tl.dot(ds.to(qt.dtype), qt, dk_acc, input_precision=PREC)
    at_key = ((b * num_tokens + at) * num_key_heads + kh)[:, None] * D + d[None, :]
    tl.store(dk + at_key, (dk_acc * scale).to(dk.dtype.element_ty), at_ok)
    tl.store(dv + at_key, dv_acc.to(dv.dtype.element_ty), at_ok)


@triton.jit
def _row_dot_kernel(
    a, b, minus, result, num_tokens, num_heads, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MINUS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    ok = token < num_tokens
    at = ((i_b * num_tokens + token) * num_heads + h)[:, None] * D + d[None, :]
    mask = ok[:, None] & (d < D)[None, :]
    x = tl.sum(tl.load(a + at, mask, 0.0).to(tl.float32) * tl.load(b + at, mask, 0.0).to(tl.float32), 1)
    at = (i_b * num_heads + h) * num_tokens + token
    if MINUS:
        x -= tl.load(minus + at, ok, 0.0)
    tl.store(result + at, x, ok)


def row_dot(a: Tensor, b: Tensor, minus: Tensor | None) -> Tensor:
    """sum_d a b - minus: a, b (B, N, H, D) contiguous, minus (B, H, N) or None -> (B, H, N) fp32."""
    batch, tokens, heads, width = a.shape
    result = torch.empty(batch, heads, tokens, dtype=torch.float32, device=a.device)
    minus = None if minus is None else minus.contiguous()
    _row_dot_kernel[(triton.cdiv(tokens, 32), heads, batch)](
        a, b, result if minus is None else minus, result, tokens, heads,
        D=width, BD=triton.next_power_of_2(width), BM=32, MINUS=minus is not None, num_warps=4,
    )  # fmt: skip
    return result
