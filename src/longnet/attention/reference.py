"""The oracle: dilated attention as one softmax with log multiplicities. Slow, O(N^2), any float dtype, obviously right.

It never forms a branch output or merges anything, so it shares no step with what it judges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.patterns import DilatedPattern


def multiplicity(
    pattern: DilatedPattern, num_heads: int, queries: Tensor, keys: Tensor, causal: bool
) -> Tensor:
    """(H, Nq, N): in how many branches the token at position queries[i] sees the token at position keys[j]."""
    heads = []
    for head in range(num_heads):
        count = torch.zeros(len(queries), len(keys), dtype=torch.int64, device=keys.device)
        for w, r in pattern.branches:
            s = pattern.offset(head, r, num_heads)
            takes_part_q, takes_part_k = queries % w % r == s, keys % w % r == s
            same_segment = queries[:, None] // w == keys[None] // w
            count += same_segment & takes_part_q[:, None] & takes_part_k[None]
        heads.append(count)
    result = torch.stack(heads)
    return result * (keys[None] <= queries[:, None]) if causal else result


def dilated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    scale: float,
    lengths: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + log multiplicity) v and its log-sum-exp; shapes as in `dilated_attention`.

    Scores and statistics are formed in the input dtype if that is fp32 or fp64 and in fp32 otherwise.
    """
    num_heads, num_keys = q.shape[2], k.shape[1]
    group = num_heads // k.shape[2]
    work = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    positions = torch.arange(start, start + num_keys, device=q.device)
    count = multiplicity(pattern, num_heads, positions[num_keys - q.shape[1] :], positions, causal)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(work) * scale
    visible = (count > 0)[None].expand(q.shape[0], -1, -1, -1)
    if lengths is not None:
        valid = torch.arange(num_keys, device=q.device) < lengths.to(q.device)[:, None]
        visible = visible & valid[:, None, None] & valid[:, None, num_keys - q.shape[1] :, None]
    scores = (scores + count.clamp(min=1).to(work).log()).masked_fill(~visible, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(~visible, 0)
    # A key that a query cannot see must not reach it even as 0 * NaN: such values are cut out of the product.
    broken = ~torch.isfinite(v)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities.to(v.dtype), v.masked_fill(broken, 0))
    if broken.any():
        reached = torch.einsum("bhqk,bkhd->bqhd", visible.to(work), broken.to(work)) > 0
        out = out.masked_fill(reached, torch.nan)
    lse = torch.logsumexp(scores.masked_fill(empty, 0), -1).masked_fill(empty[..., 0], -torch.inf)
    return out, lse
