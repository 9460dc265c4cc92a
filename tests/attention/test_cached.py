"""Streaming equals the parallel pass: chunks, steps, ragged batches, grouped heads, both offset rules."""

import math

import pytest
import torch

from longnet.attention.cached import (
    _choose,
    decode_attention,
    prefill_attention,
    write_rows,
    write_step,
)
from longnet.patterns import DilatedPattern

CASES = [
    (DilatedPattern((5,), (1,)), 2, 2),
    (DilatedPattern((4, 8, 16), (1, 2, 4)), 4, 4),
    (DilatedPattern((4, 8, 16), (1, 2, 4), "block"), 4, 2),
    (DilatedPattern((5, 13, 30), (1, 3, 7)), 6, 2),
    (DilatedPattern((5, 13, 30), (1, 3, 7), "block"), 6, 1),
    (DilatedPattern((3, 20, 64), (1, 6, 16)), 4, 4),
]


def naive(q, k, v, pattern):
    """Masked softmax with log multiplicities, straight from the definition."""
    n, heads = q.shape[1:3]
    t = torch.arange(n)
    count = torch.zeros(heads, n, n, dtype=torch.float64)
    for w, r in pattern.branches:
        for h in range(heads):
            s = h % r if pattern.head_offsets == "cyclic" else h // math.ceil(heads / r)
            part = t % w % r == s
            count[h] += (t[:, None] // w == t // w) & part[:, None] & part & (t <= t[:, None])
    group = heads // k.shape[2]
    k, v = k.repeat_interleave(group, 2).double(), v.repeat_interleave(group, 2).double()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) / math.sqrt(q.shape[3]) + count.log()
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def make(pattern, heads, key_heads, n=70, batch=2, width=4, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(batch, n, heads, width, dtype=dtype)
    k, v = (torch.randn(batch, n, key_heads, width, dtype=dtype) for _ in range(2))
    buffers = []
    for w, r in pattern.branches:
        shape = (batch, pattern.rows(w, r), len(pattern.slots(r, heads, key_heads)), width)
        # Garbage, not zeros: a stale row that is read changes the result.
        buffers.append(tuple(torch.full(shape, 50.0, dtype=dtype) for _ in range(2)))
    return q, k, v, buffers


@pytest.mark.parametrize(("pattern", "heads", "key_heads"), CASES)
@pytest.mark.parametrize("chunks", [(70,), (1, 69), (7, 1, 20, 2, 40), (16, 16, 16, 16, 6), (3,) * 23 + (1,)])
def test_chunks_equal_the_parallel_pass(pattern, heads, key_heads, chunks):
    q, k, v, buffers = make(pattern, heads, key_heads)
    exact, exact_lse = naive(q, k, v, pattern)
    begin = 0
    for n in chunks:
        window = slice(begin, begin + n)
        out, lse = prefill_attention(q[:, window], k[:, window], v[:, window], pattern, buffers, begin)
        write_rows(buffers, k[:, window], v[:, window], pattern, heads, begin)
        torch.testing.assert_close(out, exact[:, window], atol=1e-10, rtol=0)
        torch.testing.assert_close(lse, exact_lse[:, :, window], atol=1e-10, rtol=0)
        begin += n


@pytest.mark.parametrize(("pattern", "heads", "key_heads"), CASES)
@pytest.mark.parametrize("alike", [True, False])
def test_steps_equal_the_parallel_pass(pattern, heads, key_heads, alike):
    q, k, v, buffers = make(pattern, heads, key_heads)
    exact, _ = naive(q, k, v, pattern)
    for t in range(70):
        positions, known = torch.tensor([t, t]), t if alike else None
        step = slice(t, t + 1)
        write_step(buffers, k[:, step], v[:, step], pattern, heads, positions, known)
        out = decode_attention(q[:, step], pattern, buffers, positions, known, t)
        torch.testing.assert_close(out, exact[:, step], atol=1e-10, rtol=0)


@pytest.mark.parametrize(("pattern", "heads", "key_heads"), CASES)
def test_sequences_at_positions_of_their_own(pattern, heads, key_heads):
    q, k, v, buffers = make(pattern, heads, key_heads)
    exact, _ = naive(q, k, v, pattern)
    lengths = [37, 21]
    write_rows(buffers, k[:, :40], v[:, :40], pattern, heads, 0, torch.tensor(lengths))
    for i in range(30):
        positions = torch.tensor(lengths) + i
        take = [x[torch.arange(2), positions][:, None] for x in (q, k, v, exact)]
        write_step(buffers, take[1], take[2], pattern, heads, positions)
        out = decode_attention(take[0], pattern, buffers, positions)
        torch.testing.assert_close(out, take[3], atol=1e-10, rtol=0)


def test_bfloat16_stays_close():
    pattern = DilatedPattern((8, 32), (1, 4))
    q, k, v, buffers = make(pattern, 4, 2, dtype=torch.bfloat16)
    exact, _ = naive(q, k, v, pattern)
    write_rows(buffers, k[:, :50], v[:, :50], pattern, 4, 0)
    out, lse = prefill_attention(q[:, 50:], k[:, 50:], v[:, 50:], pattern, buffers, 50)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert (out.double() - exact[:, 50:]).abs().max() < 0.03


def test_a_dense_branch_is_not_copied():
    x = torch.zeros(2, 8, 4, 3)
    assert _choose(x, torch.arange(4).expand(2, 4), 1).data_ptr() == x.data_ptr()
