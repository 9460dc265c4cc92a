"""Exact training on one sequence of any length, a chunk at a time, in memory that grows with its square root.

Pass one reads the chunks in order without gradients and keeps what later chunks can still see: dilated keys and values, and of
hierarchical layers with a retention the tokens and summaries held at every border. Pass two takes the chunks in reverse,
recomputes each with gradients, and hands the gradients of what was kept to the chunk that made it. The gradients of the
parameters equal those of one backward pass over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.attention.cached import Buffers, prefill_attention, write_rows
from longnet.attention.hierarchical_cached import Step
from longnet.attention.hierarchical_recurrent import RecurrentState
from longnet.attention.hierarchical_torch import Parameters
from longnet.attention.recurrent import attend_chunk
from longnet.patterns import DilatedPattern
from longnet.train.rows import DeviceRows, GradientRows, HostRows


class _KeptRows(NamedTuple):
    """What `attend_chunk` needs of the rows that one layer keeps, for a chunk from `start` to `last`."""

    kept: DeviceRows
    kept_gradients: GradientRows
    layer: int
    start: int
    last: int

    def rows(self, backward: bool) -> Buffers:
        return self.kept.take(self.layer, (self.start,), self.layer + (-1 if backward else 1))[0]

    def gradients(self) -> tuple[Buffers, Buffers]:
        return self.kept_gradients.take(self.layer, self.start, self.last)


class ChunkStore:
    """The kept rows of all layers and their gradients; stands where a model expects its cache.

    A branch is kept if one of its segments crosses a border between chunks. Gradients are fp32, of one segment a branch, made
    when the reverse pass begins; with `offload` keys and values lie in host memory. A hierarchical layer has a
    `RecurrentState` of its own instead.
    """

    differentiable = True

    def __init__(
        self,
        config: Any,
        batch: int,
        num_tokens: int,
        chunk: int,
        device: Any,
        dtype: torch.dtype,
        offload: bool = False,
    ) -> None:
        if config.bidirectional:
            raise ValueError("expected a causal model; got a bidirectional one; train it on whole windows")
        self.pattern: DilatedPattern = config.pattern()
        self.num_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self.chunk, self.start = chunk, 0
        self.dtype = dtype
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        kinds = config.attention_kinds()
        tree: Any = config.hierarchical_pattern() if "hierarchical" in kinds else None
        tail = max(0, config.key_conv - 1)
        self.states = {
            index: RecurrentState(tree, batch, self.num_key_heads, config.head_dim, tail, dtype, device)
            for index, kind in enumerate(kinds)
            if kind == "hierarchical"
        }

        if offload and self.states:
            raise ValueError(
                "offload: expected dilated attention in every layer; got hierarchical ones, whose states stay on the device"
            )
        shapes = [(*self._shape(w, r, batch, num_tokens), config.head_dim) for w, r in self.pattern.branches]
        # Layers that are not dilated keep no rows.
        home, self.index = HostRows if offload else DeviceRows, {}
        for layer, kind in enumerate(kinds):
            if kind == "dilated":
                self.index[layer] = len(self.index)

        self.rows = home(self.pattern, len(self.index), shapes, dtype, device)
        work = torch.promote_types(dtype, torch.float32)
        self._make_gradients = lambda: GradientRows(self.pattern, len(self.index), shapes, work, device)
        self.gradients: GradientRows | None = None

    def _shape(self, w: int, r: int, batch: int, num_tokens: int) -> tuple[int, int, int, int]:
        """(segments, B, rows, slots) of a branch."""
        slots = len(self.pattern.slots(r, self.num_heads, self.num_key_heads))
        if self.chunk % w == 0 or self.chunk >= num_tokens:
            return 1, batch, 0, slots
        segments = -(-num_tokens // w)
        return segments, batch, self.pattern.rows(w, r) if segments > 1 else -(-num_tokens // r), slots

    def begin(self, start: int, reverse: bool = False) -> None:
        """The next forward is that of the chunk at `start`."""
        if reverse and self.gradients is None:
            self.gradients = self._make_gradients()
        self.start = start
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

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, lengths: Any = None) -> Tensor:
        """Attention of the chunk at `start`: -> (B, n, H, D)."""
        if lengths is not None:
            raise ValueError("expected sequences of equal length in chunked training; got lengths")
        layer, before_dtype = self.index[layer_index], q.dtype
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        last = self.start + q.shape[1] - 1
        if self.gradients is not None:
            kept = _KeptRows(self.rows, self.gradients, layer, self.start, last)
            return attend_chunk(q, k, v, self.pattern, self.start, kept).to(before_dtype)
        before, after = self.rows.take(layer, (self.start, last), layer + 1)
        out = prefill_attention(q, k, v, self.pattern, before, self.start).out
        write_rows(after, k, v, self.pattern, self.num_heads, self.start)
        self.rows.give(layer, last, after)
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
        rows = self.rows.nbytes() + (0 if self.gradients is None else self.gradients.nbytes())
        return rows + sum(state.nbytes() for state in self.states.values())


def chunked_backward(
    model: Any,
    input_ids: Tensor,
    targets: Tensor,
    chunk: int,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    offload: bool = False,
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
        offload: keep rows in host memory (pinned for a GPU); dilated layers only.
        on_chunk: called with (chunks done, chunks to do), both passes counted.

    Raises:
        ValueError: shapes that differ, chunk < 1, a model that is not causal, hierarchical layers that keep everything, or that
            `offload` cannot serve.
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
    store = ChunkStore(model.config, batch, num_tokens, chunk, device, dtype, offload)
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
