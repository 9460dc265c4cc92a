"""One hierarchical layer of a sequence that is trained chunk by chunk, with exact gradients.

A stream with a retention hands a state of bounded size from chunk to chunk. The state of every border is kept; in the reverse
pass a chunk is recomputed from the state before it, and takes the gradient of the state that it handed on back to that one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet.attention.hierarchical_cached import HierarchicalState, Rows, Step
from longnet.attention.hierarchical_torch import Parameters
from longnet.patterns import HierarchicalPattern


class GraphRows(Rows):
    """Rows of which the first stood at the border `before` (B, rows, ...) and the others, `new`, are appended in the graph."""

    def __init__(self, before: Tensor) -> None:
        super().__init__(before)
        self.before = before
        self.new: Tensor | None = None
        self.count = before.shape[1]  # how many of the newest are handed on

    def append(self, rows: Tensor) -> None:
        self.new = rows if self.new is None else torch.cat((self.new, rows), 1)
        self.buffer = torch.cat((self.before, self.new), 1)
        self.end = self.count = self.buffer.shape[1]

    def keep(self, count: int) -> None:
        self.count = min(count, len(self))

    def handed_on(self) -> Tensor:
        return self.live[:, len(self) - self.count :].detach().clone()

    def root(self, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """The new rows that are handed on and their part of the gradient of what is handed on."""
        mine = 0 if self.new is None else min(self.new.shape[1], self.count)
        if self.new is None or not mine or not self.new.requires_grad:
            return None
        return self.new[:, self.new.shape[1] - mine :], gradient[:, self.count - mine :].to(self.new.dtype)

    def pull(self, gradient: Tensor | None, work: torch.dtype) -> Tensor:
        """The gradient of `before`: what this chunk's backward pass left there, and that of the rows that were passed through."""
        found = self.before.grad
        total = torch.zeros_like(self.before, dtype=work) if found is None else found.to(work)
        through = self.count - (0 if self.new is None else min(self.new.shape[1], self.count))
        if gradient is not None and through:
            total[:, self.before.shape[1] - through :] += gradient[:, :through]
        return total


class RecurrentState:
    """States of one hierarchical layer at the borders between chunks, and the gradient of one of them.

    A chunk: `begin`, the layer's `key_tail` and `attend`, then `close` without gradients, or in reverse `roots`, a backward
    pass from them, `pull`. Rows are kept in `dtype`, summaries' masses and all gradients in fp32 at least.
    """

    def __init__(
        self,
        pattern: HierarchicalPattern,
        batch: int,
        key_heads: int,
        width: int,
        tail: int,
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        if pattern.retention is None:
            raise ValueError(
                "expected hierarchical layers with a retention, whose state is bounded; got retention=None; "
                "set it, for example hierarchical={'retention': [8192, 64]}, or train on whole windows"
            )
        self.pattern, self.dtype = pattern, dtype
        self.work = torch.promote_types(dtype, torch.float32)

        def rows(count: int, *shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, count, key_heads, *shape, dtype=of, device=device)

        node = [((width,), dtype), ((width,), dtype), ((), self.work), ((), self.work)]
        empty = [rows(0, width) for _ in range(3)]
        empty += [rows(0, *shape, of=of) for _ in range(pattern.most_levels()) for shape, of in node]
        # Before the first token: no tokens, no summaries, and zeros for the convolution.
        self.borders = {0: [rows(tail, width), *empty]}
        self.gradient: list[Tensor] | None = None
        self.start = 0
        self._leaves: list[Tensor] = []
        self._tail: GraphRows | None = None
        self._state: HierarchicalState | None = None
        self._pulled: list[GraphRows] = []

    def begin(self, start: int, reverse: bool) -> None:
        """The next forward is that of the chunk at `start`."""
        self.start = start
        self._leaves = [x.detach().requires_grad_(reverse) for x in self.borders[start]]

    def key_tail(self, k: Tensor) -> Tensor:
        """The raw keys before the chunk k (B, n, K, D), as many as the convolution needs."""
        tail = GraphRows(self._leaves[0])
        tail.append(k.to(self.dtype))
        tail.keep(self._leaves[0].shape[1])
        self._tail = tail
        return self._leaves[0].to(k.dtype)

    def attend(self, step: Step, parameters: Parameters, prior_query: Tensor) -> Tensor:
        """out (B, n, H, D). A second call, by a layer that is recomputed, begins at the same border."""
        key_heads, width = step.k.shape[2:]
        state = HierarchicalState(self.pattern, key_heads, width, self.dtype, step.k.device)
        tokens, nodes = self._leaves[1:4], self._leaves[4:]
        state.load_rows([GraphRows(x) for x in tokens], [GraphRows(x) for x in nodes], self.start)
        out = state.attend(Step(*(x.to(self.dtype) for x in step)), parameters, prior_query)
        self._state = state
        return out

    def _rows(self) -> list[GraphRows]:
        """What the chunk made of its leaves, in their order."""
        assert self._tail is not None
        assert self._state is not None
        levels = (x for level in self._state.levels for x in level)
        return [self._tail, *self._state.tokens, *levels]  # type: ignore[list-item]

    def close(self, end: int) -> None:
        """Keep the state that the chunk hands on at position `end`."""
        self.borders[end] = [x.handed_on() for x in self._rows()]
        self._forget()

    def roots(self) -> list[tuple[Tensor, Tensor]]:
        """(tensor, gradient) pairs from which the chunk's backward pass starts, besides its loss; `pull` must follow it."""
        # Taken now: a checkpointed layer calls `attend` again within the backward pass.
        self._pulled = self._rows()
        if self.gradient is None:
            return []
        pairs = (x.root(gradient) for x, gradient in zip(self._pulled, self.gradient, strict=True))
        return [pair for pair in pairs if pair is not None]

    def pull(self) -> None:
        """After the backward pass: the gradient of the state before the chunk, whose values are no longer needed."""
        handed_on = self.gradient or [None] * len(self._pulled)
        self.gradient = [
            x.pull(gradient, self.work) for x, gradient in zip(self._pulled, handed_on, strict=True)
        ]
        del self.borders[self.start]
        self._forget()

    def _forget(self) -> None:
        self._tail = self._state = None
        self._leaves, self._pulled = [], []

    def nbytes(self) -> int:
        """Bytes of the kept states and of the gradient."""
        kept = (x for border in self.borders.values() for x in border)
        return sum(x.nbytes for x in (*kept, *(self.gradient or [])))
