"""Load a model folder named on the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from longnet.model import LongNetForCausalLM


def load_model(path: Path) -> LongNetForCausalLM:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with config.json, such as OUTPUT/model of `longnet train`; got {path}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LongNetForCausalLM.from_pretrained(path, use_safetensors=True)  # never a pickle
    torch.nn.Module.to(model, device)
    return model
