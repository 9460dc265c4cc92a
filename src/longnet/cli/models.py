"""Folders and files named on the command line: models with their tokenizers to load, places to write to."""

from __future__ import annotations

from pathlib import Path

import torch

from longnet.integrations.tokenizer import tokenizer_of_model
from longnet.model import LongNetForCausalLM
from longnet.model.folder import load_whole
from longnet.text import Tokenizer


def check_place(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written once hours of work are done."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"{option}: expected a file in a folder that exists; got {path}")


def load_model(path: Path) -> tuple[LongNetForCausalLM, Tokenizer]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_whole(LongNetForCausalLM, path)
    tokenizer = tokenizer_of_model(path, model.config.vocab_size)
    torch.nn.Module.to(model, device)
    return model, tokenizer
