"""Masked spans: the pre-training objective of bidirectional models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longnet.text import FIRST_BYTE, MASK


def mask_spans(
    ids: Tensor, seed: tuple[int, ...], fraction: float = 0.2, mean_span: float = 8.0
) -> tuple[Tensor, Tensor]:
    """Replace spans of bytes by MASK. Returns (masked ids, labels), both (B, N) int64; labels are -100 where unmasked.

    Span lengths are geometric with mean `mean_span`: at byte level a span must reach beyond a word, or spelling alone fills
    it in (after SpanBERT, Joshi et al. 2020). Spans start independently, at a rate that masks about `fraction` of the bytes.
    Special ids are never masked. The same seed gives the same spans on every machine.

    Args:
        ids: (B, N) int64 on the CPU.
        seed: non-negative integers.
    """
    generator = np.random.default_rng(seed)
    batch, n = ids.shape
    # A byte stays visible with probability exp(-starts x mean_span): spans may overlap.
    rate = min(1.0, -np.log(1 - fraction) / mean_span)
    starts = generator.random((batch, n)) < rate
    spans = generator.geometric(1 / mean_span, (batch, n))
    position = np.arange(n)
    reach = np.maximum.accumulate(np.where(starts, position + spans, 0), axis=1)
    masked = torch.from_numpy(reach > position) & (ids >= FIRST_BYTE)
    return ids.masked_fill(masked, MASK), ids.masked_fill(~masked, -100)
