"""LongNet attention inside other people's models: `attn_implementation="longnet_dilated"` or `"longnet_hierarchical"`."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longnet.attention import dilated_attention
from longnet.attention.hierarchical import hierarchical_attention
from longnet.integrations.streaming import dilated_pattern
from longnet.integrations.visible import over_documents, visible_mask
from longnet.patterns import DilatedPattern, HierarchicalPattern

DILATED, HIERARCHICAL = "longnet_dilated", "longnet_hierarchical"
# Arguments of other attentions that change who sees whom or how much; ignoring one would be silently wrong.
_FOREIGN = {
    "sliding_window": "set config.use_sliding_window=False or config.sliding_window=None: the pattern replaces the window",
    "softcap": "this model caps its scores",
    "s_aux": "this model has attention sinks",
    "head_mask": "leave it out",
}
Model = TypeVar("Model", bound=PreTrainedModel)


def patch(model: Model, pattern: DilatedPattern | HierarchicalPattern, router_mix: float = 0.0) -> Model:
    """Make a Hugging Face decoder attend by a LongNet pattern; weights stay as they are. Returns the model.

    The pattern goes into `config.longnet` and is saved with the model. The implementation's name is not saved: reload with
    `from_pretrained(folder, attn_implementation="longnet_dilated")` (or "longnet_hierarchical"), or patch again.
    `config.is_causal = False` makes an encoder of a decoder.

    Args:
        model: any model that dispatches through transformers' attention interface (Llama, Qwen, Mistral, ...).
        pattern: a `DilatedPattern` or a `HierarchicalPattern`.
        router_mix: beta of a hierarchical pattern, 0 <= beta <= 1; 0 is the flat softmax, which dense weights know.

    Raises:
        ValueError: not a pattern, or a model that does not dispatch.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path)
        >>> patch(model, DilatedPattern((1024, 4096, 16384), (1, 4, 16)))
    """
    if isinstance(pattern, DilatedPattern):
        name, spec = DILATED, dataclasses.asdict(pattern)
    elif isinstance(pattern, HierarchicalPattern):
        if not 0 <= router_mix <= 1:
            raise ValueError(f"router_mix: expected a number in [0, 1]; got {router_mix!r}")
        name, spec = HIERARCHICAL, dataclasses.asdict(pattern) | {"router_mix": float(router_mix)}
    else:
        raise ValueError(f"pattern: expected a DilatedPattern or HierarchicalPattern; got {pattern!r}")
    # Lists, because JSON has no tuples: a configuration and its reloaded copy must compare equal.
    spec = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise ValueError(
            f"expected a model that dispatches through ALL_ATTENTION_FUNCTIONS; got {type(model).__name__}: {error}"
        ) from error
    for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        config.longnet = spec
    return model


def dilated(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' contract: query (B, H, Nq, D), key and value (B, K, Nk, D) -> (B, Nq, H, D) and no weights."""
    causal = _causal(module, dropout, is_causal, kwargs)
    state = getattr(key, "_longnet_cache", None)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if state is not None:
        if not causal:
            raise ValueError(
                "expected a causal model with a StreamingCache; got is_causal=False; leave it out"
            )
        cache, layer = state
        return cache.attend(layer, q, k, v, scaling, attention_mask), None
    pattern = dilated_pattern(module.config)

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        return dilated_attention(q, k, v, pattern, causal=causal, scale=scaling, lengths=lengths).out

    return over_documents(attend, q, k, v, attention_mask, kwargs).contiguous(), None


def hierarchical(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `dilated`. Keys arrive turned by the model's own rotary embedding, in summaries too.

    Fewer queries than keys (a dense cache) cost as much as a full pass: queries of the past are computed and dropped.
    """
    causal = _causal(module, dropout, is_causal, kwargs)
    if getattr(key, "_longnet_cache", None) is not None:
        raise ValueError(
            'StreamingCache: expected "longnet_dilated"; got "longnet_hierarchical"; use a DynamicCache'
        )
    pattern, beta = _hierarchical_pattern(module.config)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mix = query.new_full((query.shape[1],), beta)

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        missing = k.shape[1] - q.shape[1]
        q = F.pad(q, (0, 0, 0, 0, missing, 0))
        out = hierarchical_attention(
            q, k, v, pattern, causal=causal, scale=scaling, router_mix=mix, lengths=lengths
        ).out
        return out[:, missing:]

    return over_documents(attend, q, k, v, attention_mask, kwargs).contiguous(), None


def _causal(module: nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> bool:
    """Whether to mask the future, once every argument that LongNet attention does not know is refused."""
    if dropout:
        raise ValueError(
            f"dropout: expected 0, attention weights are never formed; got {dropout}; set config.attention_dropout=0"
        )
    for name, remedy in _FOREIGN.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with LongNet attention; got {kwargs[name]!r}; {remedy}")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _hierarchical_pattern(config: Any) -> tuple[HierarchicalPattern, float]:
    spec = getattr(config, "longnet", None)
    if not isinstance(spec, dict) or "top_k" not in spec:
        raise ValueError(
            f"config.longnet: expected the fields of a HierarchicalPattern; got {spec!r};"
            " call longnet.integrations.patch(model, HierarchicalPattern(...))"
        )
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()
    }
    beta = fields.pop("router_mix", 0.0)
    return HierarchicalPattern(**fields), beta


def register() -> None:
    """Make the names known to transformers; done by importing this room."""
    for name, function in ((DILATED, dilated), (HIERARCHICAL, hierarchical)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, visible_mask)
