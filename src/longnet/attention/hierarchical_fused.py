"""Hierarchical attention by Triton kernels: its autograd boundary and the launches of its forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.attention.far_work import (
    PLACE_STAGES,
    Geometry,
    cover_grid,
    cover_tile,
    far_tile,
    offsets_of,
    place_tile,
    reader_tile,
    rows_of,
    shape_of,
    strides,
)
from longnet.attention.fused import aligned
from longnet.attention.hierarchical_gradients import backward
from longnet.attention.opened_work import Leaves, Routes, chunks_of, readers_of_leaves, route
from longnet.attention.pyramid_fused import Tree, pool, pool_backward
from longnet.kernels import cover, leaves, opened_forward
from longnet.kernels.rotary import turned
from longnet.patterns import HierarchicalPattern


# The compiler would trace the launches, whose descriptors the host makes; a compiled model runs this as it is.
@torch.compiler.disable(reason="it launches kernels of its own")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    prior_query: Tensor | None,
    lengths: Tensor | None,
    pattern: HierarchicalPattern,
    scale: float,
    level_bias: Tensor,
    router_mix: Tensor,
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D), lse (B, H, N) of causal hierarchical attention, with gradients to all floating tensors.

    rotary (cos, sin): turns of queries and keys inside the window; turned again in the backward pass instead of kept.
    """
    geometry = Geometry.of(pattern, q.shape[1])
    inputs = (*(aligned(x) for x in (q, k, v)), *(rotary or (None, None)))
    prior = None if prior_query is None else prior_query.contiguous()
    lengths = None if lengths is None else lengths.to(q.device, torch.int64)
    parameters = (level_bias.float().contiguous(), router_mix.float().contiguous())
    with torch.cuda.device_of(q):
        return _Attend.apply(*inputs, prior, lengths, *parameters, geometry, scale)  # type: ignore[return-value]


@torch.compiler.disable(reason="it launches kernels of its own")
@torch.no_grad()
def attend_next(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_local: Tensor,
    k_local: Tensor,
    levels: Sequence[Sequence[Tensor]],
    pattern: HierarchicalPattern,
    scale: float,
    level_bias: Tensor,
    router_mix: Tensor,
) -> Tensor:
    """out (B, n, H, D) of the last n tokens of a text; without gradients.

    q, q_local (B, n, H, D); k, k_local, v (B, N, K, D) and `levels` (kbar, vbar (B, nodes, K, D), mass, entropy (B, nodes, K)) of
    the whole text. Kernels begin with a block: zeros stand for its queries before.
    """
    geometry = Geometry.of(pattern, k.shape[1])
    kbar, vbar, entropy = (torch.cat([level[i] for level in levels], 1) for i in (0, 1, 3))
    bias, mix = level_bias[:, : geometry.levels].float().contiguous(), router_mix.float().contiguous()
    start = k.shape[1] - q.shape[1]
    zeros = start % pattern.block
    q, q_local = (F.pad(x, (0, 0, 0, 0, zeros, 0)) if zeros else x for x in (q, q_local))
    q, k, v, q_local, k_local = (aligned(x) for x in (q, k, v, q_local, k_local))
    summaries, place = (kbar, vbar, entropy, bias), (geometry, scale, start - zeros)
    with torch.cuda.device_of(q):
        out, lse = cover_pass(q, v, q_local, k_local, *summaries, *place)
        opened_pass(q, k, v, *summaries, mix, *place, out, lse)
    return out[:, zeros:]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, prior, lengths, level_bias, router_mix, geometry, scale):
        nodes = pool(k, v, prior, lengths, Tree(scale, geometry.block, geometry.radix, geometry.sizes))
        kbar, vbar, _, entropy = nodes
        summaries, place = (kbar, vbar, entropy, level_bias), (geometry, scale, 0)
        q_local, k_local = (None, k) if cos is None else (turned(x, cos, sin, x.dtype) for x in (q, k))
        out, lse = cover_pass(q, v, q_local, k_local, *summaries, *place)
        del q_local, k_local  # a query of every token, which what is opened does not read
        keep = any(ctx.needs_input_grad)
        routes, kept = opened_pass(q, k, v, *summaries, router_mix, *place, out, lse, keep)
        inputs = (q, k, v, cos, sin, prior, lengths, level_bias, router_mix)
        chunks = (x for chunk in kept for x in chunk)
        ctx.save_for_backward(*inputs, *nodes, out, lse, *(routes or ()), *chunks)
        ctx.geometry, ctx.scale = geometry, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):  # type: ignore[override]
        inputs, nodes, results, opened, kept = (ctx.saved_tensors[part] for part in _SAVED)
        q, k, v, cos, sin, prior, lengths, level_bias, router_mix = inputs
        geometry, scale = ctx.geometry, ctx.scale
        routes = Routes(*opened) if opened else None
        kept = [Leaves(*kept[i : i + 4]) for i in range(0, len(kept), 4)]
        dout = torch.zeros_like(results[0]) if dout is None else dout
        rotary = None if cos is None else (cos, sin)
        kbar, vbar, mass, entropy = nodes
        grads = backward(
            dout, dlse, q, k, v, rotary, kbar, vbar, entropy, level_bias, router_mix, *results, routes, kept,
            geometry, scale, angles_wanted=any(ctx.needs_input_grad[3:5]), bias_wanted=ctx.needs_input_grad[7],
        )  # fmt: skip
        dq, dk, dv, dcos, dsin, dkbar, dvbar, dentropy, dbias, dmix = grads
        tree = Tree(scale, geometry.block, geometry.radix, geometry.sizes)
        below = (dkbar, dvbar, torch.zeros_like(mass), dentropy)
        dk, dv, dprior = pool_backward(k, v, prior, lengths, tree, nodes, below, dk, dv)
        return dq, dk, dv, dcos, dsin, dprior, None, dbias, dmix, None, None


# What the forward pass saves: its nine tensors; the nodes; out and lse; what was opened; `Leaves` of every chunk.
_SAVED = (slice(9), slice(9, 13), slice(13, 15), slice(15, 18), slice(18, None))


def cover_pass(
    q: Tensor,
    v: Tensor,
    q_local: Tensor | None,
    k_local: Tensor,
    kbar: Tensor,
    vbar: Tensor,
    entropy: Tensor,
    level_bias: Tensor,
    geometry: Geometry,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor]:
    """out (B, n, H, D), lse (B, H, n) of the window's tokens and, where nothing is opened, of the summaries.

    q: for summaries; q_local (None: q), k_local: inside the window. kbar, vbar (B, nodes, K, D), entropy (B, nodes, K): the
    levels one after the other. level_bias (H, levels) fp32. The n queries are the last of the text whose keys
    these are, from position `start` on, where a block begins.
    """
    shape = shape_of(q, k_local)
    joint = q_local is None
    q_local = q if q_local is None else q_local
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(shape.batch, shape.heads, shape.tokens, dtype=torch.float32, device=q.device)
    tile = cover_tile(shape, geometry, q.dtype, "forward")
    cover.cover_forward[cover_grid(shape, geometry, tile, start)](
        q_local, *(rows_of(x, tile["BK"], tile["BD"]) for x in (k_local, v)), q, kbar, vbar, entropy, level_bias, out, lse,
        *strides(q_local), *strides(q), start + shape.tokens, kbar.shape[1], shape.heads, shape.key_heads, start, scale,
        LISTS=not geometry.opens(start + shape.tokens), JOINT=joint, **tile,
    )  # fmt: skip
    return out, lse


def opened_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kbar: Tensor,
    vbar: Tensor,
    entropy: Tensor,
    level_bias: Tensor,
    router_mix: Tensor,
    geometry: Geometry,
    scale: float,
    start: int,
    out: Tensor,
    lse: Tensor,
    keep: bool = False,
) -> tuple[Routes | None, list[Leaves]]:
    """Add what is opened, and the summaries that stay, to out and lse of `cover_pass`, whose arguments these are.

    router_mix (H,) fp32. Returns what was opened, and if `keep` what the backward pass wants of every chunk.
    """
    shape = shape_of(q, k)
    if not geometry.opens(start + shape.tokens):
        return None, []
    offsets = offsets_of(geometry, q.device)
    counts, summaries = (kbar.shape[1], shape.heads, shape.key_heads), (kbar, vbar, entropy, level_bias)
    routes, kept = Routes.empty(shape, geometry, q.device, start), []
    chunks = chunks_of(q, shape, geometry, start)
    lead = (shape.pairs, max(chunk.tokens for chunk in chunks), geometry.top_k, shape.group)
    # The results of opened leaves, of one chunk after the other; as large as q in long texts.
    buffer = torch.empty(math.prod(lead) * shape.width, dtype=q.dtype, device=q.device)
    for chunk in chunks:
        tables, keys = route(q, kbar, entropy, offsets, routes, shape, geometry, chunk, scale)
        readers = readers_of_leaves(keys, shape, geometry, keep)
        logits = torch.empty(2, shape.pairs, chunk.tokens, *lead[2:], device=q.device)
        if keep:
            kept.append(Leaves(*readers, logits))
        leaves.leaf_forward[(len(readers.items),)](
            q, k, v, readers.order, readers.items, buffer, logits,
            *strides(q), *strides(k), *strides(v), geometry.sizes[0], shape.key_heads, chunk.first, chunk.tokens, scale,
            BLOCK=geometry.block, TOP_K=geometry.top_k, **reader_tile(shape, geometry, q.dtype, "leaf forward"),
        )  # fmt: skip
        opened_forward.far_attend[tables.grid](
            q, *summaries, router_mix, routes.opened, *tables.lists, buffer, logits, out, lse,
            *strides(q), shape.tokens, *counts, geometry.levels, scale, chunk.first, tables.columns,
            STAGES=PLACE_STAGES, **place_tile(geometry, chunk.tile), **far_tile(shape, q.dtype, "attend"),
        )  # fmt: skip
    return routes, kept
