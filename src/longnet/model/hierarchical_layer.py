"""Hierarchical attention as a layer: its parameters, the convolution on keys, and its part of a streaming cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.attention.attention_map import AttentionMap, attention_map
from longnet.attention.hierarchical import HierarchicalImpl, hierarchical_attention
from longnet.attention.hierarchical_cached import Step
from longnet.attention.hierarchical_torch import Parameters
from longnet.attention.rotary import turn
from longnet.model.layers import LongNetProjections

if TYPE_CHECKING:
    from longnet.model.cache import LongNetCache
    from longnet.model.config import LongNetConfig


class _Clamp(torch.autograd.Function):
    """x.clamp(0, 1) whose gradient dies only where a descent would leave [0, 1] farther.

    clamp's own is 0 everywhere outside: an optimizer's first step from the border could never be taken back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyrefly: ignore - one input
        (x,) = ctx.saved_tensors
        outward = ((x > 1) & (gradient < 0)) | ((x < 0) & (gradient > 0))
        return gradient.masked_fill(outward, 0)


class LongNetHierarchicalAttention(LongNetProjections):
    """Grouped-query hierarchical attention: (B, N, hidden) -> (B, N, hidden).

    Keys pass a short causal depthwise convolution, added to them, before the norm: k_t + sum_j c_j k_{t-j}. Rotary turns act
    inside the window only. Parameters of the attention itself, per key head or head: the prior query that pools (0: the
    mean), a bias per level (0, or from 0 in the first head to the configuration's `far_bias` in the last, which like ALiBi's
    slopes lets heads begin with different reach), and beta, how far an opened block's mass is the router's score (1; clamped to
    [0, 1]), which does not learn unless asked: its gradient would take away what the router learns by.
    """

    def __init__(self, config: LongNetConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.pattern = config.hierarchical_pattern()
        self.impl: HierarchicalImpl | None = "reference" if config.attention_impl == "reference" else None
        self.prior_query = nn.Parameter(torch.zeros(self.key_heads, self.head_dim))
        self.level_bias = nn.Parameter(torch.zeros(self.heads, self.pattern.most_levels()))
        self.router_mix = nn.Parameter(torch.ones(self.heads), requires_grad=False)
        self.key_conv = nn.Parameter(torch.zeros(self.key_heads, self.head_dim, config.key_conv))

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        lengths: Tensor | None = None,
        cache: LongNetCache | None = None,
        start: int = 0,
    ) -> Tensor:
        parallel = self._across_ranks(lengths, start) if cache is None else None
        if start and parallel is None:
            raise ValueError(
                f"expected start = 0: a hierarchical layer reads a text from its beginning; got {start}"
            )
        q, k, v = self._project(hidden, lengths, cache)
        # Autocast would round the pooling of keys to 16 bits.
        with torch.autocast(v.device.type, enabled=False):
            out = self._attend(q, k, v, rotary, lengths, cache)
        return self.o_proj(out.flatten(2))

    def beta(self) -> Tensor:
        """(H,): the router mix within [0, 1], which optimizers may leave by a step."""
        return _Clamp.apply(self.router_mix)

    def _project(
        self, hidden: Tensor, lengths: Tensor | None = None, cache: LongNetCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.key_heads, self.key_heads), dim=2)
        width, tail = self.key_conv.shape[2], None
        if cache is not None:
            tail = cache.key_tail(self.layer_index, k, width, lengths)
        elif self.sequence_parallel is not None and width > 1:
            from longnet.attention.hierarchical_exchange import tokens_before

            tail = tokens_before(k, width - 1, self.sequence_parallel)
        # Autocast norms in fp32.
        return self.q_norm(q).to(v.dtype), self.k_norm(self._convolve(k, tail)).to(v.dtype), v

    @torch.no_grad()
    def attention_maps(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> list[AttentionMap]:
        """What the last token of hidden (1, N, C) sees, one map per head."""
        q, k, v = self._project(hidden)
        q_local, k_local = (turn(x, rotary, v.dtype) for x in (q, k))
        mix, scale = self.beta(), 1 / math.sqrt(self.head_dim)
        return attention_map(
            q[0, -1], q_local[0, -1], k[0], k_local[0], self.pattern, scale, self.prior_query, self.level_bias, mix
        )  # fmt: skip

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        lengths: Tensor | None,
        cache: LongNetCache | None,
    ) -> Tensor:
        mix = self.beta()
        if cache is not None:
            q_local, k_local = (turn(x, rotary, v.dtype) for x in (q, k))
            work = torch.promote_types(v.dtype, torch.float32)
            parameters = Parameters(
                1 / math.sqrt(self.head_dim), self.level_bias.to(work), mix.to(work), None
            )
            step = Step(q, q_local, k, k_local, v)
            return cache.attend_hierarchical(self.layer_index, step, parameters, self.prior_query, lengths)
        parameters = {"prior_query": self.prior_query, "level_bias": self.level_bias, "router_mix": mix}
        options: dict[str, Any] = {"causal": self.causal, "rotary": rotary, **parameters}
        if self.sequence_parallel is not None:
            from longnet.attention.hierarchical_parallel import sequence_parallel_hierarchical_attention

            ranks = self.sequence_parallel
            return sequence_parallel_hierarchical_attention(q, k, v, self.pattern, ranks, **options).out
        return hierarchical_attention(q, k, v, self.pattern, lengths=lengths, impl=self.impl, **options).out

    def _convolve(self, k: Tensor, tail: Tensor | None) -> Tensor:
        """k (B, N, K, D) plus its causal depthwise convolution; `tail` (B, width - 1, K, D): the raw keys before it."""
        width = self.key_conv.shape[2]
        if not width:
            return k
        before = k.new_zeros(k.shape[0], width - 1, *k.shape[2:]) if tail is None else tail
        raw = torch.cat((before, k), 1).flatten(2).transpose(1, 2)
        weight = self.key_conv.to(k.dtype).flatten(0, 1)[:, None]
        return k + F.conv1d(raw, weight, groups=raw.shape[1]).transpose(1, 2).unflatten(2, k.shape[2:])
