"""Hierarchical patterns: a local window, lists of summaries that grow coarser with distance, and how much is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_COUNTED = 2**14
_GOLDEN = 0.6180339887498949


class Cover(NamedTuple):
    """What the queries of one block see when nothing is opened: every visible token exactly once.

    local: tokens [begin, end), of which a causal query t sees those up to t. left, right: per level (0 = leaf blocks) the
    nodes [lo, hi) before and after the window.
    """

    local: tuple[int, int]
    left: tuple[tuple[int, int], ...]
    right: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HierarchicalPattern:
    """A tree over the tokens, its data-independent cover, and the budget for opening nodes.

    Leaf j holds the tokens [j block, (j + 1) block); node j of level l the radix children [j radix, (j + 1) radix) of level
    l - 1. A query of block i sees the tokens of its window of `window_blocks` blocks; farther away, with hi = the window's
    first block, level 0 lists the nodes [lo, hi), lo = radix max(0, hi // radix - guard), and the next level goes on from
    hi = lo / radix, until nothing is left or, with `levels`, the last level lists everything. Bidirectional queries list the
    mirror image to the right. A list never exceeds radix (guard + 1) - 1 nodes unless `levels` caps the depth.

    Args:
        block: tokens of a leaf.
        radix: children of a node.
        window_blocks: leaves seen token by token, the query's own included.
        guard: parents kept open on each level between a list and the next coarser one.
        levels: None lets the depth follow the query's position; an integer caps it.
        top_k: leaves opened to their tokens, per query token and key head; 0 opens nothing.
        beam: nodes opened on every level above the leaves; None means top_k.
        retention: None keeps everything. (R_0, R_1, ..): tokens, then nodes of level 0, 1, .. that a stream keeps, the last
            number holding for all coarser levels. A node may be opened only while its children are kept.

    Raises:
        ValueError: values out of range, or a retention too short for the window and the lists.

    Example:
        >>> pattern = HierarchicalPattern(block=64, radix=8)
        >>> pattern.cover(20, 64 * 21).local
        (832, 1344)
        >>> pattern.cover(20, 64 * 21).left
        ((0, 13),)
    """

    block: int = 64
    radix: int = 8
    window_blocks: int = 8
    guard: int = 1
    levels: int | None = None
    top_k: int = 16
    beam: int | None = 32
    retention: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("radix", 2), ("window_blocks", 1), ("guard", 0), ("top_k", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}; got {value!r}")
        for name in ("levels", "beam"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: expected None or an integer >= 1; got {value!r}")
        if self.retention is None:
            return
        kept = tuple(self.retention)
        object.__setattr__(self, "retention", kept)
        if self.levels is not None:
            raise ValueError(
                "retention: expected levels=None (a capped depth lists all nodes); remove one of the two"
            )
        # Behind the newest node of a level lie the window, one guard and the longest list.
        needed = (
            self.window_blocks * self.block,
            self.radix * (self.guard + 1) + self.window_blocks + self.guard,
        )
        if (
            not kept
            or any(type(x) is not int for x in kept)
            or kept[0] < needed[0]
            or min((*kept[1:], 10**9)) < needed[1]
        ):
            raise ValueError(
                f"retention: expected integers, at least {needed[0]} tokens (the window) and then at least {needed[1]} nodes "
                f"a level (radix (guard + 1) + window_blocks + guard); got {kept}"
            )
        if len(kept) < 2:
            raise ValueError(f"retention: expected the tokens and at least one number of nodes; got {kept}")
        if kept[0] % self.block:
            raise ValueError(f"retention: expected tokens in whole blocks of {self.block}; got {kept[0]}")

    def opened(self, level: int) -> int:
        """How many nodes of a level (0 = leaves) are opened at most."""
        return self.top_k if level == 0 or self.beam is None or not self.top_k else self.beam

    def node_tokens(self, level: int) -> int:
        """Tokens under a node of a level (0 = leaves)."""
        return self.block * self.radix**level

    def num_levels(self, num_tokens: int, causal: bool = True) -> int:
        """Levels that the cover of any of the first `num_tokens` tokens uses, at least 1."""
        if self.levels is not None:
            return self.levels
        blocks = -(-num_tokens // self.block)
        if causal:
            hi, levels = blocks - self.window_blocks, 0
            while hi > 0:
                levels, hi = levels + 1, max(0, hi // self.radix - self.guard)
            return max(1, levels)
        lo, size, levels = self.window_blocks, blocks, 0
        while lo < size:
            levels, lo, size = levels + 1, -(-lo // self.radix) + self.guard, -(-size // self.radix)
        return max(levels, self.num_levels(num_tokens))

    def most_levels(self) -> int:
        """Levels that any causal sequence shorter than 2^40 tokens can need."""
        return self.num_levels(2**40)

    def node_counts(self, num_tokens: int, causal: bool = True) -> tuple[int, ...]:
        """Nodes of every level over `num_tokens` tokens: complete ones if causal, else the last may be partial."""
        sizes = []
        for level in range(self.num_levels(num_tokens, causal)):
            span = self.node_tokens(level)
            sizes.append(num_tokens // span if causal else -(-num_tokens // span))
        return tuple(sizes)

    def cover(self, query_block: int, num_tokens: int, causal: bool = True) -> Cover:
        """The cover of a block of queries within a sequence of `num_tokens` tokens."""
        levels = self.num_levels(num_tokens, causal)
        first = max(0, query_block - self.window_blocks + 1)
        left, hi = [], first
        for level in range(levels):
            lo = 0 if level == levels - 1 else self.radix * max(0, hi // self.radix - self.guard)
            left.append((lo, hi))
            hi = lo // self.radix
        if causal:
            end = min(num_tokens, (query_block + 1) * self.block)
            return Cover((first * self.block, end), tuple(left), ((0, 0),) * levels)
        sizes = self.node_counts(num_tokens, causal=False)
        lo = min(sizes[0], query_block + self.window_blocks)
        end, right = min(num_tokens, lo * self.block), []
        for level, size in enumerate(sizes):
            hi = size if level == levels - 1 else min(size, self.radix * (-(-lo // self.radix) + self.guard))
            right.append((min(lo, hi), hi))
            lo = size if hi == size else hi // self.radix
            if level + 1 < levels and hi == size:
                lo = sizes[level + 1]
        return Cover((first * self.block, end), tuple(left), tuple(right))

    def bounds(
        self, num_tokens: int, causal: bool = True, first: int = 0, count: int | None = None
    ) -> np.ndarray:
        """The covers of `count` blocks from `first` on: (levels, 4, count) int64 of left lo, left hi, right lo, right hi."""
        blocks = np.arange(first, -(-num_tokens // self.block) if count is None else first + count)
        if not causal:
            covers = [self.cover(int(i), num_tokens, causal) for i in blocks]
            table = [[*left, *right] for c in covers for left, right in zip(c.left, c.right, strict=True)]
            return np.array(table, np.int64).reshape(len(blocks), -1, 4).transpose(1, 2, 0)
        levels = self.num_levels(num_tokens)
        result = np.zeros((levels, 4, len(blocks)), np.int64)
        hi = np.maximum(0, blocks - self.window_blocks + 1)
        for level in range(levels):
            lo = self.radix * np.maximum(0, hi // self.radix - self.guard)
            if level == levels - 1:
                lo = np.zeros_like(hi)
            result[level, 0], result[level, 1] = lo, hi
            hi = lo // self.radix
        return result

    def first_openable(self, query_block: int, level: int) -> int:
        """The first node of a level whose children a stream still keeps when it reads this block."""
        if self.retention is None:
            return 0
        if level == 0:
            return max(0, query_block + 1 - self.retention[0] // self.block)
        kept = self.retention[min(level, len(self.retention) - 1)]
        complete = query_block // self.radix ** (level - 1)
        return max(0, -(-(complete - kept) // self.radix))

    def keys_per_query(self, num_tokens: int) -> tuple[int, int]:
        """(scored, attended) at the last token: summaries that are scored, and keys and summaries in its softmax."""
        block = (num_tokens - 1) // self.block
        cover = self.cover(block, num_tokens)
        local = num_tokens - cover.local[0]
        scored, above = 0, 0
        for level in range(len(cover.left) - 1, -1, -1):
            lo, hi = cover.left[level]
            candidates = hi - lo + above * self.radix
            scored += candidates
            above = min(self.opened(level), candidates)
        return scored, local + scored + above * (self.block - 1)

    def flops(self, num_tokens: int, num_heads: int, head_width: int) -> int:
        """Forward operations of a causal pass, to leading order: 4 D a key attended, 2 D more a summary scored to open.

        In texts of more than 2^14 blocks a sample of them is counted, to within 0.1 %.
        """
        total, blocks = 0, -(-num_tokens // self.block)
        # Multiples of the golden ratio spread evenly and are in step with no power of the radix.
        sample = (
            range(blocks) if blocks <= _COUNTED else [int(i * _GOLDEN % 1 * blocks) for i in range(_COUNTED)]
        )
        for block in sample:
            end = min(num_tokens, (block + 1) * self.block)
            scored, attended = self.keys_per_query(end)
            per_query = 4 * attended + (2 * scored if self.top_k else 0)
            tokens = end - block * self.block
            total += tokens * per_query - 2 * tokens * (
                tokens - 1
            )  # earlier tokens of the block see fewer of its keys
        return total * blocks // len(sample) * num_heads * head_width

    def cache_entries(self, num_tokens: int) -> tuple[int, int]:
        """(token rows, summary rows) that a stream keeps per key head after `num_tokens` tokens."""
        # A stream closes the nodes of a level before any query is far enough to list them.
        sizes = [num_tokens // self.node_tokens(level) for level in range(self.most_levels())]
        if self.retention is None:
            return num_tokens, sum(sizes)
        kept = self.retention
        rows = [min(size, kept[min(level + 1, len(kept) - 1)]) for level, size in enumerate(sizes)]
        return min(num_tokens, kept[0] + num_tokens % self.block), sum(rows)
