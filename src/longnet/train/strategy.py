"""How a window is taken: the options as given, or picked from the plan for the memory that is free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from longnet.plan import SHARE, Job, Machine, best_chunk, pick
from longnet.train import parallelize
from longnet.train.config import TrainConfig

# The options that `sequence_strategy="auto"` picks.
OPTIONS = ("sequence_strategy", "gradient_checkpointing", "tile_tokens", "chunk_tokens", "offload")


def given(config: TrainConfig, model: Any, device: torch.device, autocast: bool) -> dict[str, Any]:
    """Under "way" the options of `config` itself; "note" is empty.

    Raises:
        ValueError: more would wait in host memory than is free.
    """
    way = {name: getattr(config, name) for name in OPTIONS}
    if config.offload and device.type == "cuda":
        job = _job(config, model, device, autocast)
        if config.sequence_strategy == "chunked":
            needed = job.rows(config.chunk_tokens or best_chunk(job, config.gradient_checkpointing))
        else:
            needed = job.batch * job.kept(-(-job.tokens // config.sequence_parallel), True)
        free = SHARE * free_memory(torch.device("cpu"))
        if needed > free:
            raise ValueError(
                f"offload: expected at least {needed / 2**30:.1f} GiB of host memory for each device; got {free / 2**30:.1f} "
                "that may be filled; shorten the sequence or leave offload out; `longnet plan` says what fits"
            )
    return {"way": way, "note": {}}


def picked(config: TrainConfig, model: Any, device: torch.device, autocast: bool) -> dict[str, Any]:
    """Under "way" the fastest options that fit, under "note" their name and the reason.

    Raises:
        ValueError: nothing fits; the text says what each strategy would need.
    """
    job = _job(config, model, device, autocast)
    host = free_memory(torch.device("cpu")) if config.offload and device.type == "cuda" else 0
    machine = Machine(memory=free_memory(device), devices=config.sequence_parallel, host_memory=host)
    best, why = pick(job, machine)
    way = {name: best.options[name] for name in OPTIONS}
    return {"way": way, "note": {"strategy": best.name, "strategy_reason": why}}


def _job(config: TrainConfig, model: Any, device: torch.device, autocast: bool) -> Job:
    """What one replica does in a forward pass."""
    replicas = parallelize.world_size() // config.sequence_parallel
    return Job(
        config=model, tokens=config.sequence_length, batch=config.batch_size // replicas, autocast=autocast,
        fused_norms=device.type == "cuda",
    )  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still fill, what its allocator holds already included; of a host, its share among the ranks."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    table, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if table.exists():
        fields = dict(line.split(":") for line in table.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
