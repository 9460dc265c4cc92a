"""What blocks of queries list, as tables on the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longnet.patterns import HierarchicalPattern


class Lists(NamedTuple):
    """What some blocks of queries list: per level the nodes left and right of the window (blocks, longest), -1 filled, where
    anybody lists any; and least (levels, blocks), the first node that may be opened, or None without a retention.

    They are made on the host and uploaded at once: asking the device for sizes would wait for all that was queued.
    """

    nodes: tuple[tuple[Tensor, ...], ...]
    least: Tensor | None

    @classmethod
    def of(
        cls,
        pattern: HierarchicalPattern,
        num_tokens: int,
        causal: bool,
        first: int,
        count: int,
        device: torch.device,
    ) -> Lists:
        # The causal lists of a block are the same from its first token to its last.
        whole = -(-num_tokens // pattern.block) * pattern.block if causal else num_tokens
        return _lists(pattern, whole, causal, first, count, device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a later backward pass keeps them
def _lists(
    pattern: HierarchicalPattern, num_tokens: int, causal: bool, first: int, count: int, device: torch.device
) -> Lists:
    bounds = pattern.bounds(num_tokens, causal, first, count)
    tables = []
    for level in bounds:
        for lo, hi in (level[:2], level[2:]):
            node = lo[:, None] + np.arange(max(0, (hi - lo).max()))
            tables.append(np.where(node < hi[:, None], node, -1))
    if pattern.retention is not None:
        blocks, levels = range(first, first + count), range(len(bounds))
        tables.append(
            np.array([[pattern.first_openable(block, level) for block in blocks] for level in levels])
        )
    uploaded = torch.from_numpy(np.concatenate([x.ravel() for x in tables]))
    if device.type == "cuda":
        uploaded = uploaded.pin_memory()
    parts = uploaded.to(device, non_blocking=True).split([x.size for x in tables])
    listed = [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
    least = listed.pop() if pattern.retention is not None else None
    pairs = zip(listed[::2], listed[1::2], strict=True)
    return Lists(tuple(tuple(x for x in pair if x.shape[1]) for pair in pairs), least)
