"""Integers behind the Triton launches of hierarchical attention: shapes, tiles, work items, tables of columns."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longnet.patterns import HierarchicalPattern


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
    def width(self) -> int:
        """Places per level in the table of opened nodes."""
        return max(self.top_k, self.beam)

    @property
    def listed(self) -> int:
        """Room for the longest list from which anything is opened, a power of two: a capped tree's last level lists all."""
        longest = max(self.radix * (self.guard + 1) - 1, min(32, self.sizes[-1]))
        return max(16, triton.next_power_of_2(longest))

    def opens(self, num_tokens: int) -> bool:
        """Whether any of so many tokens has something far to open."""
        return self.top_k > 0 and num_tokens > self.window * self.block

    def parents(self, level: int) -> int:
        """Room for the nodes that a token opens one level up, a power of two."""
        above = self.sizes[level + 1] if level + 1 < self.levels else 0
        return triton.next_power_of_2(max(1, min(self.beam, above)))


class Shape(NamedTuple):
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


def shape_of(q: Tensor, k: Tensor) -> Shape:
    return Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])


def strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def tile_of(shape: Shape, dtype: torch.dtype) -> dict:
    return {
        "D": shape.width,
        "BD": max(16, triton.next_power_of_2(shape.width)),
        "PREC": "ieee" if dtype == torch.float32 else "tf32",
    }


# By kernel: (heads x blocks of queries per program, keys or nodes at a time, warps, stages, most registers) for blocks up to 64,
# and for wider ones, for which more would not fit into shared memory.
COVER_TILES = {
    "forward": ((2, 64, 8, 2, 128), (1, 64, 4, 2, None)),
    "dq": ((2, 64, 8, 3, None), (1, 64, 4, 2, None)),
    "dkv": ((1, 64, 4, 2, None), (1, 64, 4, 2, None)),
}
# Listed nodes at a time: with 64 the forward pass spills.
LISTED_NODES = {"forward": 32, "dq": 64}


def cover_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype, kernel: str) -> dict:
    units, keys, warps, stages, registers = COVER_TILES[kernel][geometry.block > 64]
    tile = tile_of(shape, dtype) | {
        "BLOCK": geometry.block,
        "WINDOW": geometry.window,
        "num_warps": warps,
        "num_stages": stages if dtype != torch.float32 else 1,
        "maxnreg": registers,
    }
    if kernel == "dkv":
        return tile | {"TMA": by_descriptor(shape)}
    heads = math.gcd(units, shape.group)
    # Blocks that share a program see a key in common, and list the same nodes of all levels but the finest.
    blocks = min(units // heads, geometry.radix, geometry.window)
    return tile | {
        "G": shape.group,
        "HG": heads,
        "QB": blocks,
        "BK": keys if blocks == 1 else min(keys, geometry.block),
        "BN": LISTED_NODES[kernel],
        "RADIX": geometry.radix,
        "GUARD": geometry.guard,
        "LEVELS": geometry.levels,
    }


def rows_of(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Descriptor of `rows` tokens of one head at a time, `width` wide: x (B, N, heads, D), aligned."""
    if any(stride == 0 and count > 1 for stride, count in zip(x.stride(), x.shape, strict=True)):
        x = x.contiguous()  # expanded: a descriptor cannot stand still
    strides = [stride if count > 1 else x.numel() for stride, count in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, rows, 1, width])


def scalars_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of `rows` neighbouring elements of x, contiguous, counted through all dimensions."""
    return TensorDescriptor(x, [x.numel()], [1], [rows])


def query_rows(q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, tile: dict) -> tuple:
    """What kernels read of a block of queries of one head, by descriptors if the tile's TMA says so."""
    if not tile["TMA"]:
        return q, dout, lse, delta
    rows, width = tile["BLOCK"], tile["BD"]
    return *(rows_of(x, rows, width) for x in (q, dout)), *(scalars_of(x, rows) for x in (lse, delta))


def by_descriptor(shape: Shape) -> bool:
    """Whether a descriptor can address the blocks of lse: each begins on 16 bytes, coordinates have 31 bits."""
    return shape.tokens % 4 == 0 and shape.batch * shape.heads * shape.tokens < 2**31


def cover_grid(shape: Shape, geometry: Geometry, tile: dict, start: int = 0) -> tuple[int, int]:
    """Programs of `cover_forward` and `cover_dq`: QB blocks of HG heads each, the first cut off where blocks do not fit. The
    queries begin at token `start`, with a block."""
    shift = (1 - geometry.window) % tile["QB"]
    blocks = -(-(start + shape.tokens) // geometry.block) + shift
    groups = -(-blocks // tile["QB"]) - (start // geometry.block + shift) // tile["QB"]
    return groups * (shape.heads // tile["HG"]), shape.batch


# Rows of a tile of tokens; (columns at a time, warps, stages, most registers) of the kernels over such tiles, for heads up to 64
# wide and for wider ones; and how many places of opened leaves are on their way.
FAR_ROWS = 64
PLACE_STAGES = 3
FAR_TILES = {
    "score": ((32, 4, 2, None), (32, 4, 2, None)),
    "attend": ((32, 4, 4, 128), (32, 4, 3, 168)),
    "dq": ((32, 4, 3, 128), (32, 4, 3, 168)),
}


def far_tile(shape: Shape, dtype: torch.dtype, kernel: str) -> dict:
    """Constants of a kernel over tiles of tokens: T tokens with all heads of a group fill the rows of one product."""
    columns, warps, stages, registers = FAR_TILES[kernel][shape.width > 64]
    return tile_of(shape, dtype) | {
        "G": shape.group,
        "GP": triton.next_power_of_2(shape.group),
        "T": tokens_per_tile(shape.group),
        "BC": columns if dtype != torch.float32 else 16,
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": registers,
    }


def place_tile(geometry: Geometry, tokens: int) -> dict:
    """Constants of products over the places of a tile's tokens, some tokens at once: 32 columns, or at least 16."""
    places = max(16, triton.next_power_of_2(geometry.top_k))
    at_once = min(tokens, max(1, 32 // places))
    return {"TOP_K": geometry.top_k, "PLACES": places, "AT_ONCE": at_once, "WIDTH": geometry.width}


# Warps that search the candidates of one token.
SELECT_WARPS = 1

# (rows, warps, stages, most registers) of the kernels over the readers of a leaf, and of opened nodes' children: for blocks and
# heads up to 64, and for wider ones.
READER_TILES = {
    "leaf forward": ((64, 4, 2, 160), (64, 4, 2, 160)),
    "leaf backward": ((64, 4, 3, None), (128, 8, 2, None)),
    "children": ((64, 4, 3, None), (64, 4, 2, None)),
}


def reader_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype, kernel: str) -> dict:
    rows, warps, stages, registers = READER_TILES[kernel][max(shape.width, geometry.block) > 64]
    if dtype == torch.float32:
        rows, stages = 32, 1
    padded = triton.next_power_of_2(shape.group)
    tile = tile_of(shape, dtype) | {"G": shape.group, "GP": padded, "BM": max(rows, padded)}
    return tile | {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


# Query rows that one program over an epoch reads: enough to amortise its loads, few enough to fill the device; nodes whose
# gradients it sums, the rows of its products; (warps, stages) by blocks up to 64 and wider ones.
EPOCH_ROWS, EPOCH_NODES = 4096, 64
EPOCH_TILE = ((4, 2), (8, 2))


def epoch_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype) -> dict:
    warps, stages = EPOCH_TILE[geometry.block > 64]
    # Blocks whose tokens one program reads: a power of two.
    blocks = min(geometry.radix, max(1, EPOCH_ROWS // (shape.group * geometry.block)))
    return tile_of(shape, dtype) | {
        "NODES": EPOCH_NODES,
        "BLOCKS": 1 << (blocks.bit_length() - 1),
        "LEVELS": geometry.levels,
        "TMA": by_descriptor(shape),
        "num_warps": warps,
        "num_stages": stages if dtype != torch.float32 else 1,
        **cover_constants(geometry),
    }


def cover_constants(geometry: Geometry) -> dict:
    return {
        "BLOCK": geometry.block,
        "RADIX": geometry.radix,
        "WINDOW": geometry.window,
        "GUARD": geometry.guard,
    }


def tokens_per_tile(group: int) -> int:
    """FAR_ROWS where the group allows, no more than 16 tokens: what they open differs."""
    return min(16, max(1, FAR_ROWS // triton.next_power_of_2(group)))


@functools.lru_cache(maxsize=64)
def offsets_of(geometry: Geometry, device: torch.device) -> Tensor:
    return torch.tensor(geometry.offsets, dtype=torch.int32, device=device)


class Epochs(NamedTuple):
    """RADIX blocks each whose far boundaries have the same parent, as `listed_dkv` and `sum_listed` want them: their number, the
    most nodes that one lists, and on the device `readers` (nodes, 3) and `places` (epochs, levels)."""

    count: int
    columns: int
    readers: Tensor
    places: Tensor


@functools.lru_cache(maxsize=64)
def epochs_of(geometry: Geometry, num_tokens: int, device: torch.device) -> Epochs:
    radix, last = geometry.radix, -(-num_tokens // geometry.block) - geometry.window
    count = last // radix + 1 if last > 0 else 0
    hi = np.minimum(np.arange(count) * radix + radix - 1, last)
    begin = np.zeros(count, dtype=np.int64)
    readers, places = [], []
    for level, (offset, size) in enumerate(zip(geometry.offsets, geometry.sizes, strict=False)):
        lo = radix * np.maximum(0, hi // radix - geometry.guard) if level < geometry.levels - 1 else 0 * hi
        node = np.arange(size)
        bounds = np.searchsorted(hi, node, side="right"), np.searchsorted(lo, node, side="right")
        readers.append(np.stack((*bounds, np.full(size, level)), 1))
        places.append(begin - lo - offset)
        begin = begin + hi - lo
        hi = lo // radix
    tables = (np.concatenate(readers), np.stack(places, 1))
    tables = (torch.from_numpy(x.astype(np.int32)).to(device) for x in tables)
    return Epochs(count, int(begin.max(initial=0)), *tables)
