"""LongNet in other people's worlds: attention for existing Hugging Face models, published weights, a tokenizer."""

from longnet.integrations.attention_interface import patch, register
from longnet.integrations.gigapath import GigaPathSlideEncoder, load_gigapath
from longnet.integrations.streaming import StreamingCache
from longnet.integrations.tokenizer import byte_tokenizer, load_tokenizer
from longnet.integrations.torchscale import TorchscaleConfig, TorchscaleLongNet, load_torchscale

register()

__all__ = [
    "GigaPathSlideEncoder",
    "StreamingCache",
    "TorchscaleConfig",
    "TorchscaleLongNet",
    "byte_tokenizer",
    "load_gigapath",
    "load_tokenizer",
    "load_torchscale",
    "patch",
]
