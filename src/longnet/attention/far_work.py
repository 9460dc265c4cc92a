"""Integers behind the Triton launches of hierarchical attention: shapes, tiles, work items, tables of columns."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from longnet.patterns import HierarchicalPattern

# Readers of one work item of a gradient kernel: enough to amortise its loads, few enough to fill the device.
READERS = 1024

# Neighbouring nodes whose gradients one program sums: the rows of its products, the bits of a reader's word.
COLUMNS = 64

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
        "G": shape.group,
        "D": shape.width,
        "BD": max(16, triton.next_power_of_2(shape.width)),
        "PREC": "ieee" if dtype == torch.float32 else "tf32",
    }


# (heads per program, warps, stages, most registers) by kernel, for even groups with blocks up to 64 and for others: the best of
# those tried on an H200 (docs/log.md).
COVER_TILES = {
    "forward": ((2, 8, 2, 128), (1, 4, 2, None)),
    "dq": ((2, 8, 3, None), (1, 4, 2, None)),
    "dkv": ((1, 4, 2, None), (1, 4, 2, None)),
}
# Keys of the window that the forward pass takes at a time, at least a block.
WINDOW_KEYS = 64


def cover_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype, kernel: str) -> dict:
    # Two heads of a block of 128 ask for more shared memory than there is.
    even = shape.group % 2 == 0 and dtype != torch.float32 and geometry.block <= 64
    heads, warps, stages, registers = COVER_TILES[kernel][0 if even else 1]
    tile = tile_of(shape, dtype) | {"HG": heads, "BLOCK": geometry.block, "WINDOW": geometry.window}
    if kernel == "forward":
        tile["BK"] = max(geometry.block, WINDOW_KEYS)
    return tile | {
        "num_warps": warps,
        "num_stages": stages if dtype != torch.float32 else 1,
        "maxnreg": registers,
    }


# Rows of a tile of tokens, (warps, stages) of the kernels over such tiles, and how many places of opened leaves are on their way.
FAR_ROWS = 64
PLACE_STAGES = 3
FAR_TILES = {"score": (4, 2), "attend": (4, 2), "dq": (4, 2)}


def far_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype, kernel: str) -> dict:
    """Constants of a kernel over tiles of tokens: T tokens with all heads of a group fill the rows of one product."""
    warps, stages = FAR_TILES[kernel]
    return tile_of(shape, dtype) | {
        "GP": triton.next_power_of_2(shape.group),
        "T": tokens_per_tile(shape.group),
        "BC": 64 if dtype != torch.float32 else 16,
        "num_warps": warps,
        "num_stages": stages,
        **cover_constants(geometry),
    }


# Warps that search the candidates of one token.
SELECT_WARPS = 1

# (rows, warps, stages) of the kernels over the readers of a leaf.
LEAF_TILES = {"forward": (64, 4, 3), "backward": (128, 8, 2)}


def leaf_tile(shape: Shape, dtype: torch.dtype, kernel: str) -> dict:
    rows, warps, stages = LEAF_TILES[kernel]
    if dtype == torch.float32:
        rows, stages = 32, 1
    padded = triton.next_power_of_2(shape.group)
    tile = tile_of(shape, dtype) | {"GP": padded, "BM": max(rows, padded)}
    return tile | {"num_warps": warps, "num_stages": stages}


# (rows, warps, stages) of the kernel over the readers of COLUMNS nodes.
NODE_TILE = (128, 8, 2)


def node_tile(shape: Shape, geometry: Geometry, q: Tensor) -> dict:
    rows, warps, stages = NODE_TILE
    if q.dtype == torch.float32:
        rows, stages = 32, 1
    elif q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
        # For sm_80 the assembler gives up on two stages: 32 registers, everything else spilled.
        stages = 1
    tile = tile_of(shape, q.dtype) | {
        "COLUMNS": COLUMNS,
        "BM": rows,
        "num_warps": warps,
        "num_stages": stages,
    }
    return tile | {"BLOCK": geometry.block, "BEAM": geometry.beam}


# (rows, warps, stages) of the kernel over the readers of opened nodes' children.
CHILD_TILE = (128, 8, 2)


def child_tile(shape: Shape, geometry: Geometry, dtype: torch.dtype) -> dict:
    rows, warps, stages = CHILD_TILE
    if dtype == torch.float32:
        rows, stages = 32, 1
    padded = triton.next_power_of_2(shape.group)
    tile = tile_of(shape, dtype) | {"GP": padded, "BM": max(rows, padded), "COLUMNS": COLUMNS}
    return tile | {"BEAM": geometry.beam, "num_warps": warps, "num_stages": stages}


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


@functools.lru_cache(maxsize=64)
def listed_items(
    geometry: Geometry, shape: Shape, level: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Work items (pair, family, first token, last token) of a level's lists, the first item of every family, and the lists
    [lo, hi) of all blocks."""
    block, radix, readers = geometry.block, geometry.radix, max(1, READERS * 4 // shape.group)
    blocks = -(-shape.tokens // block)
    hi = np.maximum(0, np.arange(blocks) - geometry.window + 1)
    lo = hi
    for at in range(level + 1):
        if at:
            hi = lo // radix
        lo = radix * np.maximum(0, hi // radix - geometry.guard)
        if at == geometry.levels - 1:
            lo = np.zeros_like(hi)
    rows, first = [], [0]
    for pair in range(shape.pairs):
        for family in range(-(-geometry.sizes[level] // COLUMNS)):
            begin = int(np.searchsorted(hi, family * COLUMNS, side="right")) * block
            end = min(shape.tokens, int(np.searchsorted(lo, (family + 1) * COLUMNS, side="left")) * block)
            rows += [(pair, family, at, min(at + readers, end)) for at in range(begin, end, readers)]
            first.append(len(rows))
    items = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 4)
    bounds = torch.from_numpy(np.stack((lo, hi), 1).astype(np.int32)).to(device)
    return items, torch.tensor(first, dtype=torch.int64, device=device), bounds
