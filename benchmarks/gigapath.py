"""Prov-GigaPath's slide encoder, ours against the published code over torch's flash kernel, same weights, same run.

    TORCHSCALE_PATH=.peers/torchscale:.peers/prov-gigapath:.peers/site python benchmarks/gigapath.py --output OUT

Outputs are compared before anything is timed. float16 by default, as the published pipeline runs. Without TORCHSCALE_PATH
only ours is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from longnet.integrations.gigapath import GigaPathSlideEncoder, gigapath_segment_lengths, load_gigapath
from longnet.integrations.torchscale import TorchscaleConfig


def slide(tiles: int, channels: int, grid: int, device: str, dtype: torch.dtype) -> tuple:
    """Random tile embeddings at distinct places of the grid."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(grid * grid, generator=generator)[:tiles]
    coords = torch.stack((places // grid, places % grid), 1)[None].float() * 256
    x = torch.randn(1, tiles, channels, generator=generator)
    return x.to(device, dtype), coords.to(device)


def measure(function: Any, device: str, repeats: int) -> dict[str, float]:
    """Median and spread in milliseconds, and peak memory beyond what was held before."""
    times, held = [], 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for i in range(repeats + 2):
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - begin) * 1e3)
    peak = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    return {
        "ms": statistics.median(times),
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "peak_gib": peak / 2**30,
    }


def build(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(ours, theirs or None) with the same random weights."""
    torch.manual_seed(0)
    if "TORCHSCALE_PATH" in os.environ:
        import torchscale_peer

        with contextlib.redirect_stdout(io.StringIO()):
            theirs = torchscale_peer.gigapath(
                "cpu",
                in_chans=1536,
                embed_dim=arguments.width,
                depth=arguments.depth,
                slide_ngrids=arguments.grid,
            )
        torchscale_peer._use_flash("torchscale", arguments.device)
        ours = load_gigapath(theirs.state_dict(), slide_ngrids=arguments.grid)
        return ours, theirs.to(arguments.device, arguments.dtype)
    config = TorchscaleConfig(
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.depth,
        num_attention_heads=16,
        segment_lengths=gigapath_segment_lengths(),
        dilation_rates=(1, 2, 4, 8, 16),
        causal=False,
    )
    return GigaPathSlideEncoder(config, slide_ngrids=arguments.grid).eval(), None


# Relative distance of two slide embeddings that twelve layers of rounding at either side may make.
ALLOWED = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}


def compare(ours: Any, theirs: Any, x: torch.Tensor, coords: torch.Tensor) -> float:
    """Relative distance of the two slide embeddings."""
    mine, other = ours(x, coords).float(), theirs(x, coords)[0].float()
    return float((mine - other).norm() / other.norm())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument(
        "--grid",
        type=int,
        default=1000,
        help="places along a side; theirs makes a table of its square on the CPU",
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    name, arguments.dtype = arguments.dtype, getattr(torch, arguments.dtype)
    ours, theirs = build(arguments)
    ours = ours.to(arguments.device, arguments.dtype)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    records, unequal = [], []
    for tiles in arguments.tiles:
        x, coords = slide(tiles, 1536, arguments.grid, arguments.device, arguments.dtype)
        record: dict[str, Any] = {
            "tiles": tiles,
            "dtype": name,
            "machine": machine,
            "torch": torch.__version__,
        }
        if theirs is not None:
            record["relative_distance"] = compare(ours, theirs, x, coords)
            if not record["relative_distance"] < ALLOWED[name]:
                unequal.append(tiles)
            record["torchscale"] = measure(
                lambda x=x, c=coords: theirs(x, c), arguments.device, arguments.repeats
            )
        record["longnet"] = measure(lambda x=x, c=coords: ours(x, c), arguments.device, arguments.repeats)
        if theirs is not None:
            record["speedup"] = record["torchscale"]["ms"] / record["longnet"]["ms"]
        print(json.dumps(record), flush=True)
        records.append(record)
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / "gigapath.json").write_text(json.dumps(records, indent=1) + "\n")
    if unequal:
        raise SystemExit(
            f"expected equal slide embeddings; those of {unequal} tiles differ: see relative_distance"
        )


if __name__ == "__main__":
    main()
