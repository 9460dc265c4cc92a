"""Loss by position: does a longer context help? A text of any length is read as a stream with a bounded cache."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from longnet.model import LongNetCache, LongNetForCausalLM


@dataclass(frozen=True)
class StreamReport:
    """`bits_per_byte[i]` and `bytes_per_token[i]` are those of positions [borders[i], borders[i + 1])."""

    tokens: int
    borders: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    bytes_per_token: tuple[float, ...]
    cache_bytes: int
    seconds: float

    @property
    def mean(self) -> float:
        """Bits per byte over the whole text."""
        sizes = np.diff(self.borders) * self.bytes_per_token
        return float(np.dot(self.bits_per_byte, sizes) / sizes.sum())

    @property
    def text_bytes(self) -> int:
        """Bytes that the predicted tokens stand for."""
        share = np.dot(self.bytes_per_token, np.diff(self.borders)) / (self.borders[-1] - self.borders[0])
        return round(share * self.tokens)

    @property
    def loss(self) -> float:
        """Nats per token over the whole text."""
        return self.mean * self.text_bytes / self.tokens * math.log(2)

    @property
    def perplexity(self) -> tuple[float, ...]:
        """2^(bits per token) of every bucket."""
        return tuple(2.0 ** (b * n) for b, n in zip(self.bits_per_byte, self.bytes_per_token, strict=True))


@dataclass(frozen=True)
class PositionReport(StreamReport):
    """`StreamReport` over `windows` windows; `standard_error[i]` of bits_per_byte[i], between windows (nan for one)."""

    windows: int
    standard_error: tuple[float, ...]


@torch.no_grad()
def stream(
    model: LongNetForCausalLM,
    ids: np.ndarray,
    *,
    byte_lengths: np.ndarray | None = None,
    chunk: int = 4096,
    first_bucket: int = 256,
    cache: LongNetCache | None = None,
    on_chunk: Callable[[int, int], None] = lambda tokens, cache_bytes: None,
    stop: Callable[[], bool] = lambda: False,
) -> StreamReport:
    """Read ids (N,) chunk by chunk through a `LongNetCache`; memory does not grow with N beyond the cache's formula.

    Position buckets double from `first_bucket`. Position p counts the prediction of token p + 1 from tokens 0 .. p.

    Args:
        byte_lengths: (V,) bytes that each id stands for, as a tokenizer's; None: one.
        cache: continue what this cache, of one sequence, has read: ids[0] follows it and has its position. Afterwards it
            has read all but the last id.
        on_chunk: called with (predictions made, bytes of the cache).
        stop: asked after every chunk; the report then covers what was read.

    Raises:
        ValueError: fewer than two tokens, a chunk below one, or a cache of another batch size.
    """
    if cache is not None and cache.batch_size != 1:
        raise ValueError(
            f"cache: expected one sequence; got {cache.batch_size}; use cache.batch_select_indices"
        )
    if np.ndim(ids) != 1 or len(ids) < 2 or chunk < 1 or first_bucket < 1:
        raise ValueError(
            f"expected at least two tokens (N,), a chunk and a first bucket of at least one; got {np.shape(ids)}, {chunk} and"
            f" {first_bucket}"
        )
    cache = _cache(model, 1) if cache is None else cache
    begin, count = cache.host_positions[0], len(ids) - 1
    borders = _borders(begin, begin + count, first_bucket)
    sums = np.zeros((2, len(borders) - 1))
    started = time.perf_counter()
    done = 0
    for first, size, part in _sums(model, ids[None], byte_lengths, chunk, cache, borders, begin, stop):
        sums += part[:, 0]
        done = first + size
        on_chunk(done, cache.nbytes())
    if done < count:
        count = done
        borders = _borders(begin, begin + count, first_bucket)
        sums = sums[:, : len(borders) - 1]
    bits, sizes = sums[0] / math.log(2) / sums[1], sums[1] / np.diff(borders)
    seconds = time.perf_counter() - started
    return StreamReport(
        count, tuple(borders), tuple(bits.tolist()), tuple(sizes.tolist()), cache.nbytes(), seconds
    )


@torch.no_grad()
def by_position(
    model: LongNetForCausalLM,
    ids: np.ndarray,
    *,
    window: int,
    windows: int = 16,
    byte_lengths: np.ndarray | None = None,
    batch_size: int = 1,
    chunk: int = 4096,
    first_bucket: int = 256,
    on_chunk: Callable[[int, int], None] = lambda tokens, cache_bytes: None,
) -> PositionReport:
    """Bits per byte by position within windows of `window` predictions, each read from nothing.

    One stream meets every position once, with whatever text stands there. Here every bucket averages over the same number of
    windows, evenly spaced over ids (N,): a bucket lower than the one before it by more than their standard errors says that
    the longer context helps. Windows do not overlap; if fewer than `windows` fit, as many as fit are read. `byte_lengths`
    as in `stream`; a bucket's bits are divided by its bytes in all windows together.

    Raises:
        ValueError: text shorter than one window, or a number below one.
    """
    if min(window, windows, batch_size, chunk, first_bucket) < 1:
        raise ValueError(
            "expected window, windows, batch_size, chunk and first_bucket of at least one; got "
            f"{window}, {windows}, {batch_size}, {chunk} and {first_bucket}"
        )
    fitting = (len(ids) - 1) // window
    if fitting < 1:
        raise ValueError(
            f"expected at least {window + 1} tokens, one window; got {len(ids)}; shorten the window or give more text"
        )
    windows = min(windows, fitting)
    borders = _borders(0, window, first_bucket)
    # Spread over the whole text: window i lies in the i-th of `windows` equal parts.
    begins = [i * fitting // windows * window for i in range(windows)]
    sums, largest, started = [], 0, time.perf_counter()
    for i in range(0, windows, batch_size):
        part = np.stack([ids[begin : begin + window + 1] for begin in begins[i : i + batch_size]])
        cache, total = _cache(model, len(part)), np.zeros((2, len(part), len(borders) - 1))
        for first, size, by_bucket in _sums(model, part, byte_lengths, chunk, cache, borders):
            total += by_bucket
            largest = max(largest, cache.nbytes())
            on_chunk(i * window + len(part) * (first + size), cache.nbytes())
        sums.append(total)
    bits, sizes = np.concatenate(sums, 1)
    bits = bits / math.log(2)
    ratio, mean_size = bits.sum(0) / sizes.sum(0), sizes.mean(0)
    # Of a ratio of two means, to first order; with a byte a token it is that of the mean.
    spread = np.square(bits - ratio * sizes).sum(0) / max(windows - 1, 1)
    error = np.sqrt(spread / windows) / mean_size if windows > 1 else np.full(len(ratio), math.nan)
    return PositionReport(
        windows * window, tuple(borders), tuple(ratio.tolist()), tuple((mean_size / np.diff(borders)).tolist()), largest,
        time.perf_counter() - started, windows, tuple(error.tolist()),
    )  # fmt: skip


def _cache(model: LongNetForCausalLM, batch: int) -> LongNetCache:
    parameter = next(model.parameters())
    dtype = torch.get_autocast_dtype(parameter.device.type) if _autocasts(parameter) else parameter.dtype
    return LongNetCache(model.config, batch, parameter.device, dtype)


def _autocasts(parameter: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(parameter.device.type)


def _borders(begin: int, end: int, first_bucket: int) -> list[int]:
    """begin, then first_bucket, 2 first_bucket, ... as far as they lie in (begin, end), then end."""
    borders, border = [begin], first_bucket
    while border < end:
        if border > begin:
            borders.append(border)
        border *= 2
    return [*borders, end]


def _sums(
    model: LongNetForCausalLM,
    ids: np.ndarray,
    byte_lengths: np.ndarray | None,
    chunk: int,
    cache: LongNetCache,
    borders: list[int],
    begin: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first, n, sums (2, B, buckets)) of the losses and bytes of the predictions of ids[:, 1:], n at a time.

    ids (B, N) may be on disk.
    A chunk is handed out when the next one has been launched, so that a GPU does not wait for the host.
    """
    model.eval()
    waiting: tuple[int, int, torch.Tensor, torch.Tensor] | None = None
    for first in range(0, ids.shape[1] - 1, chunk):
        if waiting is not None and stop():
            break
        read = ids[:, first : first + chunk + 1].astype(np.int64)
        targets = read[:, 1:]
        sizes = torch.from_numpy(np.ones_like(targets) if byte_lengths is None else byte_lengths[targets])
        part = torch.from_numpy(read).to(cache.device)
        losses = model.token_losses(part[:, :-1], targets=part[:, 1:], past_key_values=cache)
        nats, size = (_by_bucket(borders, begin + first, x) for x in (losses, sizes))
        if waiting is not None:
            yield _handed_out(*waiting)
        waiting = first, losses.shape[1], nats, size
    if waiting is not None:
        yield _handed_out(*waiting)


def _handed_out(first: int, n: int, losses: torch.Tensor, sizes: torch.Tensor) -> tuple[int, int, np.ndarray]:
    return first, n, np.stack((losses.cpu().numpy(), sizes.numpy()))


def _by_bucket(borders: list[int], first: int, losses: torch.Tensor) -> torch.Tensor:
    """(B, buckets) fp64 sums of losses (B, n) whose first column is position `first`."""
    sums = torch.zeros(losses.shape[0], len(borders) - 1, dtype=torch.float64, device=losses.device)
    for i, (low, high) in enumerate(itertools.pairwise(borders)):
        if low < first + losses.shape[1] and high > first:
            sums[:, i] = losses[:, max(0, low - first) : high - first].sum(1, dtype=torch.float64)
    return sums
