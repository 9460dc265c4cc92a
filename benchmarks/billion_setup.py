"""The text, the model and the meters of benchmarks/billion.py."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from longnet import DilatedPattern, LongNetConfig, LongNetForCausalLM, text

PEAK = 989e12
SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inc", ".md", ".rst", ".txt"}


def sources(root: Path) -> Iterator[bytes]:
    """What stands in the source files below `root`, in the order of their names; many are read at once, as disks like it."""

    def names() -> Iterator[Path]:
        for folder, folders, files in os.walk(root):
            folders.sort()
            yield from (Path(folder, name) for name in sorted(files) if Path(name).suffix in SUFFIXES)

    def content(file: Path) -> bytes:
        try:
            return b"" if file.is_symlink() else file.read_bytes()
        except OSError:
            return b""

    found = names()
    with ThreadPoolExecutor(32) as pool:
        while some := list(islice(found, 1000)):
            yield from pool.map(content, some)


def corpus(path: Path, size: int, root: Path) -> tuple[np.ndarray, int]:
    """uint16 ids (size,) kept in `path`, and how many of them are distinct text."""
    distinct = path.with_suffix(".json")
    if path.exists() and distinct.exists() and path.stat().st_size == 2 * size:
        return np.memmap(path, np.uint16, "r"), json.loads(distinct.read_text())
    ids = np.memmap(path, np.uint16, "w+", shape=(size,))
    filled = 0
    for content in sources(root):
        data = np.frombuffer(content, np.uint8)[: size - filled]
        ids[filled : filled + len(data)] = data.astype(np.uint16) + text.FIRST_BYTE
        filled += len(data)
        if filled == size:
            break
    if not filled:
        raise SystemExit(f"--root: expected source files below {root}; found none")
    distinct.write_text(json.dumps(filled))
    for begin in range(filled, size, filled):
        ids[begin : begin + filled] = ids[: min(filled, size - begin)]
    return ids, filled


def build(options: argparse.Namespace, tokens: int) -> LongNetForCausalLM:
    pattern = DilatedPattern.geometric(tokens, window=2048, ratio=4)
    spec = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    if options.preset:
        config = LongNetConfig.preset(options.preset, **spec)
    else:
        heads = max(1, options.width // 64)
        config = LongNetConfig(
            hidden_size=options.width, intermediate_size=-(-options.width * 8 // 3 // 64) * 64,
            num_hidden_layers=options.layers, num_attention_heads=heads, **spec,
        )  # fmt: skip
    torch.manual_seed(0)
    return LongNetForCausalLM(config).to(options.device)


def low_residual(model: LongNetForCausalLM, device: str) -> None:
    """Hidden states in bf16 wherever autocast is on."""

    def low(module: torch.nn.Module, inputs: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.bfloat16() if torch.is_autocast_enabled(device) else out

    # Autocast leaves the embedding in fp32, and with it the residual stream: twice the memory of every layer checkpoint.
    model.model.embed_tokens.register_forward_hook(low)


def memory(device: str) -> float:
    """GiB at most since the last question."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak
