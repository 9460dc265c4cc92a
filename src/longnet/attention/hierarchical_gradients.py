"""Gradients of hierarchical attention: of queries per tile of tokens, of keys, values and summaries per node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longnet.attention.far_work import (
    COLUMNS,
    PLACE_STAGES,
    READERS,
    Geometry,
    Leaves,
    Routes,
    Shape,
    Tables,
    chunks,
    cover_grid,
    cover_tile,
    epoch_tile,
    epochs_of,
    far_tile,
    leaf_tile,
    node_tile,
    offsets_of,
    query_rows,
    rows_of,
    shape_of,
    sorted_items,
    strides,
)
from longnet.attention.fused import aligned
from longnet.kernels import cover, cover_keys, leaves, opened_backward


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
    delta = torch.empty_like(lse)
    offsets = offsets_of(geometry, q.device)
    counts = (shape.tokens, kbar.shape[1], shape.heads, shape.key_heads)
    opening, joint = routes is not None, q_local is None
    q_local = q if q_local is None else q_local
    dq_local = _like(q)
    # Queries without a far context are left out by the kernels of what was opened.
    dq = dq_local if joint else torch.zeros_like(dq_local) if opening else _like(q)
    biased = opening or bias_wanted
    dbias = (
        torch.zeros(shape.batch, shape.tokens, shape.heads, geometry.levels, device=q.device)
        if biased
        else None
    )
    tile = cover_tile(shape, geometry, q.dtype, "dq")
    cover.cover_dq[cover_grid(shape, geometry, tile)](
        q_local, *(rows_of(x, tile["BK"], tile["BD"]) for x in (k_local, v)), q, kbar, vbar, entropy, level_bias, dout, out,
        lse, lse if dlse is None else dlse.contiguous(), delta, dq_local, dq, delta if dbias is None else dbias,
        *strides(q_local), *strides(q), *counts, scale,
        LISTS=not opening, JOINT=joint, BIAS=biased, DLSE=dlse is not None,
        COLUMNS=max(16, triton.next_power_of_2(geometry.levels)), **tile,
    )  # fmt: skip
    # What opened leaves add comes in fp32.
    dk_local, dv = (
        _like(k),
        torch.empty(v.shape, dtype=torch.float32 if opening else v.dtype, device=v.device),
    )
    tile = cover_tile(shape, geometry, q.dtype, "dkv")
    blocks = -(-shape.tokens // geometry.block)
    cover_keys.window_dkv[(blocks * shape.key_heads, shape.batch)](
        k_local, v, *query_rows(q_local, dout, lse, delta, tile), dk_local, dv,
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
    dk = None
    nodes = far.listed(routes)
    dmix = torch.zeros(shape.batch, shape.tokens if opening else 1, shape.heads, device=q.device)
    if routes is not None:
        for level in range(geometry.levels - 1):
            far.children(routes, level, nodes)
        dk = far.opened(routes, kept, dq, joint, dbias, dmix, dv, nodes)
    return (
        dq, dk, dv, None if joint else dq_local, dk_local, *nodes,
        None if dbias is None else dbias.sum((0, 1)), dmix.sum((0, 1)),
    )  # fmt: skip


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Nodes(NamedTuple):
    """Gradients of the summaries: (B, nodes, K, D) twice and (B, nodes, K), fp32."""

    dkbar: Tensor
    dvbar: Tensor
    dentropy: Tensor


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

    def listed(self, routes: Routes | None) -> Nodes:
        """Gradients of all nodes from the queries that list them."""
        shape, geometry, device = self.shape, self.geometry, self.q.device
        nodes, width = self.kbar.shape[1], 2 * shape.width + 1
        lead = (shape.batch, nodes, shape.key_heads)
        result = Nodes(*torch.empty(2, *lead, shape.width, device=device), torch.empty(lead, device=device))
        if not nodes:
            return result
        tile = epoch_tile(shape, geometry, self.q.dtype)
        epochs, parts = epochs_of(geometry, shape.tokens, device), geometry.radix // tile["BLOCKS"]
        partial = torch.empty(shape.pairs, epochs.count * parts, epochs.columns, width, device=device)
        if epochs.count:
            cover_keys.listed_dkv[
                (epochs.count * parts, triton.cdiv(epochs.columns, tile["NODES"]), shape.pairs)
            ](
                self.kbar, self.vbar, self.entropy, self.level_bias, self.delta if routes is None else routes.base_bits,
                *query_rows(self.q, self.dout, self.lse, self.delta, tile), partial,
                *strides(self.q), shape.tokens, nodes, shape.heads, shape.key_heads, epochs.columns, self.scale,
                MASKED=routes is not None, **tile,
            )  # fmt: skip
        cover_keys.sum_listed[(nodes, shape.pairs, triton.cdiv(width, 64))](
            partial, epochs.readers, epochs.places, *result, epochs.count * parts, parts, epochs.columns, nodes,
            shape.key_heads, geometry.levels, D=shape.width, BT=16, BW=64, num_warps=4,
        )  # fmt: skip
        return result

    def children(self, routes: Routes, level: int, result: Nodes) -> None:
        """Add the gradients of the nodes at `level` from the tokens that opened their parent."""
        geometry = self.geometry
        families = -(-geometry.sizes[level] // COLUMNS)
        if not families:
            return
        shape, device = self.shape, self.q.device
        lead = (shape.batch, shape.key_heads, shape.tokens, geometry.beam)
        family = torch.empty(lead, dtype=torch.int32, device=device)
        words = torch.empty(lead, dtype=torch.int64, device=device)
        entries = words.numel()
        opened_backward.gather_children[(triton.cdiv(entries, 256),)](
            routes.opened, routes.child_bits, family, words, entries, geometry.levels, level,
            COLUMNS=COLUMNS, RADIX=geometry.radix, BEAM=geometry.beam, WIDTH=geometry.width, BM=256, num_warps=4,
        )  # fmt: skip
        # An item leaves 64 KiB behind, so their number is bounded.
        order, items, first_item = sorted_items(family, families, max(READERS, entries // 4096))
        pair = torch.where(items[:, 0] >= 0, items[:, 0] // families, -1)
        items = torch.stack((pair, items[:, 0] % families, items[:, 1], items[:, 2]), 1)
        self._add_nodes(result, level, items, first_item, words, order)

    def _add_nodes(
        self,
        result: Nodes,
        level: int,
        items: Tensor,
        first_item: Tensor,
        words: Tensor,
        order: Tensor,
    ) -> None:
        """Sum over the entries in `order`."""
        shape, geometry = self.shape, self.geometry
        width = COLUMNS * (2 * shape.width + 1)
        partial = torch.empty(len(items), width, device=self.q.device)
        opened_backward.node_dkv[(len(items),)](
            self.q, self.kbar, self.vbar, self.entropy, self.level_bias, self.offsets, words, order, items,
            self.dout, self.lse, self.delta, partial, *strides(self.q),
            shape.tokens, self.kbar.shape[1], shape.heads, shape.key_heads, geometry.levels, level, self.scale,
            **node_tile(shape, geometry, self.q),
        )  # fmt: skip
        total = torch.empty(len(first_item) - 1, width, device=self.q.device)
        _sum(partial, first_item, total)
        total = total.view(shape.batch, shape.key_heads, -1, 2 * shape.width + 1)
        begin, size = geometry.offsets[level], geometry.sizes[level]
        parts = total[:, :, :size].transpose(1, 2).split((shape.width, shape.width, 1), dim=-1)
        for x, part in zip((result.dkbar, result.dvbar, result.dentropy[..., None]), parts, strict=True):
            x[:, begin : begin + size] += part

    def opened(
        self,
        routes: Routes,
        kept: Sequence[Leaves],
        dq: Tensor,
        add: bool,
        dbias: Tensor,
        dmix: Tensor,
        dv: Tensor,
        dnodes: Nodes,
    ) -> Tensor:
        """Through opened leaves: returns dk, adds to dv and to the nodes. And the gradients of the far queries: into dbias,
        dmix and dq, there `add`ed to what it holds."""
        shape, geometry = self.shape, self.geometry
        leaves, block, width = geometry.sizes[0], geometry.block, shape.width
        dkv = torch.zeros(shape.pairs * leaves, 2 * block * width, device=self.q.device)
        dnode = torch.zeros(shape.pairs * leaves, width + 1, device=self.q.device)
        parts = chunks(shape, geometry, self.q.element_size())
        for chunk, opened in zip(parts, kept, strict=True):
            self._chunk(routes, chunk, opened, dq, add, dbias, dmix, dkv, dnode)
        dkv = dkv.view(shape.batch, shape.key_heads, leaves, 2, block, width)
        covered = leaves * block
        dk = torch.zeros(
            shape.batch, shape.tokens, shape.key_heads, width, dtype=self.k.dtype, device=self.q.device
        )
        dk[:, :covered] = dkv[:, :, :, 0].flatten(2, 3).transpose(1, 2).to(dk.dtype)
        dv[:, :covered] += dkv[:, :, :, 1].flatten(2, 3).transpose(1, 2)
        dnode = dnode.view(shape.batch, shape.key_heads, leaves, width + 1).transpose(1, 2)
        dnodes.dkbar[:, :leaves] += dnode[..., :width]
        dnodes.dentropy[:, :leaves] += dnode[..., -1]
        return dk

    def _chunk(self, routes, chunk, opened, dq, add, dbias, dmix, dkv, dnode) -> None:
        """The readers of one chunk of tokens: their dq, and what they add to every leaf."""
        shape, geometry, device = self.shape, self.geometry, self.q.device
        order, items, first_item, logits = opened
        lead = (shape.pairs, chunk.tokens, geometry.top_k, shape.group)
        part = torch.empty(*lead, shape.width, dtype=self.q.dtype, device=device)
        part_dscore, part_dmix = torch.empty(2, *lead, device=device)
        item_dkv = torch.empty(len(items), dkv.shape[1], device=device)
        item_dnode = torch.empty(len(items), dnode.shape[1], device=device)
        leaves.leaf_backward[(len(items),)](
            self.q, self.k, self.v, self.kbar, self.router_mix, order, items, *logits, self.dout, self.lse, self.delta,
            part, part_dscore, part_dmix, item_dkv, item_dnode,
            *strides(self.q), *strides(self.k), *strides(self.v), shape.tokens, self.kbar.shape[1], geometry.sizes[0],
            shape.heads, shape.key_heads, chunk.first, chunk.tokens, self.scale,
            BLOCK=geometry.block, TOP_K=geometry.top_k, **leaf_tile(shape, self.q.dtype, "backward"),
        )  # fmt: skip
        _sum(item_dkv, first_item, dkv, add=True)
        _sum(item_dnode, first_item, dnode, add=True)
        tables = Tables.of(routes, shape, geometry, chunk)
        opened_backward.far_dq[tables.grid](
            self.q, self.kbar, self.vbar, self.entropy, self.level_bias, self.offsets, routes.opened,
            tables.united, tables.sizes, tables.kept, part, part_dscore, part_dmix, self.dout, self.lse, self.delta,
            dq, dbias, dmix, *strides(self.q), shape.tokens, self.kbar.shape[1], shape.heads, shape.key_heads,
            geometry.levels, self.scale, chunk.first, tables.most, tables.columns,
            TOP_K=geometry.top_k, WIDTH=geometry.width, STAGES=PLACE_STAGES, ADD=add,
            **far_tile(shape, geometry, self.q.dtype, "dq"),
        )  # fmt: skip


def _sum(partial: Tensor, first_item: Tensor, total: Tensor, add: bool = False) -> None:
    width = total.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    opened_backward.sum_items[(len(total), triton.cdiv(width, block))](
        partial, first_item, total, width, BW=block, ADD=add
    )
