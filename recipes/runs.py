"""What the task recipes share: their options, and the loop over models and seeds, which goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longnet.tasks.fit import FitConfig, FitSummary, pick_device
from results import WHOLE, finished, record

PATTERN = {"segment_lengths": [512, 4096, 32768], "dilation_rates": [1, 8, 64]}
# Of the preset "mini"; two layers less, for what these sets hold is read more often in the same minutes.
FULL = {**PATTERN, "num_hidden_layers": 4}
# Cheaper per byte on a CPU, of the same reach.
REDUCED = {
    "segment_lengths": [128, 2048, 32768],
    "dilation_rates": [1, 16, 256],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
}
# Documents that the kernels of a model are compiled with, before its time begins to count.
WARM_DOCUMENTS = 6


@dataclass(frozen=True)
class Row:
    """One model of a comparison: reads `bytes` of every document; `share` of --minutes is its time."""

    name: str
    bytes: int | None = None
    share: float = 1.0
    pretrained: bool = True
    local: bool = False
    """Attention ends at the shortest segment."""


ROWS = {
    "whole": Row(WHOLE),
    "4096": Row("LongNet, first 4,096 bytes", 4096, 0.5),
    "512": Row("LongNet, first 512 bytes", 512, 0.25),
    "scratch": Row("LongNet, whole, no pre-training", pretrained=False),
    "windows": Row("LongNet, windows of 512 bytes", local=True),
}


def parser(description: str | None, rows: Sequence[str]) -> argparse.ArgumentParser:
    """Options of a recipe that compares `rows` (keys of ROWS)."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="folder with the set's .jsonl.gz")
    p.add_argument("--output", type=Path, required=True, help="results are added to this JSON file")
    p.add_argument(
        "--minutes",
        type=float,
        default=1.0,
        help="limit of one training of a model that reads whole documents; of others their share",
    )
    p.add_argument("--rows", nargs="+", choices=rows, default=rows, help="which models")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--pretrained",
        type=Path,
        help="model folder of recipes/pretrain.py; without it all models start from nothing",
    )
    p.add_argument("--reduced", action="store_true", help="a model and a corpus for two cores")
    p.add_argument("--baselines-only", action="store_true", help="only what needs no training on a GPU")
    return p


def settings(row: Row, seed: int, minutes: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a FitConfig for one training; minutes None: one epoch, to compile."""
    local = {"segment_lengths": [512], "dilation_rates": [1]} if row.local else {}
    pretrained = args.pretrained if row.pretrained else None
    return {
        "train": args.output, "output": args.output, "preset": "tiny" if args.reduced else "mini",
        "model": {**(REDUCED if args.reduced else FULL), **local}, "pretrained": pretrained, "seed": seed, "device": args.device,
        "max_minutes": minutes, "epochs": 1 if minutes is None else 1000, "patience": 1000,
        "learning_rate": 3e-3 if args.reduced else 1e-3 if pretrained is None else 6e-4,
    }  # fmt: skip


Train = Callable[[Row, int, float | None], dict[str, Any] | None]


def run_rows(task: str, documents: int, args: argparse.Namespace, train: Train) -> None:
    """`train(row, seed, minutes)` for every seed and row that the results file lacks; a run is recorded when it ends.

    train: trains within `minutes` and returns the figures; with None it reads WARM_DOCUMENTS documents once, so that what
    is compiled for this model is compiled before its time counts.
    """
    rows = [ROWS[key] for key in args.rows if args.pretrained or ROWS[key].pretrained]
    todo = [(s, row) for s in args.seeds for row in rows if not finished(args.output, task, row.name, s)]
    limit = sum(args.minutes * row.share for _, row in todo)
    print(f"{task}: {len(todo)} trainings to do, at most {limit:.1f} minutes of training in all", flush=True)
    device, warm = pick_device(args.device), set()
    for seed, row in todo:
        if device.type == "cuda" and row.name not in warm:
            began = time.perf_counter()
            train(row, seed, None)
            warm.add(row.name)
            print(f"{row.name}: warm after {time.perf_counter() - began:.1f} s", flush=True)
        began = time.perf_counter()
        figures = train(row, seed, args.minutes * row.share)
        facts = {
            "seed": seed, "bytes": row.bytes, "documents": documents, "machine": machine(device),
            "pretrained": bool(args.pretrained and row.pretrained), "minutes": args.minutes * row.share,
            "wall_seconds": time.perf_counter() - began,
        }  # fmt: skip
        record(args.output, task, row.name, {**(figures or {}), **facts})


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def summary_of(summary: FitSummary) -> dict[str, float]:
    return {key: getattr(summary, key) for key in ("seconds", "epochs", "best_epoch", "steps")}


def log(config: FitConfig, name: str) -> Callable[[dict[str, Any]], None]:
    """Prints epochs, one every five seconds at most."""
    last = -5.0

    def show(event: dict[str, Any]) -> None:
        nonlocal last
        if event["seconds"] - last >= 5:
            last = event["seconds"]
            print(f"  {name}, seed {config.seed}:", json.dumps(event), flush=True)

    return show
