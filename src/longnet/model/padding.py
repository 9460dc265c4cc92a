"""Ragged batches: masks to lengths, rows to the left edge, labels to targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def require(holds: Tensor, problem: str) -> None:
    """Refuse what the device finds wrong: ValueError. A compiled graph cannot wait for the device's answer; there the
    device itself stops, with a RuntimeError of the same words."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, problem)
    elif not bool(holds):
        raise ValueError(problem)


def mask_to_span(attention_mask: Tensor, batch: int, num_tokens: int) -> tuple[Tensor, Tensor] | None:
    """First token and number of tokens of every row of a 0/1 mask; None where nothing is masked.

    With a cache, Hugging Face passes the mask of everything ever read: only the last `num_tokens`
    columns count. In a compiled graph, which cannot ask whether anything is masked, the span is always given.

    Returns:
        (first (B,), lengths (B,)) int64, or None.
    """
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < num_tokens:
        raise ValueError(
            f"expected attention_mask ({batch}, N >= {num_tokens}) of 0 and 1; got shape"
            f" {tuple(attention_mask.shape)}; LongNet takes no N x N masks"
        )
    mask = attention_mask[:, attention_mask.shape[1] - num_tokens :].bool()
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    lengths, first = mask.sum(1), mask.long().argmax(1)
    column = torch.arange(num_tokens, device=mask.device)
    block = (column >= first[:, None]) & (column < (first + lengths)[:, None])
    require(
        (block == mask).all(),
        "expected every row of attention_mask to be one run of 1s (padding left, right or"
        " both); got a hole; remove the masked tokens from input_ids",
    )
    return first, lengths


def roll_rows(x: Tensor, shift: Tensor) -> Tensor:
    """out[b, n] = x[b, (n + shift[b]) mod N] for x (B, N) or (B, N, C)."""
    index = (torch.arange(x.shape[1], device=x.device) + shift[:, None]) % x.shape[1]
    if x.dim() == 3:
        index = index[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, index)


def last_tokens(hidden: Tensor, lengths: Tensor | None, keep: int | Tensor) -> Tensor:
    """The tokens whose logits are wanted: all (keep = 0), the last `keep` valid ones, or those at
    an index tensor."""
    if isinstance(keep, Tensor):
        return hidden[:, keep]
    if keep == 0:
        return hidden
    if lengths is None:
        return hidden[:, -keep:]
    # Right padding: count back from each sequence's own end. A sequence shorter than `keep` repeats
    # its first token.
    index = lengths[:, None] - keep + torch.arange(keep, device=hidden.device)
    index = index.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index)


def next_tokens(ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """targets[:, n] = ids[:, n + 1]; -100 at the end and wherever n or n + 1 is padding. (B, N) ->
    (B, N)."""
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    if lengths is not None:
        attention_mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None].to(ids.device)
    if attention_mask is not None:
        real = attention_mask[:, -ids.shape[1] :].bool().to(ids.device)
        targets = targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1))), -100)
    return targets
