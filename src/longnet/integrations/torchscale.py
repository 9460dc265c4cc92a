"""Published LongNet weights: torchscale's LongNetEncoder and LongNetDecoder, without flash-attn, batched and masked."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.attention import dilated_attention
from longnet.model.cache import LongNetCache
from longnet.model.padding import mask_to_span, roll_rows
from longnet.patterns import DilatedPattern

_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}
# Parts of torchscale's state dicts that change the formula and that this module does not compute.
_REFUSED = {
    "xpos": "xPos (xpos_rel_pos=True)",
    "relative_position": "relative position bias, which torchscale's LongNet itself refuses",
    "encoder_attn.": "cross-attention to an encoder",
    "moe_layer.": "mixture-of-experts layers",
    ".A.": "multiway layers",
}
# fairseq counts positions from the padding index plus one.
_FIRST_POSITION = 2


@dataclass(frozen=True, kw_only=True)
class TorchscaleConfig:
    """What a torchscale state dict cannot say, and what it does. Names follow Hugging Face's, so that caches can be made.

    zero_padding: torchscale fills ragged segments of an encoder with keys 0 and values 0 that are never masked: every one adds
    exp(0) to the softmax denominator. True computes exactly that, in closed form, because published weights were trained and
    are used with it. False is the clean softmax over real tokens. Causal models are not affected.

    Where r does not divide w and a sequence is longer than w, torchscale moreover puts every further segment's output
    (ceil(w / r) r - w) tokens too late, causal or not. That is not reproduced: outputs stay with their tokens, with a warning.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    causal: bool
    subln: bool = True
    deepnorm: bool = False
    normalize_before: bool = True
    normalize_output: bool = True
    activation: Literal["gelu", "relu", "swish"] = "gelu"
    layernorm_eps: float = 1e-5
    scale_embedding: bool = False
    zero_padding: bool = True
    vocab_size: int = 0
    positions: int = 0
    layernorm_embedding: bool = False
    output_size: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_heads: expected a divisor of the width {self.hidden_size}; got {self.num_attention_heads}"
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(_ACTIVATIONS)}; got {self.activation!r}"
            )
        self.pattern()

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def pattern(self) -> DilatedPattern:
        """torchscale shifts heads in blocks: offset h // ceil(H / r)."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates, "block")


def zero_keys(pattern: DilatedPattern, num_heads: int, num_tokens: int, lengths: Tensor) -> Tensor:
    """How many zero keys torchscale's padding shows to every query, over all branches: (B, H, N) int64.

    It cuts a sequence of L tokens into segments of g = min(w, L), pads the last to g and every segment to a multiple of r:
    each offset s then has ceil(g / r) rows, of which ceil((tokens of the segment - s) / r) are real.
    Every sequence counts as if it were alone in its batch. lengths (B,).
    """
    t = torch.arange(num_tokens, device=lengths.device)
    length = lengths[:, None].clamp(min=1)
    total = torch.zeros(len(lengths), num_heads, num_tokens, dtype=torch.int64, device=lengths.device)
    for w, r in pattern.branches:
        segment = length.clamp(max=w)
        local = t % segment
        tokens = torch.minimum(segment, length - (t - local))[:, None]
        s = torch.tensor([pattern.offset(h, r, num_heads) for h in range(num_heads)], device=t.device)[
            :, None
        ]
        rows, real = (segment + r - 1)[:, None] // r, ((tokens - s + r - 1) // r).clamp(min=0)
        total += torch.where((local % r)[:, None] == s, rows - real, 0)
    return total


class TorchscaleAttention(nn.Module):
    """q, k, v, out projections with bias around dilated attention; sub-LN before the last."""

    def __init__(self, config: TorchscaleConfig, layer_index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.layer_index, self.pattern = config, layer_index, config.pattern()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(width, eps=config.layernorm_eps) if config.subln else None

    def forward(
        self, x: Tensor, lengths: Tensor | None, log_zero_keys: Tensor | None, cache: LongNetCache | None
    ) -> Tensor:
        heads = (self.config.num_attention_heads, self.config.head_dim)
        q, k, v = (project(x).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            out = cache.attend(self.layer_index, q, k, v, lengths)
        else:
            out, lse = dilated_attention(q, k, v, self.pattern, causal=self.config.causal, lengths=lengths)
            if log_zero_keys is not None:
                # n keys of logit 0 and value 0: out e^lse / (e^lse + n).
                out = out * torch.sigmoid(lse - log_zero_keys).transpose(1, 2)[..., None].to(out.dtype)
        out = out.flatten(2)
        return self.out_proj(out if self.inner_attn_ln is None else self.inner_attn_ln(out))


class TorchscaleFFN(nn.Module):
    """fc2(LayerNorm(activation(fc1(x)))); the norm only under sub-LN."""

    def __init__(self, config: TorchscaleConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        width = config.intermediate_size
        self.ffn_layernorm = nn.LayerNorm(width, eps=config.layernorm_eps) if config.subln else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.fc1(x))
        return self.fc2(x if self.ffn_layernorm is None else self.ffn_layernorm(x))


class TorchscaleLayer(nn.Module):
    """Pre-norm, or post-norm with the residual scaled by alpha = (2 layers)^(1/4) under DeepNorm."""

    def __init__(self, config: TorchscaleConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = TorchscaleAttention(config, layer_index)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.ffn = TorchscaleFFN(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.pre = config.normalize_before
        self.alpha = (2.0 * config.num_hidden_layers) ** 0.25 if config.deepnorm else 1.0

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        if self.pre:
            x = self._residual(x, self.self_attn(self.self_attn_layer_norm(x), *context))
            return self._residual(x, self.ffn(self.final_layer_norm(x)))
        x = self.self_attn_layer_norm(self._residual(x, self.self_attn(x, *context)))
        return self.final_layer_norm(self._residual(x, self.ffn(x)))

    def _residual(self, x: Tensor, change: Tensor) -> Tensor:
        return torch.add(change, x, alpha=self.alpha)


class TorchscaleLongNet(nn.Module):
    """torchscale's LongNetEncoder (causal=False) or LongNetDecoder (causal=True); parameter names are torchscale's own.

    Without dropout and stochastic depth. Gradients are exact, where torchscale detaches the mixture weights.
    """

    def __init__(self, config: TorchscaleConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=config.layernorm_eps)

        self.embed_tokens = nn.Embedding(config.vocab_size, width) if config.vocab_size else None
        self.embed_positions = nn.Embedding(config.positions, width) if config.positions else None
        self.layernorm_embedding = norm() if config.layernorm_embedding else None
        self.layers = nn.ModuleList(TorchscaleLayer(config, i) for i in range(config.num_hidden_layers))
        self.layer_norm = norm() if config.normalize_output else None
        self.output_projection = (
            nn.Linear(width, config.output_size, bias=False) if config.output_size else None
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        return_all_hiddens: bool = False,
        features_only: bool = False,
    ) -> Tensor | list[Tensor]:
        """Outputs (B, N, hidden), or (B, N, output_size) with an output projection; a row does not depend on its batch.

        Args:
            input_ids: (B, N), or inputs_embeds (B, N, hidden).
            attention_mask: (B, N) of 0 and 1, every row one run of 1s. Outputs at padding mean nothing.
            past_key_values: `LongNetCache(model.config, batch_size)`; decoders only; no padding on the left.
            return_all_hiddens: the embeddings and every layer's output instead, without the last norm.
            features_only: leave the output projection out.
        """
        if (input_ids is None) == (inputs_embeds is None) or (
            input_ids is not None and self.embed_tokens is None
        ):
            raise ValueError(
                "expected inputs_embeds, or input_ids if the state dict has embed_tokens.weight; got "
                + ("both" if input_ids is not None and inputs_embeds is not None else "neither of use")
            )
        if past_key_values is not None and not self.config.causal:
            raise ValueError(
                "past_key_values: expected None for an encoder; got a cache; read the whole text at once"
            )
        x: Any = inputs_embeds if input_ids is None else input_ids
        self._warn_of_shifts(x.shape[1])
        first = lengths = None
        if attention_mask is not None and (span := mask_to_span(attention_mask, *x.shape[:2])):
            first, lengths = span
            x = roll_rows(x, first)
        states = self._states(self._embed(x, past_key_values), lengths, past_key_values, return_all_hiddens)
        if not return_all_hiddens:
            states = [self._finish(states[-1], features_only)]
        if first is not None:
            states = [roll_rows(state, -first) for state in states]
        return states if return_all_hiddens else states[0]

    def _embed(self, x: Tensor, cache: LongNetCache | None) -> Tensor:
        if x.dim() == 2 and self.embed_tokens is not None:
            x = self.embed_tokens(x)
        if self.config.scale_embedding:
            x = math.sqrt(self.config.hidden_size) * x
        if self.embed_positions is not None:
            positions = torch.arange(x.shape[1], device=x.device)[None] + _FIRST_POSITION
            positions = positions if cache is None else positions + cache.positions[:, None]
            last = x.shape[1] + (max(cache.host_positions) if cache is not None else 0) + _FIRST_POSITION
            if last > self.config.positions:
                raise ValueError(
                    f"expected at most {self.config.positions - _FIRST_POSITION} tokens, which have learned positions;"
                    f" got {last - _FIRST_POSITION}"
                )
            x = x + self.embed_positions(positions)
        return x if self.layernorm_embedding is None else self.layernorm_embedding(x)

    def _warn_of_shifts(self, num_tokens: int) -> None:
        shifted = [(w, r) for w, r in self.config.pattern().branches if w % r and num_tokens > w]
        if shifted and self.config.zero_padding:
            warnings.warn(
                f"{num_tokens} tokens exceed a segment that its rate does not divide, {shifted}: torchscale misplaces outputs"
                " of further segments there; these outputs are in their places and differ from torchscale's",
                stacklevel=3,
            )

    def _states(
        self, x: Tensor, lengths: Tensor | None, cache: LongNetCache | None, keep: bool
    ) -> list[Tensor]:
        """The embeddings and every layer's output; without `keep` only the last."""
        log_zero_keys = None
        if self.config.zero_padding and not self.config.causal:
            log_zero_keys = self._log_zero_keys(x, lengths)
        states = [x]
        for layer in self.layers:
            x = layer(x, lengths, log_zero_keys, cache)
            states = [*states, x] if keep else [x]
        if cache is not None:
            cache.advance(x.shape[1] if lengths is None else lengths)
        return states

    def _log_zero_keys(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        n = x.shape[1]
        alone = torch.tensor([n], device=x.device) if lengths is None else lengths
        count = zero_keys(self.config.pattern(), self.config.num_attention_heads, n, alone)
        count = count.to(torch.promote_types(x.dtype, torch.float32)).log()
        if lengths is None:
            return count
        # At padding the log-sum-exp is -inf, and -inf - -inf is no number.
        return count.masked_fill((torch.arange(n, device=x.device) >= lengths[:, None])[:, None], 0)

    def _finish(self, x: Tensor, features_only: bool) -> Tensor:
        x = x if self.layer_norm is None else self.layer_norm(x)
        return x if features_only or self.output_projection is None else self.output_projection(x)


def load_torchscale(
    weights: Mapping[str, Tensor] | str | os.PathLike,
    *,
    num_heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool,
    prefix: str = "",
    **options: Any,
) -> TorchscaleLongNet:
    """A torchscale LongNetEncoder or LongNetDecoder from its state dict.

    Sizes, sub-LN, embeddings and output projection are read off the names and shapes. What a state dict cannot tell is given:
    torchscale's `encoder_attention_heads`, `segment_length`, `dilated_ratio`, and as options of `TorchscaleConfig`: deepnorm,
    normalize_before, activation, layernorm_eps, scale_embedding (not no_scale_embedding), zero_padding.

    Args:
        weights: a state dict, or a file (.safetensors, or .pt/.pth read without pickled code; "model" inside is looked up).
        prefix: of the names to read, e.g. "encoder.".

    Raises:
        ValueError: parts that LongNet does not compute (xPos, relative positions, cross-attention, experts, multiway), or names
            or shapes that do not fit.

    Example:
        >>> pattern = {"segment_lengths": (2048, 4096), "dilation_rates": (1, 2)}
        >>> load_torchscale("checkpoint.pt", num_heads=12, causal=True, prefix="decoder.", **pattern)  # doctest: +SKIP
    """
    state = {k.removeprefix(prefix): v for k, v in read_weights(weights).items() if k.startswith(prefix)}
    for part, reason in _REFUSED.items():
        if found := next((name for name in state if part in name), None):
            raise ValueError(f"{found}: expected a LongNet without {reason}; it is not computed here")
    layers = {int(name.split(".")[1]) for name in state if name.startswith("layers.")}
    if not layers or "layers.0.ffn.fc1.weight" not in state:
        raise ValueError(
            f"expected torchscale's names (layers.0.ffn.fc1.weight, ...) after prefix {prefix!r}; got"
            f" {sorted(state)[:3]}; give the prefix"
        )
    inner, hidden = state["layers.0.ffn.fc1.weight"].shape

    def rows(name: str) -> int:
        return state[name].shape[0] if name in state else 0

    config = TorchscaleConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=num_heads,
        segment_lengths=tuple(int(w) for w in segment_lengths),
        dilation_rates=tuple(int(r) for r in dilation_rates),
        causal=causal,
        subln="layers.0.self_attn.inner_attn_ln.weight" in state,
        normalize_output="layer_norm.weight" in state,
        vocab_size=rows("embed_tokens.weight"),
        positions=rows("embed_positions.weight"),
        layernorm_embedding="layernorm_embedding.weight" in state,
        output_size=rows("output_projection.weight"),
        **options,
    )
    model = TorchscaleLongNet(config).to(state["layers.0.ffn.fc1.weight"].dtype)
    fill(model, state)
    return model.eval()


def read_weights(weights: Mapping[str, Tensor] | str | os.PathLike) -> Mapping[str, Tensor]:
    """The state dict in a file, or itself. Never runs pickled code."""
    if isinstance(weights, Mapping):
        return weights
    path = Path(weights)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("model", state)
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f'{path}: expected a state dict, or one under "model"; got something else')
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict whose names and shapes must fit exactly."""
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise ValueError(f"expected weights that fit {type(model).__name__}; {error}") from error
