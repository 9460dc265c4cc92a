"""LongNet: attention, models and tools for very long sequences. `import longnet` needs neither triton nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longnet.attention import AttentionOutput, dilated_attention, explain
from longnet.attention.hierarchical import hierarchical_attention
from longnet.patterns import DilatedPattern, HierarchicalPattern
from longnet.registration import register_with_transformers

if TYPE_CHECKING:
    from longnet.model import (
        LongNetCache,
        LongNetConfig,
        LongNetForCausalLM,
        LongNetForMaskedLM,
        LongNetForSequenceClassification,
        LongNetForTokenClassification,
        LongNetModel,
    )

__version__ = "0.1.0"
_MODEL_NAMES = (
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
)
__all__ = [
    "AttentionOutput",
    "DilatedPattern",
    "HierarchicalPattern",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "dilated_attention",
    "explain",
    "hierarchical_attention",
]


def __getattr__(name: str) -> Any:
    # Models stand on transformers, which takes seconds to import; attention users never pay for it.
    if name in _MODEL_NAMES:
        from longnet import model

        return getattr(model, name)
    raise AttributeError(f"module 'longnet' has no attribute {name!r}")


register_with_transformers()
