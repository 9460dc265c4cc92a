"""Gradients of one branch of dilated attention. Every branch is fed the merged statistics, so that p = exp(s - lse) and
ds = p (dout . v - delta) are those of the whole mixture. Two kernels, one by query rows and one by key rows: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.kernels.dilated_forward import head_offset, segment_of, strided_rows


@triton.jit
def _dq_tiles(
    acc, qt, do, lse2, delta, k_rows, v_rows, begin, end, row, keys, scale2,
    BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    for j in tl.range(begin, end, BN, num_stages=STAGES):
        kt = k_rows.load([j, 0])
        vt = v_rows.load([j, 0])
        s = tl.dot(qt, kt.T, input_precision=PREC)
        dp = tl.dot(do, vt.T, input_precision=PREC)
        p = tl.exp2(s * scale2 - lse2[:, None])
        if MASK:
            col = j + tl.arange(0, BN)
            seen = col[None, :] < keys
            if CAUSAL:
                seen = seen & (col[None, :] <= row[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
    return acc


@triton.jit(do_not_specialize=["start", "num_queries", "num_keys", "tiles"])
def dilated_dq(
    q, k, v, dout, lse, delta, dq, lengths, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_queries, num_keys, num_heads, w, rate, per_offset, start, tiles, scale, scale2,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, CYCLIC: tl.constexpr, LENGTHS: tl.constexpr, FIRST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq <- this branch's part (FIRST), or dq plus it. dout, dq (B, Nq, H, D) contiguous; lse, delta (B, H, Nq)."""
    head = tl.program_id(0) % num_heads
    x = tl.program_id(0) // num_heads
    b = tl.program_id(1).to(tl.int64)
    tile = tiles - 1 - x % tiles
    valid = num_keys
    if LENGTHS:
        valid = tl.minimum(num_keys, tl.load(lengths + b)).to(tl.int32)
    offset = head_offset(head, rate, per_offset, CYCLIC)
    g = (start + num_keys - num_queries) // w + x // tiles
    origin, key, _, keys, query, queries, valid_queries = segment_of(
        g, offset, rate, w, start, num_queries, num_keys, valid
    )
    i = tile * BM
    if i < (queries if FIRST else valid_queries):
        skip = (query - key).to(tl.int32)
        first = origin + offset + query * rate - (num_keys - num_queries)
        q_rows = strided_rows(q + b * sqb, first, valid_queries, sqn, sqh, head, rate, D=D, BD=BD, ROWS=BM)
        do_rows = strided_rows(
            dout + b * num_queries * num_heads * D, first, valid_queries, num_heads * D, D, head, rate,
            D=D, BD=BD, ROWS=BM,
        )  # fmt: skip
        at_key = origin + offset + key * rate
        k_rows = strided_rows(k + b * skb, at_key, keys, skn, skh, head // G, rate, D=D, BD=BD, ROWS=BN)
        v_rows = strided_rows(v + b * svb, at_key, keys, svn, svh, head // G, rate, D=D, BD=BD, ROWS=BN)
        m = i + tl.arange(0, BM)
        ok = m < valid_queries
        at = first + m.to(tl.int64) * rate
        p_lse = (b * num_heads + head) * num_queries + at
        # Rows that do not exist get lse = inf, and so p = 0.
        lse2 = tl.load(lse + p_lse, ok, float("inf")) * 1.4426950408889634
        dl = tl.load(delta + p_lse, ok, 0.0)
        qt = q_rows.load([i, 0])
        do = do_rows.load([i, 0])
        row = m + skip
        acc = tl.zeros((BM, BD), tl.float32)
        end = keys
        full = keys // BN * BN
        if CAUSAL:
            end = tl.minimum(keys, i + skip + BM)
            full = tl.minimum(full, (i + skip + 1) // BN * BN)
        acc = _dq_tiles(
            acc, qt, do, lse2, dl, k_rows, v_rows, 0, full, row, keys, scale2, BN=BN, MASK=False, CAUSAL=CAUSAL,
            STAGES=STAGES, PREC=PREC,
        )  # fmt: skip
        acc = _dq_tiles(
            acc, qt, do, lse2, dl, k_rows, v_rows, full, end, row, keys, scale2, BN=BN, MASK=True, CAUSAL=CAUSAL,
            STAGES=STAGES, PREC=PREC,
        )  # fmt: skip
        acc = acc * scale
        d = tl.arange(0, BD)
        p_dq = dq + ((b * num_queries + at) * num_heads + head)[:, None] * D + d[None, :]
        written = ((m < queries) if FIRST else ok)[:, None] & (d < D)[None, :]
        if not FIRST:
            acc += tl.load(p_dq, written, 0.0).to(tl.float32)
        tl.store(p_dq, acc.to(dq.dtype.element_ty), written)


@triton.jit
def _dkv_tiles(
    dk, dv, kt, vt, q_rows, do_rows, p_lse, delta, begin, end, col, skip, queries, rate, scale2,
    BM: tl.constexpr, MASK: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    for i in tl.range(begin, end, BM, num_stages=STAGES):
        qt = q_rows.load([i, 0])
        do = do_rows.load([i, 0])
        m = i + tl.arange(0, BM)
        ok = m < queries
        at = m.to(tl.int64) * rate
        lse2 = tl.load(p_lse + at, ok, float("inf")) * 1.4426950408889634
        dl = tl.load(delta + at, ok, 0.0)
        s = tl.dot(kt, qt.T, input_precision=PREC)
        dp = tl.dot(vt, do.T, input_precision=PREC)
        p = tl.exp2(s * scale2 - lse2[None, :])
        if MASK:
            p = tl.where(col[:, None] <= (m + skip)[None, :], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
        ds = p * (dp - dl[None, :])
        dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PREC)
    return dk, dv


@triton.jit(do_not_specialize=["start", "num_queries", "num_keys", "tiles"])
def dilated_dkv(
    q, k, v, dout, lse, delta, dk, dv, lengths, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_queries, num_keys, num_heads, w, rate, per_offset, start, tiles, scale, scale2,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, CYCLIC: tl.constexpr, LENGTHS: tl.constexpr, FIRST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk, dv (B, N, K, D, contiguous) <- this branch's part (FIRST), or the sum with it.

    A program owns `BN` key rows and all heads of the key head's group that see them, that is, those of one offset.
    """
    head = tl.program_id(0) % num_heads
    x = tl.program_id(0) // num_heads
    b = tl.program_id(1).to(tl.int64)
    tile = x % tiles
    valid = num_keys
    if LENGTHS:
        valid = tl.minimum(num_keys, tl.load(lengths + b)).to(tl.int32)
    offset = head_offset(head, rate, per_offset, CYCLIC)
    kh = head // G
    if CYCLIC:
        step = rate
        leads = head - rate < kh * G
        stop = (kh + 1) * G
    else:
        step = 1
        leads = head == tl.maximum(kh * G, offset * per_offset)
        stop = tl.minimum((kh + 1) * G, (offset + 1) * per_offset)
    g = start // w + x // tiles
    origin, key, every, keys, query, _, queries = segment_of(
        g, offset, rate, w, start, num_queries, num_keys, valid
    )
    j = tile * BN
    wanted = j < every
    if not FIRST:
        wanted = (j < keys) & (queries > 0)
    if leads & wanted:
        skip = (query - key).to(tl.int32)
        first = origin + offset + query * rate - (num_keys - num_queries)
        at_key = origin + offset + key * rate
        k_rows = strided_rows(k + b * skb, at_key, keys, skn, skh, kh, rate, D=D, BD=BD, ROWS=BN)
        v_rows = strided_rows(v + b * svb, at_key, keys, svn, svh, kh, rate, D=D, BD=BD, ROWS=BN)
        kt = k_rows.load([j, 0])
        vt = v_rows.load([j, 0])
        col = j + tl.arange(0, BN)
        acc_k = tl.zeros((BN, BD), tl.float32)
        acc_v = tl.zeros((BN, BD), tl.float32)
        begin = 0
        full = 0
        if CAUSAL:
            begin = tl.maximum(0, j - skip) // BM * BM
            full = tl.minimum(tl.cdiv(tl.maximum(0, j + BN - 1 - skip), BM) * BM, tl.cdiv(queries, BM) * BM)
        for h in tl.range(head, stop, step):
            q_rows = strided_rows(q + b * sqb, first, queries, sqn, sqh, h, rate, D=D, BD=BD, ROWS=BM)
            do_rows = strided_rows(
                dout + b * num_queries * num_heads * D, first, queries, num_heads * D, D, h, rate, D=D, BD=BD, ROWS=BM
            )  # fmt: skip
            at = (b * num_heads + h) * num_queries + first
            acc_k, acc_v = _dkv_tiles(
                acc_k, acc_v, kt, vt, q_rows, do_rows, lse + at, delta + at, begin, full, col, skip, queries, rate,
                scale2, BM=BM, MASK=CAUSAL, STAGES=STAGES, PREC=PREC,
            )  # fmt: skip
            acc_k, acc_v = _dkv_tiles(
                acc_k, acc_v, kt, vt, q_rows, do_rows, lse + at, delta + at, full, queries, col, skip, queries, rate,
                scale2, BM=BM, MASK=False, STAGES=STAGES, PREC=PREC,
            )  # fmt: skip
        d = tl.arange(0, BD)
        ok = (col < keys)[:, None]
        acc_k = tl.where(ok, acc_k * scale, 0.0)
        acc_v = tl.where(ok, acc_v, 0.0)
        at = at_key + col.to(tl.int64) * rate
        num_key_heads = num_heads // G
        place = ((b * num_keys + at) * num_key_heads + kh)[:, None] * D + d[None, :]
        written = (col < (every if FIRST else keys))[:, None] & (d < D)[None, :]
        if not FIRST:
            acc_k += tl.load(dk + place, written, 0.0).to(tl.float32)
            acc_v += tl.load(dv + place, written, 0.0).to(tl.float32)
        tl.store(dk + place, acc_k.to(dk.dtype.element_ty), written)
        tl.store(dv + place, acc_v.to(dv.dtype.element_ty), written)
