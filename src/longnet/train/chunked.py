"""Exact training on one sequence of any length, a chunk at a time, in memory that grows with its square root.

Pass one reads the chunks in order without gradients and keeps the dilated keys and values that later chunks can still see.
Pass two takes the chunks in reverse, recomputes each with gradients, and hands the gradients of kept rows to the chunk that
made them. The gradients of the parameters equal those of one backward pass over the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longnet.attention.cached import prefill_attention, write_rows
from longnet.attention.recurrent import attend_chunk
from longnet.patterns import DilatedPattern


class ChunkStore:
    """The kept rows of all layers and their gradients; stands where a model expects its cache.

    A branch is kept if one of its segments crosses a border between chunks. Keys and values are (B, rows, slots, D), segment
    after segment; gradients are fp32 of the same shape, made when the reverse pass begins.
    """

    differentiable = True

    def __init__(
        self, config: Any, batch: int, num_tokens: int, chunk: int, device: Any, dtype: torch.dtype
    ) -> None:
        if "hierarchical" in config.attention_kinds() or config.bidirectional:
            raise ValueError(
                "expected a causal model of dilated layers; got hierarchical or bidirectional ones; train it on whole windows"
            )
        self.pattern: DilatedPattern = config.pattern()
        self.num_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self.chunk, self.start, self.reverse = chunk, 0, False
        self.dtype = dtype
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        rows = [self._rows(w, r, num_tokens) for w, r in self.pattern.branches]

        def make(of: torch.dtype) -> list:
            return [
                [
                    tuple(
                        torch.zeros(batch, n, slots, config.head_dim, dtype=of, device=device)
                        for _ in range(2)
                    )
                    for n, slots in rows
                ]
                for _ in range(config.num_hidden_layers)
            ]

        self.rows = make(dtype)
        self._make_gradients: Callable[[], list] = lambda: make(torch.promote_types(dtype, torch.float32))
        self.gradients: list = []

    def _rows(self, w: int, r: int, num_tokens: int) -> tuple[int, int]:
        slots = len(self.pattern.slots(r, self.num_heads, self.num_key_heads))
        if self.chunk % w == 0 or self.chunk >= num_tokens:
            return 0, slots
        segments = -(-num_tokens // w)
        return (segments * self.pattern.rows(w, r) if segments > 1 else -(-num_tokens // r)), slots

    def begin(self, start: int, reverse: bool = False) -> None:
        """The next forward is that of the chunk at `start`."""
        if reverse and not self.reverse:
            self.gradients = self._make_gradients()
        self.start, self.reverse = start, reverse
        self.positions.fill_(start)

    def _segments(self, buffers: list, token: int) -> list[tuple[Tensor, Tensor]]:
        """Per branch the rows of the segment that holds `token`."""
        parts = []
        for (w, r), (keys, values) in zip(self.pattern.branches, buffers, strict=True):
            first = token // w * self.pattern.rows(w, r)
            part = slice(first, first + self.pattern.rows(w, r))
            parts.append((keys[:, part], values[:, part]))
        return parts

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, lengths: Any = None) -> Tensor:
        """Attention of the chunk at `start`: -> (B, n, H, D)."""
        if lengths is not None:
            raise ValueError("expected sequences of equal length in chunked training; got lengths")
        kept, before_dtype = self.rows[layer_index], q.dtype
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        before = self._segments(kept, self.start)
        last = self.start + q.shape[1] - 1
        if self.reverse:
            gradients = self.gradients[layer_index]
            parts = (before, self._segments(gradients, self.start), self._segments(gradients, last))
            return attend_chunk(q, k, v, self.pattern, self.start, *parts).to(before_dtype)
        out = prefill_attention(q, k, v, self.pattern, before, self.start).out
        write_rows(self._segments(kept, last), k, v, self.pattern, self.num_heads, self.start)
        return out.to(before_dtype)

    def advance(self, lengths: Any) -> None:
        """Positions are set by `begin`."""

    def nbytes(self) -> int:
        """Bytes of the kept rows and of their gradients."""
        return sum(
            x.nbytes for of in (self.rows, self.gradients) for layer in of for pair in layer for x in pair
        )


def chunked_backward(
    model: Any,
    input_ids: Tensor,
    targets: Tensor,
    chunk: int,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Accumulate the exact gradient of the mean loss into the parameters' .grad; the loss (nats) is returned, detached.

    Args:
        model: `LongNetForCausalLM`, causal and dilated.
        input_ids, targets: (B, N), any integers, on any device (chunks are moved and widened); targets[:, n] is to be predicted
            after input_ids[:, n], -100 is ignored.
        chunk: tokens recomputed at once, a multiple of the shortest segments saves rows; see `choose_chunk`.
        dtype: of the kept rows; None is the autocast dtype if autocast is on, else the dtype of the weights.
        scale: factor on the gradients, not on the loss that is returned.
        on_chunk: called with (chunks done, chunks to do), both passes counted.

    Raises:
        ValueError: shapes that differ, chunk < 1, or a model that is not causal and dilated.
    """
    if input_ids.shape != targets.shape or input_ids.dim() != 2 or chunk < 1:
        raise ValueError(
            f"expected input_ids and targets (B, N) alike and chunk >= 1; got {tuple(input_ids.shape)}, "
            f"{tuple(targets.shape)}, {chunk}"
        )
    parameter = next(model.parameters())
    device = parameter.device
    if dtype is None:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else parameter.dtype
    batch, num_tokens = input_ids.shape
    store = ChunkStore(model.config, batch, num_tokens, chunk, device, dtype)
    count = (targets != -100).sum().clamp(min=1).to(device)
    starts = range(0, num_tokens, chunk)
    done, todo = 0, 2 * len(starts) - 1
    with torch.no_grad():
        for start in starts[:-1]:  # nothing comes after the last chunk
            store.begin(start)
            model.model(input_ids=_moved(input_ids[:, start : start + chunk], device), past_key_values=store)
            done += 1
            if on_chunk is not None:
                on_chunk(done, todo)
    total = torch.zeros((), dtype=torch.promote_types(parameter.dtype, torch.float32), device=device)
    for start in reversed(starts):
        store.begin(start, reverse=True)
        part = slice(start, start + chunk)
        losses = model.token_losses(
            _moved(input_ids[:, part], device),
            targets=_moved(targets[:, part], device),
            past_key_values=store,
        )
        loss = losses.sum() / count
        (loss * scale).backward()
        total += loss.detach()
        done += 1
        if on_chunk is not None:
            on_chunk(done, todo)
    return total


def _moved(ids: Tensor, device: Any) -> Tensor:
    return ids.to(device, non_blocking=True).long()


def choose_chunk(config: Any, num_tokens: int, batch: int = 1, bytes_per_number: int = 2) -> int:
    """The chunk, a power of two times the shortest segment, that needs the least memory; the larger of equals.

    memory(c) = c (24 + 2 L) hidden + the kept rows (K and V in 16 bits, their gradients in 32) of all branches that cross
    chunks; the optimum grows with the square root of N.
    """
    pattern = config.pattern()
    width = config.num_hidden_layers * config.head_dim * (2 * bytes_per_number + 8)

    def memory(chunk: int) -> float:
        store = sum(
            len(pattern.slots(r, config.num_attention_heads, config.num_key_value_heads))
            * -(-num_tokens // r)
            for w, r in pattern.branches
            if chunk % w and chunk < num_tokens
        )
        return width * store + chunk * (24 + 2 * config.num_hidden_layers) * config.hidden_size

    shortest = min(pattern.segment_lengths)
    sizes = [shortest * 2**i for i in range(1 + max(0, math.ceil(math.log2(max(1, num_tokens / shortest)))))]
    return min(num_tokens, min(reversed(sizes), key=memory))
