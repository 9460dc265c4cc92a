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
from longnet.attention.opened_gradients import Nodes, Opened
from longnet.attention.opened_work import Leaves, Routes
from longnet.attention.rotary import angle_gradients
from longnet.kernels import cover, cover_keys
from longnet.kernels.rotary import turned


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
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
    angles_wanted: bool = False,
    bias_wanted: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, cos, sin, kbar, vbar, entropy (fp32), level_bias, router_mix, in this order; None: not asked for.

    rotary (cos, sin): turns of queries and keys inside the window, which are made again; None: without.
    """
    shape = shape_of(q, k)
    dout = aligned(dout.contiguous())
    opening = routes is not None
    summaries = (kbar, vbar, entropy, level_bias)
    # Per query, from the lists; what was opened has its own sums.
    dbias = None
    if bias_wanted and not opening:
        dbias = torch.zeros(shape.batch, shape.tokens, shape.heads, geometry.levels, device=q.device)
    q_local, k_local = (q, k) if rotary is None else (turned(x, *rotary, x.dtype) for x in (q, k))
    dq = _like(q)
    # What the far queries get from the lists; what was opened is added to what the local ones got.
    dq_far = dq if rotary is None or opening else _like(q)
    delta = torch.empty_like(lse)
    tile = cover_tile(shape, geometry, q.dtype, "dq")
    cover.cover_dq[cover_grid(shape, geometry, tile)](
        q_local, *(rows_of(x, tile["BK"], tile["BD"]) for x in (k_local, v)), q, *summaries, dout, out,
        lse, lse if dlse is None else dlse.contiguous(), delta, dq, dq_far, delta if dbias is None else dbias,
        *strides(q_local), *strides(q), shape.tokens, kbar.shape[1], shape.heads, shape.key_heads, scale,
        LISTS=not opening, JOINT=rotary is None, BIAS=dbias is not None, DLSE=dlse is not None,
        COLUMNS=max(16, triton.next_power_of_2(geometry.levels)), **tile,
    )  # fmt: skip
    queries = (dout, lse, delta)
    # What opened leaves add comes in fp32.
    dk, dv = _window(q_local, k_local, v, *queries, geometry, scale, torch.float32 if opening else v.dtype)
    del q_local, k_local  # a query of every token, which what was opened does not read
    dcos = dsin = None
    if rotary is not None:
        if angles_wanted:
            dcos, dsin = angle_gradients(((q, dq), (k, dk)), rotary)
        dq = turned(dq, *rotary, q.dtype, back=True, onto=None if opening else dq_far)
        dk = turned(dk, *rotary, dk.dtype, back=True)
    del dq_far
    nodes = _listed(q, *summaries, *queries, routes, shape, geometry, scale)
    if routes is None:
        dbias = None if dbias is None else dbias.sum((0, 1))
        dmix = torch.zeros_like(router_mix)
    else:
        rows = (x.transpose(1, 2).contiguous() for x in (lse, delta))
        offsets = offsets_of(geometry, q.device)
        given = Opened(shape, geometry, scale, q, k, v, *summaries, router_mix, offsets, dout, *rows)
        given.children(routes, nodes)
        dk, dv, dbias, dmix = given.leaves(routes, kept, dq, dk, dv, nodes)
    return dq, dk, dv, dcos, dsin, *nodes, dbias, dmix


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
    """Gradients of the window's keys and values, in `dtype`."""
    shape = shape_of(q, k)
    dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (k, v))
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
