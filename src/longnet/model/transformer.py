"""LongNet as Hugging Face models: the stack of layers and the causal language model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from longnet.model.cache import LongNetCache
from longnet.model.config import LongNetConfig
from longnet.model.folder import furnish
from longnet.model.hierarchical_layer import LongNetHierarchicalAttention
from longnet.model.layers import LongNetLayer, LongNetRMSNorm, rotary_angles
from longnet.model.padding import last_tokens, mask_to_span, next_tokens, roll_rows
from longnet.model.tiles import by_tiles

# Logits that exist at one time while a loss is computed: 128 MiB in fp32.
LOSS_LOGITS = 2**25


# transformers 5.24 calls `cache` what was `past_key_values` before, in outputs and in what `generate` hands to a model.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def loss_chunk(vocab_size: int) -> int:
    """Tokens whose logits are alive at once."""
    return max(1, LOSS_LOGITS // vocab_size)


class LongNetPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving; no forward."""

    config: LongNetConfig  # pyrefly: ignore
    config_class = LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongNetLayer"]  # noqa: RUF012 - Hugging Face's own convention
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:  # pyrefly: ignore - the rest is handed on
        """As in transformers, which makes every loaded parameter learn: router mixes are held fixed again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair with output_loading_info=True
        for module in model.modules():
            if isinstance(module, LongNetHierarchicalAttention):
                module.router_mix.requires_grad_(False)
        return loaded

    def save_pretrained(  # pyrefly: ignore - the rest is handed on by name
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As in transformers; the folder also gets a stub for `trust_remote_code=True` and a model card."""
        if is_main_process:
            furnish(self, Path(save_directory))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range); matrices that write to the residual stream 1 / sqrt(2 layers) smaller (GPT-2)."""
        if isinstance(module, nn.Linear) and getattr(module, "writes_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, LongNetHierarchicalAttention):
            for weight in (module.prior_query, module.key_conv):
                init.zeros_(weight)
            heads = torch.linspace(0, self.config.far_bias, module.heads)
            init.copy_(module.level_bias, heads[:, None].expand_as(module.level_bias))
            init.ones_(module.router_mix)
        else:
            super()._init_weights(module)


class LongNetModel(LongNetPreTrainedModel):
    """Token embeddings, the layers and a final norm. Returns (B, N, hidden).

    Example:
        >>> encoder = LongNetModel(LongNetConfig.preset("tiny", num_hidden_layers=1, bidirectional=True))
        >>> encoder(input_ids=torch.randint(4, 260, (2, 50))).last_hidden_state.shape
        torch.Size([2, 50, 128])
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LongNetLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LongNetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.tile_tokens: int | None = None  # set from outside (tiles.set_tile)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        lengths: Tensor | None = None,
        start: int = 0,
        cache: LongNetCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of a batch.

        Args:
            input_ids: (B, N) int64; or inputs_embeds (B, N, hidden).
            attention_mask: (B, N) of 0 and 1, every row one run of 1s. Left-padded rows are shifted to the left edge at
                the door and back at the exit, so a document's states do not depend on its batch.
            past_key_values: a `LongNetCache`; the tokens continue what it has read. `cache` is its
                other name, that of newer transformers.
            use_cache: make a cache if none is given. None means no.
            lengths: (B,) instead of attention_mask, for right-padded rows.
            start: global position of the first token (without a cache).
        """
        self._check_inputs(input_ids, inputs_embeds, attention_mask, lengths, kwargs)
        cache = _one_of(past_key_values, cache)
        x: Any = inputs_embeds if input_ids is None else input_ids
        first = None
        if attention_mask is not None and (span := mask_to_span(attention_mask, *x.shape[:2])):
            first, lengths = span
            x = roll_rows(x, first)
        hidden = x if input_ids is None else self.embed_tokens(x)
        cache = self._cache(cache, use_cache, hidden, start)
        hidden, states = self._stack(hidden, lengths, cache, start, bool(output_hidden_states))
        if cache is not None:
            cache.advance(hidden.shape[1] if lengths is None else lengths)
        if first is not None:
            hidden = roll_rows(hidden, -first)
            states = states and tuple(roll_rows(state, -first) for state in states)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=states,
            **{CACHE: cache},  # pyrefly: ignore - not a transformers Cache
        )
        return output if return_dict is not False else output.to_tuple()

    def _stack(
        self,
        hidden: Tensor,
        lengths: Tensor | None,
        cache: LongNetCache | None,
        start: int,
        keep_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """All layers and the final norm: (hidden (B, N, C), the input of every layer and the last output, or None)."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None] + start
        if cache is not None:
            positions = positions + cache.positions[:, None]
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        states = []
        for layer in self.layers:
            if keep_states:
                states.append(hidden)
            hidden = layer(hidden, rotary, lengths, cache, start)
        hidden = by_tiles(self.norm, self.tile_tokens, hidden)
        return hidden, (*states, hidden) if keep_states else None

    def _cache(
        self, cache: LongNetCache | None, use_cache: bool | None, hidden: Tensor, start: int
    ) -> LongNetCache | None:
        recomputes = self.training and self.gradient_checkpointing
        if cache is None and (not use_cache or recomputes):
            return None
        if recomputes and not getattr(cache, "differentiable", False):
            raise ValueError(
                "a cache cannot be used with gradient checkpointing; pass past_key_values=None or"
                " call model.eval()"
            )
        if self.config.bidirectional:
            raise ValueError("expected no cache in a bidirectional model; pass use_cache=False")
        if start:
            raise ValueError(f"expected start = 0 with a cache, which knows its position; got {start}")
        if cache is None:
            return LongNetCache(self.config, hidden.shape[0], hidden.device, hidden.dtype)
        if not isinstance(cache, LongNetCache) and not getattr(cache, "differentiable", False):
            raise ValueError(
                f"past_key_values: expected a LongNetCache; got {type(cache).__name__}; use_cache=True makes one"
            )
        return cache

    @staticmethod
    def _check_inputs(
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        lengths: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
            found = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            raise ValueError(f"input_ids: expected int64 (B, N); got {found}; one text is input_ids[None]")
        if attention_mask is not None and lengths is not None:
            raise ValueError("expected at most one of attention_mask and lengths")
        for name in ("position_ids", "cu_seq_lens_q", "seq_idx"):
            if kwargs.get(name) is not None:
                # Ignoring it would let packed documents read each other.
                raise ValueError(
                    f"{name} is not supported: positions count from the start of each row; give"
                    " each document its own row with attention_mask or lengths"
                )
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not supported: the weights are never formed")


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """LongNet with a language-model head. Losses are computed in chunks of tokens; all logits never exist at once.

    Example:
        >>> model = LongNetForCausalLM(LongNetConfig.preset("tiny", num_hidden_layers=1))
        >>> ids = torch.randint(4, 260, (2, 50))
        >>> model(input_ids=ids, labels=ids).loss.shape
        torch.Size([])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        if config.bidirectional:
            raise ValueError(
                "expected bidirectional=False for causal language modelling; use LongNetModel for an encoder"
            )
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        lengths: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: LongNetCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, N, V), or the loss.

        Args:
            labels: (B, N), usually input_ids: token n is asked to predict labels[n + 1]; -100 is ignored, and so is
                every label at padding or predicted from padding. With labels, logits are None unless return_logits.
            logits_to_keep: an integer k keeps the last k tokens (of each sequence's own, if `lengths` is given).
            num_items_in_batch: the loss is the sum over tokens divided by this; None: by the tokens that count.
            Others: as in `LongNetModel`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            lengths=lengths,
            **kwargs,
        )
        hidden, loss, logits = output.last_hidden_state, None, None
        if labels is not None:
            targets = next_tokens(labels, attention_mask, lengths)
            losses = self._chunked_losses(hidden, targets)
            count = (targets != -100).sum().clamp(min=1)
            loss = losses.sum() / (count if num_items_in_batch is None else num_items_in_batch)
        if labels is None if return_logits is None else return_logits:
            logits = self.lm_head(last_tokens(hidden, lengths, logits_to_keep))
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE: getattr(output, CACHE)},
        )
        return result if return_dict is not False else result.to_tuple()

    def token_losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Negative log-likelihood of every next token, in nats, fp32; 0 where a target is -100 or padding.

        Without `targets`: (B, N - 1), entry n scores input_ids[:, n + 1]. With `targets` (B, N): entry n scores targets[:, n],
        for streams, where the next token of a chunk's end lies in the next chunk.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            lengths=lengths,
            **kwargs,
        ).last_hidden_state
        if targets is not None:
            return self._chunked_losses(hidden, targets)
        return self._chunked_losses(hidden, next_tokens(input_ids, attention_mask, lengths))[:, :-1]

    def _chunked_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(B, N) losses from hidden (B, N, C): logits live for LOSS_LOGITS / V tokens and are recomputed
        in backward."""
        if targets.shape != hidden.shape[:2]:
            raise ValueError(
                f"expected targets or labels {tuple(hidden.shape[:2])}; got {tuple(targets.shape)}"
            )
        flat, wanted = hidden.flatten(0, 1), targets.to(hidden.device).flatten()
        losses = []
        # `split`, not slices: the gradient of every slice would be a whole tensor of zeros, quadratic work in all.
        size = loss_chunk(self.config.vocab_size)
        for part in zip(flat.split(size), wanted.split(size), strict=True):
            if torch.is_grad_enabled():
                # No dropout here, so there is no random state to restore.
                losses.append(checkpoint(self._losses, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                losses.append(self._losses(*part))
        return torch.cat(losses).view(targets.shape)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")

    def prepare_inputs_for_generation(  # pyrefly: ignore - narrower types than the parent's
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: LongNetCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: LongNetCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step of `generate`. Positions come from the cache or the mask, so no position_ids are handed on."""
        cache = _one_of(past_key_values, cache)
        inputs: dict[str, Any] = {
            CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }
        keep = next_sequence_length
        if keep is None and cache is not None and not is_first_iteration:
            keep = 1
        if inputs_embeds is not None and is_first_iteration:
            inputs["inputs_embeds"] = inputs_embeds if keep is None else inputs_embeds[:, -keep:]
        else:
            inputs["input_ids"] = input_ids if keep is None else input_ids[:, -keep:]
        for name in ("output_hidden_states", "return_dict"):
            if name in kwargs:
                inputs[name] = kwargs[name]
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Make nothing: `forward` makes a `LongNetCache` at its first call, when the batch (with
        beams) is known. Only a prefill in chunks asks for one before."""
        if (cache := model_kwargs.get(CACHE)) is not None:
            cache._is_user_defined = True
        elif generation_config.prefill_chunk_size is not None and model_kwargs.get("use_cache") is not False:
            beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs[CACHE] = LongNetCache(self.config, batch_size * beams, self.device, self.dtype)
        return False


def _one_of(past_key_values: LongNetCache | None, cache: LongNetCache | None) -> LongNetCache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("expected past_key_values or cache, two names of one thing; got both")
    return past_key_values if cache is None else cache
