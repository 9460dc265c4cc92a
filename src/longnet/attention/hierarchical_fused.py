"""Hierarchical attention by Triton kernels: its autograd boundary and the launches of its forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.attention import opened_work
from longnet.attention.far_work import (
    PLACE_STAGES,
    Geometry,
    cover_tile,
    far_tile,
    leaf_tile,
    offsets_of,
    shape_of,
    strides,
)
from longnet.attention.fused import aligned, allocate_descriptors
from longnet.attention.hierarchical_gradients import backward
from longnet.attention.opened_work import Leaves, Routes, chunks, route
from longnet.attention.pyramid import Pyramid
from longnet.kernels import cover, leaves, opened_forward
from longnet.patterns import HierarchicalPattern


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_local: Tensor,
    k_local: Tensor,
    pyramid: Pyramid,
    pattern: HierarchicalPattern,
    scale: float,
    level_bias: Tensor,
    router_mix: Tensor,
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D), lse (B, H, N) of causal hierarchical attention, with gradients to all tensors."""
    geometry = Geometry.of(pattern, q.shape[1])
    inputs = (q, k, v, None if q_local is q else q_local, k_local)
    inputs = (None if x is None else aligned(x) for x in inputs)
    summaries = (pyramid.kbar.contiguous(), pyramid.vbar.contiguous(), pyramid.entropy.float().contiguous())
    parameters = (level_bias.float().contiguous(), router_mix.float().contiguous())
    return _Attend.apply(*inputs, *summaries, *parameters, geometry, scale)  # type: ignore[return-value]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, geometry, scale = arguments
        out, lse, routes = forward(*tensors, geometry, scale)
        ctx.save_for_backward(*tensors, out, lse, *(routes.flat() if routes else ()))
        ctx.geometry, ctx.scale = geometry, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):  # type: ignore[override]
        *tensors, out, lse = ctx.saved_tensors[:12]
        routes = Routes.of(ctx.saved_tensors[12:]) if len(ctx.saved_tensors) > 12 else None
        dout = torch.zeros_like(out) if dout is None else dout
        return *backward(dout, dlse, *tensors, out, lse, routes, ctx.geometry, ctx.scale), None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_local: Tensor | None,
    k_local: Tensor,
    kbar: Tensor,
    vbar: Tensor,
    entropy: Tensor,
    level_bias: Tensor,
    router_mix: Tensor,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Routes | None]:
    """out (B, N, H, D), lse (B, H, N) and what was opened.

    q, k: for far tokens and summaries; q_local (None: q), k_local: inside the window. kbar, vbar (B, nodes, K, D), entropy
    (B, nodes, K): the levels one after the other. level_bias (H, levels), router_mix (H,) fp32.
    """
    allocate_descriptors()
    shape = shape_of(q, k)
    q_local = q if q_local is None else q_local
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(shape.batch, shape.heads, shape.tokens, dtype=torch.float32, device=q.device)
    tile = cover_tile(shape, geometry, q.dtype, "forward")
    grid = (-(-shape.tokens // geometry.block), shape.heads // tile["HG"], shape.batch)
    offsets = offsets_of(geometry, q.device)
    opening = geometry.top_k > 0 and geometry.sizes[0] > 0
    sizes = (shape.tokens, kbar.shape[1], shape.heads, shape.key_heads, geometry.levels, scale)
    cover.cover_forward[grid](
        q_local, k_local, v, q, kbar, vbar, entropy, level_bias, offsets, out, lse,
        *strides(q_local), *strides(k_local), *strides(v), *strides(q), *sizes,
        BN=min(64, geometry.listed), RADIX=geometry.radix, GUARD=geometry.guard, LISTS=not opening, **tile,
    )  # fmt: skip
    if not opening:
        return out, lse, None
    routes = Routes.empty(shape, geometry, q.device)
    summaries = (kbar, vbar, entropy, level_bias, offsets)
    for chunk in chunks(shape, geometry, q.element_size(), opened_work.CHUNK_BYTES):
        tables, work = route(q, kbar, entropy, offsets, routes, shape, geometry, chunk, scale)
        lead = (shape.pairs, chunk.tokens, geometry.top_k, shape.group)
        part = torch.empty(*lead, shape.width, dtype=q.dtype, device=q.device)
        weight, logits = torch.empty(lead, device=q.device), torch.empty(lead, device=q.device)
        leaves.leaf_forward[(len(work.items),)](
            q, k, v, kbar, entropy, level_bias, router_mix, work.order, work.items, part, weight, logits,
            *strides(q), *strides(k), *strides(v), kbar.shape[1], geometry.sizes[0], shape.key_heads, geometry.levels,
            chunk.first, chunk.tokens, scale,
            BLOCK=geometry.block, TOP_K=geometry.top_k, **leaf_tile(shape, q.dtype, "forward"),
        )  # fmt: skip
        opened_forward.far_attend[tables.grid](
            q, *summaries, routes.opened, tables.united, tables.sizes, tables.kept, part, weight,
            out, lse, *strides(q), *sizes, chunk.first, tables.most, tables.columns,
            TOP_K=geometry.top_k, WIDTH=geometry.width, STAGES=PLACE_STAGES, **far_tile(shape, geometry, q.dtype, "attend"),
        )  # fmt: skip
        routes.leaves.append(Leaves(*work, logits))
    return out, lse, routes
