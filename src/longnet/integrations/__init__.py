"""LongNet in other people's worlds: attention for existing Hugging Face models, published weights, tokenizers."""

from longnet.integrations.attention_interface import patch, register
from longnet.integrations.streaming import StreamingCache

register()

__all__ = ["StreamingCache", "patch"]
