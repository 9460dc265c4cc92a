"""Loss by position: does a longer context help? A text of any length is read as a stream with a bounded cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from longnet.model import LongNetCache, LongNetForCausalLM


@dataclass(frozen=True)
class StreamReport:
    """`bits_per_byte[i]` is the mean over positions [borders[i], borders[i + 1])."""

    tokens: int
    borders: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    cache_bytes: int
    seconds: float

    @property
    def mean(self) -> float:
        """Bits per byte over the whole text."""
        sizes = np.diff(self.borders)
        return float(np.dot(self.bits_per_byte, sizes) / sizes.sum())


@torch.no_grad()
def stream(
    model: LongNetForCausalLM,
    ids: np.ndarray,
    *,
    chunk: int = 4096,
    first_bucket: int = 256,
    on_chunk: Callable[[int, int], None] = lambda tokens, cache_bytes: None,
) -> StreamReport:
    """Read ids (N,) chunk by chunk through a `LongNetCache`; memory does not grow with N beyond the cache's formula.

    Position buckets double from `first_bucket`. Position p counts the prediction of token p + 1 from tokens 0 .. p.

    Raises:
        ValueError: fewer than two tokens or a chunk below one.
    """
    if len(ids) < 2 or chunk < 1:
        raise ValueError(
            f"expected at least two tokens and a chunk of at least one; got {len(ids)} and {chunk}"
        )
    model.eval()
    parameter = next(model.parameters())
    cache = LongNetCache(model.config, 1, parameter.device, parameter.dtype)
    count = len(ids) - 1
    borders = [0]
    while borders[-1] < count:
        borders.append(min(count, max(first_bucket, borders[-1] * 2)))
    sums = np.zeros(len(borders) - 1)
    started = time.perf_counter()
    for first in range(0, count, chunk):
        part = torch.from_numpy(ids[first : first + chunk + 1].astype(np.int64)).to(parameter.device)[None]
        inputs, targets = part[:, :-1], part[:, 1:]
        losses = model.token_losses(inputs, targets=targets, past_key_values=cache)[0].double().cpu().numpy()
        buckets = np.searchsorted(borders, np.arange(first, first + len(losses)), "right") - 1
        np.add.at(sums, buckets, losses)
        on_chunk(first + len(losses), cache.nbytes())
    bits = sums / np.diff(borders) / math.log(2)
    return StreamReport(
        count, tuple(borders), tuple(bits.tolist()), cache.nbytes(), time.perf_counter() - started
    )
