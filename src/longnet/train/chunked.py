"""Exact training on one sequence of any length, a chunk at a time, in memory that grows with its square root.

Pass one reads the chunks in order without gradients and keeps what later chunks can still see: dilated keys and values, and of
hierarchical layers with a retention the tokens and summaries held at every border. Pass two takes the chunks in reverse,
recomputes each with gradients, and hands the gradients of what was kept to the chunk that made it. The gradients of the
parameters equal those of one backward pass over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longnet.attention.cached import prefill_attention, write_rows
from longnet.attention.hierarchical_cached import Step
from longnet.attention.hierarchical_recurrent import RecurrentState
from longnet.attention.hierarchical_torch import Parameters
from longnet.attention.recurrent import attend_chunk
from longnet.patterns import DilatedPattern


class ChunkStore:
    """The kept rows of all layers and their gradients; stands where a model expects its cache.

    A branch is kept if one of its segments crosses a border between chunks. Keys and values are (B, rows, slots, D), segment
    after segment; gradients are fp32 of the same shape, made when the reverse pass begins. A hierarchical layer has a
    `RecurrentState` of its own instead.
    """

    differentiable = True

    def __init__(
        self, config: Any, batch: int, num_tokens: int, chunk: int, device: Any, dtype: torch.dtype
    ) -> None:
        if config.bidirectional:
            raise ValueError("expected a causal model; got a bidirectional one; train it on whole windows")
        self.pattern: DilatedPattern = config.pattern()
        self.num_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self.chunk, self.start, self.reverse = chunk, 0, False
        self.dtype = dtype
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        rows = [self._rows(w, r, num_tokens) for w, r in self.pattern.branches]
        kinds = config.attention_kinds()
        tree: Any = config.hierarchical_pattern() if "hierarchical" in kinds else None
        tail = max(0, config.key_conv - 1)
        self.states = {
            index: RecurrentState(tree, batch, self.num_key_heads, config.head_dim, tail, dtype, device)
            for index, kind in enumerate(kinds)
            if kind == "hierarchical"
        }

        def make(of: torch.dtype) -> list:
            return [
                [
                    tuple(
                        torch.zeros(batch, n, slots, config.head_dim, dtype=of, device=device)
                        for _ in range(2)
                    )
                    for n, slots in rows
                ]
                if kind == "dilated"
                else []
                for kind in kinds
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
        for state in self.states.values():
            state.begin(start, reverse)

    def close(self, end: int) -> None:
        """After a forward without gradients: keep what the chunk hands on at position `end`."""
        for state in self.states.values():
            state.close(end)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of the chunk, from its share of the loss and from what it handed on to later chunks."""
        roots = [pair for state in self.states.values() for pair in state.roots()]
        torch.autograd.backward(
            [loss, *(x for x, _ in roots)], [torch.ones_like(loss), *(g for _, g in roots)]
        )
        for state in self.states.values():
            state.pull()

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

    def attend_hierarchical(
        self, layer_index: int, step: Step, parameters: Parameters, prior_query: Tensor, lengths: Any = None
    ) -> Tensor:
        """`attend` of a hierarchical layer: -> (B, n, H, D)."""
        if lengths is not None:
            raise ValueError("expected sequences of equal length in chunked training; got lengths")
        return self.states[layer_index].attend(step, parameters, prior_query)

    def key_tail(self, layer_index: int, k: Tensor, width: int, lengths: Any = None) -> Tensor:
        """The width - 1 raw keys before the chunk k (B, n, K, D)."""
        return self.states[layer_index].key_tail(k)

    def advance(self, lengths: Any) -> None:
        """Positions are set by `begin`."""

    def nbytes(self) -> int:
        """Bytes of all that is kept and of its gradients."""
        rows = (x for of in (self.rows, self.gradients) for layer in of for pair in layer for x in pair)
        return sum(x.nbytes for x in rows) + sum(state.nbytes() for state in self.states.values())


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
        model: `LongNetForCausalLM`, causal; hierarchical layers need a retention.
        input_ids, targets: (B, N), any integers, on any device (chunks are moved and widened); targets[:, n] is to be predicted
            after input_ids[:, n], -100 is ignored.
        chunk: tokens recomputed at once, a multiple of the shortest segments saves rows; see `plan.best_chunk`.
        dtype: of the kept rows; None is the autocast dtype if autocast is on, else the dtype of the weights.
        scale: factor on the gradients, not on the loss that is returned.
        on_chunk: called with (chunks done, chunks to do), both passes counted.

    Raises:
        ValueError: shapes that differ, chunk < 1, a model that is not causal, hierarchical layers that keep everything.
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
            store.close(start + chunk)
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
        store.backward(loss * scale)
        total += loss.detach()
        done += 1
        if on_chunk is not None:
            on_chunk(done, todo)
    return total


def _moved(ids: Tensor, device: Any) -> Tensor:
    return ids.to(device, non_blocking=True).long()
