"""`StreamingCache`: LongNet's log-size cache as `past_key_values` of other people's decoders."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from longnet.integrations.visible import Visible, roll_heads
from longnet.model.cache import LongNetCache
from longnet.patterns import DilatedPattern


class StreamingCache:
    """Keys and values of any decoder with `attn_implementation="longnet_dilated"`, bounded by the pattern.

    Memory is `pattern.cache_entries(H, K)` rows per layer and sequence at most, however much is read; outputs equal those of
    a cache that keeps everything. Padded batches, beams, chunked prefill and several turns work; cropping does not.

    Args:
        config: of a model that `patch` has prepared.

    Example:
        >>> patch(model, DilatedPattern.geometric(32768, window=1024))  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=StreamingCache(model.config))  # doctest: +SKIP
    """

    is_compileable = False
    is_sliding = is_linear = is_dummy = (False,)
    is_croppable = False

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        pattern = dilated_pattern(text)
        self._shape = SimpleNamespace(
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            pattern=lambda: pattern,
        )
        self._stream: LongNetCache | None = None
        self._columns = 0
        self._waiting: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Mark the keys (B, K, n, D) for the attention function, which gets them next and calls `attend`."""
        if self._waiting is not None:
            raise ValueError(
                f"expected attention of layer {self._waiting} to read this cache; another implementation ran in its place;"
                ' call longnet.integrations.patch, or load with attn_implementation="longnet_dilated"'
            )
        if self._stream is None:
            batch, device = key_states.shape[0], key_states.device
            self._stream = LongNetCache(self._shape, batch, device, key_states.dtype)
        self._waiting = layer_idx
        key_states._longnet_cache = (self, layer_idx)  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(
        self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, visible: Visible | None
    ) -> Tensor:
        """Attention of the next n tokens (B, n, H, D), which are then kept."""
        assert self._stream is not None
        self._waiting = None
        width = q.shape[3]
        if scale is not None and not math.isclose(scale, width**-0.5):
            q = q * (scale * math.sqrt(width))
        span = None if visible is None else visible.queries()
        if span is None:
            out = self._stream.attend(layer_idx, q, k, v)
        else:
            first, lengths = span
            q, k, v = (roll_heads(x, first) for x in (q, k, v))
            out = roll_heads(self._stream.attend(layer_idx, q, k, v, lengths), -first)
        if layer_idx == self._shape.num_hidden_layers - 1:
            self._stream.advance(q.shape[1] if span is None else span[1])
            self._columns += q.shape[1]
        return out

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return 0 if self._stream is None else self._stream.nbytes()

    # What transformers asks of a cache. Lengths count columns of the batch, padding included.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    get_max_length = get_max_cache_shape

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._columns + query_length, 0

    def __len__(self) -> int:
        return self._shape.num_hidden_layers

    def reset(self) -> None:
        """Forget everything."""
        self._stream, self._columns, self._waiting = None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._stream is not None:
            self._stream.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._stream is not None:
            self._stream.batch_select_indices(indices)

    def save(self, path: str | os.PathLike) -> None:
        """Write a snapshot; only for batches without padding, whose columns are their tokens."""
        if self._stream is None or any(n != self._columns for n in self._stream.host_positions):
            raise ValueError(
                "expected a cache that has read unpadded text; got an empty or a padded one; save before batching"
            )
        self._stream.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any, device: torch.device | str = "cpu") -> StreamingCache:
        """Read a snapshot; generation continues as if it had never stopped."""
        cache = cls(config)
        cache._stream = LongNetCache.load(path, cache._shape, device)
        cache._columns = max(cache._stream.host_positions)
        return cache


def dilated_pattern(config: Any) -> DilatedPattern:
    """The `DilatedPattern` that `patch` wrote into a configuration."""
    spec = getattr(config, "longnet", None)
    if not isinstance(spec, dict) or "segment_lengths" not in spec:
        raise ValueError(
            'config.longnet: expected {"segment_lengths": [...], "dilation_rates": [...]}; got'
            f" {spec!r}; call longnet.integrations.patch(model, DilatedPattern(...))"
        )
    offsets = spec.get("head_offsets", "cyclic")
    return DilatedPattern(tuple(spec["segment_lengths"]), tuple(spec["dilation_rates"]), offsets)
