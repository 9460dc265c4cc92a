"""Gradients of hierarchical attention: of queries per tile of tokens, of keys, values and summaries per node."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longnet.attention.far_work import (
    COLUMNS,
    Geometry,
    Shape,
    cover_tile,
    listed_items,
    node_tile,
    offsets_of,
    shape_of,
    strides,
)
from longnet.attention.fused import aligned, allocate_descriptors
from longnet.attention.opened_gradients import Opened, opened_gradients
from longnet.attention.opened_work import Routes
from longnet.kernels import cover, opened_backward


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
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, q_local, k_local, kbar, vbar, entropy, level_bias, router_mix, in this order.

    q_local None: q was read inside the window too; None is its gradient, and that of k where no token reached beyond summaries.
    """
    allocate_descriptors()
    shape = shape_of(q, k)
    dout = aligned(dout.contiguous())
    delta = cover.row_dot(dout, out, dlse)
    offsets = offsets_of(geometry, q.device)
    sizes = (shape.tokens, kbar.shape[1], shape.heads, shape.key_heads, geometry.levels, scale)
    opening, joint = routes is not None, q_local is None
    q_local = q if q_local is None else q_local
    dq_local = _like(q)
    dq = dq_local if joint else _like(q)
    # Per query, from the lists; what was opened has its own sums.
    per_query = (shape.batch, shape.tokens, shape.heads, geometry.levels)
    dbias = offsets if opening else torch.empty(per_query, device=q.device)
    tile = cover_tile(shape, geometry, q.dtype, "dq")
    blocks = -(-shape.tokens // geometry.block)
    cover.cover_dq[(blocks, shape.heads // tile["HG"], shape.batch)](
        q_local, k_local, v, q, kbar, vbar, entropy, level_bias, offsets, dout, lse, delta, dq_local, dq, dbias,
        *strides(q_local), *strides(k_local), *strides(v), *strides(q), *sizes,
        BN=min(64, geometry.listed), RADIX=geometry.radix, GUARD=geometry.guard, LISTS=not opening,
        JOINT=joint and not opening, **tile,
    )  # fmt: skip
    dk_local, dv = _like(k), torch.empty_like(v, dtype=torch.float32, memory_format=torch.contiguous_format)
    tile = cover_tile(shape, geometry, q.dtype, "dkv")
    cover.window_dkv[(blocks, shape.key_heads, shape.batch)](
        q_local, k_local, v, dout, lse, delta, dk_local, dv,
        *strides(q_local), *strides(k_local), *strides(v), shape.tokens, shape.heads, shape.key_heads, scale, **tile,
    )  # fmt: skip
    far = _Far(
        shape,
        geometry,
        scale,
        q,
        k,
        v,
        kbar,
        vbar,
        entropy,
        level_bias,
        router_mix,
        offsets,
        dout,
        lse,
        delta,
    )
    dnodes = far.listed(routes)
    if routes is None:
        dk, dv, dbias, dmix = None, dv.to(v.dtype), dbias.sum((0, 1)), torch.zeros_like(router_mix)
    else:
        rows = (x.transpose(1, 2).contiguous() for x in (lse, delta))
        given = Opened(
            shape, geometry, scale, q, k, v, kbar, vbar, entropy, level_bias, router_mix, offsets, dout, *rows
        )
        dk, dv, dbias, dmix = opened_gradients(given, routes, dq, joint, dv, dnodes)
    dkbar, dvbar, dentropy = dnodes.split((shape.width, shape.width, 1), dim=-1)
    return (
        dq, dk, dv, None if joint else dq_local, dk_local,
        dkbar.to(kbar.dtype), dvbar.to(vbar.dtype), dentropy[..., 0], dbias, dmix,
    )  # fmt: skip


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Far(NamedTuple):
    """The tensors that the node-major gradient kernels share."""

    shape: Shape
    geometry: Geometry
    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    kbar: Tensor
    vbar: Tensor
    entropy: Tensor
    level_bias: Tensor
    router_mix: Tensor
    offsets: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor

    def listed(self, routes: Routes | None) -> Tensor:
        """Gradients of all nodes from the queries that list them: (B, nodes, K, 2 D + 1) fp32."""
        shape, geometry = self.shape, self.geometry
        result = torch.zeros(
            shape.batch, self.kbar.shape[1], shape.key_heads, 2 * shape.width + 1, device=self.q.device
        )
        for level in range(geometry.levels):
            items, first_item, bounds = listed_items(geometry, shape, level, self.q.device)
            if len(items):
                lists = (bounds, None if routes is None else routes.base_bits)
                self._add_nodes(result, level, items, first_item, lists=lists)
        return result

    def _add_nodes(
        self,
        result: Tensor,
        level: int,
        items: Tensor,
        first_item: Tensor,
        lists: tuple[Tensor, Tensor | None] | None = None,
        readers: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Sum over the tokens that list nodes, without those they opened, or over the entries in `readers`."""
        shape, geometry = self.shape, self.geometry
        width = COLUMNS * (2 * shape.width + 1)
        partial = torch.empty(len(items), width, device=self.q.device)
        nothing = self.offsets
        bounds, base_bits = lists or (nothing, None)
        opened_backward.node_dkv[(len(items),)](
            self.q, self.kbar, self.vbar, self.entropy, self.level_bias, self.offsets,
            bounds, nothing if base_bits is None else base_bits, *(readers or (nothing, nothing)), items,
            self.dout, self.lse, self.delta, partial, *strides(self.q),
            shape.tokens, self.kbar.shape[1], shape.heads, shape.key_heads, geometry.levels, level, self.scale,
            LISTED=readers is None, MASKED=base_bits is not None, **node_tile(shape, geometry, self.q),
        )  # fmt: skip
        total = torch.empty(len(first_item) - 1, width, device=self.q.device)
        _sum(partial, first_item, total)
        total = total.view(shape.batch, shape.key_heads, -1, 2 * shape.width + 1)
        begin, size = geometry.offsets[level], geometry.sizes[level]
        result[:, begin : begin + size] += total[:, :, :size].transpose(1, 2)


def _sum(partial: Tensor, first_item: Tensor, total: Tensor, add: bool = False) -> None:
    width = total.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    opened_backward.sum_items[(len(total), triton.cdiv(width, block))](
        partial, first_item, total, width, BW=block, ADD=add
    )
