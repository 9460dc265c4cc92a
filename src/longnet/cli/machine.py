"""The commands about this machine: doctor, bench."""

from __future__ import annotations

import os
import shutil
import sys
import time

import torch

import longnet
from longnet import DilatedPattern, dilated_attention


def doctor() -> None:
    """What this machine can run, and why not."""
    print(f"longnet {longnet.__version__}, python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"cores: {os.cpu_count()}, torch threads: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(
                f"GPU {i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            )
    else:
        print("GPU: none that torch can use; everything runs on the CPU")
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        q = torch.zeros(1, 256, 4, 64, device=device, dtype=dtype)
        print(f"{device}, {dtype}: {longnet.explain(q, q, q, DilatedPattern.geometric(256, 64))}")
    print(f"disk: {shutil.disk_usage('.').free / 2**30:.0f} GiB free here")


def bench(
    tokens: int = 16384, heads: int = 8, head_width: int = 64, window: int = 2048, repeats: int = 5
) -> None:
    """Time dilated attention against torch's dense attention on this machine: forward, median and spread.

    Args:
        tokens: Sequence length.
        heads: Query and key heads.
        head_width: Width of a head.
        window: Shortest segment; segments and rates double from there.
        repeats: Timed runs after two warm-up runs.
    """
    if repeats < 1:
        raise ValueError(f"--repeats: expected at least 1; got {repeats}")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q, k, v = (torch.randn(1, tokens, heads, head_width, device=device, dtype=dtype) for _ in range(3))
    pattern = DilatedPattern.geometric(tokens, window)
    by_head = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    runs = {
        "dilated": lambda: dilated_attention(q, k, v, pattern),
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(
            by_head[0], by_head[1], by_head[2], is_causal=True
        ),
    }
    print(f"{device}, {dtype}, {tokens} tokens, {heads} heads of {head_width}, {pattern.branches}")
    for name, run in runs.items():
        times = sorted([_seconds(run, device) for _ in range(repeats + 2)][2:])
        middle = times[len(times) // 2]
        print(f"{name:>8}: {middle * 1e3:9.2f} ms (from {times[0] * 1e3:.2f} to {times[-1] * 1e3:.2f})")


def _seconds(run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
