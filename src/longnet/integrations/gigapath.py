"""Prov-GigaPath's slide encoder: LongNet over the tiles of a pathology slide (Xu et al., Nature 2024)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from longnet.integrations.torchscale import TorchscaleConfig, TorchscaleLongNet, fill, read_weights

_HEADS, _RATES = 16, (1, 2, 4, 8, 16)


def gigapath_segment_lengths(max_wsi_size: int = 262144, tile_size: int = 256) -> tuple[int, ...]:
    """Five lengths, evenly spaced in logarithms from 1024 to the tiles of the largest slide.

    Example:
        >>> gigapath_segment_lengths()
        (1024, 5792, 32768, 185363, 1048576)
    """
    most = int(np.log2((max_wsi_size // tile_size) ** 2))
    return tuple(int(x) for x in 2 ** np.linspace(np.log2(1024), most, len(_RATES)))


class GigaPathSlideEncoder(nn.Module):
    """Tile embeddings and their places on the slide -> one embedding of the slide.

    The published model with its parameter names. A batch of slides of different sizes gives each what it gets alone, and the
    two-dimensional sine-cosine table of 10^6 positions (3 GB) is put together from two rows of a table of 10^3 (1.5 MB).

    Args:
        config: of the encoder.
        in_channels: width of a tile embedding (1536).
        slide_ngrids: tiles along one side of the position grid.
        tile_size: pixels along one side of a tile.
        global_pool: average the tiles; else take the class token.
    """

    axis: Tensor

    def __init__(
        self,
        config: TorchscaleConfig,
        in_channels: int = 1536,
        slide_ngrids: int = 1000,
        tile_size: int = 256,
        global_pool: bool = False,
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.slide_ngrids, self.tile_size, self.global_pool = slide_ngrids, tile_size, global_pool
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(in_channels, width)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = TorchscaleLongNet(config)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("axis", sine_cosine(slide_ngrids, width // 2), persistent=False)

    def positions(self, coords: Tensor) -> Tensor:
        """(B, L, 2) pixel coordinates -> (B, L, hidden): the embeddings of y tile and x tile, side by side.

        Places are counted as one number, x tile * slide_ngrids + y tile, as in the published code.
        """
        tiles = torch.floor(coords / self.tile_size)
        place = (tiles[..., 0] * self.slide_ngrids + tiles[..., 1]).long()
        inside = (place >= 0) & (place < self.slide_ngrids**2)
        if not bool(inside.all()):
            raise ValueError(
                f"coords: expected pixels of a grid of {self.slide_ngrids} x {self.slide_ngrids} tiles of {self.tile_size};"
                f" got a tile at {coords[~inside][0].tolist()}; give coordinates at the level the tiles were cut"
            )
        rows = self.axis[place % self.slide_ngrids], self.axis[place // self.slide_ngrids]
        return torch.cat(rows, -1)

    @overload
    def forward(
        self,
        x: Tensor,
        coords: Tensor,
        lengths: Tensor | None = ...,
        all_layer_embed: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, coords: Tensor, lengths: Tensor | None = ..., *, all_layer_embed: Literal[True]
    ) -> list[Tensor]: ...

    def forward(
        self, x: Tensor, coords: Tensor, lengths: Tensor | None = None, all_layer_embed: bool = False
    ) -> Tensor | list[Tensor]:
        """Slide embeddings (B, hidden).

        Args:
            x: (B, L, in_channels) tile embeddings.
            coords: (B, L, 2) pixel coordinates of the tiles.
            lengths: (B,) tiles of every slide; the rest of a row is padding. None: all.
            all_layer_embed: a list instead: after the embedding and after every layer.
        """
        if x.dim() != 3 or coords.shape != (*x.shape[:2], 2):
            raise ValueError(
                f"expected x (B, L, channels) and coords (B, L, 2); got {tuple(x.shape)} and {tuple(coords.shape)}"
            )
        mask = None
        if lengths is not None:
            if lengths.shape != (x.shape[0],) or bool(((lengths < 1) | (lengths > x.shape[1])).any()):
                raise ValueError(
                    f"lengths: expected {x.shape[0]} integers in [1, {x.shape[1]}]; got {lengths.tolist()}"
                )
            mask = torch.arange(x.shape[1] + 1, device=x.device) <= lengths[:, None].to(x.device)
            coords = coords.masked_fill(~mask[:, 1:, None], 0)
        tiles = self.patch_embed["proj"](x) + self.positions(coords)
        # The table's row of the class token is zero.
        hidden = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(tiles.dtype), tiles), 1)
        states = self.encoder(attention_mask=mask, inputs_embeds=hidden, return_all_hiddens=all_layer_embed)
        if all_layer_embed:
            return [self._pool(state, mask) for state in states]
        return self._pool(states, mask)  # type: ignore[arg-type]

    def _pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if not self.global_pool:
            return self.norm(hidden[:, 0])
        if mask is None:
            return self.norm(hidden[:, 1:].mean(1))
        real = mask[:, 1:, None]
        return self.norm(hidden[:, 1:].masked_fill(~real, 0).sum(1) / real.sum(1))


def sine_cosine(positions: int, width: int) -> Tensor:
    """(positions, width) fp32: sin(p w_i), then cos(p w_i), w_i = 10000^(-2 i / width), formed in float64."""
    frequencies = 1 / 10000.0 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), 1).float()


def load_gigapath(
    weights: Mapping[str, Tensor] | str | os.PathLike,
    *,
    max_wsi_size: int = 262144,
    tile_size: int = 256,
    slide_ngrids: int = 1000,
    global_pool: bool = False,
    zero_padding: bool = True,
) -> GigaPathSlideEncoder:
    """Prov-GigaPath's slide encoder from `slide_encoder.pth` (or any state dict of its LongNetViT, of any width or depth).

    Needs neither flash-attn nor timm nor torchscale, and runs on CPU and any GPU, in any float dtype. `zero_padding=True`
    reproduces the published model exactly (see `TorchscaleConfig`).

    Raises:
        ValueError: weights that are missing or do not fit.

    Example:
        >>> encoder = load_gigapath("slide_encoder.pth").cuda().half()
        >>> slide = encoder(tiles, coords)  # (1, L, 1536), (1, L, 2) -> (1, 768)
    """
    # Published code builds the table anew; a stored one would be the same.
    state = {name: x for name, x in read_weights(weights).items() if name != "pos_embed"}
    name = "patch_embed.proj.weight"
    if name not in state or "encoder.layers.0.ffn.fc1.weight" not in state:
        raise ValueError(f"expected GigaPath's names ({name}, encoder.layers.0...); got {sorted(state)[:3]}")
    hidden, channels = state[name].shape
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layers."))
    config = TorchscaleConfig(
        hidden_size=hidden,
        intermediate_size=state["encoder.layers.0.ffn.fc1.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=_HEADS,
        segment_lengths=gigapath_segment_lengths(max_wsi_size, tile_size),
        dilation_rates=_RATES,
        causal=False,
        zero_padding=zero_padding,
    )
    model = GigaPathSlideEncoder(config, channels, slide_ngrids, tile_size, global_pool)
    wanted = model.state_dict()
    if extra := sorted(state.keys() - wanted.keys()):
        warnings.warn(
            f"{len(extra)} tensors that the slide encoder does not have are left out: {extra[:5]}",
            stacklevel=2,
        )
    fill(model, {name: x for name, x in state.items() if name in wanted})
    return model.eval()
