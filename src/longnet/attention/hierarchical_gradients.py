"""Gradients of hierarchical attention: of queries per tile of tokens, of keys, values and summaries per node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from longnet.attention.far_work import (
    Geometry,
    Shape,
    cover_grid,
    cover_tile,
    epoch_tile,
    epochs_of,
    offsets_of,
    query_rows,
    rows_of,
    shape_of,
    strides,
)
from longnet.attention.fused import aligned
from longnet.attention.opened_gradients import Nodes, Opened, opened_gradients
from longnet.attention.opened_work import Leaves, Routes
from longnet.kernels import cover, cover_keys


def backward(
    dout: Tensor,
    dlse: Tensor | None,
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
    out: Tensor,
    lse: Tensor,
    routes: Routes | None,
    kept: Sequence[Leaves],
    geometry: Geometry,
    scale: float,
    bias_wanted: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, q_local, k_local, kbar, vbar, entropy (fp32), level_bias, router_mix, in this order.

    q_local None: q was read inside the window too; None is its gradient, and that of k where no token reached beyond summaries.
    """
    shape = shape_of(q, k)
    dout = aligned(dout.contiguous())
    opening, joint = routes is not None, q_local is None
    q_local = q if q_local is None else q_local
    summaries = (kbar, vbar, entropy, level_bias)
    dq_local = _like(q)
    dq = dq_local if joint else _like(q)
    # Per query, from the lists; what was opened has its own sums.
    dbias = None
    if bias_wanted and not opening:
        dbias = torch.zeros(shape.batch, shape.tokens, shape.heads, geometry.levels, device=q.device)
    delta = torch.empty_like(lse)
    tile = cover_tile(shape, geometry, q.dtype, "dq")
    cover.cover_dq[cover_grid(shape, geometry, tile)](
        q_local, *(rows_of(x, tile["BK"], tile["BD"]) for x in (k_local, v)), q, *summaries, dout, out,
        lse, lse if dlse is None else dlse.contiguous(), delta, dq_local, dq, delta if dbias is None else dbias,
        *strides(q_local), *strides(q), shape.tokens, kbar.shape[1], shape.heads, shape.key_heads, scale,
        LISTS=not opening, JOINT=joint, BIAS=dbias is not None, DLSE=dlse is not None,
        COLUMNS=max(16, triton.next_power_of_2(geometry.levels)), **tile,
    )  # fmt: skip
    queries = (dout, lse, delta)
    # What opened leaves add comes in fp32.
    dk_local, dv = _window(
        q_local, k_local, v, *queries, geometry, scale, torch.float32 if opening else v.dtype
    )
    nodes = _listed(q, *summaries, *queries, routes, shape, geometry, scale)
    if routes is None:
        dk, dbias = None, None if dbias is None else dbias.sum((0, 1))
        dmix = torch.zeros_like(router_mix)
    else:
        rows = (x.transpose(1, 2).contiguous() for x in (lse, delta))
        offsets = offsets_of(geometry, q.device)
        given = Opened(shape, geometry, scale, q, k, v, *summaries, router_mix, offsets, dout, *rows)
        dk, dv, dbias, dmix = opened_gradients(given, routes, kept, dq, joint, dv, nodes)
    return dq, dk, dv, None if joint else dq_local, dk_local, *nodes, dbias, dmix


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    geometry: Geometry,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of the window's keys and, in `dtype`, of the values."""
    shape = shape_of(q, k)
    dk, dv = _like(k), torch.empty(v.shape, dtype=dtype, device=v.device)
    tile = cover_tile(shape, geometry, q.dtype, "dkv")
    blocks = -(-shape.tokens // geometry.block)
    cover_keys.window_dkv[(blocks * shape.key_heads, shape.batch)](
        k, v, *query_rows(q, dout, lse, delta, tile), dk, dv,
        *strides(q), *strides(k), *strides(v), shape.tokens, shape.heads, shape.key_heads, scale, **tile,
    )  # fmt: skip
    return dk, dv


def _listed(
    q: Tensor,
    kbar: Tensor,
    vbar: Tensor,
    entropy: Tensor,
    level_bias: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    routes: Routes | None,
    shape: Shape,
    geometry: Geometry,
    scale: float,
) -> Nodes:
    """Gradients of all nodes from the queries that list them."""
    device, nodes, width = q.device, kbar.shape[1], 2 * shape.width + 1
    lead = (shape.batch, nodes, shape.key_heads)
    result = Nodes(*torch.empty(2, *lead, shape.width, device=device), torch.empty(lead, device=device))
    if not nodes:
        return result
    tile = epoch_tile(shape, geometry, q.dtype)
    epochs, parts = epochs_of(geometry, shape.tokens, device), geometry.radix // tile["BLOCKS"]
    partial = torch.empty(shape.pairs, epochs.count * parts, epochs.columns, width, device=device)
    if epochs.count:
        grid = (epochs.count * parts, triton.cdiv(epochs.columns, tile["NODES"]), shape.pairs)
        cover_keys.listed_dkv[grid](
            kbar, vbar, entropy, level_bias, delta if routes is None else routes.base_bits,
            *query_rows(q, dout, lse, delta, tile), partial,
            *strides(q), shape.tokens, nodes, shape.heads, shape.key_heads, epochs.columns, scale,
            MASKED=routes is not None, **tile,
        )  # fmt: skip
    cover_keys.sum_listed[(nodes, shape.pairs, triton.cdiv(width, 64))](
        partial, epochs.readers, epochs.places, *result, epochs.count * parts, parts, epochs.columns, nodes,
        shape.key_heads, geometry.levels, D=shape.width, BT=16, BW=64, num_warps=4,
    )  # fmt: skip
    return result
