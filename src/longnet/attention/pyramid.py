"""Summaries of tokens at growing scale: what far queries see, and what they are routed by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pyramid(NamedTuple):
    """Summaries of all levels, one level after the other along the second dimension.

    kbar, vbar (B, M, K, D) in the dtype of the keys; mass Z and entropy (B, M, K) fp32 (fp64 for fp64 keys); an empty node has
    Z = -inf. sizes: nodes per level, sum = M.
    """

    kbar: Tensor
    vbar: Tensor
    mass: Tensor
    entropy: Tensor
    sizes: tuple[int, ...]

    def level(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(kbar, vbar, mass, entropy) of one level."""
        begin = sum(self.sizes[:index])
        return tuple(x[:, begin : begin + self.sizes[index]] for x in self[:4])  # type: ignore[return-value]


def build_pyramid(
    k: Tensor,
    v: Tensor,
    prior_query: Tensor | None,
    scale: float,
    block: int,
    radix: int,
    sizes: Sequence[int],
    lengths: Tensor | None = None,
) -> Pyramid:
    """Pool tokens into leaves and children into parents.

    Leaf: z_i = scale p . k_i over its valid tokens, a = softmax(z), kbar = sum a k, vbar = sum a v, Z = logsumexp(z), entropy
    = -sum a log a. Parent: the same over its children with z = Z_child; entropy = -sum a log a + sum a entropy_child.

    k, v (B, N, K, D); prior_query (K, D), None pools by the mean; sizes: nodes per level (the last node of a level may be
    partial). A node is rounded to the dtype of k once, when it is closed, and its parent is made from the rounded child.
    """
    z = token_mass(k, prior_query, scale)
    if lengths is not None:
        beyond = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
        z = z.masked_fill(beyond[..., None], -torch.inf)
    keys, values, mass, entropy = k, v, z, torch.zeros_like(z)
    levels = []
    for size, children in zip(sizes, [block, *[radix] * (len(sizes) - 1)], strict=True):
        keys, values, mass, entropy = pool(keys, values, mass, entropy, size, children)
        levels.append((keys, values, mass, entropy))
    kbar, vbar, masses, entropies = (torch.cat(x, 1) for x in zip(*levels, strict=True))
    return Pyramid(kbar, vbar, masses, entropies, tuple(sizes))


def token_mass(k: Tensor, prior_query: Tensor | None, scale: float) -> Tensor:
    """z = scale prior . k of every token, (B, N, K); 0 without a prior query."""
    work = torch.promote_types(k.dtype, torch.float32)
    if prior_query is None:
        return torch.zeros(k.shape[:3], dtype=work, device=k.device)
    return scale * torch.einsum("bnkd,kd->bnk", k.to(work), prior_query.to(work))


def pool(
    keys: Tensor, values: Tensor, mass: Tensor, entropy: Tensor, size: int, children: int
) -> tuple[Tensor, ...]:
    count = size * children
    if count > keys.shape[1]:
        missing = count - keys.shape[1]
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in (keys, values))
        mass = torch.nn.functional.pad(mass, (0, 0, 0, missing), value=-torch.inf)
        entropy = torch.nn.functional.pad(entropy, (0, 0, 0, missing))
    keys, values, mass, entropy = (
        x[:, :count].unflatten(1, (size, children)) for x in (keys, values, mass, entropy)
    )
    total = torch.logsumexp(mass, 2)
    empty = total == -torch.inf
    finite = torch.where(empty, 0, total)
    a = torch.exp(mass - finite[:, :, None])
    log_a = torch.where(a > 0, mass - finite[:, :, None], 0)
    entropy = (a * (torch.where(a > 0, entropy, 0) - log_a)).sum(2)
    # Padding may hold anything: a weight of 0 must not meet a NaN.
    seen = (a > 0)[..., None]
    pooled = ((a[..., None] * torch.where(seen, x, 0)).sum(2).to(x.dtype) for x in (keys, values))
    return *pooled, total, entropy
