"""The parts of a LongNet layer: rotary angles, attention, SwiGLU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from longnet.attention.dilated import dilated_attention
from longnet.attention.rotary import turn
from longnet.attention.strided import has_triton
from longnet.model.tiles import by_tiles

if TYPE_CHECKING:
    from longnet.attention.collectives import SequenceParallel
    from longnet.model.cache import LongNetCache
    from longnet.model.config import LongNetConfig


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / D), i < D / 2, in fp32.

    The product is formed and reduced modulo 2 pi in float64: in fp32, position 1e9 would be off by
    up to 64 radians.

    Args:
        positions: (B or 1, N) int64.

    Returns:
        (cos, sin), each (B or 1, N, 1, D / 2).
    """
    device = positions.device
    if device.type == "mps":  # has no float64
        positions = positions.cpu()
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    inverse = torch.exp(exponents * (-math.log(theta) / head_dim))
    angles = positions.to(torch.float64)[..., None] * inverse
    angles = torch.remainder(angles, 2 * math.pi).to(torch.float32).to(device)[:, :, None]
    return angles.cos(), angles.sin()


def _turns_in_place(qkv: Tensor) -> bool:
    """Whether one kernel may norm and turn queries and keys where they lie: on a GPU, with nothing to differentiate."""
    fits = qkv.is_cuda and qkv.is_contiguous() and qkv.dtype != torch.float64
    return fits and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and has_triton()


class LongNetRMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x is bf16 and the weight fp32; unequal dtypes would miss the fused kernel.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LongNetProjections(nn.Module):
    """What attention layers share: queries, keys and values from the hidden states, their norms, and the way back."""

    def __init__(self, config: LongNetConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.causal = not config.bidirectional
        width = (self.heads + 2 * self.key_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.o_proj.writes_residual = True  # pyrefly: ignore
        self.q_norm = LongNetRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LongNetRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        # Set from outside (train/parallelize.py) where the tokens are one rank's part of a longer sequence.
        self.sequence_parallel: SequenceParallel | None = None

    def _across_ranks(self, lengths: Tensor | None, start: int) -> SequenceParallel | None:
        """The ranks that share the sequence, if any: whose tokens these must be."""
        parallel = self.sequence_parallel
        if parallel is not None and (lengths is not None or start != parallel.start):
            raise ValueError(
                f"sequence parallelism: expected no lengths and start={parallel.start}, this rank's first position; got "
                f"{'no lengths' if lengths is None else 'lengths'} and start={start}"
            )
        return parallel


class LongNetAttention(LongNetProjections):
    """Dilated grouped-query attention with RMS-normed, rotary-turned queries and keys.

    (B, N, hidden) -> (B, N, hidden). With a cache, the N tokens continue what the cache has read.
    """

    def __init__(self, config: LongNetConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.pattern = config.pattern()
        self.impl = config.attention_impl
        self.tile_tokens: int | None = None  # set from outside (tiles.set_tile)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        lengths: Tensor | None = None,
        cache: LongNetCache | None = None,
        start: int = 0,
    ) -> Tensor:
        q, k, v = by_tiles(self._project, self.tile_tokens, hidden, *rotary)
        if cache is not None:
            out = cache.attend(self.layer_index, q, k, v, lengths)
        elif (parallel := self._across_ranks(lengths, start)) is not None:
            from longnet.attention.sequence_parallel import sequence_parallel_attention

            out = sequence_parallel_attention(q, k, v, self.pattern, parallel, causal=self.causal).out
        else:
            out = dilated_attention(
                q,
                k,
                v,
                self.pattern,
                causal=self.causal,
                lengths=lengths,
                start=start,
                impl=self.impl,
            ).out
        return self.o_proj(out.flatten(2))

    def _project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a run of tokens, normed and turned."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.key_heads, self.key_heads), dim=2)
        if _turns_in_place(qkv):
            from longnet.kernels.rotary import norm_rotary_

            weights = (self.q_norm.weight, self.k_norm.weight)
            norm_rotary_(qkv, self.heads, self.key_heads, *weights, float(self.q_norm.eps or 0), cos, sin)
        else:
            q = turn(self.q_norm(q), (cos, sin), v.dtype)
            k = turn(self.k_norm(k), (cos, sin), v.dtype)
        return q, k, v


class LongNetMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_residual = True  # pyrefly: ignore

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class LongNetLayer(GradientCheckpointingLayer):
    """h + Attention(RMSNorm(h)), then h + MLP(RMSNorm(h)). (B, N, hidden) -> (B, N, hidden)."""

    def __init__(self, config: LongNetConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = LongNetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.attention_kinds()[layer_index] == "hierarchical":
            from longnet.model.hierarchical_layer import LongNetHierarchicalAttention

            self.attention: nn.Module = LongNetHierarchicalAttention(config, layer_index)
        else:
            self.attention = LongNetAttention(config, layer_index)
        self.mlp_norm = LongNetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LongNetMLP(config)
        self.tile_tokens: int | None = None  # set from outside (tiles.set_tile)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        lengths: Tensor | None = None,
        cache: LongNetCache | None = None,
        start: int = 0,
    ) -> Tensor:
        normed = by_tiles(self.attention_norm, self.tile_tokens, hidden)
        hidden = hidden + self.attention(normed, rotary, lengths, cache, start)
        return by_tiles(self._feed_forward, self.tile_tokens, hidden)

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.mlp_norm(hidden))
