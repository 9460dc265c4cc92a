"""What a layer does to every token alone, done to a tile of tokens at a time, so that its inner activations are never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def by_tiles(function: Callable[..., Any], tile: int | None, *tensors: Tensor) -> Any:
    """function(*tensors), a function of every token alone, over tiles of the tokens, recomputed in the backward pass.

    The result and its gradients are those of one call, but for the order in which gradients of weights are summed.
    Without gradients, or where all tokens fit into one tile, it is one call.

    Args:
        function: takes tensors (B or 1, n, ...) and returns one tensor (B, n, ...) or a tuple of them.
        tile: tokens at once; None: all.
        tensors: (B or 1, N, ...).

    Example:
        >>> x = torch.randn(2, 10, 3, requires_grad=True)
        >>> torch.equal(by_tiles(torch.sin, 4, x), torch.sin(x))
        True
    """
    if tile is None or tile >= tensors[0].shape[1] or not torch.is_grad_enabled():
        return function(*tensors)
    # `split`, not slices: the gradient of every slice would be a whole tensor of zeros, quadratic work in all.
    tiles = zip(*(x.split(tile, dim=1) for x in tensors), strict=True)
    # Nothing here is random, so there is no random state to restore.
    parts = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in tiles]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=1)
    return tuple(torch.cat(same, dim=1) for same in zip(*parts, strict=True))


def set_tile(model: torch.nn.Module, tile: int | None) -> None:
    """Let `model` do its token-wise work (norms, SwiGLU, and the projections and turns of dilated attention) in tiles.

    Inside a layer that is recomputed (gradient checkpointing), the SwiGLU's hidden states then live for one tile only.

    Raises:
        ValueError: tile < 1.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile_tokens: expected 1 or more tokens, or None; got {tile}")
    for module in model.modules():
        if hasattr(module, "tile_tokens"):
            setattr(module, "tile_tokens", tile)  # noqa: B010  (Module's declared attributes know no None)
