"""What a layer must know of its batch in place of an N x N mask: where every row's document begins and ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longnet.model.padding import mask_to_span, roll_rows

Operation = Callable[..., Tensor]


class Visible:
    """Padding and offsets of one forward pass: O(B N) at most, read on the host once, shared by all layers.

    It is what the mask function hands to every layer. Transformers treats it as an opaque mask (`ndim`, `contiguous`).

    Args:
        padding: (B, M) bool over everything seen, True where a token is real; None where nothing is padded.
        num_queries: tokens of this forward pass.
        offset: tokens before them. A tensor where a static cache counts on the device.
    """

    ndim = 0

    def __init__(self, padding: Tensor | None, num_queries: int, offset: int | Tensor) -> None:
        self.padding, self.num_queries, self.offset = padding, num_queries, offset
        self._spans: dict[str, tuple[Tensor, Tensor] | None] = {}

    def contiguous(self) -> Visible:
        return self

    @property
    def seen(self) -> int:
        """Keys that exist, this forward pass included; a static cache is longer."""
        return int(self.offset) + self.num_queries

    def keys(self) -> tuple[Tensor, Tensor] | None:
        """(first, length), both (B,), of every row among all keys; None where nothing is padded."""
        return self._span("keys", 0)

    def queries(self) -> tuple[Tensor, Tensor] | None:
        """The same among the tokens of this forward pass."""
        return self._span("queries", int(self.offset))

    def _span(self, name: str, begin: int) -> tuple[Tensor, Tensor] | None:
        if self.padding is None:
            return None
        if name not in self._spans:
            if self.padding.dim() != 2 or self.padding.shape[1] < self.seen:
                raise ValueError(
                    f"attention_mask: expected (B, {self.seen}), all tokens seen so far; got shape"
                    f" {tuple(self.padding.shape)}"
                )
            columns = self.padding[:, begin : self.seen]
            self._spans[name] = mask_to_span(columns, *columns.shape)
        return self._spans[name]


def visible_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Visible:
    """The mask function of every longnet attention implementation: never N x N, whatever the padding."""
    if isinstance(attention_mask, Visible):
        return attention_mask
    if not isinstance(kv_offset, Tensor) and kv_offset:
        raise ValueError(
            f"expected a cache that keeps all tokens; got one that has dropped {kv_offset}; use a DynamicCache without"
            " sliding_window, or longnet's StreamingCache"
        )
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in place, layer by layer
    return Visible(attention_mask, q_length, q_offset)


def over_documents(
    operation: Operation, q: Tensor, k: Tensor, v: Tensor, visible: Any, kwargs: dict[str, Any]
) -> Tensor:
    """operation(q, k, v, lengths) for every document by itself, wherever it lies in its row: -> (B, Nq, H, D).

    q (B, Nq, H, D) are the last of the tokens seen; k, v (B, Nk, K, D), longer than what was seen under a static cache.
    Outputs of padding are 0.
    """
    if visible is not None and not isinstance(visible, Visible):
        raise ValueError(
            f"attention_mask: expected a 2-D mask (B, N) of 0 and 1; got {tuple(getattr(visible, 'shape', ()))}; LongNet"
            " takes no N x N masks: its pattern says who sees whom"
        )
    if visible is not None and k.shape[1] > visible.seen:
        k, v = k[:, : visible.seen], v[:, : visible.seen]
    documents = _documents(q, k, visible, kwargs)
    if documents is not None:
        rows = [
            torch.cat([operation(q[b : b + 1, i:j], k[b : b + 1, i:j], v[b : b + 1, i:j]) for i, j in row], 1)
            for b, row in enumerate(documents)
        ]
        return torch.cat(rows)
    span = None if visible is None else visible.keys()
    if span is None:
        return operation(q, k, v)
    first, lengths = span
    if q.shape[1] == k.shape[1]:
        q, k, v = (roll_heads(x, first) for x in (q, k, v))
        return roll_heads(operation(q, k, v, lengths), -first)
    return _each_row(operation, q, k, v, first.tolist(), lengths.tolist())


def roll_heads(x: Tensor, shift: Tensor) -> Tensor:
    """out[b, n] = x[b, (n + shift[b]) mod N] for x (B, N, H, D)."""
    return roll_rows(x.flatten(2), shift).unflatten(2, x.shape[2:])


def _each_row(
    operation: Operation, q: Tensor, k: Tensor, v: Tensor, first: list[int], lengths: list[int]
) -> Tensor:
    """Queries that continue rows of different beginnings: every row over its own keys alone."""
    offset, rows = k.shape[1] - q.shape[1], []
    for b, (begin, length) in enumerate(zip(first, lengths, strict=True)):
        row, end = torch.zeros_like(q[b : b + 1]), begin + length
        low, high = max(begin, offset) - offset, end - offset
        if high > low:
            part = operation(q[b : b + 1, low:high], k[b : b + 1, begin:end], v[b : b + 1, begin:end])
            row = torch.cat((row[:, :low], part, row[:, high:]), 1)
        rows.append(row)
    return torch.cat(rows)


def _documents(
    q: Tensor, k: Tensor, visible: Visible | None, kwargs: dict[str, Any]
) -> list[list[tuple[int, int]]] | None:
    """(begin, end) of every packed document of every row; None where rows are single documents."""
    borders, tokens = kwargs.get("cu_seq_lens_q"), q.shape[1]
    if borders is not None:
        if q.shape[0] != 1 or tokens != k.shape[1]:
            raise ValueError(
                f"cu_seq_lens_q: expected one row of packed documents and no cache; got q {tuple(q.shape)}, k {tuple(k.shape)}"
            )
        ends = _once(borders, Tensor.tolist)
        if ends[0] != 0 or ends[-1] != tokens:
            raise ValueError(f"cu_seq_lens_q: expected 0, ..., {tokens}; got {ends[0]}, ..., {ends[-1]}")
        return [[(i, j) for i, j in itertools.pairwise(ends) if j > i]]
    positions = kwargs.get("position_ids")
    # Looked at even where transformers does not (it stops at the sight of a cache): a leak would be silent.
    padded = visible is not None and visible.padding is not None
    if padded or positions is None or positions.dim() != 2 or tokens != k.shape[1] or tokens < 2:
        return None
    if positions.shape[1] != tokens or positions.shape[0] not in (1, q.shape[0]):
        return None
    rows = _once(positions, _restarts)
    return None if rows is None else rows * (q.shape[0] // len(rows))


def _restarts(positions: Tensor) -> list[list[tuple[int, int]]] | None:
    """Documents of every row of position_ids (B, N): a new one wherever the next position does not follow."""
    broken = positions[:, 1:] != positions[:, :-1] + 1
    if not bool(broken.any()):
        return None
    rows = []
    for row in broken:
        borders = [0, *(row.nonzero()[:, 0] + 1).tolist(), positions.shape[1]]
        rows.append(list(itertools.pairwise(borders)))
    return rows


@torch.compiler.disable
def _once(x: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """read(x), which waits for the device: once per tensor, not once per layer."""
    if x.is_inference():
        return read(x)
    known = getattr(x, "_longnet_read", None)
    if known is None or known[0] != x._version:
        known = (x._version, read(x))
        x._longnet_read = known  # type: ignore[attr-defined]
    return known[1]
