"""The command plan: what training and reading at a length take, which way fits, and how far each would reach."""

from __future__ import annotations

import dataclasses
import json as to_json
from pathlib import Path
from typing import Any

from longnet.model import LongNetConfig
from longnet.patterns import DilatedPattern
from longnet.plan import LIMIT, SHARE, Job, Machine, Strategy, largest, reading, strategies
from longnet.train.config import preset_config

GIB = 2**30


def plan(
    tokens: int,
    preset: str = "base",
    model: dict[str, Any] = {},  # noqa: B006 - never changed
    folder: Path | None = None,
    ratio: int | None = None,
    batch: int = 1,
    bf16: bool = True,
    devices: int = 1,
    memory: float = 80,
    host_memory: float = 0,
    tflops: float = 300,
    link: float = 50,
    host_link: float = 25,
    chunk: int = 131072,
    json: bool = False,
) -> None:
    """What a training step at a length takes, by every strategy: memory by part, operations, time, traffic; and what fits.

    Nothing is run. Memory agrees within 15 percent with what was measured; a tenth of the device is left free. Times are
    operations over --tflops plus what travels over the links, as if nothing were hidden.

    Args:
        tokens: Length of a sequence.
        preset: Model size: tiny, mini, small, base, large, xl.
        model: Overrides of the preset's fields, such as num_hidden_layers=2.
        folder: A saved model instead of a preset.
        ratio: Replace the pattern by segments of 2048 tokens growing by this ratio until one spans the sequence.
        batch: Sequences in one forward pass.
        bf16: bfloat16 autocast, as on a GPU; without it all numbers take 4 bytes.
        devices: GPUs that share every sequence.
        memory: GiB of one GPU.
        host_memory: GiB of the host, for each GPU, that may hold what waits for the backward pass; 0: none.
        tflops: 10^12 operations a second that a GPU really reaches; a tenth to two fifths of what its maker states.
        link: 10^9 bytes a second that a GPU receives from the others.
        host_link: 10^9 bytes a second between a GPU and its host.
        chunk: Tokens at once, for reading.
        json: Print all figures as JSON, in bytes and seconds.
    """
    config = _config(preset, model, folder, tokens, ratio)
    job = Job(config=config, tokens=tokens, batch=batch, autocast=bf16)
    machine = Machine(
        memory=memory * GIB, devices=devices, host_memory=host_memory * GIB, rate=tflops * 1e12, link=link * 1e9,
        host_link=host_link * 1e9,
    )  # fmt: skip
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token; got {chunk}")
    ways = strategies(job, machine)
    most = {s.name: largest(s.name, job, machine) for s in ways}
    fitting = [s for s in ways if not s.problem]
    best = min(fitting, key=lambda s: s.seconds) if fitting else None
    read = reading(job, machine, chunk)
    if json:
        rows = [{**_figures(s), "largest_tokens": most[s.name]} for s in ways]
        head = {"parameters": config.num_parameters(), "tokens": tokens, "pick": best and best.name}
        print(to_json.dumps({**head, "training": rows, "reading": _figures(read)}, indent=1))
        return
    print(_heading(job, machine))
    print("\n".join(_table([*ways, read], most)))
    if best is None:
        print(
            f"\nnothing fits; {SHARE:.0%} of the memory are given away, the largest lengths are those of the last column"
        )
    else:
        print(f"\n{best.name}: longnet train --sequence-length {tokens} --batch-size {batch} {_flags(best)}")


def _config(
    preset: str, model: dict[str, Any], folder: Path | None, tokens: int, ratio: int | None
) -> LongNetConfig:
    if ratio is not None:
        pattern = DilatedPattern.geometric(tokens, ratio=ratio)
        spec = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
        model = {**model, **spec}
    if folder is None:
        return preset_config(preset, model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder: expected a saved model with config.json; got {folder}")
    return LongNetConfig.from_pretrained(folder, **model)


def _heading(job: Job, machine: Machine) -> str:
    c = job.config
    devices = f"{machine.devices} devices" if machine.devices > 1 else "one device"
    pattern = f"{len(c.segment_lengths)} branches up to {max(c.segment_lengths):,} tokens"
    return (
        f"{c.num_parameters() / 1e6:.1f} million parameters, {c.num_hidden_layers} layers of {c.hidden_size}, {pattern}; "
        f"{job.batch} x {job.tokens:,} tokens on {devices} of {machine.memory / GIB:.0f} GiB at {machine.rate / 1e12:.0f} TFLOP/s"
    )


def _table(rows: list[Strategy], most: dict[str, int]) -> list[str]:
    """Columns of text; memory in GiB on one device."""
    parts = list(dict.fromkeys(name for s in rows for name in s.memory))
    lines = [["", "GiB", *parts, "host", "PFLOP", "seconds", "GB received", "chunk", "fits", "largest N"]]
    for s in rows:
        chunk = s.options.get("chunk_tokens", s.options.get("chunk"))
        numbers = [s.total, *(s.memory.get(part, 0) for part in parts), s.host]
        lines.append(
            [
                s.name,
                *(f"{x / GIB:,.1f}" if x else "-" for x in numbers),
                f"{s.flops / 1e15:,.3g}",
                f"{s.seconds:,.1f}",
                f"{s.received / 1e9:,.2f}" if s.received else "-",
                f"{chunk:,}" if chunk else "-",
                "no" if s.problem else "yes",
                "any" if most.get(s.name) == LIMIT else f"{most[s.name]:,}" if s.name in most else "-",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _flags(strategy: Strategy) -> str:
    """The options of `longnet train` that take this way."""
    options = strategy.options
    flags = ["--sequence-strategy", options["sequence_strategy"]]
    if options["gradient_checkpointing"]:
        flags += ["--gradient-checkpointing", "--tile-tokens", str(options["tile_tokens"])]
    if options["chunk_tokens"]:
        flags += ["--chunk-tokens", str(options["chunk_tokens"])]
    if options["offload"]:
        flags.append("--offload")
    return " ".join(flags)


def _figures(strategy: Strategy) -> dict[str, Any]:
    return {**dataclasses.asdict(strategy), "total": strategy.total}
