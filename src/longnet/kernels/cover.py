"""The data-independent part of hierarchical attention: a local window and, without opening, the lists of summaries.

A program owns `BLOCK` query tokens of `HG` heads that share a key head. All of them see the same key blocks and the same
nodes (the cover depends on the query's block only), so no tile needs a mask except the diagonal one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet.kernels.dilated_forward import strided_rows


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
def _summaries(
    kbar, vbar, entropy, base, begin, end, num_key_heads, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Keys, values, entropies of the nodes begin .. begin + BN - 1 of a level with first row `base`; which lie before end."""
    c = begin + tl.arange(0, BN)
    d = tl.arange(0, BD)
    ok = c < end
    row = base + c.to(tl.int64) * num_key_heads
    mask = ok[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    return tl.load(kbar + at, mask, 0.0), tl.load(vbar + at, mask, 0.0), tl.load(entropy + row, ok, 0.0), ok


@triton.jit
def _attend(acc, top, total, s, vt, PREC: tl.constexpr):
    """Online softmax: one more tile of scores (log 2) and their values."""
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    rescale = tl.exp2(top - new)
    acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision=PREC)
    return acc, new, total * rescale + tl.sum(p, 1)


@triton.jit(do_not_specialize=["num_tokens"])
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
    k_rows = strided_rows(k_local + b * skb, 0, num_tokens, skn, skh, kh, 1, D=D, BD=BD, ROWS=BK)
    v_rows = strided_rows(v + b * svb, 0, num_tokens, svn, svh, kh, 1, D=D, BD=BD, ROWS=BK)
    # The last keys, the query's own block among them, need a mask.
    last = first + (i - first) // (BK // BLOCK) * (BK // BLOCK)
    for j in tl.range(first, last, BK // BLOCK):
        s = tl.dot(qt, k_rows.load([j * BLOCK, 0]).T, input_precision=PREC) * scale2
        acc, m, total = _attend(acc, m, total, s, v_rows.load([j * BLOCK, 0]), PREC=PREC)
    s = tl.dot(qt, k_rows.load([last * BLOCK, 0]).T, input_precision=PREC) * scale2
    s = tl.where(last * BLOCK + col[None, :] <= token[:, None], s, float("-inf"))
    acc, m, total = _attend(acc, m, total, s, v_rows.load([last * BLOCK, 0]), PREC=PREC)
    if LISTS:
        qf = tl.load(q + b * sfb + at_row * sfn + heads[:, None] * sfh + d[None, :], row_ok, 0.0)
        hi = first
        for level in range(levels):
            lo = list_begin(hi, level, levels, RADIX, GUARD)
            bias = tl.load(level_bias + heads * levels + level)
            base = (b * num_nodes + tl.load(offsets + level)) * num_key_heads + kh
            for begin in tl.range(lo, hi, BN, num_stages=1):
                k_far, v_far, h, ok = _summaries(
                    kbar, vbar, entropy, base, begin, hi, num_key_heads, D=D, BD=BD, BN=BN
                )
                far = tl.dot(qf, k_far.T, input_precision=PREC) * scale2
                far += (h[None, :] + bias[:, None]) * 1.4426950408889634
                far = tl.where(ok[None, :], far, float("-inf"))
                acc, m, total = _attend(acc, m, total, far, v_far, PREC=PREC)
            hi = lo // RADIX
    at_out = (b * num_tokens + at_row) * num_heads + heads[:, None]
    tl.store(out + at_out * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), row_ok)
    at_lse = (b * num_heads + heads) * num_tokens + token
    tl.store(lse + at_lse, (m + tl.log2(total)) * 0.6931471805599453, token < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
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

    dbias (B, N, H, levels) receives the sums of the logit gradients of every level.
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
    k_rows = strided_rows(k_local + b * skb, 0, num_tokens, skn, skh, kh, 1, D=D, BD=BD, ROWS=BLOCK)
    v_rows = strided_rows(v + b * svb, 0, num_tokens, svn, svh, kh, 1, D=D, BD=BD, ROWS=BLOCK)
    acc = tl.zeros((BLOCK * HG, BD), tl.float32)
    for j in tl.range(first, i):
        kt = k_rows.load([j * BLOCK, 0])
        vt = v_rows.load([j * BLOCK, 0])
        p = tl.exp2(tl.dot(qt, kt.T, input_precision=PREC) * scale2 - lse2[:, None])
        ds = p * (tl.dot(do, vt.T, input_precision=PREC) - dl[:, None])
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
    kt = k_rows.load([i * BLOCK, 0])
    vt = v_rows.load([i * BLOCK, 0])
    p = tl.exp2(tl.dot(qt, kt.T, input_precision=PREC) * scale2 - lse2[:, None])
    p = tl.where(col[None, :] <= (row % BLOCK)[:, None], p, 0.0)
    ds = p * (tl.dot(do, vt.T, input_precision=PREC) - dl[:, None])
    acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
    if not JOINT:
        tl.store(dq_local + at_out * D + d[None, :], (acc * scale).to(dq_local.dtype.element_ty), row_ok)
    if LISTS:
        qf = tl.load(q + b * sfb + at_row * sfn + heads[:, None] * sfh + d[None, :], row_ok, 0.0)
        if not JOINT:
            acc = tl.zeros((BLOCK * HG, BD), tl.float32)
        at_bias = ((b * num_tokens + token) * num_heads + heads) * levels
        hi = first
        for level in range(levels):
            lo = list_begin(hi, level, levels, RADIX, GUARD)
            bias = tl.load(level_bias + heads * levels + level)
            base = (b * num_nodes + tl.load(offsets + level)) * num_key_heads + kh
            sums = tl.zeros((BLOCK * HG,), tl.float32)
            for begin in tl.range(lo, hi, BN, num_stages=1):
                k_far, v_far, h, ok = _summaries(
                    kbar, vbar, entropy, base, begin, hi, num_key_heads, D=D, BD=BD, BN=BN
                )
                far = tl.dot(qf, k_far.T, input_precision=PREC) * scale2
                far += (h[None, :] + bias[:, None]) * 1.4426950408889634 - lse2[:, None]
                p_far = tl.where(ok[None, :], tl.exp2(far), 0.0)
                ds_far = p_far * (tl.dot(do, v_far.T, input_precision=PREC) - dl[:, None])
                acc = tl.dot(ds_far.to(k_far.dtype), k_far, acc, input_precision=PREC)
                sums += tl.sum(ds_far, 1)
            tl.store(dbias + at_bias + level, sums, token_ok)
            hi = lo // RADIX
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
