"""What tokens opened, ordered for the Triton kernels: chunks of tokens, columns of their tiles, readers of nodes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longnet.attention.far_work import (
    SELECT_WARPS,
    Geometry,
    Shape,
    cover_constants,
    far_tile,
    strides,
    tokens_per_tile,
)
from longnet.kernels import readers, routing

# Readers of one work item: enough to amortise its loads, few enough to fill the device; items of children leave 32 KiB each, so
# their number is bounded.
LEAF_READERS = 512
CHILD_READERS, CHILD_ITEMS = 512, 2**15

# Neighbouring nodes whose gradients one program sums: the columns of its products, the bits of a reader's words.
COLUMNS = 32

# Bytes of the buffer that holds the results of opened leaves for one chunk of tokens. Every chunk reads all leaves before it, so
# in longer texts chunks grow: until a leaf has LEAF_ROWS rows of queries on average, or the buffer has the bytes of q.
CHUNK_BYTES, LEAF_ROWS = 2**30, 1024

# Bytes of queries and of their gradients that the readers of children in one window have: they stay in the cache. Every window
# may have readers of every family, so the number of windows is bounded, and a stretch of windows whose sums together have
# CHUNK_BYTES is done before the next.
WINDOW_BYTES, WINDOWS = 2**25, 512


class Chunk(NamedTuple):
    """Tokens [first, first + tiles * tile) of all sequences, whose opened leaves are attended to together; counted from the
    first query, which stands at position `start`."""

    first: int
    tiles: int
    tile: int
    start: int = 0

    @property
    def tokens(self) -> int:
        return self.tiles * self.tile


def chunks_of(q: Tensor, shape: Shape, geometry: Geometry, start: int = 0) -> tuple[Chunk, ...]:
    """The sequence in chunks of whole blocks: places' results fit in the buffer, the heads' numbers of all places in 31 bits, and
    so do the offsets of a sequence's queries."""
    row = shape.width * q.element_size()
    token = shape.batch * shape.heads * row
    longer = min(token * shape.tokens, LEAF_ROWS * geometry.sizes[0] * shape.pairs * row)
    numbers = max(q.stride(1), shape.heads * shape.width, shape.batch * shape.heads * geometry.top_k)
    most = min(max(CHUNK_BYTES, longer) // (token * geometry.top_k), (2**31 - 1) // numbers)
    return _chunks(shape, geometry, most, start)


@functools.lru_cache(maxsize=64)
def _chunks(shape: Shape, geometry: Geometry, most: int, start: int) -> tuple[Chunk, ...]:
    tile = tokens_per_tile(shape.group)
    size = max(1, most // geometry.block) * geometry.block
    begin = max(0, geometry.window * geometry.block - start)
    return tuple(
        Chunk(first, triton.cdiv(min(size, shape.tokens - first), tile), tile, start)
        for first in range(begin, shape.tokens, size)
    )


class Readers(NamedTuple):
    """Readers by group, as `kernels.readers` lists them: order (their flat numbers, sorted), items, ranges."""

    order: Tensor
    items: Tensor
    ranges: Tensor

    @classmethod
    def of(cls, keys: Tensor, groups: int, most: int) -> Readers:
        """keys: the group of every reader, `groups` where it reads none. Nothing waits for the device."""
        keys, order = torch.sort(keys.view(-1), stable=True)
        count = len(keys)
        total = groups + count // most
        items = torch.empty(total, 3, dtype=torch.int64, device=keys.device)
        ranges = torch.empty(groups, 2, dtype=torch.int64, device=keys.device)
        readers.list_items[(triton.cdiv(groups, 64),)](
            keys, items, ranges, count, groups, most, total, count.bit_length(), BG=64, num_warps=2
        )
        return cls(order, items, ranges)

    @classmethod
    def each(cls, keys: Tensor, groups: int) -> Readers:
        """Every reader is an item of its own, in the order given; no ranges."""
        keys = keys.view(-1).long()
        order = torch.arange(len(keys), device=keys.device)
        group = torch.where(keys < groups, keys, -1)
        return cls(order, torch.stack((group, order, order + 1), 1), order[:0])


class Leaves(NamedTuple):
    """What the backward pass wants of a chunk's opened leaves: `Readers`, and of every place and head the log2 of the leaf's mass
    and its score, (2, pairs, tokens, top_k, group) fp32."""

    order: Tensor
    items: Tensor
    ranges: Tensor
    logits: Tensor


class Routes(NamedTuple):
    """What every token opened. opened (B, K, N, levels, width) int32, -1 filled; the others are bit masks of the same choice,
    undefined where nothing is far."""

    opened: Tensor
    base_bits: Tensor
    child_bits: Tensor

    @classmethod
    def empty(cls, shape: Shape, geometry: Geometry, device: torch.device, start: int = 0) -> Routes:
        lead = (shape.batch, shape.key_heads, shape.tokens, geometry.levels)
        whole = functools.partial(torch.empty, dtype=torch.int32, device=device)
        opened = whole(*lead, geometry.width)
        opened[:, :, : max(0, geometry.window * geometry.block - start)] = -1
        return cls(opened, whole(*lead), whole(*lead, geometry.beam))


# Columns that a kernel reads at a time divide it: lists are filled up to it. Columns that are marked at a time. Keys below it are
# sorted in 32 bits.
PAD, MARKED, NARROW = 64, 256, 2**31 - 1


class Tables:
    """Columns of a chunk's tiles, per level: `united`, `members`, `places`, `sizes` of `kernels.routing.unite`; `rows`,
    `records`, `totals` of `mark`."""

    def __init__(self, shape: Shape, geometry: Geometry, chunk: Chunk, device: torch.device) -> None:
        self.shape, self.geometry, self.chunk = shape, geometry, chunk
        above = max((0, *geometry.sizes[1:]))
        self.most = max(1, min(chunk.tile * geometry.beam, above))
        self.columns = triton.cdiv(self.most * geometry.radix + geometry.listed, PAD) * PAD
        lead = (geometry.levels, shape.pairs, chunk.tiles)
        whole = functools.partial(torch.empty, dtype=torch.int32, device=device)
        self.united, self.members = whole(*lead, self.most), whole(*lead, self.most)
        self.sizes, self.totals, self.rows = whole(lead), whole(lead), whole(*lead, self.columns)
        self.records = torch.empty(*lead, self.columns, dtype=torch.int64, device=device)
        self.places = torch.empty(*lead, self.most, chunk.tile, dtype=torch.int16, device=device)

    @property
    def grid(self) -> tuple[int, int]:
        return self.chunk.tiles, self.shape.pairs

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.records, self.totals

    def unite(self, routes: Routes, level: int, count: int = 1) -> None:
        """The columns below `level` and the `count` - 1 levels above it, from what the tokens opened there."""
        geometry = self.geometry
        entries = self.chunk.tile * geometry.beam
        wide = max(geometry.sizes) * entries >= NARROW
        scratch = torch.empty(
            count,
            *self.rows.shape[1:3],
            entries,
            dtype=torch.int64 if wide else torch.int32,
            device=self.rows.device,
        )
        routing.unite[(*self.grid, count)](
            routes.opened, scratch, self.united, self.members, self.places, self.sizes,
            self.shape.tokens, geometry.levels, level, self.chunk.first, self.most,
            T=self.chunk.tile, BEAM=geometry.beam, WIDTH=geometry.width, WIDE=wide,
            BITS=self.chunk.tile + geometry.beam.bit_length(), num_warps=2,
        )  # fmt: skip

    def mark(self, routes: Routes, entropy: Tensor, offsets: Tensor, level: int | None = None) -> None:
        """The columns that a `level`'s tokens see; of all levels, those that stay summaries."""
        geometry = self.geometry
        tile = {"T": self.chunk.tile, "PARENTS": max(1, MARKED // geometry.radix), "PAD": PAD}
        tile["REST"] = triton.next_power_of_2(geometry.listed + PAD)
        routing.mark[(*self.grid, geometry.levels if level is None else 1)](
            routes.base_bits, routes.child_bits, self.united, self.members, self.places, self.sizes, offsets, entropy,
            *self.lists, self.shape.tokens, entropy.shape[1], self.shape.key_heads, geometry.levels, level or 0,
            self.chunk.first, self.chunk.start, self.most, self.columns, KEPT=level is None, BEAM=geometry.beam, num_warps=2,
            **tile, **cover_constants(geometry),
        )  # fmt: skip

    @classmethod
    def of(
        cls, routes: Routes, entropy: Tensor, offsets: Tensor, shape: Shape, geometry: Geometry, chunk: Chunk
    ) -> Tables:
        tables = cls(shape, geometry, chunk, routes.opened.device)
        if geometry.levels > 1:
            tables.unite(routes, 1, geometry.levels - 1)
        tables.mark(routes, entropy, offsets)
        return tables


def route(
    q: Tensor,
    kbar: Tensor,
    entropy: Tensor,
    offsets: Tensor,
    routes: Routes,
    shape: Shape,
    geometry: Geometry,
    chunk: Chunk,
    scale: float,
) -> tuple[Tables, Tensor]:
    """Open nodes for the tokens of a chunk, from the coarsest level down; the leaves that they opened, as keys of `Readers`."""
    tables = Tables(shape, geometry, chunk, q.device)
    leaves = geometry.sizes[0]
    keys = torch.empty(shape.pairs, chunk.tokens, geometry.top_k, dtype=torch.int32, device=q.device)
    constants = {"TOP_K": geometry.top_k, "BEAM": geometry.beam, "WIDTH": geometry.width}
    constants |= {"LISTED": geometry.listed, "PLACES": triton.next_power_of_2(geometry.width)}
    for level in range(geometry.levels - 1, -1, -1):
        parents = geometry.parents(level)
        places = parents * geometry.radix + geometry.listed
        scores = keys
        if geometry.sizes[level] > (geometry.beam if level else geometry.top_k):
            scores = torch.empty(shape.pairs, chunk.tokens, places, device=q.device)
            tables.mark(routes, entropy, offsets, level)
            _score(q, kbar, routes, tables, scores, level, scale)
        routing.select[(chunk.tokens, shape.pairs)](
            scores, *routes, keys, shape.tokens, geometry.levels, level, chunk.first, chunk.start, leaves, places,
            PARENTS=parents, num_warps=SELECT_WARPS, **constants, **cover_constants(geometry),
        )  # fmt: skip
        if level:
            tables.unite(routes, level)
    tables.mark(routes, entropy, offsets)
    return tables, keys


def readers_of_leaves(keys: Tensor, shape: Shape, geometry: Geometry, ranges: bool) -> Readers:
    """keys (pairs, tokens, places): the opened leaf, numbered through pairs, of every place; `ranges`: they are wanted, too."""
    leaves = shape.pairs * geometry.sizes[0]
    if ranges or keys.shape[1] > geometry.block:
        return Readers.of(keys, leaves, LEAF_READERS)
    # Of a block or less: lists of all leaves would take longer than the readers, and the longer, the longer the text.
    return Readers.each(keys, leaves)


def _score(q, kbar, routes, tables, scores, level, scale) -> None:
    """Where there are no more nodes than places all are opened, and nobody asks for their scores."""
    shape, geometry, chunk = tables.shape, tables.geometry, tables.chunk
    routing.score[tables.grid](
        q, kbar, routes.opened, tables.places, tables.sizes, tables.rows, tables.records, scores, *strides(q),
        shape.tokens, shape.key_heads, geometry.levels, level, scale, chunk.first, chunk.start, tables.most, tables.columns,
        scores.shape[2], TOP_K=geometry.top_k, BEAM=geometry.beam, WIDTH=geometry.width, **cover_constants(geometry),
        **far_tile(shape, q.dtype, "score"),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def families_of(geometry: Geometry, device: torch.device) -> tuple[Tensor, int]:
    """Families of COLUMNS nodes of the levels that have parents: how many lie before each level, and all of them."""
    counts = [-(-size // COLUMNS) for size in geometry.sizes[: geometry.levels - 1]]
    before = [sum(counts[:level]) for level in range(geometry.levels)]
    return torch.tensor(before, dtype=torch.int32, device=device), sum(counts)


class Stretch(NamedTuple):
    """Tokens [first, first + tokens) of all sequences, whose opened nodes' children get their gradients together, in windows."""

    first: int
    tokens: int
    window: int

    @property
    def windows(self) -> int:
        return triton.cdiv(self.tokens, self.window)


def stretches_of(shape: Shape, families: int, element_size: int) -> tuple[Stretch, ...]:
    token = 2 * shape.batch * shape.heads * shape.width * element_size
    window = max(1, WINDOW_BYTES // token, triton.cdiv(shape.tokens, WINDOWS))
    sums = 4 * shape.pairs * families * COLUMNS * (2 * shape.width + 1)
    size = window * max(1, CHUNK_BYTES // sums)
    firsts = range(0, shape.tokens, size)
    return tuple(Stretch(first, min(size, shape.tokens - first), window) for first in firsts)


def children(routes: Routes, shape: Shape, geometry: Geometry, stretch: Stretch) -> tuple[Tensor, Readers]:
    """Readers of the children of all nodes that a stretch opened, by window and family of COLUMNS nodes; and their words (levels
    - 1, entries, COLUMNS / 32)."""
    device = routes.opened.device
    before, families = families_of(geometry, device)
    lead = (geometry.levels - 1, shape.pairs * stretch.tokens * geometry.beam)
    keys = torch.empty(lead, dtype=torch.int32, device=device)
    words = torch.empty(*lead, triton.cdiv(COLUMNS, 32), dtype=torch.int32, device=device)
    readers.gather_children[(triton.cdiv(lead[1], 256), lead[0])](
        routes.opened, routes.child_bits, before, keys, words, lead[1], shape.tokens, stretch.first, stretch.tokens,
        geometry.levels, families, stretch.window, stretch.windows, COLUMNS=COLUMNS, RADIX=geometry.radix,
        BEAM=geometry.beam, WIDTH=geometry.width, WORDS=words.shape[2], BM=256, num_warps=4,
    )  # fmt: skip
    most = max(CHILD_READERS, keys.numel() // CHILD_ITEMS)
    return words, Readers.of(keys, stretch.windows * shape.pairs * families, most)
