"""Files of a streaming cache: named tensors and JSON in one safetensors file, checksummed. No pickle, never half a file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "longnet-cache-1"


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write to a temporary name, synchronise, rename: `path` is the old file or the whole new one."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    meta = {"format": _FORMAT, **meta}
    meta["checksum"] = _checksum(meta, tensors)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"longnet": json.dumps(meta, sort_keys=True)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def fingerprint(config: Any, pattern: Any) -> dict[str, Any]:
    """What must agree between a snapshot and the model that continues it, as JSON values."""
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    optional = ("hidden_size", "intermediate_size", "vocab_size", "rope_theta")
    result = {name: getattr(config, name) for name in names}
    result |= {name: getattr(config, name) for name in optional if hasattr(config, name)}
    result["branches"] = [list(branch) for branch in pattern.branches]
    result["head_offsets"] = pattern.head_offsets
    if "hierarchical" in getattr(config, "attention_kinds", list)():
        result |= {"attention": config.attention_kinds(), "hierarchical": repr(config.hierarchical_pattern())}
    return result


def _checksum(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """sha256 over the metadata and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(
        json.dumps({k: meta[k] for k in sorted(meta) if k != "checksum"}, sort_keys=True).encode()
    )
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)};".encode())
        if x.numel():
            digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a snapshot whose checksum holds."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["longnet"])
            # Cloned: library products depend on the alignment of memory in their last bit, and a file has none.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        checksum = meta["checksum"]
        actual = _checksum(meta, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a cache snapshot ({_FORMAT}, safetensors); got {error!r}; "
            "use a file that LongNetCache.save wrote"
        ) from error
    if checksum != actual or meta.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: expected checksum {checksum} and format {_FORMAT}; got {actual} and {meta.get('format')}; "
            "the snapshot is damaged: read the text again"
        )
    return meta, tensors
