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
def load_tile(rows, sequence, begin, head, ROWS: tl.constexpr, BD: tl.constexpr):
    """ROWS tokens of a head, zeros beyond the sequence. rows: descriptor of (B, N, heads, D) made by the host, which spares
    every program to make one and wait for it."""
    return rows.load([sequence, begin, head, 0]).reshape(ROWS, BD)


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
def listed_nodes(c, first, leaves, LEVELS: tl.constexpr, RADIX: tl.constexpr, GUARD: tl.constexpr):
    """The lists of all levels for the far boundary `first` (in blocks) one after the other, finest first: node at place c
    (counted through the levels), its level and its place in that level's list. leaves: whole blocks of the sequence; what
    level a node is on is computed, for a table would be waited for."""
    node = tl.zeros_like(c)
    level = tl.zeros_like(c)
    place = c
    begin = 0
    hi = first
    offset = 0
    size = leaves
    for at in tl.static_range(LEVELS):
        lo = list_begin(hi, at, LEVELS, RADIX, GUARD)
        node = tl.where(c >= begin, offset + lo - begin + c, node)
        level = tl.where(c >= begin, at, level)
        place = tl.where(c >= begin, c - begin, place)
        begin += hi - lo
        hi = lo // RADIX
        offset += size
        size = size // RADIX
    return node, level, place


@triton.jit
def listed_count(first, LEVELS: tl.constexpr, RADIX: tl.constexpr, GUARD: tl.constexpr):
    """How many nodes all lists hold."""
    count = 0
    hi = first
    for at in tl.static_range(LEVELS):
        lo = list_begin(hi, at, LEVELS, RADIX, GUARD)
        count += hi - lo
        hi = lo // RADIX
    return count


@triton.jit
def _place(
    num_tokens, num_heads,
    HG: tl.constexpr, BLOCK: tl.constexpr, QB: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Of a program: its first query block and the first of its HG heads.

    QB neighbouring blocks begin where their far boundary, WINDOW - 1 blocks before, is a multiple of QB: then they differ in
    the finest list only, and there by its end. The first program may begin before token 0.
    """
    shift: tl.constexpr = (QB - (WINDOW - 1) % QB) % QB
    rows = tl.cdiv(tl.cdiv(num_tokens, BLOCK) + shift, QB)
    parts = num_heads // HG
    pid = tl.program_id(0)
    # Heads first: programs at work at the same time read the same tokens.
    return (rows - 1 - pid // parts) * QB - shift, pid % parts * HG


@triton.jit
def _masked_tiles(i, first, diagonal, BLOCK: tl.constexpr, QB: tl.constexpr, BK: tl.constexpr):
    """How many tiles of BK keys need a mask: those of the program's own keys, and with the oldest ones.

    Numbers that the compiler does not know: a loop of one step would be unrolled, and the assembler then makes every product of
    the kernel wait for the one before (ptxas C7515).
    """
    own = (i * BLOCK + QB * BLOCK - diagonal + BK - 1) // BK
    masked = own
    if QB > 1:
        masked += tl.where(first >= 0, (QB - 1) * BLOCK // BK, 0)
    return own, masked


@triton.jit
def _window_tile(
    t,
    own,
    low,
    diagonal,
    token,
    BLOCK: tl.constexpr,
    QB: tl.constexpr,
    WINDOW: tl.constexpr,
    BK: tl.constexpr,
):
    """First key of the t-th tile that needs a mask, and the mask: from the program's own keys on, then from its oldest."""
    begin = diagonal + t * BK
    if QB > 1:
        begin = tl.where(t < own, begin, low + (t - own) * BK)
    col = begin + tl.arange(0, BK)
    seen = col[None, :] <= token[:, None]
    if QB > 1:
        seen = seen & (col[None, :] // BLOCK > token[:, None] // BLOCK - WINDOW)
    return begin, seen


@triton.jit
def _far_tile(
    begin, first, count, base, kbar, vbar, entropy, level_bias, leaves, head, row, num_key_heads,
    HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, QB: tl.constexpr, BN: tl.constexpr,
    RADIX: tl.constexpr, GUARD: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Keys and values of BN listed nodes, what their scores (log 2) have beyond q . k per row, -inf where a row does not list
    them, and their levels."""
    LOG2E: tl.constexpr = 1.4426950408889634
    c = begin + tl.arange(0, BN)
    d = tl.arange(0, BD)
    ok = c < count
    node, level, _ = listed_nodes(c, first + QB - 1, leaves, LEVELS=LEVELS, RADIX=RADIX, GUARD=GUARD)
    # 32 bits: nodes are too few to need more, and addresses cost registers.
    at = node * num_key_heads
    mask = ok[:, None] & (d < D)[None, :]
    k_far = tl.load(kbar + base * D + (at[:, None] * D + d[None, :]), mask, 0.0)
    v_far = tl.load(vbar + base * D + (at[:, None] * D + d[None, :]), mask, 0.0)
    h = tl.load(entropy + base + at, ok, 0.0)
    addend = tl.full((HG * QB * BLOCK, BN), float("-inf"), tl.float32)
    for part in tl.static_range(HG * QB):
        bias = tl.load(level_bias + (head + part // QB) * LEVELS + level, ok, 0.0)
        # Level 0 comes first in the row of all nodes: there `node` counts leaves.
        seen = ok & ((level > 0) | (node < first + part % QB))
        bias = tl.where(seen, (h + bias) * LOG2E, float("-inf"))
        addend = tl.where((row // BLOCK == part)[:, None], bias[None, :], addend)
    return k_far, v_far, addend, level


@triton.jit
def _attend(acc, top, total, s, factor, vt, PREC: tl.constexpr):
    """Online softmax: one more tile of scores, `factor` (>= 0) times s in log 2, and their values."""
    new = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new[:, None])
    rescale = tl.exp2(top - new)
    acc = tl.dot(p.to(vt.dtype), vt, acc * rescale[:, None], input_precision=PREC)
    return acc, new, total * rescale + tl.sum(p, 1)


@triton.jit(do_not_specialize=["num_tokens", "num_nodes"])
def cover_forward(
    q_local, k_rows, v_rows, q, kbar, vbar, entropy, level_bias, out, lse,
    sqb, sqn, sqh, sfb, sfn, sfh,
    num_tokens, num_nodes, num_heads, num_key_heads, start, scale,
    G: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, QB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    LEVELS: tl.constexpr, LISTS: tl.constexpr, JOINT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """out and lse (natural) of one softmax over the local window, BK keys at a time, and, if LISTS, all listed summaries, BN
    at a time. JOINT: q_local and q are the same. Queries, out and lse begin at token `start`, keys and nodes with the text.
    """
    i, head = _place(num_tokens, num_heads, HG, BLOCK, QB, WINDOW)
    sequence = tl.program_id(1)
    b = sequence.to(tl.int64)
    kh = head // G
    row = tl.arange(0, QB * BLOCK * HG)
    token = i * BLOCK + row % (QB * BLOCK)
    heads = head + row // (QB * BLOCK)
    d = tl.arange(0, BD)
    at_row = token.to(tl.int64)[:, None]
    token_ok = (token >= start) & (token < num_tokens)
    row_ok = token_ok[:, None] & (d < D)[None, :]
    # Addresses count from the text's first token, too, which then lies before the queries.
    before = start.to(tl.int64)
    qt = tl.load(
        q_local + (b * sqb - before * sqn) + at_row * sqn + heads[:, None] * sqh + d[None, :], row_ok, 0.0
    )
    scale2 = scale * 1.4426950408889634
    first = i - WINDOW + 1
    m = tl.full((QB * BLOCK * HG,), float("-inf"), tl.float32)
    total = tl.zeros((QB * BLOCK * HG,), tl.float32)
    acc = tl.zeros((QB * BLOCK * HG, BD), tl.float32)
    low = tl.maximum(0, first + QB - 1) * BLOCK
    diagonal = tl.maximum(low, low + (i * BLOCK - low) // BK * BK)
    for begin in tl.range(low, diagonal, BK):
        s = tl.dot(qt, load_tile(k_rows, sequence, begin, kh, BK, BD).T, input_precision=PREC)
        acc, m, total = _attend(
            acc, m, total, s, scale2, load_tile(v_rows, sequence, begin, kh, BK, BD), PREC=PREC
        )
    # Every row sees a key of the first tile that needs a mask: from there on all maxima are finite.
    own, masked = _masked_tiles(i, first, diagonal, BLOCK, QB, BK)
    for t in tl.range(0, masked):
        begin, seen = _window_tile(t, own, first * BLOCK, diagonal, token, BLOCK, QB, WINDOW, BK)
        s = tl.dot(qt, load_tile(k_rows, sequence, begin, kh, BK, BD).T, input_precision=PREC) * scale2
        s = tl.where(seen, s, float("-inf"))
        acc, m, total = _attend(
            acc, m, total, s, 1.0, load_tile(v_rows, sequence, begin, kh, BK, BD), PREC=PREC
        )
    if LISTS:
        if JOINT:
            qf = qt
        else:
            qf = tl.load(
                q + (b * sfb - before * sfn) + at_row * sfn + heads[:, None] * sfh + d[None, :], row_ok, 0.0
            )
        count = listed_count(tl.maximum(0, first + QB - 1), LEVELS=LEVELS, RADIX=RADIX, GUARD=GUARD)
        base = b * num_nodes * num_key_heads + kh
        leaves = num_tokens // BLOCK
        for begin in tl.range(0, count, BN, num_stages=1):
            k_far, v_far, addend, _ = _far_tile(
                begin, first, count, base, kbar, vbar, entropy, level_bias, leaves, head, row, num_key_heads,
                HG, D, BD, BLOCK, QB, BN, RADIX, GUARD, LEVELS,
            )  # fmt: skip
            far = tl.dot(qf, k_far.T, input_precision=PREC) * scale2 + addend
            acc, m, total = _attend(acc, m, total, far, 1.0, v_far, PREC=PREC)
    at_out = (b * (num_tokens - start) - before + at_row) * num_heads + heads[:, None]
    # A division an element would cost as much as half a tile of keys.
    share = 1.0 / total
    tl.store(out + at_out * D + d[None, :], (acc * share[:, None]).to(out.dtype.element_ty), row_ok)
    at_lse = (b * num_heads + heads) * (num_tokens - start) + token - start
    tl.store(lse + at_lse, (m + tl.log2(total)) * 0.6931471805599453, token_ok)


@triton.jit(do_not_specialize=["num_tokens", "num_nodes"])
def cover_dq(
    q_local, k_rows, v_rows, q, kbar, vbar, entropy, level_bias, dout, out, lse, dlse, delta, dq_local, dq, dbias,
    sqb, sqn, sqh, sfb, sfn, sfh,
    num_tokens, num_nodes, num_heads, num_key_heads, scale,
    G: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, QB: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, RADIX: tl.constexpr, WINDOW: tl.constexpr, GUARD: tl.constexpr,
    LEVELS: tl.constexpr, LISTS: tl.constexpr, JOINT: tl.constexpr, BIAS: tl.constexpr, DLSE: tl.constexpr,
    COLUMNS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, gradients of the local queries, and if LISTS of the far queries and, if BIAS, per
    query of the level biases. JOINT: both are the same queries, and with LISTS the sum goes to dq.

    dbias (B, N, H, LEVELS) receives the sums of the logit gradients of every level.
    """
    i, head = _place(num_tokens, num_heads, HG, BLOCK, QB, WINDOW)
    sequence = tl.program_id(1)
    b = sequence.to(tl.int64)
    kh = head // G
    row = tl.arange(0, QB * BLOCK * HG)
    token = i * BLOCK + row % (QB * BLOCK)
    heads = head + row // (QB * BLOCK)
    d = tl.arange(0, BD)
    at_row = token.to(tl.int64)[:, None]
    token_ok = (token >= 0) & (token < num_tokens)
    row_ok = token_ok[:, None] & (d < D)[None, :]
    at_out = (b * num_tokens + at_row) * num_heads + heads[:, None]
    at_lse = (b * num_heads + heads) * num_tokens + token
    qt = tl.load(q_local + b * sqb + at_row * sqn + heads[:, None] * sqh + d[None, :], row_ok, 0.0)
    do = tl.load(dout + at_out * D + d[None, :], row_ok, 0.0)
    # Rows beyond the sequence: exp2(s - inf) is 0.
    lse2 = tl.load(lse + at_lse, token_ok, float("inf")) * 1.4426950408889634
    o = tl.load(out + at_out * D + d[None, :], row_ok, 0.0)
    dl = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if DLSE:
        dl -= tl.load(dlse + at_lse, token_ok, 0.0)
    tl.store(delta + at_lse, dl, token_ok)
    scale2 = scale * 1.4426950408889634
    first = i - WINDOW + 1
    acc = tl.zeros((QB * BLOCK * HG, BD), tl.float32)
    low = tl.maximum(0, first + QB - 1) * BLOCK
    diagonal = tl.maximum(low, low + (i * BLOCK - low) // BK * BK)
    for begin in tl.range(low, diagonal, BK):
        kt = load_tile(k_rows, sequence, begin, kh, BK, BD)
        vt = load_tile(v_rows, sequence, begin, kh, BK, BD)
        p = tl.exp2(tl.dot(qt, kt.T, input_precision=PREC) * scale2 - lse2[:, None])
        ds = p * (tl.dot(do, vt.T, input_precision=PREC) - dl[:, None])
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
    own, masked = _masked_tiles(i, first, diagonal, BLOCK, QB, BK)
    for t in tl.range(0, masked):
        begin, seen = _window_tile(t, own, first * BLOCK, diagonal, token, BLOCK, QB, WINDOW, BK)
        kt = load_tile(k_rows, sequence, begin, kh, BK, BD)
        vt = load_tile(v_rows, sequence, begin, kh, BK, BD)
        p = tl.exp2(tl.dot(qt, kt.T, input_precision=PREC) * scale2 - lse2[:, None])
        p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(do, vt.T, input_precision=PREC) - dl[:, None])
        acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
    if not (JOINT and LISTS):
        tl.store(dq_local + at_out * D + d[None, :], (acc * scale).to(dq_local.dtype.element_ty), row_ok)
    if LISTS:
        if JOINT:
            qf = qt
        else:
            qf = tl.load(q + b * sfb + at_row * sfn + heads[:, None] * sfh + d[None, :], row_ok, 0.0)
            acc = tl.zeros((QB * BLOCK * HG, BD), tl.float32)
        count = listed_count(tl.maximum(0, first + QB - 1), LEVELS=LEVELS, RADIX=RADIX, GUARD=GUARD)
        base = b * num_nodes * num_key_heads + kh
        leaves = num_tokens // BLOCK
        # One column a level.
        column = tl.arange(0, COLUMNS)
        sums = tl.zeros((QB * BLOCK * HG, COLUMNS), tl.float32)
        for begin in tl.range(0, count, BN, num_stages=1):
            k_far, v_far, addend, level = _far_tile(
                begin, first, count, base, kbar, vbar, entropy, level_bias, leaves, head, row, num_key_heads,
                HG, D, BD, BLOCK, QB, BN, RADIX, GUARD, LEVELS,
            )  # fmt: skip
            p_far = tl.exp2(tl.dot(qf, k_far.T, input_precision=PREC) * scale2 + (addend - lse2[:, None]))
            ds_far = p_far * (tl.dot(do, v_far.T, input_precision=PREC) - dl[:, None])
            acc = tl.dot(ds_far.to(k_far.dtype), k_far, acc, input_precision=PREC)
            if BIAS:
                for at in tl.static_range(LEVELS):
                    of_level = tl.sum(tl.where((level == at)[None, :], ds_far, 0.0), 1)
                    sums += tl.where((column == at)[None, :], of_level[:, None], 0.0)
        if BIAS:
            at_bias = ((b * num_tokens + at_row) * num_heads + heads[:, None]) * LEVELS + column[None, :]
            tl.store(dbias + at_bias, sums, token_ok[:, None] & (column < LEVELS)[None, :])
        tl.store(dq + at_out * D + d[None, :], (acc * scale).to(dq.dtype.element_ty), row_ok)


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
