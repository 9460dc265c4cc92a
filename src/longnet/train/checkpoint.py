"""Checkpoints that are there whole or not at all, and that notice a flipped bit. Tensors and JSON only; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
Groups = dict[str, dict[str, Tensor]]


class CheckpointCorrupt(ValueError):
    """A checkpoint is not what was written: the message names the file, what was expected and what was found."""


def save(root: Path, step: int, tensors: Groups, state: dict[str, Any], keep: int = 2) -> Path:
    """Write root/step-XXXXXXXX: <group>.safetensors each, state.json, manifest.json with every file's size and SHA-256.

    Written to a fresh temporary directory, every file and the directories fsynced, then renamed once. Older checkpoints
    beyond `keep` go only after the new one has been read back and verified.

    Raises:
        OSError: no space, no permission; nothing partial stays visible and earlier checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob("tmp.*"):
        shutil.rmtree(stale, ignore_errors=True)
    run = uuid.uuid4().hex
    temporary, final = root / f"tmp.{step}.{run}", root / f"step-{step:08d}"
    temporary.mkdir()
    try:
        for name, group in tensors.items():
            binding = {"step": str(step), "run": run}
            save_file(
                {k: v.detach().contiguous() for k, v in group.items()},
                temporary / f"{name}.safetensors",
                binding,
            )
        (temporary / "state.json").write_text(json.dumps(state))
        files = {
            p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "step": step, "run": run, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _fsync(root)
    except SafetensorError as error:
        raise OSError(f"could not write checkpoint {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verify(final)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file it names has been found with its size and SHA-256."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        step, format_ = int(manifest["step"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(
            f"{path / 'manifest.json'}: expected a readable manifest; got {error!r}"
        ) from error
    if format_ != FORMAT or f"step-{step:08d}" != path.name:
        raise CheckpointCorrupt(
            f"{path}: expected format {FORMAT} and this step; got format {format_}, step {step}"
        )
    if "state.json" not in files:
        raise CheckpointCorrupt(
            f"{path / 'manifest.json'}: expected state.json among its files; got {sorted(files)}"
        )
    for name, (size, digest) in files.items():
        if Path(name).name != name:
            raise CheckpointCorrupt(f"{path}: expected plain file names; got {name!r}")
        file = path / name
        found = (file.stat().st_size, _sha256(file)) if file.is_file() else (None, None)
        if found != (size, digest):
            raise CheckpointCorrupt(
                f"{file}: expected {size} bytes, sha256 {digest}; got {found[0]}, {found[1]}"
            )
    return manifest


def load(path: Path) -> tuple[Groups, dict[str, Any]]:
    """(tensors, state) of a verified checkpoint, on the CPU."""
    manifest = verify(path)
    groups = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            groups[name.removesuffix(".safetensors")] = load_file(path / name)
    return groups, json.loads((path / "state.json").read_text())


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over."""
    skipped = []
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            verify(path)
            return path, skipped
        except CheckpointCorrupt as error:
            skipped.append(str(error))
    return None, skipped


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
