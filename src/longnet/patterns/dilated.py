"""Dilated patterns: segments and strides, a mixture of branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HeadOffsets = Literal["cyclic", "block"]


def _rows_before(end: int, offset: int, rate: int) -> int:
    """How many of the tokens offset, offset + rate, ... are smaller than `end`."""
    return max(0, -((offset - end) // rate))


@dataclass(frozen=True)
class DilatedPattern:
    """A mixture of dilated branches (segment length w, dilation rate r): LongNet, arXiv 2307.02486, equations 3-15.

    Token t lies in segment g = t // w of a branch and takes part in it, for head h, iff (t - g w) mod r == s, where s is
    the head's offset: `h mod r` ("cyclic", the paper) or `h // ceil(H / r)` ("block", torchscale's published weights).
    It then sees the tokens u of the same segment with (u - g w) mod r == s (and u <= t if causal).
    All branches together form one softmax over the multiset union of their keys.

    Args:
        segment_lengths: w of every branch, in tokens, each >= 1.
        dilation_rates: r of every branch, 1 <= r <= w. r need not divide w, w need not divide N.
        head_offsets: how heads are shifted against each other.

    Raises:
        ValueError: unequal or empty lists, a rate outside [1, w], or a pattern that leaves a (token, head) without keys.

    Coverage: token 1 of head 0 (offset 0 under both rules) takes part in a branch with w >= 2 only if 1 mod r == 0, that is
    r == 1, and w == 1 forces r == 1. So a pattern covers every (token, head) if and only if one of its rates is 1.

    Example:
        >>> pattern = DilatedPattern((2048, 4096), (1, 2))
        >>> pattern.branches
        ((2048, 1), (4096, 2))
        >>> DilatedPattern.geometric(max_length=8192, window=2048).dilation_rates
        (1, 2, 4)
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "cyclic"

    def __post_init__(self) -> None:
        lengths, rates = tuple(self.segment_lengths), tuple(self.dilation_rates)
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)
        if not lengths or len(lengths) != len(rates):
            raise ValueError(
                f"expected one dilation rate per segment length and at least one branch; got {len(lengths)} segment"
                f" lengths and {len(rates)} dilation rates"
            )
        for w, r in zip(lengths, rates, strict=True):
            if type(w) is not int or type(r) is not int or not 1 <= r <= w:
                raise ValueError(
                    f"expected integers 1 <= dilation rate <= segment length; got rate {r!r}, length {w!r}"
                )
        if 1 not in rates:
            raise ValueError(
                f"dilation rates {rates} leave token 1 of head 0 without any key; add a branch of rate 1 (a local window)"
            )
        if self.head_offsets not in ("cyclic", "block"):
            raise ValueError(f"expected head_offsets 'cyclic' or 'block'; got {self.head_offsets!r}")

    @classmethod
    def geometric(
        cls,
        max_length: int,
        window: int = 2048,
        ratio: int = 2,
        head_offsets: HeadOffsets = "cyclic",
    ) -> DilatedPattern:
        """w_i = window ratio^i and r_i = ratio^i until w covers `max_length` tokens (equations 11-12 and 18)."""
        if max_length < 1 or window < 1 or ratio < 2:
            raise ValueError(
                f"expected max_length >= 1, window >= 1, ratio >= 2; got {max_length}, {window}, {ratio}"
            )
        lengths, rates = [window], [1]
        while lengths[-1] < max_length:
            lengths.append(lengths[-1] * ratio)
            rates.append(rates[-1] * ratio)
        return cls(tuple(lengths), tuple(rates), head_offsets)

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """(w, r) of every branch."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    def offset(self, head: int, rate: int, num_heads: int) -> int:
        """s, the offset of a head in a branch of this rate."""
        if self.head_offsets == "cyclic":
            return head % rate
        return head // -(-num_heads // rate)

    @staticmethod
    def rows(w: int, r: int) -> int:
        """Rows that one offset of a segment holds at most: ceil(w / r)."""
        return -(-w // r)

    def slots(self, rate: int, num_heads: int, num_key_heads: int) -> tuple[tuple[int, int], ...]:
        """The distinct (key head, offset) pairs that the query heads use in a branch: what a cache must keep."""
        group = num_heads // num_key_heads
        return tuple(sorted({(h // group, self.offset(h, rate, num_heads)) for h in range(num_heads)}))

    def head_slots(self, rate: int, num_heads: int, num_key_heads: int) -> tuple[int, ...]:
        """For every query head the index of its pair in `slots`."""
        index = {pair: i for i, pair in enumerate(self.slots(rate, num_heads, num_key_heads))}
        group = num_heads // num_key_heads
        return tuple(index[h // group, self.offset(h, rate, num_heads)] for h in range(num_heads))

    def visible_pairs(self, num_tokens: int, num_heads: int, causal: bool = True) -> int:
        """(query, key) pairs that are computed, summed over heads; a key in two branches counts twice."""
        total = 0
        for w, r in self.branches:
            full, tail = divmod(num_tokens, w)
            for head in range(num_heads):
                s = self.offset(head, r, num_heads)
                for count, length in ((full, w), (1, tail)):
                    m = _rows_before(length, s, r)
                    total += count * (m * (m + 1) // 2 if causal else m * m)
        return total

    def flops(self, num_tokens: int, num_heads: int, head_width: int, causal: bool = True) -> int:
        """Forward floating-point operations: 4 D per visible pair (2 D for q k^T, 2 D for p v). Backward is 2.5 times that."""
        return 4 * head_width * self.visible_pairs(num_tokens, num_heads, causal)

    def cache_entries(self, num_heads: int, num_key_heads: int) -> int:
        """Key rows (each D wide; values the same again) that a stream keeps per layer and sequence, whatever it has read."""
        return sum(len(self.slots(r, num_heads, num_key_heads)) * self.rows(w, r) for w, r in self.branches)

    def receptive_field(self) -> int:
        """The longest distance, in tokens, at which a single layer can look back: the longest segment less one."""
        return max(self.segment_lengths) - 1
