"""One decoding step as a CUDA graph: the host launches once instead of several hundred times a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet.attention.cached import fused_steps
from longnet.model.cache import LongNetCache
from longnet.model.cache_batch import lasting


class GraphedStep:
    """logits (B, V) after one more token of every sequence: step(ids (B, 1)) equals model(ids, past_key_values=cache).

    Captured at the first call, and again whenever the cache moved its buffers (they grow by doubling, then never again).
    The returned logits are overwritten by the next call.

    Args:
        model: a causal LongNet on a CUDA device.
        cache: what it has read; `unsupported(model, cache)` must be None.
    """

    def __init__(self, model: Any, cache: LongNetCache) -> None:
        if reason := unsupported(model, cache):
            raise ValueError(
                f"expected a model and a cache that can be captured; got: {reason}; call the model itself"
            )
        self.model, self.cache = model, cache
        with lasting():  # read where it is captured
            self.ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=cache.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.version = -1

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        self.cache.reserve_step()
        self.ids.copy_(ids)
        if self.graph is None or self.version != self.cache.version:
            self._capture()
        assert self.graph is not None
        assert self.logits is not None
        self.graph.replay()
        self.cache.count_step()
        return self.logits

    def _forward(self) -> Tensor:
        output = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    @lasting()
    def _capture(self) -> None:
        # Not in inference mode: torch makes the random state of all captures at the first one, and as an inference tensor
        # it would break every later capture outside that mode, the caller's own included (pytorch issue 166792).
        # Neither the warm-up nor the capture may count: both write the row that the replay writes again.
        with self.cache.uncounted():
            stream = torch.cuda.Stream(self.cache.device)
            stream.wait_stream(torch.cuda.current_stream(self.cache.device))
            with torch.cuda.stream(stream):
                self._forward()
            torch.cuda.current_stream(self.cache.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with self.cache.uncounted(), torch.cuda.graph(graph):
            self.logits = self._forward()
        self.graph, self.version = graph, self.cache.version


def unsupported(model: Any, cache: LongNetCache) -> str | None:
    """Why a step cannot be captured, or None."""
    if cache.device.type != "cuda" or not fused_steps(cache.positions.new_empty(0, dtype=cache.dtype)):
        return "it needs a CUDA device, triton and 16 or 32 bit keys"
    if "hierarchical" in model.config.attention_kinds():
        return "hierarchical layers decide on the host which nodes are complete"
    return None
