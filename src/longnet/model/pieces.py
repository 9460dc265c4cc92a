"""Reading a document longer than memory likes, piece by piece, with the states of one whole pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from longnet.model.config import LongNetConfig
    from longnet.model.transformer import LongNetModel

# Longest run of tokens whose activations are held at one time, where the pattern allows a cut.
PIECE_TOKENS = 65536


def piece_tokens(config: LongNetConfig, most: int = PIECE_TOKENS) -> int | None:
    """Tokens of a piece: a multiple of every segment length, so that no segment of dilated attention is cut.

    Two tokens see each other only inside a segment; at a common multiple of all segment lengths every segment ends, so
    the states of a piece, read at its global position, are those of the whole document. None where tokens further apart
    than any segment see each other (hierarchical layers): such a document has to be read in one pass.
    """
    if "hierarchical" in config.attention_kinds():
        return None
    unit = math.lcm(*config.pattern().segment_lengths)
    return unit * max(1, most // unit)


def read_pieces(
    model: LongNetModel, inputs: Tensor, lengths: Tensor | None, piece: int | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first token, hidden (B, n, C), lengths (B,) within the piece or None) of every piece, in order.

    Args:
        inputs: ids (B, N), or embeddings (B, N, C).
        lengths: (B,) valid tokens of right-padded rows; None if all are.
        piece: tokens at once; None for all. In training with more than one piece, a piece's activations are computed
            again in the backward pass.
    """
    total = inputs.shape[1]
    step = total if piece is None else min(piece, total)
    name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"

    def read(part: Tensor, begin: int, rest: Tensor | None) -> Tensor:
        return model(**{name: part}, lengths=rest, start=begin, use_cache=False).last_hidden_state

    for begin in range(0, total, step):
        part = inputs[:, begin : begin + step]
        rest = None if lengths is None else (lengths - begin).clamp(min=0, max=part.shape[1])
        if step < total and torch.is_grad_enabled():
            hidden: Tensor = checkpoint(read, part, begin, rest, use_reentrant=False)  # pyrefly: ignore
        else:
            hidden = read(part, begin, rest)
        yield begin, hidden, rest
