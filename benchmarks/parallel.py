"""Sequence parallelism on real devices: equality with one device, and times of attention forward and backward.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py                 # one GPU a rank, NCCL
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --one-gpu       # two ranks on one GPU, gloo through host
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --cpu --tokens 4096
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --hierarchical  # the same of hierarchical attention
    python benchmarks/parallel.py --plan                                            # a simulated job, no device at all

Rank 0 prints one JSON line. On stderr every rank says what it has done and after how many seconds, and once a minute where it
stands. Errors: the largest difference to one device in the same dtype, over its largest value; "ulp" is the
rounding unit of the dtype. --one-gpu times share the device and pass through host memory: equality is what they show.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from longnet import DilatedPattern, HierarchicalPattern, dilated_attention, hierarchical_attention
from longnet.attention.collectives import SequenceParallel
from longnet.attention.hierarchical_parallel import sequence_parallel_hierarchical_attention
from longnet.attention.sequence_parallel import sequence_parallel_attention
from longnet.schedule import Shards, exchanges, hierarchical_traffic, traffic, work

BEGAN = time.perf_counter()
Attend = Callable[..., torch.Tensor]


def done(what: str) -> None:
    """A line for a rank that has come so far, its device included."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - BEGAN
    print(
        f"rank {os.environ['RANK']}, {time.strftime('%X')}, {seconds:.1f} s after imports: {what}",
        file=sys.stderr,
        flush=True,
    )


def simulated() -> None:
    """Bytes a rank receives in a step (12 layers, 12 heads of 64, bf16) and the balance of work, at 2^20 tokens a rank."""
    for count in (8, 64, 1024):
        shards, pattern = Shards.even(count << 20, count), DilatedPattern.geometric(count << 20)
        moved = [traffic(pattern, 12, 12, 64, shards, rank) for rank in range(count)]
        pairs = [sum(work(pattern, 12, 12, shards, rank)) for rank in range(count)]
        line = {
            "ranks": count,
            "tokens": count << 20,
            "forward_bytes_per_layer": max(x.forward for x in moved),
            "backward_bytes_per_layer": max(x.backward for x in moved),
            "bytes_per_step_12_layers": 12 * max(sum(x) for x in moved),
            "most_loaded_over_mean": round(max(pairs) * count / sum(pairs), 6),
        }
        # Hierarchical layers with 4 key heads, opened blocks not counted: how many are distinct depends on the text.
        tree, blocks = HierarchicalPattern(), Shards.even(count << 20, count, block=64)
        moved = hierarchical_traffic(tree, 4, 64, blocks, count // 2)
        line["hierarchical_forward_bytes_per_layer"] = moved.forward
        line["hierarchical_backward_bytes_per_layer"] = moved.backward
        loads = [tree_work(tree, blocks, rank) for rank in range(count)]
        line["hierarchical_most_loaded_over_mean"] = round(max(loads) * count / sum(loads), 4)
        line["hierarchical_least_loaded_over_mean"] = round(min(loads) * count / sum(loads), 4)
        print(json.dumps(line))


def tree_work(tree: HierarchicalPattern, shards: Shards, rank: int) -> int:
    """Operations of one head and channel for 64 blocks spread evenly over a rank's shard."""
    begin, end = (b // tree.block for b in shards.span(rank))
    total = 0
    for i in range(64):
        scored, attended = tree.keys_per_query((begin + (end - begin) * i // 64 + 1) * tree.block)
        total += 4 * attended + (2 * scored if tree.top_k else 0)
    return total


def median_ms(function, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--uneven", action="store_true", help="borders that cut segments")
    parser.add_argument("--hierarchical", action="store_true", help="with blocks of 64; borders at blocks")
    parser.add_argument("--one-gpu", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--plan", action="store_true")
    return parser.parse_args()


def connect(options: argparse.Namespace, timeout: timedelta) -> torch.device:
    """This rank's device, when all ranks are there."""
    local = 0 if options.one_gpu else int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu" if options.cpu else f"cuda:{local}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    done("begins")
    gloo = options.cpu or options.one_gpu
    dist.init_process_group("gloo" if gloo else "nccl", timeout=timeout, device_id=None if gloo else device)
    done(f"all ranks connected by {dist.get_backend()}")
    return device


def split(options: argparse.Namespace, world: int) -> Shards:
    n = options.tokens
    shards = Shards.even(n, world)
    if options.uneven:
        inner = [b + 777 * (i + 1) for i, b in enumerate(shards.borders[1:-1])]
        shards = Shards((0, *inner, n))
    if options.hierarchical:
        shards = Shards(tuple(b if b == n else b // 64 * 64 for b in shards.borders))
    return shards


def compare(
    options: argparse.Namespace, one_device: Attend, many: Attend, span: tuple[int, int], device: Any
) -> dict:
    """Errors of the ranks' rows against one device, largest over all ranks, and times."""
    dtype = torch.float64 if options.cpu else torch.bfloat16
    g = torch.Generator(device).manual_seed(0)
    shape = (1, options.tokens, options.heads, options.width)
    q, k, v, dout = (torch.randn(shape, generator=g, device=device, dtype=dtype) for _ in range(4))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out = one_device(*whole)
    exact = [out.detach(), *torch.autograd.grad(out, whole, dout)]
    done("one device")
    a, b = span
    mine = [x[:, a:b].clone().requires_grad_() for x in (q, k, v)]
    part = many(*mine)
    done("forward across ranks")
    got = [part.detach(), *torch.autograd.grad(part, mine, dout[:, a:b])]
    errors = torch.tensor(
        [float((x[:, a:b] - y).abs().max() / x.abs().max()) for x, y in zip(exact, got, strict=True)],
        device=device,
    )
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    done(f"backward across ranks, errors {errors.tolist()}")
    gradient = dout[:, a:b]

    def both(inputs: list, call: Attend, grad: torch.Tensor) -> None:
        torch.autograd.grad(call(*inputs), inputs, grad)

    across = median_ms(lambda: both(mine, many, gradient), options.repeats)
    forward = median_ms(lambda: many(*mine), options.repeats)
    done("timed across ranks")
    alone = median_ms(lambda: both(whole, one_device, dout), options.repeats)
    done("timed on one device")
    return {
        "relative_error": dict(zip(("out", "dq", "dk", "dv"), errors.tolist(), strict=True)),
        "ulp": torch.finfo(dtype).eps,
        "forward_ms": forward,
        "forward_backward_ms": across,
        "one_device_forward_backward_ms": alone,
    }


def main() -> None:
    options = parse()
    if options.plan:
        return simulated()
    faulthandler.dump_traceback_later(60, repeat=True)
    timeout = timedelta(seconds=120)
    device = connect(options, timeout)
    rank, world, n, heads = dist.get_rank(), dist.get_world_size(), options.tokens, options.heads
    shards, tree = split(options, world), HierarchicalPattern()
    pattern = DilatedPattern.geometric(n, options.window)

    def one_device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if options.hierarchical:  # by the path that the ranks take
            return hierarchical_attention(q, k, v, tree, impl="torch").out
        return dilated_attention(q, k, v, pattern).out

    def many(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if options.hierarchical:
            return sequence_parallel_hierarchical_attention(q, k, v, tree, parallel).out
        return sequence_parallel_attention(q, k, v, pattern, parallel).out

    parallel = SequenceParallel(shards, timeout=timeout)
    # NCCL makes a group by splitting that of all ranks, which must be idle then.
    members = [] if options.hierarchical else [e.members for e in exchanges(pattern, heads, heads, shards)]
    parallel.groups([*members, tuple(range(world))])
    done("process groups made")
    dist.all_reduce(torch.ones(1, device=device))
    done("first collective")
    found = compare(options, one_device, many, shards.span(rank), device)
    if options.hierarchical:  # without opened blocks
        moved = hierarchical_traffic(tree, heads, options.width, shards, rank)
    else:
        moved = traffic(pattern, heads, heads, options.width, shards, rank)
    if rank == 0:
        line = {
            "ranks": world,
            "backend": dist.get_backend(),
            "tokens": n,
            "attention": "hierarchical"
            if options.hierarchical
            else f"dilated, {len(pattern.branches)} branches",
            **found,
            "bytes_received_forward": moved.forward,
            "bytes_received_backward": moved.backward,
        }
        print(json.dumps(line), flush=True)
    dist.destroy_process_group()
    done("ended")


if __name__ == "__main__":
    main()
