"""Hierarchical attention by Triton kernels: launches, work lists and the sums that close the gradients."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from longnet.attention.pyramid import Pyramid
from longnet.kernels import cover, opened_backward, opened_forward
from longnet.patterns import HierarchicalPattern

# Readers of one work item of a gradient kernel: enough to amortise its loads, few enough to fill the device.
_READERS = 1024


class Routes(NamedTuple):
    """What every token opened. opened (B, K, N, levels, width) int32, -1 filled; the others are bit masks of the same choice."""

    opened: Tensor
    base_bits: Tensor
    child_bits: Tensor


class Geometry(NamedTuple):
    """The integers of a pattern at one length, as the kernels want them."""

    block: int
    radix: int
    window: int
    guard: int
    top_k: int
    beam: int
    levels: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, pattern: HierarchicalPattern, num_tokens: int) -> Geometry:
        sizes = pattern.node_counts(num_tokens)
        budget = (pattern.window_blocks, pattern.guard, pattern.top_k, pattern.opened(1), len(sizes))
        return cls(pattern.block, pattern.radix, *budget, sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(np.cumsum((0, *self.sizes)).tolist())

    @property
    def listed(self) -> int:
        """Room for the longest list of a level, a power of two."""
        return max(16, triton.next_power_of_2(self.radix * (self.guard + 1) - 1))


class _Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    key_heads: int
    width: int

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def pairs(self) -> int:
        return self.batch * self.key_heads


def _shape(q: Tensor, k: Tensor) -> _Shape:
    return _Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _tile(shape: _Shape, dtype: torch.dtype) -> dict:
    return {
        "G": shape.group,
        "D": shape.width,
        "BD": max(16, triton.next_power_of_2(shape.width)),
        "PREC": "ieee" if dtype == torch.float32 else "tf32",
    }


# (heads per program, warps, stages) by kernel, for even groups and for others: the best of a sweep on an H200 (docs/log.md).
_COVER_TILES = {
    "forward": ((2, 4, 2), (1, 4, 3)),
    "dq": ((2, 8, 3), (1, 4, 2)),
    "dkv": ((1, 4, 2), (1, 4, 2)),
}


def _cover_tile(shape: _Shape, geometry: Geometry, dtype: torch.dtype, kernel: str) -> dict:
    even = shape.group % 2 == 0 and dtype != torch.float32
    heads, warps, stages = _COVER_TILES[kernel][0 if even else 1]
    tile = _tile(shape, dtype) | {"HG": heads, "BLOCK": geometry.block, "WINDOW": geometry.window}
    return tile | {"num_warps": warps, "num_stages": stages if dtype != torch.float32 else 1}


def _opened_tile(shape: _Shape, geometry: Geometry, dtype: torch.dtype) -> dict:
    return _tile(shape, dtype) | {
        "GP": max(16, triton.next_power_of_2(shape.group)),
        "BLOCK": geometry.block,
        "BC": 64,
        "RADIX": geometry.radix,
        "WINDOW": geometry.window,
        "GUARD": geometry.guard,
        "TOP_K": geometry.top_k,
        "BEAM": geometry.beam,
        "WIDTH": max(geometry.top_k, geometry.beam),
        "num_warps": 4,
        "num_stages": 2,
    }


# Programs of the routing kernel: each walks over many tokens with one row of scratch.
_ROUTERS = 2048


@functools.lru_cache(maxsize=64)
def _offsets(geometry: Geometry, device: torch.device) -> Tensor:
    return torch.tensor(geometry.offsets, dtype=torch.int32, device=device)


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
    q, k, v, q_local, k_local = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, q_local, k_local)
    )
    summaries = (pyramid.kbar.contiguous(), pyramid.vbar.contiguous(), pyramid.entropy.float().contiguous())
    parameters = (level_bias.float().contiguous(), router_mix.float().contiguous())
    return _Attend.apply(q, k, v, q_local, k_local, *summaries, *parameters, geometry, scale)  # type: ignore[return-value]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, geometry, scale = arguments
        out, lse, routes = forward(*tensors, geometry, scale)
        ctx.save_for_backward(*tensors, out, lse, *(routes or ()))
        ctx.geometry, ctx.scale = geometry, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):  # type: ignore[override]
        *tensors, out, lse, opened, base_bits, child_bits = _padded(ctx.saved_tensors, 15)
        routes = None if opened is None else Routes(opened, base_bits, child_bits)
        dout = torch.zeros_like(out) if dout is None else dout
        return *backward(dout, dlse, *tensors, out, lse, routes, ctx.geometry, ctx.scale), None, None


def _padded(saved: tuple, count: int) -> tuple:
    return *saved, *(None,) * (count - len(saved))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_local: Tensor,
    k_local: Tensor,
    kbar: Tensor,
    vbar: Tensor,
    entropy: Tensor,
    level_bias: Tensor,
    router_mix: Tensor,
    geometry: Geometry,
    scale: float,
    routes: Routes | None = None,
) -> tuple[Tensor, Tensor, Routes | None]:
    """out (B, N, H, D), lse (B, H, N) and what was opened.

    q, k: for far tokens and summaries; q_local, k_local: inside the window. kbar, vbar (B, nodes, K, D), entropy (B, nodes, K):
    the levels one after the other. level_bias (H, levels), router_mix (H,) fp32. `routes` given: they are obeyed.
    """
    shape = _shape(q, k)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(shape.batch, shape.heads, shape.tokens, dtype=torch.float32, device=q.device)
    tile = _cover_tile(shape, geometry, q.dtype, "forward")
    grid = (-(-shape.tokens // geometry.block), shape.heads // tile["HG"], shape.batch)
    offsets = _offsets(geometry, q.device)
    opening = geometry.top_k > 0 and geometry.sizes[0] > 0
    sizes = (shape.tokens, kbar.shape[1], shape.heads, shape.key_heads, geometry.levels, scale)
    cover.cover_forward[grid](
        q_local, k_local, v, q, kbar, vbar, entropy, level_bias, offsets, out, lse,
        *_strides(q_local), *_strides(k_local), *_strides(v), *_strides(q), *sizes,
        BN=64, RADIX=geometry.radix, GUARD=geometry.guard, LISTS=not opening, **tile,
    )  # fmt: skip
    if not opening:
        return out, lse, None
    tile = _opened_tile(shape, geometry, q.dtype)
    if routes is None:
        routes = _empty_routes(shape, geometry, q.device)
        items = shape.tokens * shape.pairs
        programs = min(items, _ROUTERS)
        most = triton.next_power_of_2(geometry.beam * geometry.radix + geometry.listed)
        scratch = torch.empty(programs, most, dtype=torch.float32, device=q.device)
        opened_forward.route[(programs,)](
            q,
            kbar,
            entropy,
            level_bias,
            offsets,
            scratch,
            *routes,
            *_strides(q),
            *sizes,
            items,
            MOST=most,
            **tile,
        )
    opened_forward.opened_attend[(shape.tokens, shape.pairs)](
        q, k, v, kbar, vbar, entropy, level_bias, router_mix, offsets, *routes, out, lse,
        *_strides(q), *_strides(k), *_strides(v), *sizes, **tile,
    )  # fmt: skip
    return out, lse, routes


def _empty_routes(shape: _Shape, geometry: Geometry, device: torch.device) -> Routes:
    lead = (shape.batch, shape.key_heads, shape.tokens, geometry.levels)
    # Tokens without a far context open nothing, and their programs write nothing.
    opened = torch.full((*lead, max(geometry.top_k, geometry.beam)), -1, dtype=torch.int32, device=device)
    bits = torch.zeros(lead, dtype=torch.int32, device=device)
    return Routes(opened, bits, torch.zeros((*lead, geometry.beam), dtype=torch.int32, device=device))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_local: Tensor,
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
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, q_local, k_local, kbar, vbar, entropy, level_bias, router_mix, in this order."""
    shape = _shape(q, k)
    dout = dout.contiguous()
    delta = cover.row_dot(dout, out, dlse)
    offsets = _offsets(geometry, q.device)
    sizes = (shape.tokens, kbar.shape[1], shape.heads, shape.key_heads, geometry.levels, scale)
    dq, dq_local = torch.zeros_like(q, memory_format=torch.contiguous_format), _like(q)
    dbias = torch.zeros(shape.batch, shape.tokens, shape.heads, geometry.levels, device=q.device)
    dmix = torch.zeros(shape.batch, shape.tokens, shape.heads, device=q.device)
    tile = _cover_tile(shape, geometry, q.dtype, "dq")
    blocks = -(-shape.tokens // geometry.block)
    opening = routes is not None
    cover.cover_dq[(blocks, shape.heads // tile["HG"], shape.batch)](
        q_local, k_local, v, q, kbar, vbar, entropy, level_bias, offsets, dout, lse, delta, dq_local, dq, dbias,
        *_strides(q_local), *_strides(k_local), *_strides(v), *_strides(q), *sizes,
        BN=64, RADIX=geometry.radix, GUARD=geometry.guard, LISTS=not opening, **tile,
    )  # fmt: skip
    dk_local, dv = _like(k), torch.empty_like(v, dtype=torch.float32, memory_format=torch.contiguous_format)
    tile = _cover_tile(shape, geometry, q.dtype, "dkv")
    cover.window_dkv[(blocks, shape.key_heads, shape.batch)](
        q_local, k_local, v, dout, lse, delta, dk_local, dv,
        *_strides(q_local), *_strides(k_local), *_strides(v), shape.tokens, shape.heads, shape.key_heads, scale, **tile,
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
    dk = torch.zeros_like(k, memory_format=torch.contiguous_format)
    dnodes = far.listed(routes)
    if routes is not None:
        opened_backward.opened_dq[(shape.tokens, shape.pairs)](
            q, k, v, kbar, vbar, entropy, level_bias, router_mix, offsets, *routes, dout, lse, delta, dq, dbias, dmix,
            *_strides(q), *_strides(k), *_strides(v), *sizes, **_opened_tile(shape, geometry, q.dtype),
        )  # fmt: skip
        for level in range(geometry.levels - 1):
            far.children(routes, level, dnodes)
        dk = far.leaves(routes, dv, dnodes)
    dkbar, dvbar, dentropy = dnodes.split((shape.width, shape.width, 1), dim=-1)
    return (
        dq, dk, dv.to(v.dtype), dq_local, dk_local, dkbar.to(kbar.dtype), dvbar.to(vbar.dtype), dentropy[..., 0],
        dbias.sum((0, 1)), dmix.sum((0, 1)),
    )  # fmt: skip


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Far(NamedTuple):
    """The tensors that the node-major gradient kernels share."""

    shape: _Shape
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
            table, first = _listed_items(geometry, shape.tokens, level, _READERS * 16 // max(1, shape.group))
            if not len(table):
                continue
            items = torch.from_numpy(table).to(self.q.device)
            groups = len(first) - 1
            pairs = torch.arange(shape.pairs, device=self.q.device)
            items = items.expand(shape.pairs, -1, -1).clone()
            items[:, :, 0] = pairs[:, None]
            first_item = torch.from_numpy(first).to(self.q.device)[None, :-1] + pairs[:, None] * len(table)
            first_item = torch.cat((first_item.flatten(), first_item.new_tensor([shape.pairs * len(table)])))
            self._add_nodes(result, level, groups, items.flatten(0, 1), first_item, None, routes)
        return result

    def children(self, routes: Routes, level: int, result: Tensor) -> None:
        """Add the gradients of the children at `level` from the tokens that opened their parent."""
        geometry = self.geometry
        parents = geometry.sizes[level + 1]
        if not parents:
            return
        places = routes.opened[:, :, :, level + 1, : geometry.beam]
        order, items, first_item = _sorted_items(places, parents)
        readers = order % (self.shape.tokens * geometry.beam)
        pair = torch.where(items[:, 0] >= 0, items[:, 0] // parents, -1)
        items = torch.stack((pair, items[:, 0] % parents, items[:, 1], items[:, 2]), 1)
        self._add_nodes(result, level, parents, items, first_item, readers, routes)

    def _add_nodes(self, result, level, groups, items, first_item, readers, routes) -> None:
        shape, geometry = self.shape, self.geometry
        width = geometry.radix * (2 * shape.width + 1)
        partial = torch.empty(len(items), width, device=self.q.device)
        nothing = self.offsets
        masks = routes or (nothing, nothing, nothing)
        tile = _tile(shape, self.q.dtype)
        opened_backward.node_dkv[(len(items),)](
            self.q, self.kbar, self.vbar, self.entropy, self.level_bias, self.offsets, *masks,
            nothing if readers is None else readers, items, self.dout, self.lse, self.delta, partial, *_strides(self.q),
            shape.tokens, self.kbar.shape[1], shape.heads, shape.key_heads, geometry.levels, level, self.scale,
            BLOCK=geometry.block, RADIX=geometry.radix, RP=max(16, geometry.radix), WINDOW=geometry.window,
            GUARD=geometry.guard, BEAM=geometry.beam, BM=64 if self.q.dtype != torch.float32 else 32,
            LISTED=readers is None, MASKED=routes is not None, num_warps=4, num_stages=2, **tile,
        )  # fmt: skip
        total = torch.empty(shape.pairs * groups, width, device=self.q.device)
        _sum(partial, first_item, total)
        total = total.view(shape.batch, shape.key_heads, groups * geometry.radix, -1)
        begin, size = geometry.offsets[level], geometry.sizes[level]
        size = min(size, groups * geometry.radix)
        result[:, begin : begin + size] += total[:, :, :size].transpose(1, 2)

    def leaves(self, routes: Routes, dv: Tensor, result: Tensor) -> Tensor:
        """Gradients through opened leaves: returns dk, adds to dv and to the nodes."""
        shape, geometry = self.shape, self.geometry
        leaves, block, width = geometry.sizes[0], geometry.block, shape.width
        order, items, first_item = _sorted_items(routes.opened[:, :, :, 0, : geometry.top_k], leaves)
        readers = order % (shape.tokens * geometry.top_k) // geometry.top_k
        dkv = torch.empty(len(items), 2 * block * width, device=self.q.device)
        dnode = torch.empty(len(items), width + 1, device=self.q.device)
        opened_backward.leaf_dkv[(len(items),)](
            self.q, self.k, self.v, self.kbar, self.entropy, self.level_bias, self.router_mix, readers, items,
            self.dout, self.lse, self.delta, dkv, dnode, *_strides(self.q), *_strides(self.k), *_strides(self.v),
            shape.tokens, self.kbar.shape[1], leaves, shape.heads, shape.key_heads, geometry.levels, self.scale,
            BLOCK=block, BM=64 if self.q.dtype != torch.float32 else 32, num_warps=4, num_stages=2, **_tile(shape, self.q.dtype),
        )  # fmt: skip
        total = torch.empty(shape.pairs * leaves, 2 * block * width, device=self.q.device)
        _sum(dkv, first_item, total)
        total = total.view(shape.batch, shape.key_heads, leaves, 2, block, width)
        covered = leaves * block
        dk = torch.zeros(
            shape.batch, shape.tokens, shape.key_heads, width, dtype=self.k.dtype, device=self.q.device
        )
        dk[:, :covered] = total[:, :, :, 0].flatten(2, 3).transpose(1, 2).to(dk.dtype)
        dv[:, :covered] += total[:, :, :, 1].flatten(2, 3).transpose(1, 2)
        total = torch.empty(shape.pairs * leaves, width + 1, device=self.q.device)
        _sum(dnode, first_item, total)
        total = total.view(shape.batch, shape.key_heads, leaves, width + 1).transpose(1, 2)
        result[:, :leaves, :, :width] += total[..., :width]
        result[:, :leaves, :, -1] += total[..., -1]
        return dk


def _sum(partial: Tensor, first_item: Tensor, total: Tensor) -> None:
    width = total.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    opened_backward.sum_items[(len(total), triton.cdiv(width, block))](
        partial, first_item, total, width, BW=block
    )


def _sorted_items(opened: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Readers by node: (order, items, first item of every node), all on the device, without a synchronisation.

    opened (B, K, N, places): node or -1. order: flat positions in `opened`, stably sorted by node. items (., 4) int64:
    node numbered through all pairs (-1: no work), first and last position in `order`.
    """
    batch, key_heads = opened.shape[:2]
    groups = batch * key_heads * nodes
    pair = torch.arange(batch * key_heads, dtype=torch.int32, device=opened.device).view(
        batch, key_heads, 1, 1
    )
    keys = torch.where(opened >= 0, pair * nodes + opened, groups).flatten()
    keys, order = torch.sort(keys, stable=True)
    border = torch.searchsorted(keys, torch.arange(groups + 1, dtype=keys.dtype, device=keys.device))
    per_node = (border.diff() + _READERS - 1) // _READERS
    first_item = torch.cat((border.new_zeros(1), per_node.cumsum(0)))
    item = torch.arange(groups + opened.numel() // _READERS, device=keys.device)
    node = torch.searchsorted(first_item, item, right=True) - 1
    some = item < first_item[-1]
    node = torch.where(some, node, 0)
    begin = border[node] + (item - first_item[node]) * _READERS
    end = torch.minimum(begin + _READERS, border[node + 1])
    return order, torch.stack((torch.where(some, node, -1), begin, end, torch.zeros_like(end)), 1), first_item


@functools.lru_cache(maxsize=64)
def _listed_items(geometry: Geometry, tokens: int, level: int, readers: int) -> tuple[np.ndarray, np.ndarray]:
    """Work items (0, group of siblings, first token, last token) of a level's lists, and the first item of every group."""
    block, radix = geometry.block, geometry.radix
    blocks = -(-tokens // block)
    hi = np.maximum(0, np.arange(blocks) - geometry.window + 1)
    lo = hi
    for at in range(level + 1):
        if at:
            hi = lo // radix
        lo = radix * np.maximum(0, hi // radix - geometry.guard)
        if at == geometry.levels - 1:
            lo = np.zeros_like(hi)
    groups = -(-geometry.sizes[level] // radix)
    rows, first = [], [0]
    for group in range(groups):
        begin = int(np.searchsorted(hi, group * radix, side="right")) * block
        end = min(tokens, int(np.searchsorted(lo, (group + 1) * radix, side="left")) * block)
        rows += [(0, group, at, min(at + readers, end)) for at in range(begin, end, readers)]
        first.append(len(rows))
    return np.array(rows, dtype=np.int64).reshape(-1, 4), np.array(first, dtype=np.int64)
