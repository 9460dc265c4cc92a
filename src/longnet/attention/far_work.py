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

from longnet.kernels import routing
from longnet.patterns import HierarchicalPattern

# Readers of one work item of a gradient kernel: enough to amortise its loads, few enough to fill the device.
READERS = 1024

# Neighbouring nodes whose gradients one program sums: the rows of its products, the bits of a reader's word.
COLUMNS = 64

# Bytes of the buffer that holds the results of opened leaves for one chunk of tokens.
CHUNK_BYTES = 2**30


class Routes(NamedTuple):
    """What every token opened. opened (B, K, N, levels, width) int32, -1 filled; the others are bit masks of the same choice."""

    opened: Tensor
    base_bits: Tensor
    child_bits: Tensor


class Leaves(NamedTuple):
    """What the backward pass wants of a chunk's opened leaves: the readers by leaf (`sorted_items`), and of every place and head
    the log2 of the leaf's mass and its score, (2, pairs, tokens, top_k, group) fp32."""

    order: Tensor
    items: Tensor
    first_item: Tensor
    logits: Tensor


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
    blocks = min(units // heads, geometry.radix)
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


def cover_grid(shape: Shape, geometry: Geometry, tile: dict) -> tuple[int, int]:
    """Programs of `cover_forward` and `cover_dq`: QB blocks of HG heads each, the first cut off where blocks do not fit."""
    blocks = -(-shape.tokens // geometry.block) + (1 - geometry.window) % tile["QB"]
    return -(-blocks // tile["QB"]) * (shape.heads // tile["HG"]), shape.batch


# Rows of a tile of tokens; (columns at a time, warps, stages, most registers) of the kernels over such tiles; and how many places
# of opened leaves are on their way.
FAR_ROWS = 64
PLACE_STAGES = 3
FAR_TILES = {"score": (64, 4, 2, None), "attend": (64, 4, 2, None), "dq": (64, 4, 2, None)}


def far_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype, kernel: str) -> dict:
    """Constants of a kernel over tiles of tokens: T tokens with all heads of a group fill the rows of one product."""
    columns, warps, stages, registers = FAR_TILES[kernel]
    return tile_of(shape, dtype) | {
        "G": shape.group,
        "GP": triton.next_power_of_2(shape.group),
        "T": tokens_per_tile(shape.group),
        "BC": columns if dtype != torch.float32 else 16,
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": registers,
        **cover_constants(geometry),
    }


# Warps that search the candidates of one token.
SELECT_WARPS = 1

# (rows, warps, stages, most registers) of the kernels over the readers of a leaf.
ACROSS = False
LEAF_TILES = {"forward": (64, 4, 3, None), "backward": (64, 4, 2, None)}


def leaf_tile(shape: Shape, dtype: torch.dtype, kernel: str) -> dict:
    rows, warps, stages, registers = LEAF_TILES[kernel]
    if dtype == torch.float32:
        rows, stages = 32, 1
    tile = tile_of(shape, dtype) | {"G": shape.group, "BM": rows, "num_warps": warps, "num_stages": stages}
    tile["maxnreg"] = registers
    if kernel == "backward":
        tile["ACROSS"] = ACROSS
    return tile


# (rows, warps, stages) of the kernel over the readers of COLUMNS nodes; (warps, stages) of the one over epochs, by blocks up to
# 64 and wider ones.
NODE_TILE = (64, 4, 2)
EPOCH_TILE = ((4, 2), (8, 2))


def node_tile(shape: Shape, geometry: Geometry, q: Tensor) -> dict:
    rows, warps, stages = NODE_TILE
    if q.dtype == torch.float32:
        rows, stages = 32, 1
    elif q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
        # For sm_80 the assembler gives up on two stages: 32 registers, everything else spilled.
        stages = 1
    return tile_of(shape, q.dtype) | {
        "G": shape.group, "COLUMNS": COLUMNS, "BEAM": geometry.beam, "BM": rows, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def epoch_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype) -> dict:
    warps, stages = EPOCH_TILE[geometry.block > 64]
    # Blocks whose tokens one program reads: a power of two.
    blocks = min(geometry.radix, max(1, 4 * READERS // (shape.group * geometry.block)))
    return tile_of(shape, dtype) | {
        "NODES": COLUMNS,
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


class Chunk(NamedTuple):
    """Tokens [first, first + tiles * tile) of all sequences, whose opened leaves are attended to together."""

    first: int
    tiles: int
    tile: int

    @property
    def tokens(self) -> int:
        return self.tiles * self.tile


def chunks(shape: Shape, geometry: Geometry, element_size: int) -> list[Chunk]:
    """The sequence in chunks of whole blocks whose places' results fit in CHUNK_BYTES; none where nothing is far."""
    tile = tokens_per_tile(shape.group)
    token = shape.batch * shape.heads * geometry.top_k * shape.width * element_size
    size = max(1, CHUNK_BYTES // token // geometry.block) * geometry.block
    begin = geometry.window * geometry.block
    return [
        Chunk(first, triton.cdiv(min(size, shape.tokens - first), tile), tile)
        for first in range(begin, shape.tokens, size)
    ]


class Tables:
    """Columns of a chunk's tiles: `united`, `sizes`, `members`, `places`, `kept` of `kernels.routing`, per level."""

    def __init__(self, shape: Shape, geometry: Geometry, chunk: Chunk, device: torch.device) -> None:
        self.shape, self.geometry, self.chunk = shape, geometry, chunk
        above = max((0, *geometry.sizes[1:]))
        self.most = max(1, min(chunk.tile * geometry.beam, above))
        self.columns = self.most * geometry.radix + geometry.listed
        lead = (geometry.levels, shape.pairs, chunk.tiles)
        whole = functools.partial(torch.empty, dtype=torch.int32, device=device)
        self.united, self.members = whole(*lead, self.most), whole(*lead, self.most)
        self.sizes, self.kept = (
            torch.zeros(lead, dtype=torch.int32, device=device),
            whole(*lead, self.columns),
        )
        self.places = torch.full((*lead, self.most, chunk.tile), -1, dtype=torch.int16, device=device)
        self.scratch = torch.empty(*lead[1:], chunk.tile * geometry.beam, dtype=torch.int64, device=device)

    @property
    def grid(self) -> tuple[int, int]:
        return self.chunk.tiles, self.shape.pairs

    def unite(self, routes: Routes, level: int) -> None:
        """The columns below `level`, from what the tokens opened at it."""
        at = level - 1
        routing.unite[self.grid](
            routes.opened, self.scratch, self.united[at], self.members[at], self.places[at], self.sizes[at],
            self.shape.tokens, self.geometry.levels, level, self.chunk.first, self.most,
            T=self.chunk.tile, BEAM=self.geometry.beam, WIDTH=self.geometry.width, num_warps=2,
        )  # fmt: skip

    def mark(self, routes: Routes) -> None:
        """Which columns stay summaries."""
        geometry = self.geometry
        for level in range(geometry.levels):
            routing.mark[self.grid](
                routes.base_bits, routes.child_bits, self.places[level], self.sizes[level], self.kept[level],
                self.shape.tokens, geometry.levels, level, self.chunk.first, self.most, self.columns,
                T=self.chunk.tile, BC=128, BEAM=geometry.beam, num_warps=4, **cover_constants(geometry),
            )  # fmt: skip

    @classmethod
    def of(cls, routes: Routes, shape: Shape, geometry: Geometry, chunk: Chunk) -> Tables:
        tables = cls(shape, geometry, chunk, routes.opened.device)
        for level in range(1, geometry.levels):
            tables.unite(routes, level)
        tables.mark(routes)
        return tables


def leaf_items(
    routes: Routes, shape: Shape, geometry: Geometry, chunk: Chunk
) -> tuple[Tensor, Tensor, Tensor]:
    """`sorted_items` of a chunk's opened leaves; positions count in (pairs, chunk.tokens, top_k)."""
    opened = routes.opened[:, :, chunk.first : chunk.first + chunk.tokens, 0, : geometry.top_k]
    missing = chunk.tokens - opened.shape[2]
    if missing:
        opened = torch.nn.functional.pad(opened, (0, 0, 0, missing), value=-1)
    return sorted_items(opened, geometry.sizes[0])


def sorted_items(opened: Tensor, nodes: int, readers: int = READERS) -> tuple[Tensor, Tensor, Tensor]:
    """Readers by node: (order, items, first item of every node), all on the device, without a synchronisation.

    opened (B, K, N, places): node or -1. order: flat positions in `opened`, stably sorted by node. items (., 3) int64:
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
    per_node = (border.diff() + readers - 1) // readers
    first_item = torch.cat((border.new_zeros(1), per_node.cumsum(0)))
    item = torch.arange(groups + opened.numel() // readers, device=keys.device)
    node = torch.searchsorted(first_item, item, right=True) - 1
    some = item < first_item[-1]
    node = torch.where(some, node, 0)
    begin = border[node] + (item - first_item[node]) * readers
    end = torch.minimum(begin + readers, border[node + 1])
    return order, torch.stack((torch.where(some, node, -1), begin, end), 1), first_item


@functools.lru_cache(maxsize=64)
def offsets_of(geometry: Geometry, device: torch.device) -> Tensor:
    return torch.tensor(geometry.offsets, dtype=torch.int32, device=device)


def empty_routes(shape: Shape, geometry: Geometry, device: torch.device) -> Routes:
    lead = (shape.batch, shape.key_heads, shape.tokens, geometry.levels)
    # Tokens without a far context open nothing, and their programs write nothing.
    opened = torch.full((*lead, geometry.width), -1, dtype=torch.int32, device=device)
    bits = torch.zeros(lead, dtype=torch.int32, device=device)
    return Routes(opened, bits, torch.zeros((*lead, geometry.beam), dtype=torch.int32, device=device))


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
