"""Hierarchical attention over a stream: one sequence's tokens and summaries, carried like a counter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention import hierarchical_torch
from longnet.attention.hierarchical import unsupported
from longnet.attention.hierarchical_torch import Far, Parameters
from longnet.attention.pyramid import pool, token_mass
from longnet.patterns import HierarchicalPattern


class Step(NamedTuple):
    """A chunk of one sequence: q, q_local (1, n, H, D); k, k_local, v (1, n, K, D)."""

    q: Tensor
    q_local: Tensor
    k: Tensor
    k_local: Tensor
    v: Tensor


class Rows:
    """The newest rows of a growing array (1, rows, ...): appended at the end, dropped at the front, amortised O(1) a row."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.begin, self.end = buffer, 0, buffer.shape[1]

    @property
    def live(self) -> Tensor:
        return self.buffer[:, self.begin : self.end]

    def __len__(self) -> int:
        return self.end - self.begin

    def append(self, rows: Tensor) -> None:
        count = rows.shape[1]
        if self.end + count > self.buffer.shape[1]:
            grown = self.buffer.new_zeros((1, max(16, 2 * (len(self) + count)), *self.buffer.shape[2:]))
            grown[:, : len(self)] = self.live
            self.buffer, self.begin, self.end = grown, 0, len(self)
        self.buffer[:, self.end : self.end + count] = rows.detach()
        self.end += count

    def keep(self, count: int) -> None:
        """Drop all but the newest `count` rows; room that a long chunk needed is given back."""
        self.begin = max(self.begin, self.end - count)
        if self.buffer.shape[1] > 4 * max(16, len(self)):
            self.buffer, self.begin, self.end = self.live.clone(), 0, len(self)


def _by_kernels(q: Tensor, k: Tensor, pattern: HierarchicalPattern) -> bool:
    return not torch.is_grad_enabled() and unsupported(q, k, pattern, causal=True) is None


class HierarchicalState:
    """What one layer keeps of one sequence: `position` tokens were read.

    With retention None every token and node is kept; else only the newest (R_0, R_1, ..), the same whatever was read.
    """

    def __init__(
        self, pattern: HierarchicalPattern, key_heads: int, width: int, dtype: torch.dtype, device
    ) -> None:
        self.pattern, self.position = pattern, 0
        work = torch.promote_types(dtype, torch.float32)

        def rows(*shape: int, of: torch.dtype = dtype) -> Rows:
            return Rows(torch.zeros(1, 0, key_heads, *shape, dtype=of, device=device))

        self.tokens = [rows(width), rows(width), rows(width)]  # k, k_local, v
        self.levels = [
            [rows(width), rows(width), rows(of=work), rows(of=work)] for _ in range(pattern.most_levels())
        ]
        self._dropped = [0] * len(self.levels)

    def attend(self, step: Step, parameters: Parameters, prior_query: Tensor | None) -> Tensor:
        """out (1, n, H, D) of the next n tokens, which are kept."""
        n, start = step.q.shape[1], self.position
        for rows, new in zip(self.tokens, (step.k, step.k_local, step.v), strict=True):
            rows.append(new)
        self.position += n
        self._close_nodes(parameters.scale, prior_query)
        levels = self.pattern.num_levels(self.position)
        k, k_local, v = (rows.live for rows in self.tokens)
        live: list = [tuple(x.live for x in level) for level in self.levels[:levels]]
        if _by_kernels(step.q, k, self.pattern):
            from longnet.attention.hierarchical_fused import attend_next

            weights = (parameters.scale, parameters.level_bias, parameters.router_mix)
            return attend_next(step.q, k, v, step.q_local, k_local, live, self.pattern, *weights)
        # A stream drops whole blocks of tokens, so leaves stay aligned.
        first = tuple(self._count(level) - len(self.levels[level][0]) for level in range(levels))
        far = Far.of(k, v, live, self.position - len(self.tokens[0]), first)
        out, _ = hierarchical_torch.attend(
            step.q, step.q_local, k_local, far, self.pattern, True, parameters, self.position, start
        )
        self._drop()
        return out.to(step.q.dtype)

    def _count(self, level: int) -> int:
        return self.position // self.pattern.node_tokens(level)

    def _close_nodes(self, scale: float, prior_query: Tensor | None) -> None:
        """Pool the nodes that the new tokens complete, from the finest level up."""
        first_token = self.position - len(self.tokens[0])
        for level, rows in enumerate(self.levels):
            new = self._count(level) - self._closed(level)
            if not new:
                return
            children = self.pattern.block if level == 0 else self.pattern.radix
            begin = self._closed(level) * children
            if level == 0:
                part = slice(begin - first_token, begin - first_token + new * children)
                k, v = self.tokens[0].live[:, part], self.tokens[2].live[:, part]
                mass = token_mass(k, prior_query, scale)
                source = (k, v, mass, torch.zeros_like(mass))
            else:
                below = self.levels[level - 1]
                oldest = self._count(level - 1) - len(below[0])
                part = slice(begin - oldest, begin - oldest + new * children)
                source = tuple(x.live[:, part] for x in below)
            pooled = pool(source[0], source[1], source[2], source[3], new, children)
            for kept, x in zip(rows, pooled, strict=True):
                kept.append(x)
            self._dropped[level] = self._count(level) - len(rows[0])

    def _closed(self, level: int) -> int:
        """Nodes of a level that were closed so far."""
        return self._dropped[level] + len(self.levels[level][0])

    def _drop(self) -> None:
        kept = self.pattern.retention
        if kept is None:
            return
        block = self.pattern.block
        # The tokens of the unfinished block come on top of the whole blocks that are kept.
        for rows in self.tokens:
            rows.keep(kept[0] + self.position % block)
        for level, level_rows in enumerate(self.levels):
            for rows in level_rows:
                rows.keep(kept[min(level + 1, len(kept) - 1)])
            self._dropped[level] = self._count(level) - len(level_rows[0])

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, by name: the same names whatever was read."""
        names = dict(zip(("k", "k_local", "v"), (rows.live for rows in self.tokens), strict=True))
        for level, rows in enumerate(self.levels):
            parts = zip(("kbar", "vbar", "mass", "entropy"), rows, strict=True)
            names |= {f"{level}.{name}": x.live for name, x in parts}
        return names

    def nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(
            rows.buffer.nbytes for rows in (*self.tokens, *(x for level in self.levels for x in level))
        )

    def load(self, tensors: dict[str, Tensor], position: int) -> None:
        """The inverse of `tensors`."""
        device = self.tokens[0].buffer.device
        names = [
            f"{level}.{name}"
            for level in range(len(self.levels))
            for name in ("kbar", "vbar", "mass", "entropy")
        ]
        tokens, nodes = (
            [Rows(tensors[x].to(device)) for x in group] for group in (("k", "k_local", "v"), names)
        )
        self.load_rows(tokens, nodes, position)

    def load_rows(self, tokens: Sequence[Rows], nodes: Sequence[Rows], position: int) -> None:
        """Stand at `position` with k, k_local, v and, level after level, kbar, vbar, mass, entropy."""
        self.position, self.tokens = position, list(tokens)
        for level in range(len(self.levels)):
            self.levels[level] = list(nodes[4 * level : 4 * level + 4])
            self._dropped[level] = self._count(level) - len(self.levels[level][0])

    def copy(self) -> HierarchicalState:
        """An independent state that has read the same."""
        key_heads, width = self.tokens[0].buffer.shape[2:]
        other = HierarchicalState(
            self.pattern, key_heads, width, self.tokens[0].buffer.dtype, self.tokens[0].buffer.device
        )
        other.load({name: x.clone() for name, x in self.tensors().items()}, self.position)
        return other
