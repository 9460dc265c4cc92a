"""`LongNetCache`: the state between tokens. Bounded by the pattern, never by what has been read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longnet.attention.cached import decode_attention, prefill_attention, write_rows, write_step
from longnet.attention.hierarchical_cached import Step
from longnet.attention.hierarchical_torch import Parameters
from longnet.model import snapshot
from longnet.model.cache_batch import CacheBatch, lasting
from longnet.model.hierarchical_states import HierarchicalStates

_MIN_ROWS = 64


class LongNetCache(CacheBatch):
    """Keys and values that later tokens may still see: per layer and branch (B, rows, slots, D), rows <= ceil(w / r).

    Buffers grow by doubling while the stream first reaches them, then stay: at most `pattern.cache_entries(H, K)` rows per
    layer and sequence, however many tokens were read. It serves as `past_key_values` of transformers' `generate`.

    Args:
        config: anything with num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim and pattern().
        batch_size: number of sequences; each has a position of its own.
        device, dtype: of keys and values.

    Attributes:
        positions: (B,) int64 on the device, tokens read by every sequence.
        layers: per dilated layer a list of (keys, values), one pair per branch; per hierarchical layer its states.

    Example:
        >>> from longnet import LongNetConfig, LongNetForCausalLM
        >>> model = LongNetForCausalLM(LongNetConfig.preset("tiny", num_hidden_layers=1))
        >>> cache = LongNetCache(model.config, batch_size=1)
        >>> for chunk in torch.randint(4, 260, (1, 100)).split(30, dim=1):
        ...     logits = model(input_ids=chunk, past_key_values=cache, use_cache=True).logits
        >>> cache.host_positions
        (100,)
    """

    is_compileable = False
    is_sliding = is_linear = is_dummy = (False,)
    is_croppable = False

    def __init__(
        self,
        config: Any,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1; got {batch_size!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype; got {dtype}")
        self.pattern = config.pattern()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_heads = config.num_key_value_heads or config.num_attention_heads
        self.dtype = dtype
        self._fingerprint = snapshot.fingerprint(config, self.pattern)
        with lasting():
            self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # The host's copy spares a synchronisation per step; both change only in `advance` and by batch operations.
        self._host = [0] * batch_size
        self._lengths: tuple[Tensor, list[int]] | None = None
        # Changes whenever a buffer or `positions` moves to another address.
        self.version = 0
        kinds = getattr(config, "attention_kinds", lambda: ["dilated"] * config.num_hidden_layers)()
        tree: Any = config.hierarchical_pattern() if "hierarchical" in kinds else None
        with lasting():
            self.layers: list[Any] = [
                [self._pair(batch_size, 0, branch) for branch in self.pattern.branches]
                if kind == "dilated"
                else HierarchicalStates(tree, batch_size, self.num_key_heads, self.head_dim, dtype, device)
                for kind in kinds
            ]

    def _pair(self, batch: int, rows: int, branch: tuple[int, int]) -> tuple[Tensor, Tensor]:
        slots = len(self.pattern.slots(branch[1], self.num_heads, self.num_key_heads))
        shape = (batch, rows, slots, self.head_dim)
        # Zeros, not empty: rows that are masked out must stay finite, 0 * NaN is NaN.
        with lasting():
            return tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))  # type: ignore[return-value]

    def _reserve(self, layer: list[tuple[Tensor, Tensor]], end: int) -> None:
        """Make room for positions below `end` in the buffers of a layer."""
        for i, (w, r) in enumerate(self.pattern.branches):
            full, have = self.pattern.rows(w, r), layer[i][0].shape[1]
            needed = min(full, -(-end // r))
            if needed <= have:
                continue
            grown = self._pair(self.batch_size, min(full, max(needed, 2 * have, _MIN_ROWS)), (w, r))
            for new, old in zip(grown, layer[i], strict=True):
                new[:, :have] = old
            layer[i] = grown
            self.version += 1

    def attend(
        self,
        layer_index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Attention of the next n tokens of every sequence, whose keys and values are kept: -> (B, n, H, D).

        q (B, n, H, D); k, v (B, n, K, D); `lengths` (B,): valid tokens of every sequence, padded on the right; outputs of
        padding mean nothing. Sequences may stand at different positions. `advance` must follow once all layers ran.
        """
        self._check(layer_index, q, k, v)
        n, layer = q.shape[1], self.layers[layer_index]
        host = self._host_lengths(lengths, n)
        k, v = k.to(self.dtype), v.to(self.dtype)
        self._reserve(layer, max(p + max(m, n == 1) for p, m in zip(self._host, host, strict=True)))
        if n == 1:
            return self._decode(layer, q.to(self.dtype), k, v).to(q.dtype)
        groups = list(_equal_runs(self._host, host))
        if len(groups) == 1 and groups[0] == slice(0, self.batch_size):
            return self._prefill(layer, q, k, v, groups[0], host)
        out = torch.zeros_like(q)
        for part in groups:
            out[part] = self._prefill(layer, q[part], k[part], v[part], part, host[part])
        return out

    def attend_hierarchical(
        self,
        layer_index: int,
        step: Step,
        parameters: Parameters,
        prior_query: Tensor,
        lengths: Tensor | None,
    ) -> Tensor:
        """`attend` of a hierarchical layer: -> (B, n, H, D)."""
        self._check(layer_index, step.q, step.k, step.v)
        host = self._host_lengths(lengths, step.q.shape[1])
        step = Step(*(x.to(self.dtype) for x in step))
        with lasting():
            return self.layers[layer_index].attend(step, parameters, prior_query, host)

    def key_tail(self, layer_index: int, k: Tensor, width: int, lengths: Tensor | None) -> Tensor:
        """The width - 1 raw keys before the chunk k (B, n, K, D); those of the chunk take their place."""
        with lasting():
            return self.layers[layer_index].key_tail(k, width, self._host_lengths(lengths, k.shape[1]))

    def _prefill(
        self, layer: list, q: Tensor, k: Tensor, v: Tensor, part: slice, lengths: list[int]
    ) -> Tensor:
        buffers = [(keys[part], values[part]) for keys, values in layer]
        start = self._host[part.start]
        out = prefill_attention(q.to(self.dtype), k, v, self.pattern, buffers, start).out
        # After attention: rows of the old segment are read by this chunk and may be overwritten by it.
        write_rows(buffers, k, v, self.pattern, self.num_heads, start, lengths)
        return out.to(q.dtype)

    def _decode(self, layer: list, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A sequence without a token in this step writes to the row of its next token, which will overwrite it.
        alike = self._host[0] if len(set(self._host)) == 1 else None
        write_step(layer, k, v, self.pattern, self.num_heads, self.positions, alike)
        return decode_attention(q, self.pattern, layer, self.positions, alike, max(self._host))

    @torch.no_grad()
    def advance(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Count the tokens that all layers have now attended: n for all sequences or lengths (B,). Once per forward."""
        if isinstance(lengths, int):
            host = [lengths] * self.batch_size
            self.positions.add_(lengths)
        else:
            host = self._host_lengths(lengths, None)
            self.positions.add_(torch.as_tensor(lengths, device=self.device).long())
        self._host = [p + n for p, n in zip(self._host, host, strict=True)]
        self._lengths = None

    # What a captured step needs: addresses that stay, and counting that happens once.

    def reserve_all(self) -> None:
        """Make all the room that the pattern allows now: dilated layers' buffers never move again, whatever is read."""
        for layer in self.layers:
            if not isinstance(layer, HierarchicalStates):
                self._reserve(layer, max(self.pattern.segment_lengths))

    def reserve_step(self) -> None:
        """Make room for one more token of every sequence."""
        for layer in self.layers:
            if not isinstance(layer, HierarchicalStates):
                self._reserve(layer, max(self._host) + 1)

    def count_step(self) -> None:
        """Tell the host that a replayed step has counted one token of every sequence on the device."""
        self._host = [p + 1 for p in self._host]
        self._lengths = None

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within, forwards leave the positions, on the host and on the device, as they were."""
        positions, host = self.positions.clone(), self._host
        yield
        self._host = host
        self._lengths = None
        if not torch.cuda.is_current_stream_capturing():
            self.positions.copy_(positions)

    def _host_lengths(self, lengths: Sequence[int] | Tensor | None, n: int | None) -> list[int]:
        """`lengths` as integers; a tensor is read once per forward, not once per layer."""
        if lengths is None:
            return [n or 0] * self.batch_size
        if isinstance(lengths, Tensor):
            if self._lengths is None or self._lengths[0] is not lengths:
                self._lengths = (lengths, lengths.tolist())
            host = self._lengths[1]
        else:
            host = [int(x) for x in lengths]
        if len(host) != self.batch_size or any(x < 0 or (n is not None and x > n) for x in host):
            raise ValueError(
                f"lengths: expected {self.batch_size} integers in [0, {n}]; got {host}; give one per sequence"
            )
        return host

    def _check(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        n = q.shape[1]
        queries = (self.batch_size, n, self.num_heads, self.head_dim)
        keys = (self.batch_size, n, self.num_key_heads, self.head_dim)
        if not 0 <= layer_index < len(self.layers):
            raise ValueError(f"layer_index: expected 0 .. {len(self.layers) - 1}; got {layer_index}")
        if tuple(q.shape) != queries or tuple(k.shape) != keys or tuple(v.shape) != keys or n < 1:
            raise ValueError(
                f"expected q {queries} and k, v {keys}; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
                "make the cache with the batch size and configuration of the model"
            )

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        own = [layer for layer in self.layers if isinstance(layer, HierarchicalStates)]
        pairs = [
            x
            for layer in self.layers
            if not isinstance(layer, HierarchicalStates)
            for pair in layer
            for x in pair
        ]
        return sum(layer.nbytes() for layer in own) + sum(x.nbytes for x in pairs)

    def _tensors(self) -> dict[str, Tensor]:
        named = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, HierarchicalStates):
                named |= {f"{i}.{name}": x for name, x in layer.tensors().items()}
                continue
            for j, pair in enumerate(layer):
                named |= {f"{i}.{j}.{name}": x for name, x in zip(("keys", "values"), pair, strict=True)}
        return named

    # What transformers' generate asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the longest sequence."""
        return max(self._host)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the stream has no end."""
        return -1

    get_max_length = get_max_cache_shape

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys, offset) of a mask over everything read: virtual, no mask is built."""
        return self.get_seq_length() + query_length, 0

    def __len__(self) -> int:
        return len(self.layers)

    def reset(self) -> None:
        """Forget everything; buffers stay allocated (stale rows are never read)."""
        self.version += 1
        self._host = [0] * self.batch_size
        with lasting():
            self.positions = torch.zeros_like(self.positions)
            for layer in self.layers:
                if isinstance(layer, HierarchicalStates):
                    layer.reset()

    def crop(self, max_length: int) -> None:
        """Refuse to go back: rows that newer tokens overwrote are gone. (transformers calls this in assisted decoding.)

        Raises:
            ValueError: max_length below what has been read.
        """
        if max_length < 0 or max_length < self.get_seq_length():
            raise ValueError(
                f"crop: expected a length of at least {self.get_seq_length()}, what has been read; got {max_length}; a "
                "LongNetCache keeps only rows that later tokens may see, so it cannot go back: take a copy() or save() "
                "before reading what may have to be undone"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write a snapshot (one safetensors file): to a temporary name, synchronised, renamed. Never half a file."""
        meta = {"config": self._fingerprint, "positions": self._host}
        snapshot.write(Path(path), self._tensors(), meta | {"dtype": str(self.dtype).removeprefix("torch.")})

    @classmethod
    @lasting()
    def load(cls, path: str | os.PathLike, config: Any, device: torch.device | str = "cpu") -> LongNetCache:
        """Read a snapshot for a model of the same configuration; it continues bit for bit.

        Raises:
            ValueError: not a snapshot, damaged, or of another configuration.
        """
        meta, tensors = snapshot.read(Path(path))
        wanted = snapshot.fingerprint(config, config.pattern())
        if meta["config"] != wanted:
            raise ValueError(
                f"{path}: expected a snapshot of configuration {wanted}; got {meta['config']}; "
                "load it with the model that wrote it"
            )
        host = meta["positions"]
        cache = cls(config, len(host), device, getattr(torch, meta["dtype"]))
        if tensors.keys() != cache._tensors().keys():
            raise ValueError(
                f"{path}: expected {len(cache._tensors())} buffers; got {len(tensors)}; write it anew"
            )
        cache._host = list(host)
        cache.positions = torch.tensor(host, dtype=torch.int64, device=device)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, HierarchicalStates):
                layer.load(
                    {
                        name.removeprefix(f"{i}."): x
                        for name, x in tensors.items()
                        if name.startswith(f"{i}.")
                    },
                    host,
                )
                continue
            for j in range(len(layer)):
                layer[j] = tuple(tensors[f"{i}.{j}.{name}"].to(device) for name in ("keys", "values"))  # type: ignore[assignment]
        return cache


def _equal_runs(positions: list[int], lengths: list[int]) -> Iterator[slice]:
    """Slices of neighbouring sequences that stand at the same position and have tokens to read."""
    begin = 0
    for b in range(len(positions) + 1):
        same = b < len(positions) and lengths[b] > 0 and positions[b] == positions[begin]
        if b > begin and not (same and lengths[begin] > 0):
            if lengths[begin] > 0:
                yield slice(begin, b)
            begin = b
