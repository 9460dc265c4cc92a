"""torch.compile for what a layer does to every token alone; attention between tokens stays as it is, with kernels of its own."""

from __future__ import annotations

from typing import Any

import torch

from longnet.model.layers import LongNetAttention


def compile_token_work(model: Any) -> None:
    """Compile norms, projections, turns and the SwiGLU of every layer, in place. All layers share one compiled code.

    A whole layer cannot be one graph: attention in chunks and across ranks keeps books between its calls. Token-wise work is
    where most of the time of a narrow model goes, in passes over memory that a compiler joins.
    """
    for layer in model.model.layers:
        layer.attention_norm.compile(dynamic=False)
        layer._feed_forward = torch.compile(layer._feed_forward, dynamic=False)
        if isinstance(layer.attention, LongNetAttention):
            layer.attention._project = torch.compile(layer.attention._project, dynamic=False)
