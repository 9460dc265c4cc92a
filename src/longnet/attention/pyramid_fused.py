"""The pyramid by Triton kernels: what `build_pyramid` does, and its gradients."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longnet.kernels import pyramid as kernels


class Tree(NamedTuple):
    """What a pyramid is built by, beside its keys and values; complete nodes only: sizes[l] <= N / (block radix^l)."""

    scale: float
    block: int
    radix: int
    sizes: tuple[int, ...]


def pool(
    k: Tensor, v: Tensor, prior: Tensor | None, lengths: Tensor | None, tree: Tree
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kbar, vbar (B, nodes, K, D), mass and entropy (B, nodes, K) fp32; unit stride in D. lengths int64 on the device of k."""
    batch, _, key_heads, width = k.shape
    sizes, nodes = tree.sizes, sum(tree.sizes)
    kbar, vbar = torch.empty(2, batch, nodes, key_heads, width, dtype=k.dtype, device=k.device)
    mass, entropy = torch.empty(2, batch, nodes, key_heads, dtype=torch.float32, device=k.device)
    tile, leaf = _tiles(k, prior, lengths, tree.block)
    if sizes[0]:
        kernels.pool_leaves[(sizes[0], key_heads, batch)](
            k, v, k if prior is None else prior, k if lengths is None else lengths, kbar, vbar, mass, entropy,
            *k.stride()[:3], *v.stride()[:3], nodes, key_heads, tree.scale, **tile, **leaf,
        )  # fmt: skip
    first = [0, *itertools.accumulate(sizes)]
    for level in range(1, len(sizes)):
        if sizes[level]:
            kernels.pool_nodes[(sizes[level], key_heads, batch)](
                kbar, vbar, mass, entropy, first[level - 1], first[level], nodes, key_heads, RADIX=tree.radix, **tile,
            )  # fmt: skip
    return kbar, vbar, mass, entropy


def pool_backward(
    k: Tensor,
    v: Tensor,
    prior: Tensor | None,
    lengths: Tensor | None,
    tree: Tree,
    nodes: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    dk_token: Tensor | None = None,
    dv_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv, dprior from the gradients of the four outputs of `pool` (fp32, contiguous; the kernels add to them on the way
    down) and what tokens get elsewhere: dk_token, dv_token, contiguous. These are overwritten where they have the dtype of k."""
    batch, tokens, key_heads, width = k.shape
    sizes = tree.sizes
    tile, leaf = _tiles(k, prior, lengths, tree.block)
    first = [0, *itertools.accumulate(sizes)]
    for level in range(len(sizes) - 1, 0, -1):
        if sizes[level]:
            kernels.nodes_backward[(sizes[level], key_heads, batch)](
                *nodes, *grads, first[level - 1], first[level], first[-1], key_heads, RADIX=tree.radix, **tile,
            )  # fmt: skip
    dk, dv = (
        torch.empty(k.shape, dtype=k.dtype, device=k.device) if x is None or x.dtype != k.dtype else x
        for x in (dk_token, dv_token)
    )
    dprior = None
    if prior is not None:
        dprior = torch.empty(batch, sizes[0], key_heads, width, device=k.device)
    kernels.leaves_backward[(triton.cdiv(tokens, tree.block), key_heads, batch)](
        k, v, k if prior is None else prior, k if lengths is None else lengths, *grads,
        dk if dk_token is None else dk_token, dv if dv_token is None else dv_token, dk, dv, dk if dprior is None else dprior,
        *k.stride()[:3], *v.stride()[:3], tokens, sizes[0], first[-1], key_heads, tree.scale,
        ADD_K=dk_token is not None, ADD_V=dv_token is not None, **tile, **leaf,
    )  # fmt: skip
    return dk, dv, None if dprior is None else dprior.sum((0, 1)).to(prior.dtype)


def _tiles(k: Tensor, prior: Tensor | None, lengths: Tensor | None, block: int) -> tuple[dict, dict]:
    width = k.shape[3]
    tile = {"D": width, "BD": triton.next_power_of_2(width), "num_warps": 2}
    return tile, {"BLOCK": block, "PRIOR": prior is not None, "LENGTHS": lengths is not None}
