"""Load a model folder named on the command line, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from longnet.integrations.tokenizer import tokenizer_of_model
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.text import Tokenizer


def load_model(path: Path) -> tuple[LongNetForCausalLM, Tokenizer]:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with config.json, such as OUTPUT/model of `longnet train`; got {path}"
        )
    tokenizer = tokenizer_of_model(path, LongNetConfig.from_pretrained(path).vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LongNetForCausalLM.from_pretrained(path, use_safetensors=True)  # never a pickle
    torch.nn.Module.to(model, device)
    return model, tokenizer
