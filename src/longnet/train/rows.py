"""Where the chunked pass keeps rows of all layers: on the device, or in host memory, copied a layer ahead of the computation;
and the gradients of the rows in use."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longnet.attention.cached import Buffers
from longnet.patterns import DilatedPattern


class DeviceRows:
    """Keys and values of every layer and branch: (segments, B, rows, slots, D), zeros at first.

    `take` gives the segments of a layer that hold some tokens, for every branch a pair; `give` hands one of them back,
    changed. Here they are views. `shapes` holds the five numbers of every branch; a branch that is not kept has no rows.
    """

    pinned = False

    def __init__(
        self, pattern: DilatedPattern, layers: int, shapes: Sequence[tuple], dtype: torch.dtype, device: Any
    ) -> None:
        self.pattern, self.shapes, self.dtype, self.device = pattern, shapes, dtype, torch.device(device)
        self.layers = [self._pairs(shapes, self._home()) for _ in range(layers)]

    def _home(self) -> torch.device:
        return self.device

    def _pairs(self, shapes: Sequence[tuple], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        options: dict[str, Any] = {"dtype": self.dtype, "device": device}
        options["pin_memory"] = self.pinned and device.type == "cpu"
        return [(torch.zeros(shape, **options), torch.zeros(shape, **options)) for shape in shapes]

    def segments(self, layer: int, token: int) -> list[tuple[Tensor, Tensor]]:
        """Per branch the rows (B, rows, slots, D) of the segment that holds `token`, where they are kept."""
        parts = []
        for w, (keys, values) in zip(self.pattern.segment_lengths, self.layers[layer], strict=True):
            segment = min(token // w, len(keys) - 1)
            parts.append((keys[segment], values[segment]))
        return parts

    def take(self, layer: int, tokens: tuple[int, ...], ahead: int) -> list[Buffers]:
        """For each of `tokens` the segments that hold it; `ahead` is the layer that will be asked for next."""
        return [self.segments(layer, token) for token in tokens]

    def give(self, layer: int, token: int, parts: Buffers) -> None:
        """Keep what has been changed in the segments that were taken for `token`."""

    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for pair in layer for x in pair)


class HostRows(DeviceRows):
    """The same in host memory, of which the device holds the segments of two layers: one in use, one under way.

    On CUDA all copies are queued on a stream of their own, so that what is given back is written before it is taken again.
    A set of buffers is filled anew only after everything that was queued before on the computing stream, hence after its last
    use. Elsewhere copies are done at once.
    """

    def __init__(
        self, pattern: DilatedPattern, layers: int, shapes: Sequence[tuple], dtype: torch.dtype, device: Any
    ) -> None:
        self.copies = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self.pinned = self.copies is not None
        super().__init__(pattern, layers, shapes, dtype, device)
        # Two sets of buffers, each for two tokens.
        self.sets = [[self._pairs([s[1:] for s in shapes], self.device) for _ in range(2)] for _ in range(2)]
        if self.copies is not None:
            for x in (x for buffers in self.sets for pairs in buffers for pair in pairs for x in pair):
                x.record_stream(self.copies)  # when the last copy ends, the store may be gone
        self.arrived: torch.cuda.Event | None = None
        self.turn = 0
        self.under_way: tuple[int, tuple[int, ...]] | None = None

    def _home(self) -> torch.device:
        return torch.device("cpu")

    def _aside(self) -> Any:
        """Queue copies after what the computation has queued so far."""
        if self.copies is None:
            return contextlib.nullcontext()
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.copies)

    def _fetch(self, layer: int, tokens: tuple[int, ...]) -> None:
        self.turn = 1 - self.turn
        with self._aside():
            for token, buffers in zip(tokens, self.sets[self.turn], strict=False):
                _copy(buffers, self.segments(layer, token))
            if self.copies is not None:
                self.arrived = torch.cuda.Event()
                self.arrived.record(self.copies)
        self.under_way = layer, tokens

    def take(self, layer: int, tokens: tuple[int, ...], ahead: int) -> list[Buffers]:
        if self.under_way != (layer, tokens):  # the first layer of a chunk, or the pass has turned round
            self._fetch(layer, tokens)
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        taken = self.sets[self.turn][: len(tokens)]
        self.under_way = None
        if 0 <= ahead < len(self.layers):
            self._fetch(ahead, tokens)
        return taken  # type: ignore[return-value]

    def give(self, layer: int, token: int, parts: Buffers) -> None:
        with self._aside():
            _copy(self.segments(layer, token), parts)


class GradientRows:
    """Gradients of kept rows while the chunks are taken from the last to the first: of every layer and branch one segment.

    Only chunks that begin within a segment add to its rows, and only chunks that end in it read them. So of each layer the
    segment where the last chunk began is enough, whatever the length; where a chunk crosses a border, `spare`, one for all
    layers, takes the next.
    """

    def __init__(
        self, pattern: DilatedPattern, layers: int, shapes: Sequence[tuple], dtype: torch.dtype, device: Any
    ) -> None:
        def zeros() -> list[tuple[Tensor, Tensor]]:
            made = (torch.zeros(2, *shape[1:], dtype=dtype, device=device) for shape in shapes)
            return [(both[0], both[1]) for both in made]

        self.pattern, self.counts = pattern, [shape[0] for shape in shapes]
        self.layers, self.spare = [zeros() for _ in range(layers)], zeros()
        # The segment that stands in `layers`, unknown before the first chunk.
        self.held: list[list[int | None]] = [[None] * len(self.counts) for _ in range(layers)]

    def take(self, layer: int, start: int, last: int) -> tuple[Buffers, Buffers]:
        """Once for every chunk, in reverse order: of the segments where it begins, to be added to in place, and where it ends."""
        before, own = [], []
        for branch, (w, count) in enumerate(zip(self.pattern.segment_lengths, self.counts, strict=True)):
            first, end = (min(token // w, count - 1) for token in (start, last))
            pair = self.layers[layer][branch]
            if self.held[layer][branch] != end:  # no later chunk began in it
                _clear(pair)
            own.append(pair)
            if first != end:
                # What was read in the layer before this one is free again, and so is `pair` in the next.
                pair, self.spare[branch] = self.spare[branch], pair
                _clear(pair)
            before.append(pair)
            self.layers[layer][branch], self.held[layer][branch] = pair, first
        return before, own

    def nbytes(self) -> int:
        return sum(x.nbytes for layer in (*self.layers, self.spare) for pair in layer for x in pair)


def _clear(pair: tuple[Tensor, Tensor]) -> None:
    for x in pair:
        x.zero_()


def _copy(targets: Buffers, sources: Buffers) -> None:
    for pair, other in zip(targets, sources, strict=True):
        for target, source in zip(pair, other, strict=True):
            target.copy_(source, non_blocking=True)
