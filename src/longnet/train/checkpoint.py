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
_ASIDE = ".replaced"
Groups = dict[str, dict[str, Tensor]]


class CheckpointCorrupt(ValueError):
    """A checkpoint is not what was written: the message names the file, what was expected and what was found."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. Nothing partial is visible; earlier checkpoints are untouched."""


def save(root: Path, step: int, tensors: Groups, state: dict[str, Any], keep: int = 2) -> Path:
    """Write root/step-XXXXXXXX: <group>.safetensors each, state.json, manifest.json with every file's size and SHA-256.

    Written to a fresh temporary directory, every file and the directories fsynced, then renamed once. Of the other
    checkpoints, the `keep` - 1 newest that verify stay; the rest go only after the new one has been verified.

    Raises:
        CheckpointWriteError: no space, no permission; says where and how many bytes the tensors need.
    """
    temporary, final = root / f"tmp.{step}.{uuid.uuid4().hex}", root / f"step-{step:08d}"
    aside = final.with_name(final.name + _ASIDE)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob("tmp.*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        _write(temporary, step, tensors, state)
        if final.exists():
            # A kill between the two renames must leave one of them: `newest` finds the one set aside, too.
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(final, aside)
        os.rename(temporary, final)
        _fsync(root)
    except (OSError, SafetensorError) as error:
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        message = f"could not write checkpoint {final} ({needed} bytes of tensors): {error}; free space or choose another folder"
        raise CheckpointWriteError(message) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verify(final)
    kept = 1
    for other in _found(root):
        if other == final:
            continue
        if kept < keep and not other.name.endswith(_ASIDE) and _intact(other):
            kept += 1
        else:
            shutil.rmtree(other)
    return final


def _write(folder: Path, step: int, tensors: Groups, state: dict[str, Any]) -> None:
    for name, group in tensors.items():
        save_file({k: v.detach().contiguous() for k, v in group.items()}, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / "manifest.json").write_text(_sealed(manifest))
    for path in (*folder.iterdir(), folder):
        _fsync(path)


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest's text with its own hash: the list of hashes is no weaker than what it lists."""
    seal = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": seal})


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after its own seal and every file it names have been found with their size and SHA-256."""
    file = path / "manifest.json"
    try:
        written = file.read_text()
        manifest = json.loads(written)["manifest"]
        intact = written == _sealed(manifest)
        files = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        step, format_ = int(manifest["step"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{file}: expected a readable manifest; got {error!r}") from error
    if not intact:
        raise CheckpointCorrupt(f"{file}: expected the manifest that its own sha256 seals; got a changed one")
    if format_ != FORMAT or f"step-{step:08d}" != path.name.removesuffix(_ASIDE):
        raise CheckpointCorrupt(
            f"{path}: expected format {FORMAT} and this step; got format {format_}, step {step}"
        )
    if "state.json" not in files:
        raise CheckpointCorrupt(f"{file}: expected state.json among its files; got {sorted(files)}")
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
    groups, file = {}, path
    try:
        for name in manifest["files"]:
            file = path / name
            if name.endswith(".safetensors"):
                groups[name.removesuffix(".safetensors")] = load_file(file)
        file = path / "state.json"
        state = json.loads(file.read_text())
        if not isinstance(state, dict):
            raise TypeError(f"{type(state).__name__} instead of an object")
    except (SafetensorError, ValueError, TypeError) as error:
        raise CheckpointCorrupt(
            f"{file}: expected safetensors tensors or a JSON object; got {error!r}; the manifest seals it, so it was written "
            "by something else"
        ) from error
    return groups, state


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over."""
    skipped = []
    for path in _found(root):
        try:
            verify(path)
            return path, skipped
        except CheckpointCorrupt as error:
            skipped.append(str(error))
    return None, skipped


def _found(root: Path) -> list[Path]:
    """Checkpoints, newest step first; one that was set aside comes after its successor of the same step."""
    return sorted(
        root.glob("step-*"), key=lambda p: (p.name.removesuffix(_ASIDE), p.suffix != _ASIDE), reverse=True
    )


def _intact(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointCorrupt:
        return False
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
