"""Hugging Face models with LongNet attention. Importing this room registers them with the Auto
classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from longnet.model.cache import LongNetCache
from longnet.model.config import PRESETS, LongNetConfig
from longnet.model.heads import (
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
)
from longnet.model.transformer import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel

AutoConfig.register(LongNetConfig.model_type, LongNetConfig, exist_ok=True)
AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LongNetConfig, LongNetForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(LongNetConfig, LongNetForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(LongNetConfig, LongNetForTokenClassification, exist_ok=True)

__all__ = [
    "PRESETS",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
]
