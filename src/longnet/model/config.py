"""The configuration of a LongNet model: what it is, what it costs, and the sizes we ship."""

from __future__ import annotations

import math
from typing import Any, Literal

from transformers import PreTrainedConfig

from longnet.patterns import DilatedPattern, HeadOffsets, HierarchicalPattern

_SHORT = {"segment_lengths": [256, 1024, 4096], "dilation_rates": [1, 4, 16]}
_MIDDLE = {"segment_lengths": [1024, 4096, 16384], "dilation_rates": [1, 4, 16]}
_LONG = {"segment_lengths": [2048, 8192, 32768], "dilation_rates": [1, 4, 16]}


def _size(hidden: int, inner: int, layers: int, heads: int, pattern: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **pattern,
    }


# Parameters with the byte vocabulary:
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _size(128, 512, 4, 4, _SHORT),  # 1.1 million
    "mini": _size(256, 704, 6, 8, _SHORT),  # 4.9 million
    "small": _size(512, 1408, 6, 8, _MIDDLE),  # 19 million
    "base": _size(768, 2048, 12, 12, _LONG),  # 85 million
    "large": _size(1024, 2816, 28, 16, _LONG),  # 360 million
    "xl": _size(2048, 5632, 20, 16, _LONG),  # 1.0 billion
}


class LongNetConfig(PreTrainedConfig):
    """Configuration of a LongNet decoder (or, with `bidirectional=True`, encoder).

    Pre-norm layers: h + Attention(RMSNorm(h)), then h + SwiGLU(RMSNorm(h)); rotary positions;
    RMS-normed queries and keys.

    Args:
        vocab_size: number of token ids; 260 = 4 special ids and 256 bytes.
        num_key_value_heads: None means as many as query heads; fewer is grouped-query attention.
        head_dim: None means hidden_size / num_attention_heads; must be even (rotary turns pairs).
        segment_lengths, dilation_rates, head_offsets: the `DilatedPattern`.
        bidirectional: every token sees both directions of its segments (no cache, no causal
            language modelling).
        attention: "dilated", "hierarchical", or a list with one of them for every layer.
        hierarchical: fields of `HierarchicalPattern` for the hierarchical layers, as JSON.
        key_conv: width of the short convolution on the keys of hierarchical layers; 0 for none.
        far_bias: what the level biases of hierarchical layers are at first, in nats, spread evenly over the heads from 0 to
            this: heads begin with different reach. 0: far text weighs as in dense attention, in every head. -6 learns text
            faster, and later what stands far apart (docs/hierarchical.md).
        attention_impl: None picks the best path; "triton", "strided" or "reference" obeys or
            raises.

    Example:
        >>> config = LongNetConfig.preset("tiny", num_hidden_layers=2)
        >>> config.pattern().branches
        ((256, 1), (1024, 4), (4096, 16))
    """

    model_type = "longnet"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    vocab_size: int = 260
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    # None until __post_init__ has filled them in.
    num_key_value_heads: int = None  # pyrefly: ignore
    head_dim: int = None  # pyrefly: ignore
    segment_lengths: list[int] | tuple[int, ...] = (2048, 8192, 32768)
    dilation_rates: list[int] | tuple[int, ...] = (1, 4, 16)
    head_offsets: HeadOffsets = "cyclic"
    rope_theta: float | int = 10_000.0
    rms_norm_eps: float = 1e-6
    bidirectional: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    attention_impl: Literal["triton", "strided", "reference"] | None = None
    attention: str | list[str] = "dilated"
    hierarchical: dict[str, Any] | None = None
    key_conv: int = 4
    far_bias: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._require_positive("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        self._require_positive("num_attention_heads")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"expected hidden_size divisible by num_attention_heads; got"
                    f" {self.hidden_size} and {self.num_attention_heads}; change one of them or"
                    " give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._require_positive("num_key_value_heads", "head_dim")
        # Lists, because JSON has no tuples: a configuration and its reloaded copy must compare
        # equal.
        self.segment_lengths = list(self.segment_lengths)
        self.dilation_rates = list(self.dilation_rates)
        self._validate()
        super().__post_init__(**kwargs)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"expected {name} to be an integer >= 1; got {value!r}")

    def _validate(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"expected num_attention_heads divisible by num_key_value_heads; got"
                f" {self.num_attention_heads} and {self.num_key_value_heads}; choose a divisor of"
                f" {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"expected an even head_dim (rotary turns pairs); got {self.head_dim}")
        if self.attention_impl not in (None, "triton", "strided", "reference"):
            raise ValueError(
                "expected attention_impl None, 'triton', 'strided' or 'reference'; got"
                f" {self.attention_impl!r}; None picks the best path"
            )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int) or not value > 0:
                raise ValueError(f"expected {name} > 0; got {value!r}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"expected pad_token_id in [0, vocab_size = {self.vocab_size}); got {self.pad_token_id}"
            )
        self.pattern()  # raises for a pattern that cannot be
        kinds = self.attention_kinds()
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {"dilated", "hierarchical"}:
            raise ValueError(
                f"expected attention 'dilated', 'hierarchical' or a list of {self.num_hidden_layers} of them, one a layer; got"
                f" {self.attention!r}"
            )
        if type(self.key_conv) is not int or not 0 <= self.key_conv <= 64:
            raise ValueError(
                f"expected key_conv, the width of the convolution on keys, in 0 .. 64; got {self.key_conv!r}"
            )
        bias = self.far_bias
        if isinstance(bias, bool) or not isinstance(bias, float | int) or not math.isfinite(bias):
            raise ValueError(
                f"expected far_bias, what the level biases begin with, to be a finite number; got {bias!r}"
            )
        self.hierarchical_pattern()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LongNetConfig:
        """A shipped size ("tiny", "mini", "small", "base", "large", "xl"), with any field
        overridden."""
        if name not in PRESETS:
            raise ValueError(f"expected a preset of {', '.join(PRESETS)}; got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    def pattern(self) -> DilatedPattern:
        """Who sees whom."""
        return DilatedPattern(tuple(self.segment_lengths), tuple(self.dilation_rates), self.head_offsets)

    def attention_kinds(self) -> list[str]:
        """ "dilated" or "hierarchical", for every layer."""
        return (
            [self.attention] * self.num_hidden_layers
            if isinstance(self.attention, str)
            else list(self.attention)
        )

    def hierarchical_pattern(self) -> HierarchicalPattern:
        """The tree of the hierarchical layers."""
        fields = dict(self.hierarchical or {})
        if fields.get("retention") is not None:
            fields["retention"] = tuple(fields["retention"])
        try:
            return HierarchicalPattern(**fields)
        except TypeError as error:
            raise ValueError(
                f"expected hierarchical to hold fields of HierarchicalPattern; got {fields}: {error}"
            ) from error

    def matrix_parameters(self) -> int:
        """Weights of all layers that take part in a matrix product: every one costs 2 operations
        per token."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads  # q, o, k, v
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer

    def num_parameters(self) -> int:
        """Parameters of `LongNetForCausalLM`: matrices + two norms and two head norms per layer +
        what hierarchical layers pool and route by + norm + embeddings."""
        norms = self.num_hidden_layers * 2 * (self.hidden_size + self.head_dim) + self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        pooling = self.num_key_value_heads * self.head_dim * (1 + self.key_conv)
        routing = self.num_attention_heads * (1 + self.hierarchical_pattern().most_levels())
        extra = self.attention_kinds().count("hierarchical") * (pooling + routing)
        return self.matrix_parameters() + norms + extra + tables * self.vocab_size * self.hidden_size

    def flops_per_token(self, num_tokens: int, training: bool = True) -> float:
        """Operations per token at sequence length N, the embedding look-up excluded, recomputation
        not counted.

        forward = 2 (matrices + hidden V) + the sum over layers of pattern.flops(N) / N;
        training = 3 * the first term + 3.5 * the second (its backward recomputes the scores).
        """
        matrices = 2 * (self.matrix_parameters() + self.vocab_size * self.hidden_size)
        kinds, shape = self.attention_kinds(), (num_tokens, self.num_attention_heads, self.head_dim)
        attention = 0.0
        if "dilated" in kinds:
            dilated = self.pattern().flops(*shape, causal=not self.bidirectional)
            attention += kinds.count("dilated") * dilated / num_tokens
        if "hierarchical" in kinds:
            # Bidirectional lists are the causal ones and their mirror image.
            directions = 2 if self.bidirectional else 1
            tree = directions * self.hierarchical_pattern().flops(*shape)
            attention += kinds.count("hierarchical") * tree / num_tokens
        return 3 * matrices + 3.5 * attention if training else matrices + attention
