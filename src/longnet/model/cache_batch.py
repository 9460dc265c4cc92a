"""The sequences of a streaming cache: chosen, copied, moved; they join and leave a batch one by one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from longnet.model.hierarchical_states import HierarchicalStates

if TYPE_CHECKING:
    from longnet.patterns import DilatedPattern


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Tensors made within outlive the call: ordinary ones even in inference mode, so that others may write to them later."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


class CacheBatch:
    """The part of `LongNetCache` that treats sequences as a batch and knows nothing of attention."""

    pattern: DilatedPattern
    dtype: torch.dtype
    positions: Tensor
    layers: list[Any]
    version: int
    _host: list[int]
    _lengths: tuple[Tensor, list[int]] | None
    _fingerprint: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def batch_size(self) -> int:
        return len(self._host)

    @property
    def host_positions(self) -> tuple[int, ...]:
        """`positions` without a synchronisation."""
        return tuple(self._host)

    def _reserve(self, layer: list[tuple[Tensor, Tensor]], end: int) -> None:
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b continues what sequence beam_idx[b] has read (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes `repeats` equal ones."""
        index = torch.arange(self.batch_size).repeat_interleave(repeats)
        self.batch_select_indices(index)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        index = indices.to(self.device)
        host_index = torch.arange(self.batch_size)[indices.cpu()].tolist()
        self.version += 1
        self._host = [self._host[b] for b in host_index]
        with lasting():
            self.positions = self.positions[index]
            self.layers = [
                layer.select(host_index)
                if isinstance(layer, HierarchicalStates)
                else [(k[index], v[index]) for k, v in layer]
                for layer in self.layers
            ]

    def copy(self) -> Self:
        """The same state in memory of its own: read on with one, return to the other."""
        other = copy.copy(self)
        other._host, other._lengths = list(self._host), None
        other.batch_select_indices(torch.arange(self.batch_size))
        return other

    # Sequences that join and leave a batch.

    def take(self, indices: Sequence[int]) -> Self:
        """The sequences `indices`, in this order, as a cache of their own: copies, with no more rows than they fill.

        Example:
            >>> from longnet import LongNetCache, LongNetConfig
            >>> cache = LongNetCache(LongNetConfig.preset("tiny"), batch_size=4)
            >>> cache.take([2, 0]).batch_size
            2
        """
        chosen = [self._place(b) for b in indices]
        if not chosen:
            raise ValueError("take: expected at least one sequence; got none")
        other = copy.copy(self)
        other._host, other._lengths = [self._host[b] for b in chosen], None
        with lasting():
            index = torch.tensor(chosen, device=self.device)
            other.positions = self.positions[index]
            other.layers = [
                layer.select(chosen)
                if isinstance(layer, HierarchicalStates)
                else [
                    (k[:, :n][index], v[:, :n][index])
                    for (k, v), n in zip(layer, self._filled(other._host), strict=True)
                ]
                for layer in self.layers
            ]
        return other

    @torch.no_grad()
    def put(self, index: int, sequence: CacheBatch) -> None:
        """Sequence `index` becomes a copy of what `sequence`, a cache of one, has read; nothing of the former is left.

        Buffers keep their addresses unless the newcomer needs more rows than there are (`version` tells).

        Raises:
            ValueError: no such place, or a cache of several sequences, another configuration, dtype or device.
        """
        index = self._place(index)
        mine = (1, self.dtype, self.device, self._fingerprint)
        its = (sequence.batch_size, sequence.dtype, sequence.device, sequence._fingerprint)
        if mine != its:
            raise ValueError(
                f"put: expected a cache of (sequences, dtype, device, configuration) {mine}; got {its}; take([i]) one "
                "sequence, and make both caches for the same model, dtype and device"
            )
        end = sequence._host[0]
        for own, layer in zip(self.layers, sequence.layers, strict=True):
            if isinstance(own, HierarchicalStates):
                with lasting():
                    own.put(index, layer)
                continue
            self._reserve(own, end)
            for pair, source, n in zip(own, layer, self._filled([end]), strict=True):
                for x, new in zip(pair, source, strict=True):
                    x[index, :n] = new[0, :n]
                    x[index, n:] = 0  # the former tenant's rows, which may hold NaN
        self._stand(index, end)

    @torch.no_grad()
    def clear(self, index: int) -> None:
        """Forget sequence `index`: it stands at 0 and its rows are zero."""
        index = self._place(index)
        for layer in self.layers:
            if isinstance(layer, HierarchicalStates):
                with lasting():
                    layer.clear(index)
                continue
            for x in (x for pair in layer for x in pair):
                x[index] = 0
        self._stand(index, 0)

    def _place(self, index: int) -> int:
        if not 0 <= index < self.batch_size:
            raise ValueError(
                f"index: expected 0 .. {self.batch_size - 1}, a sequence of this cache; got {index}"
            )
        return int(index)

    def _stand(self, index: int, position: int) -> None:
        self.positions[index] = position
        self._host[index] = position
        self._lengths = None

    def _filled(self, positions: list[int]) -> list[int]:
        """Per branch the rows that any of these positions has written."""
        return [min(self.pattern.rows(w, r), -(-max(positions) // r)) for w, r in self.pattern.branches]

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        other = self.copy()
        with lasting():
            other.positions = other.positions.to(device)
            other.layers = [
                layer.to(device, self._host)
                if isinstance(layer, HierarchicalStates)
                else [tuple(x.to(device) for x in pair) for pair in layer]
                for layer in other.layers
            ]
        return other
