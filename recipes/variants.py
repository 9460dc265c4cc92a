"""The attentions that the experiments compare, in models of the same parameters and, per seed, the same initial weights.

Every model is built as a hierarchical one. Where dilated or dense attention is wanted, each layer keeps its parameters (the
convolution on keys included; what only a tree can use lies idle) and another operation joins queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longnet import (
    DilatedPattern,
    HierarchicalPattern,
    LongNetConfig,
    LongNetForCausalLM,
    dilated_attention,
    explain,
)
from longnet.attention.hierarchical import unsupported
from longnet.attention.rotary import turn
from longnet.model.hierarchical_layer import LongNetHierarchicalAttention

# exp(-10000) is 0 in every dtype: summaries with this bias have no weight, whatever they score.
NEVER = -1e4
# Spread of the convolution's taps at first. From zero, which is the layer's own start, a model needs several times as many steps
# before it matches a token with what followed it earlier.
TAPS = 0.5
# Router mix: 1 while the router learns, lowered to this at the end of a training, which lets the right block outweigh the others.
MIX = 0.5
# `far_bias` of models whose heads begin with different reach.
REACH = -6.0
# One segment that no text outgrows: dense attention.
EVERYTHING = 2**31


@dataclass(frozen=True)
class Variant:
    """An attention: a tree, or a dilated pattern if one is given.

    turned: rotary positions (dilated and dense); summaries: False leaves of a tree only its window; mix_learned: the router
    mix follows its gradient, which always asks for less of it at once and so leaves the router untrained; far_bias: of
    `LongNetConfig`, REACH lets heads begin with different reach.
    """

    name: str
    tree: HierarchicalPattern
    dilated: DilatedPattern | None = None
    turned: bool = True
    summaries: bool = True
    mix_learned: bool = False
    far_bias: float = LongNetConfig.far_bias

    @property
    def opens(self) -> bool:
        """Whether blocks are opened, so that a router and its mix matter."""
        return self.dilated is None and self.tree.top_k > 0

    def keys_share(self, tokens: int, heads: int) -> float:
        """Keys and summaries in the softmax of the last token, as a share of the text (dilated: the mean, against dense)."""
        if self.dilated is not None:
            return self.dilated.visible_pairs(tokens, heads) / (heads * tokens * (tokens + 1) / 2)
        if not self.summaries:
            begin = self.tree.cover((tokens - 1) // self.tree.block, tokens).local[0]
            return (tokens - begin) / tokens
        return self.tree.keys_per_query(tokens)[1] / tokens

    def path(self, device: str, heads: int, width: int, tokens: int) -> str:
        """Which implementation runs: on CUDA in bfloat16, elsewhere in float32."""
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        q = torch.empty(1, 1, heads, width, device=device, dtype=dtype).expand(-1, tokens, -1, -1)
        if self.dilated is not None:
            return (
                "torch's attention"
                if is_dense(self.dilated)
                else explain(q, q, q, self.dilated).split("'")[1]
            )
        reason = unsupported(q, q, self.tree, True)
        return "triton" if reason is None else f"torch: {reason}"


def dense(name: str, tree: HierarchicalPattern, turned: bool = True) -> Variant:
    return Variant(name, tree, DilatedPattern((EVERYTHING,), (1,)), turned)


def is_dense(pattern: DilatedPattern) -> bool:
    """Whether every token sees all before it, whatever the length."""
    return pattern.segment_lengths == (EVERYTHING,)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention (B, N, H, D) by torch's fastest kernel: what is compared with it must not win by its slowness."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    with sdpa_kernel(
        [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True
    ):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class LongNetPlainAttention(LongNetHierarchicalAttention):
    """A hierarchical layer's parameters around another attention: the same projections, norms and convolution on keys."""

    def __init__(
        self, config: LongNetConfig, layer_index: int, pattern: DilatedPattern, turned: bool
    ) -> None:
        super().__init__(config, layer_index)
        self.dilated, self.turned = pattern, turned

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        lengths: Tensor | None = None,
        cache: object = None,
        start: int = 0,
    ) -> Tensor:
        if cache is not None or start:
            raise ValueError("expected a whole text without a cache: this layer exists to be compared")
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.key_heads, self.key_heads), dim=2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(self._convolve(k, None)).to(v.dtype)
        if self.turned:
            q, k = (turn(x, rotary, v.dtype) for x in (q, k))
        if lengths is None and self.causal and is_dense(self.dilated):
            out = dense_attention(q, k, v)
        else:
            out = dilated_attention(q, k, v, self.dilated, causal=self.causal, lengths=lengths).out
        return self.o_proj(out.flatten(2))


def build(variant: Variant, seed: int, taps: float = TAPS, **size: object) -> LongNetForCausalLM:
    """A model of `size` (fields of LongNetConfig) with this attention; weights depend on the seed alone.

    taps: spread of the convolution's taps at first.
    """
    torch.manual_seed(seed)
    tree = {"attention": "hierarchical", "hierarchical": asdict(variant.tree), "far_bias": variant.far_bias}
    config = LongNetConfig(**tree, **size)  # type: ignore[arg-type]
    model = LongNetForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.attention.key_conv, std=taps)
        layer.attention.router_mix.requires_grad_(variant.mix_learned)
    for index, layer in enumerate(model.model.layers):
        if variant.dilated is not None:
            plain = LongNetPlainAttention(config, index, variant.dilated, variant.turned)
            plain.load_state_dict(layer.attention.state_dict())
            plain.router_mix.requires_grad_(False)
            layer.attention = plain
        elif not variant.summaries:
            torch.nn.init.constant_(layer.attention.level_bias, NEVER)
            layer.attention.level_bias.requires_grad_(False)
    return model


def layers(model: LongNetForCausalLM) -> Iterator[LongNetHierarchicalAttention]:
    """The attention layers, in order."""
    for module in model.modules():
        if isinstance(module, LongNetHierarchicalAttention):
            yield module


@torch.no_grad()
def lower_mix(model: LongNetForCausalLM, done: float) -> None:
    """The router mix, where it is not learned: 1 at first (done = 0), MIX when it has been lowered (1)."""
    for layer in layers(model):
        if not layer.router_mix.requires_grad:
            layer.router_mix.fill_(1 - (1 - MIX) * min(1.0, max(0.0, done)))
