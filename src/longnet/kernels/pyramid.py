"""Summaries of blocks and of their parents, and the gradients of the children: one launch a level."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(z):
    """softmax(z), log-softmax where finite, logsumexp; a node without mass has weights 0."""
    top = tl.max(z, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(z - finite), 0)
    mass = tl.where(total > 0, finite + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    finite = tl.where(total > 0, mass, 0.0)
    a = tl.exp(z - finite)
    return a, tl.where(a > 0, z - finite, 0.0), mass


@triton.jit
def _leaf_mass(
    kt, prior, lengths, b, kh, token, d, scale, D: tl.constexpr, PRIOR: tl.constexpr, LENGTHS: tl.constexpr
):
    """z of a leaf's tokens, before those beyond the sequence are dropped, and the prior query."""
    p = tl.zeros_like(d).to(tl.float32)
    if PRIOR:
        p = tl.load(prior + kh * D + d, d < D, 0.0).to(tl.float32)
    z = scale * tl.sum(kt.to(tl.float32) * p[None, :], 1)
    if LENGTHS:
        z = tl.where(token < tl.load(lengths + b), z, float("-inf"))
    return z, p


@triton.jit
def pool_leaves(
    k, v, prior, lengths, kbar, vbar, mass, entropy, skb, skn, skh, svb, svn, svh, num_nodes, num_key_heads, scale,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, PRIOR: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Leaf `program_id(0)`: kbar, vbar (B, nodes, K, D), mass and entropy (B, nodes, K); only whole leaves are launched."""
    leaf, kh, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    token = leaf.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = (d < D)[None, :] & (token >= 0)[:, None]
    if LENGTHS:
        ok = ok & (token < tl.load(lengths + b))[:, None]
    kt = tl.load(k + b * skb + token[:, None] * skn + kh * skh + d[None, :], ok, 0.0)
    vt = tl.load(v + b * svb + token[:, None] * svn + kh * svh + d[None, :], ok, 0.0)
    z, _ = _leaf_mass(kt, prior, lengths, b, kh, token, d, scale, D, PRIOR, LENGTHS)
    a, log_a, total = _weights(z)
    row = (b * num_nodes + leaf) * num_key_heads + kh
    tl.store(kbar + row * D + d, tl.sum(a[:, None] * kt.to(tl.float32), 0).to(kbar.dtype.element_ty), d < D)
    tl.store(vbar + row * D + d, tl.sum(a[:, None] * vt.to(tl.float32), 0).to(vbar.dtype.element_ty), d < D)
    tl.store(mass + row, total)
    tl.store(entropy + row, -tl.sum(a * log_a, 0))


@triton.jit
def pool_nodes(
    kbar, vbar, mass, entropy, first_child, first_node, num_nodes, num_key_heads,
    D: tl.constexpr, BD: tl.constexpr, RADIX: tl.constexpr,
):  # fmt: skip
    """Node `first_node + program_id(0)` from its RADIX children, all of the same buffers."""
    node, kh, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    child = first_child + node * RADIX + tl.arange(0, RADIX)
    rows = (b * num_nodes + child) * num_key_heads + kh
    a, log_a, total = _weights(tl.load(mass + rows))
    seen = (a > 0)[:, None] & (d < D)[None, :]
    kt = tl.load(kbar + rows[:, None] * D + d[None, :], seen, 0.0).to(tl.float32)
    vt = tl.load(vbar + rows[:, None] * D + d[None, :], seen, 0.0).to(tl.float32)
    h = tl.load(entropy + rows, a > 0, 0.0)
    row = (b * num_nodes + first_node + node) * num_key_heads + kh
    tl.store(kbar + row * D + d, tl.sum(a[:, None] * kt, 0).to(kbar.dtype.element_ty), d < D)
    tl.store(vbar + row * D + d, tl.sum(a[:, None] * vt, 0).to(vbar.dtype.element_ty), d < D)
    tl.store(mass + row, total)
    tl.store(entropy + row, tl.sum(a * (h - log_a), 0))


@triton.jit
def nodes_backward(
    kbar, vbar, mass, entropy, dkbar, dvbar, dmass, dentropy, first_child, first_node, num_nodes, num_key_heads,
    D: tl.constexpr, BD: tl.constexpr, RADIX: tl.constexpr,
):  # fmt: skip
    """Add to the gradients (fp32) of the RADIX children what their parent passes down; a child has one parent only."""
    node, kh, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    d_ok = d < D
    child = first_child + node * RADIX + tl.arange(0, RADIX)
    rows = (b * num_nodes + child) * num_key_heads + kh
    a, log_a, _ = _weights(tl.load(mass + rows))
    seen = (a > 0)[:, None] & d_ok[None, :]
    at = rows[:, None] * D + d[None, :]
    kt = tl.load(kbar + at, seen, 0.0).to(tl.float32)
    vt = tl.load(vbar + at, seen, 0.0).to(tl.float32)
    h = tl.load(entropy + rows, a > 0, 0.0)
    row = (b * num_nodes + first_node + node) * num_key_heads + kh
    dk = tl.load(dkbar + row * D + d, d_ok, 0.0)
    dv = tl.load(dvbar + row * D + d, d_ok, 0.0)
    dh = tl.load(dentropy + row)
    da = tl.sum(dk[None, :] * kt + dv[None, :] * vt, 1) + dh * (h - log_a)
    dz = a * (da - tl.sum(a * da, 0) + tl.load(dmass + row))
    ok = (rows >= 0)[:, None] & d_ok[None, :]
    tl.store(dkbar + at, tl.load(dkbar + at, ok, 0.0) + a[:, None] * dk[None, :], ok)
    tl.store(dvbar + at, tl.load(dvbar + at, ok, 0.0) + a[:, None] * dv[None, :], ok)
    tl.store(dentropy + rows, tl.load(dentropy + rows) + a * dh)
    tl.store(dmass + rows, tl.load(dmass + rows) + dz)


@triton.jit
def leaves_backward(
    k, v, prior, lengths, dkbar, dvbar, dmass, dentropy, dk_token, dv_token, dk, dv, dprior,
    skb, skn, skh, svb, svn, svh, num_tokens, num_leaves, num_nodes, num_key_heads, scale,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, PRIOR: tl.constexpr, LENGTHS: tl.constexpr,
    ADD_K: tl.constexpr, ADD_V: tl.constexpr,
):  # fmt: skip
    """dk, dv (B, N, K, D) of all tokens: what comes through their leaf, nothing behind the last whole one, and if ADD what
    dk_token, dv_token hold; dprior (B, leaves, K, D) fp32, summed by the caller."""
    leaf, kh, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    d_ok = d < D
    token = leaf.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    whole = leaf < num_leaves
    ok = d_ok[None, :] & (token < num_tokens)[:, None]
    seen = ok & whole
    if LENGTHS:
        seen = seen & (token < tl.load(lengths + b))[:, None]
    kt = tl.load(k + b * skb + token[:, None] * skn + kh * skh + d[None, :], seen, 0.0)
    vt = tl.load(v + b * svb + token[:, None] * svn + kh * svh + d[None, :], seen, 0.0)
    z, p = _leaf_mass(kt, prior, lengths, b, kh, token, d, scale, D, PRIOR, LENGTHS)
    a, log_a, _ = _weights(z)
    row = (b * num_nodes + leaf) * num_key_heads + kh
    dkb = tl.load(dkbar + row * D + d, d_ok & whole, 0.0)
    dvb = tl.load(dvbar + row * D + d, d_ok & whole, 0.0)
    grad = a[:, None] * dkb[None, :]
    if PRIOR:
        kt = kt.to(tl.float32)
        da = tl.sum(dkb[None, :] * kt + dvb[None, :] * vt.to(tl.float32), 1)
        da -= tl.load(dentropy + row, whole, 0.0) * log_a
        dz = scale * a * (da - tl.sum(a * da, 0) + tl.load(dmass + row, whole, 0.0))
        grad += dz[:, None] * p[None, :]
        at = (b * num_leaves + leaf) * num_key_heads + kh
        tl.store(dprior + at * D + d, tl.sum(dz[:, None] * kt, 0), d_ok & whole)
    at = ((b * num_tokens + token) * num_key_heads + kh)[:, None] * D + d[None, :]
    if ADD_K:
        grad += tl.load(dk_token + at, ok, 0.0).to(tl.float32)
    tl.store(dk + at, grad.to(dk.dtype.element_ty), ok)
    grad = a[:, None] * dvb[None, :]
    if ADD_V:
        grad += tl.load(dv_token + at, ok, 0.0).to(tl.float32)
    tl.store(dv + at, grad.to(dv.dtype.element_ty), ok)
