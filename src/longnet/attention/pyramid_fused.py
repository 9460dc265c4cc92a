"""The pyramid by Triton kernels: the autograd boundary of `build_pyramid` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from longnet.attention.pyramid import Pyramid
from longnet.kernels import pyramid as kernels


def build_pyramid_fused(
    k: Tensor,
    v: Tensor,
    prior_query: Tensor | None,
    scale: float,
    block: int,
    radix: int,
    sizes: Sequence[int],
    lengths: Tensor | None = None,
) -> Pyramid:
    """`build_pyramid` for complete nodes only: sizes[l] <= N / (block radix^l); mass and entropy are fp32."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    prior = None if prior_query is None else prior_query.contiguous()
    return Pyramid(*_Build.apply(k, v, prior, scale, block, radix, tuple(sizes), lengths), tuple(sizes))


class _Build(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, prior, scale, block, radix, sizes, lengths):
        batch, _, key_heads, width = k.shape
        nodes = sum(sizes)
        kbar, vbar = (
            torch.empty(batch, nodes, key_heads, width, dtype=k.dtype, device=k.device) for _ in "kv"
        )
        mass, entropy = (
            torch.empty(batch, nodes, key_heads, dtype=torch.float32, device=k.device) for _ in "me"
        )
        lengths = None if lengths is None else lengths.to(k.device, torch.int64)
        ctx.constants = (scale, block, radix, sizes)
        tile, leaf = _tiles(k, prior, lengths, block)
        if sizes[0]:
            kernels.pool_leaves[(sizes[0], key_heads, batch)](
                k, v, k if prior is None else prior, k if lengths is None else lengths, kbar, vbar, mass, entropy,
                *k.stride()[:3], *v.stride()[:3], nodes, key_heads, scale, **tile, **leaf,
            )  # fmt: skip
        first = np.cumsum((0, *sizes)).tolist()
        for level in range(1, len(sizes)):
            if sizes[level]:
                kernels.pool_nodes[(sizes[level], key_heads, batch)](
                    kbar,
                    vbar,
                    mass,
                    entropy,
                    first[level - 1],
                    first[level],
                    nodes,
                    key_heads,
                    RADIX=radix,
                    **tile,
                )
        ctx.save_for_backward(k, v, prior, lengths, kbar, vbar, mass, entropy)
        return kbar, vbar, mass, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dkbar, dvbar, dmass, dentropy):  # type: ignore[override]
        k, v, prior, lengths, kbar, vbar, mass, entropy = ctx.saved_tensors
        scale, block, radix, sizes = ctx.constants
        batch, tokens, key_heads, width = k.shape
        # The kernels add to them on the way down.
        below = [_own(x) for x in (dkbar, dvbar, dmass, dentropy)]
        tile, leaf = _tiles(k, prior, lengths, block)
        first = np.cumsum((0, *sizes)).tolist()
        for level in range(len(sizes) - 1, 0, -1):
            if sizes[level]:
                kernels.nodes_backward[(sizes[level], key_heads, batch)](
                    kbar, vbar, mass, entropy, *below, first[level - 1], first[level], first[-1], key_heads,
                    RADIX=radix, **tile,
                )  # fmt: skip
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in "kv")
        dprior = None
        if prior is not None:
            dprior = torch.empty(batch, sizes[0], key_heads, width, device=k.device)
        kernels.leaves_backward[(triton.cdiv(tokens, block), key_heads, batch)](
            k, v, k if prior is None else prior, k if lengths is None else lengths, *below,
            dk, dv, dk if dprior is None else dprior,
            *k.stride()[:3], *v.stride()[:3], tokens, sizes[0], first[-1], key_heads, scale, **tile, **leaf,
        )  # fmt: skip
        if dprior is not None:
            dprior = dprior.sum((0, 1)).to(prior.dtype)
        return dk, dv, dprior, None, None, None, None, None


def _own(x: Tensor) -> Tensor:
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _tiles(k: Tensor, prior: Tensor | None, lengths: Tensor | None, block: int) -> tuple[dict, dict]:
    width = k.shape[3]
    tile = {"D": width, "BD": triton.next_power_of_2(width), "num_warps": 4}
    return tile, {"BLOCK": block, "PRIOR": prior is not None, "LENGTHS": lengths is not None}
