"""Hugging Face models with LongNet attention. Importing this room registers them with the Auto
classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longnet.model.config import PRESETS, LongNetConfig
from longnet.model.transformer import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel

if TYPE_CHECKING:
    from longnet.model.cache import LongNetCache

AutoConfig.register(LongNetConfig.model_type, LongNetConfig, exist_ok=True)
AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetModel",
    "LongNetPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name == "LongNetCache":
        from longnet.model.cache import LongNetCache

        return LongNetCache
    raise AttributeError(f"module 'longnet.model' has no attribute {name!r}")
