"""What a streaming cache holds for one hierarchical layer: a state per sequence, and raw keys for the convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet.attention.hierarchical_cached import HierarchicalState, Step
from longnet.attention.hierarchical_torch import Parameters
from longnet.patterns import HierarchicalPattern

# Raw keys kept for the convolution: the widest that a configuration may ask for, less one.
TAIL = 63


class HierarchicalStates:
    """Sequences stand at positions of their own, so each keeps its own tokens and summaries; they are read one by one."""

    def __init__(
        self,
        pattern: HierarchicalPattern,
        batch: int,
        key_heads: int,
        width: int,
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        self._kind = (pattern, key_heads, width, dtype)
        self.tail = torch.zeros(batch, TAIL, key_heads, width, dtype=dtype, device=device)
        self.states = [self._make() for _ in range(batch)]

    def _make(self) -> HierarchicalState:
        return HierarchicalState(*self._kind, self.tail.device)

    def attend(self, step: Step, parameters: Parameters, prior_query: Tensor, lengths: list[int]) -> Tensor:
        """(B, n, H, D): the next lengths[b] tokens of every sequence; outputs of padding are 0."""
        out = torch.zeros_like(step.q)
        for b, (state, n) in enumerate(zip(self.states, lengths, strict=True)):
            if n:
                part = Step(*(x[b : b + 1, :n] for x in step))
                out[b : b + 1, :n] = state.attend(part, parameters, prior_query)
        return out

    def key_tail(self, k: Tensor, width: int, lengths: list[int]) -> Tensor:
        before, self.tail = self.tail, self.tail.clone()
        for b, n in enumerate(lengths):
            self.tail[b] = torch.cat((before[b], k[b, :n].detach().to(before.dtype)))[-TAIL:]
        return before[:, TAIL - max(0, width - 1) :].to(k.dtype)

    def tensors(self) -> dict[str, Tensor]:
        named = {"tail": self.tail}
        for b, state in enumerate(self.states):
            named |= {f"{b}.{name}": x for name, x in state.tensors().items()}
        return named

    def load(self, tensors: dict[str, Tensor], positions: list[int]) -> None:
        self.tail = tensors["tail"].to(self.tail.device)
        for b, state in enumerate(self.states):
            mine = {name.removeprefix(f"{b}."): x for name, x in tensors.items() if name.startswith(f"{b}.")}
            state.load(mine, positions[b])

    def nbytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return self.tail.nbytes + sum(state.nbytes() for state in self.states)

    def select(self, indices: list[int]) -> HierarchicalStates:
        """The sequences `indices`, in this order, each independent of the others."""
        chosen = object.__new__(HierarchicalStates)
        chosen._kind = self._kind
        chosen.states = [self.states[b].copy() for b in indices]
        chosen.tail = self.tail[indices]
        return chosen

    def put(self, index: int, other: HierarchicalStates) -> None:
        """Sequence `index` becomes a copy of the only one of `other`."""
        self.states[index] = other.states[0].copy()
        self.tail[index] = other.tail[0]

    def clear(self, index: int) -> None:
        self.states[index] = self._make()
        self.tail[index] = 0

    def to(self, device: torch.device | str, positions: list[int]) -> HierarchicalStates:
        """A copy on another device; `positions`: tokens that every sequence has read."""
        moved = object.__new__(HierarchicalStates)
        moved._kind, moved.tail = self._kind, self.tail.to(device)
        moved.states = [moved._make() for _ in self.states]
        moved.load({name: x.clone() for name, x in self.tensors().items()}, positions)
        return moved

    def reset(self) -> None:
        self.states = [self._make() for _ in self.states]
        self.tail = torch.zeros_like(self.tail)
