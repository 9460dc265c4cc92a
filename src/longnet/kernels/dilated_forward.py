"""Dilated attention, one branch a launch: flash attention over strided rows that goes on where the branches before ended.

Row m of segment g at offset s is token g w + s + m r. A program owns `BM` query rows of one head in one segment. Tensor
descriptors address rows by their stride, cut them off at the segment's end and widen D to a power of two with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_offset(head, rate, per_offset, CYCLIC: tl.constexpr):
    """s, the offset of a head: h mod r, or h // ceil(H / r)."""
    if CYCLIC:
        return head % rate
    return head // per_offset


@triton.jit
def rows_before(position, origin, offset, rate):
    """How many rows of the segment that begins at `origin` lie before `position` (both relative to the first key)."""
    return tl.maximum(0, (position - origin - offset + rate - 1) // rate)


@triton.jit
def strided_rows(x, first, count, sn, sh, head, rate, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Descriptor of `count` rows of one head, `rate` tokens apart, the first at token `first`."""
    return tl.make_tensor_descriptor(
        x + first * sn + head * sh, [tl.maximum(count, 1).to(tl.int32), D], [rate * sn, 1], [ROWS, BD]
    )


@triton.jit
def segment_of(
    index, offset, rate, w, start, num_queries, num_keys, valid
):  # fmt: skip
    """Origin of a segment (local position) and its rows: first key, keys, valid keys, first query, queries, valid queries."""
    origin = index.to(tl.int64) * w - start
    end = tl.minimum(origin + w, num_keys)
    key = rows_before(tl.maximum(origin, 0), origin, offset, rate)
    query = rows_before(tl.maximum(origin, num_keys - num_queries), origin, offset, rate)
    last = rows_before(end, origin, offset, rate)
    last_valid = rows_before(tl.minimum(end, valid), origin, offset, rate)
    keys = tl.maximum(0, last - key).to(tl.int32)
    valid_keys = tl.maximum(0, last_valid - key).to(tl.int32)
    queries = tl.maximum(0, last - query).to(tl.int32)
    valid_queries = tl.maximum(0, last_valid - query).to(tl.int32)
    return origin, key, keys, valid_keys, query, queries, valid_queries


@triton.jit
def _attend(
    acc, top, total, qt, k_rows, v_rows, begin, end, row, keys, scale2, OUT: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    for j in tl.range(begin, end, BN, num_stages=STAGES):
        kt = k_rows.load([j, 0])
        s = tl.dot(qt, kt.T, input_precision=PREC)
        if MASK:
            col = j + tl.arange(0, BN)
            seen = col[None, :] < keys
            if CAUSAL:
                seen = seen & (col[None, :] <= row[:, None])
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - new[:, None])
        rescale = tl.exp2(top - new)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        vt = v_rows.load([j, 0])
        acc = tl.dot(p.to(OUT), vt, acc, input_precision=PREC)
        top = new
    return acc, top, total


@triton.jit(do_not_specialize=["start", "num_queries", "num_keys", "tiles"])
def dilated_forward(
    q, k, v, out, lse, lengths, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    num_queries, num_keys, num_heads, w, rate, per_offset, start, tiles, scale2,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, CYCLIC: tl.constexpr, LENGTHS: tl.constexpr, FIRST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out, lse <- this branch's (FIRST), or their merge with it. scale2 = scale log2(e) >= 0."""
    head = tl.program_id(0) % num_heads
    x = tl.program_id(0) // num_heads
    b = tl.program_id(1).to(tl.int64)
    tile = tiles - 1 - x % tiles  # the longest first
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
        skip = (query - key).to(tl.int32)  # rows of keys before the first query
        first = origin + offset + query * rate - (num_keys - num_queries)
        q_rows = strided_rows(q + b * sqb, first, valid_queries, sqn, sqh, head, rate, D=D, BD=BD, ROWS=BM)
        at_key = origin + offset + key * rate
        k_rows = strided_rows(k + b * skb, at_key, keys, skn, skh, head // G, rate, D=D, BD=BD, ROWS=BN)
        v_rows = strided_rows(v + b * svb, at_key, keys, svn, svh, head // G, rate, D=D, BD=BD, ROWS=BN)
        o_rows = strided_rows(
            out + b * num_queries * num_heads * D, first, queries if FIRST else valid_queries, num_heads * D, D, head, rate,
            D=D, BD=BD, ROWS=BM,
        )  # fmt: skip
        qt = q_rows.load([i, 0])
        m = i + tl.arange(0, BM)
        row = m + skip
        ok = m < valid_queries
        p_lse = lse + (b * num_heads + head) * num_queries + first + m.to(tl.int64) * rate
        if FIRST:
            top = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, BD), tl.float32)
        else:
            # The branches before are a block of keys already seen: maximum lse, sum 1, mean out. The first branch holds
            # every token, so lse is finite.
            top = tl.load(p_lse, ok, float("-inf")) * 1.4426950408889634
            total = tl.where(ok, 1.0, 0.0)
            acc = o_rows.load([i, 0]).to(tl.float32)
        end = keys
        full = keys // BN * BN
        if CAUSAL:
            end = tl.minimum(keys, i + skip + BM)
            full = tl.minimum(full, (i + skip + 1) // BN * BN)
        acc, top, total = _attend(
            acc, top, total, qt, k_rows, v_rows, 0, full, row, keys, scale2, qt.dtype, BN=BN, MASK=False,
            CAUSAL=CAUSAL, STAGES=STAGES, PREC=PREC,
        )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, qt, k_rows, v_rows, full, end, row, keys, scale2, qt.dtype, BN=BN, MASK=True,
            CAUSAL=CAUSAL, STAGES=STAGES, PREC=PREC,
        )  # fmt: skip
        weight = tl.where(ok, 1.0 / total, 0.0)
        joint = tl.where(ok, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        tl.store(p_lse, joint, (m < queries) if FIRST else ok)
        o_rows.store([i, 0], tl.where(ok[:, None], acc * weight[:, None], 0.0).to(out.dtype.element_ty))
