"""Gradients through what was opened: of the far queries per tile of tokens, of opened leaves and of opened nodes' children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longnet.attention import opened_work
from longnet.attention.far_work import (
    PLACE_STAGES,
    Geometry,
    Shape,
    far_tile,
    place_tile,
    reader_tile,
    strides,
)
from longnet.attention.opened_work import (
    COLUMNS,
    Chunk,
    Leaves,
    Routes,
    Stretch,
    Tables,
    chunks_of,
    families_of,
    stretches_of,
)
from longnet.kernels import leaves, opened_backward, readers


class Nodes(NamedTuple):
    """Gradients of the summaries: (B, nodes, K, D) twice and (B, nodes, K), fp32."""

    dkbar: Tensor
    dvbar: Tensor
    dentropy: Tensor


class Opened(NamedTuple):
    """The tensors that these kernels share. lse, delta (B, N, H): what a token's heads need lies side by side."""

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

    @property
    def summaries(self) -> tuple[Tensor, ...]:
        return self.kbar, self.vbar, self.entropy, self.level_bias, self.offsets

    @property
    def sizes(self) -> tuple[int, ...]:
        shape = self.shape
        return shape.tokens, self.kbar.shape[1], shape.heads, shape.key_heads, self.geometry.levels

    def children(self, routes: Routes, nodes: Nodes) -> None:
        """Add the gradients of nodes from the tokens that opened their parent."""
        families = families_of(self.geometry, self.q.device)[1]
        if families:
            for stretch in stretches_of(self.shape, families, self.q.element_size()):
                self._stretch(routes, nodes, stretch)

    def _stretch(self, routes: Routes, nodes: Nodes, stretch: Stretch) -> None:
        shape, geometry = self.shape, self.geometry
        before, families = families_of(geometry, self.q.device)
        words, work = opened_work.children(routes, shape, geometry, stretch)
        tile, width = reader_tile(shape, geometry, self.q.dtype, "children"), 2 * shape.width + 1
        partial = torch.empty(len(work.items), COLUMNS * width, device=self.q.device)
        opened_backward.children_dkv[(len(work.items),)](
            self.q, *self.summaries, before, words, work.order, work.items, self.dout, self.lse, self.delta, partial,
            *strides(self.q), *self.sizes, shape.pairs, families, words.shape[1], stretch.first, stretch.tokens, self.scale,
            BEAM=geometry.beam, COLUMNS=COLUMNS, WORDS=words.shape[2], **tile,
        )  # fmt: skip
        readers.add_children[(shape.pairs * families, COLUMNS // min(8, COLUMNS))](
            partial, work.ranges, before, self.offsets, *nodes, *self.sizes[1::2], geometry.levels, families, stretch.windows,
            D=tile["D"], BD=tile["BD"], COLUMNS=COLUMNS, ROWS=min(8, COLUMNS), num_warps=4,
        )  # fmt: skip

    def leaves(
        self,
        routes: Routes,
        kept: Sequence[Leaves],
        dq: Tensor,
        dk_sum: Tensor,
        dv_sum: Tensor,
        nodes: Nodes,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dk, dv, dbias, dmix. Adds to dq and nodes; dk_sum, dv_sum (B, N, K, D) fp32 hold the window's gradients, and are
        used up."""
        shape, levels = self.shape, self.geometry.levels
        parts = chunks_of(self.q, shape, self.geometry)
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (self.k, self.v))
        tiles = sum(chunk.tiles for chunk in parts)
        dparameters = torch.empty(
            shape.batch, shape.key_heads, tiles, levels + 1, shape.group, device=self.q.device
        )
        done = 0
        for i, (chunk, opened) in enumerate(zip(parts, kept, strict=True)):
            item_dkv, item_dnode = self._chunk(routes, opened, chunk, dq, dparameters, done)
            last = i == len(parts) - 1
            # Nobody opens what lies after a chunk: sums of earlier blocks only.
            blocks = triton.cdiv(shape.tokens if last else chunk.first + chunk.tokens, self.geometry.block)
            readers.add_leaves[(blocks, self.geometry.block // 16, shape.pairs)](
                item_dkv, item_dnode, opened.ranges, dk_sum, dv_sum, dk, dv, nodes.dkbar, nodes.dentropy,
                shape.tokens, self.geometry.sizes[0], self.kbar.shape[1], shape.key_heads,
                **self.leaf, BLOCK=self.geometry.block, ROWS=16, LAST=last, num_warps=4,
            )  # fmt: skip
            del item_dkv, item_dnode  # before the next chunk has its own
            done += chunk.tiles
        sums = dparameters.sum((0, 2)).transpose(1, 2).reshape(shape.heads, levels + 1)
        return dk, dv, sums[:, :levels], sums[:, levels]

    @property
    def leaf(self) -> dict:
        return {"D": self.shape.width, "BD": max(16, triton.next_power_of_2(self.shape.width))}

    def _chunk(
        self,
        routes: Routes,
        opened: Leaves,
        chunk: Chunk,
        dq: Tensor,
        dparameters: Tensor,
        done: int,
    ) -> tuple[Tensor, Tensor]:
        """The readers of one chunk of tokens: their dq and, per work item, what they add to leaves and to leaves' summaries."""
        shape, geometry, device = self.shape, self.geometry, self.q.device
        items, apart = len(opened.items), opened.logits[0].numel()
        lead = opened.logits.shape[1:4]
        part = torch.empty(*opened.logits.shape[1:], shape.width, dtype=self.q.dtype, device=device)
        slopes = torch.empty_like(opened.logits)
        item_dkv = torch.empty(items, 2 * geometry.block * shape.width, device=device)
        leaves.leaf_backward[(items,)](
            self.q, self.k, self.v, self.router_mix, opened.order, opened.items, opened.logits, self.dout, self.lse,
            self.delta, part, slopes, item_dkv, *strides(self.q), *strides(self.k), *strides(self.v),
            shape.tokens, geometry.sizes[0], shape.heads, shape.key_heads, chunk.first, chunk.tokens, apart,
            self.scale, BLOCK=geometry.block, TOP_K=geometry.top_k, **reader_tile(shape, geometry, self.q.dtype, "leaf backward"),
        )  # fmt: skip
        tables = Tables.of(routes, self.entropy, self.offsets, shape, geometry, chunk)
        rises = torch.empty(*lead, shape.width, dtype=self.q.dtype, device=device)
        rise_sums = torch.empty(lead, device=device)
        opened_backward.far_dq[tables.grid](
            self.q, self.kbar, self.vbar, self.level_bias, routes.opened, *tables.lists, part, slopes,
            self.dout, self.lse, self.delta, dq, dparameters, rises, rise_sums, *strides(self.q), *self.sizes, self.scale,
            chunk.first, tables.columns, done, dparameters.shape[2],
            STAGES=PLACE_STAGES, **place_tile(geometry, chunk.tile), **far_tile(shape, self.q.dtype, "dq"),
        )  # fmt: skip
        item_dnode = torch.empty(items, shape.width + 1, device=device)
        leaves.sum_places[(items,)](
            rises, rise_sums, opened.order, opened.items, item_dnode, **self.leaf, BR=64, num_warps=4
        )
        return item_dkv, item_dnode
