"""Which checkpoint a run continues from, and whether it is one of this run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from longnet.integrations.tokenizer import BYTES
from longnet.train import checkpoint


class Found(NamedTuple):
    """A checkpoint that was read; `path` is None where another rank read it."""

    path: Path | None
    tensors: checkpoint.Groups
    state: dict[str, Any]


def newest(folder: Path, resume: str) -> tuple[Found | None, list[str]]:
    """The newest intact checkpoint in `folder`, or the one that `resume` names where there is none; and those skipped.

    Args:
        resume: "auto"; "never", which refuses a folder that has any; the output folder of a run, or a checkpoint.

    Raises:
        ValueError: only damaged checkpoints, or `resume` names none.
    """
    path, skipped = checkpoint.newest(folder)
    if path is not None and resume == "never":
        raise ValueError(
            f'resume="never": expected an output folder without checkpoints; got {path}; use another folder'
        )
    if path is None and skipped:
        raise ValueError(
            f"expected an intact checkpoint in {folder}; got only damaged ones: {'; '.join(skipped)}"
        )
    if path is None and resume not in ("auto", "never"):
        path, more = _elsewhere(Path(resume))
        skipped += more
    return None if path is None else Found(path, *checkpoint.load(path)), skipped


def _elsewhere(source: Path) -> tuple[Path, list[str]]:
    if (source / "manifest.json").exists():
        return source, []
    path, skipped = checkpoint.newest(source / "checkpoints")
    if path is None:
        raise ValueError(
            f'resume: expected "auto", "never", the output folder of a run or one of its checkpoints; got {source}, '
            f"which has no intact checkpoint {'; '.join(skipped)}"
        )
    return path, skipped


def require_same(found: Found, now: dict[str, Any], model: torch.nn.Module) -> None:
    """Raises where a checkpoint is of another configuration (ValueError) or does not fit the model (CheckpointCorrupt).

    Args:
        now: what a continuation must share with the run that wrote it.
    """
    path, tensors, state = found
    before = {"tokenizer": BYTES.name} | state["config"]  # checkpoints from before there were others
    differing = [f"{k}: checkpoint {before.get(k)!r}, now {now[k]!r}" for k in now if before.get(k) != now[k]]
    if differing:
        raise ValueError(
            f"{path} belongs to another configuration; differing: {'; '.join(differing)}; use another output folder"
        )
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    got = {name: tuple(t.shape) for name, t in tensors.get("weights", {}).items()}
    if wanted != got or not {"optimizer", "random"} <= tensors.keys():
        names = sorted(n for n in wanted | got if wanted.get(n) != got.get(n))
        raise checkpoint.CheckpointCorrupt(
            f"{path}: expected weights, optimizer and random state of this model; got groups {sorted(tensors)}, differing "
            f"weights {names[:5]}"
        )
