"""Millions of tokens through a small model with bounded retention: time per token and bytes of the cache, which stay. Or, with
--full, through one that keeps everything: how fast a prompt is read and a token written after it.

At every mark the rows that the cache holds are compared with `HierarchicalPattern.cache_entries`. The model is untrained: time
and memory do not depend on the weights. Writes JSON, a table and a picture after every mark.

    PYTHONPATH=src python benchmarks/hierarchical_stream.py --tokens 10000000 --budget-seconds 500
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from longnet import HierarchicalPattern, LongNetCache, LongNetConfig, LongNetForCausalLM
from run import environment

TREE = HierarchicalPattern(
    block=64, radix=8, window_blocks=8, guard=1, top_k=8, beam=16, retention=(4096, 64)
)
SMALL_TREE = HierarchicalPattern(
    block=16, radix=4, window_blocks=2, guard=1, top_k=2, beam=4, retention=(64, 16)
)
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE |= {"num_key_value_heads": 1}
STEPS = 20


def make(tree: HierarchicalPattern, device: str) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = LongNetConfig(attention="hierarchical", hierarchical=asdict(tree), **SIZE)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LongNetForCausalLM(config).to(device, dtype).eval()


def formula(config: LongNetConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the rows kept of one sequence: keys, turned keys and values of tokens; two vectors and two fp32 of nodes."""
    rows, nodes = config.hierarchical_pattern().cache_entries(tokens)
    vector = config.head_dim * dtype.itemsize
    each = rows * 3 * vector + nodes * (2 * vector + 8)
    return config.num_hidden_layers * config.num_key_value_heads * each


def held(cache: LongNetCache) -> int:
    """Bytes of the rows in the cache, without room for growth and without the tail of the convolution."""
    states = [state for layer in cache.layers for state in layer.states]
    return sum(x.nbytes for state in states for x in state.tensors().values())


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def read(model: LongNetForCausalLM, cache: LongNetCache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=ids.shape[1]).logits[0]


def check(model: LongNetForCausalLM, tokens: int, device: str) -> float:
    """Share of tokens whose streamed logits differ from the parallel pass: near ties may be opened otherwise, few may."""
    ids = torch.randint(4, 260, (1, tokens), generator=torch.Generator().manual_seed(2)).to(device)
    cache = LongNetCache(model.config, 1, device, model.dtype)
    sizes = [tokens // 3, 1, 1, tokens // 2]
    sizes.append(tokens - sum(sizes))
    got = torch.cat([read(model, cache, part) for part in ids.split(sizes, dim=1)]).float()
    want = model(input_ids=ids).logits[0].float()
    differ = (got - want).norm(dim=-1) > (5e-2 if device == "cuda" else 1e-4) * want.norm(dim=-1)
    share = differ.float().mean().item()
    if share > (0.02 if device == "cuda" else 0):
        raise SystemExit(f"{share:.1%} of the streamed logits differ from the parallel pass; not timed")
    return share


@torch.inference_mode()
def stream(model: LongNetForCausalLM, options: argparse.Namespace, done) -> list[dict]:
    """A row at every mark; `done(rows)` is called after each."""
    device, began = options.device, now(options.device)
    cache, rows = LongNetCache(model.config, 1, device, model.dtype), []
    generator = torch.Generator(device).manual_seed(1)
    token = torch.full((1, 1), 65, device=device)
    while cache.host_positions[0] < options.tokens:
        first, mark = cache.host_positions[0], now(device)
        while (position := cache.host_positions[0]) < min(first + options.every, options.tokens):
            n = min(options.chunk, first + options.every - position, options.tokens - position)
            ids = torch.randint(4, 260, (1, n), generator=generator, device=device)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        position = cache.host_positions[0]
        row = {"tokens": position, "us_per_token": 1e6 * (now(device) - mark) / (position - first)}
        row["held_bytes"], row["formula_bytes"] = held(cache), formula(model.config, position, model.dtype)
        row["allocated_bytes"] = cache.nbytes()
        if device == "cuda":
            row["device_bytes"] = torch.cuda.memory_allocated()
        times = []
        for _ in range(STEPS):
            start = now(device)
            read(model, cache, token)
            times.append(1e3 * (now(device) - start))
        row["step_ms"] = sorted(times)[STEPS // 2]
        rows.append(row)
        done(rows)
        print(json.dumps(row), flush=True)
        if now(device) - began > options.budget_seconds:
            print("stopped: the time ended")
            break
    return rows


def report(rows: list[dict], facts: dict, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(facts | {"rows": rows}, indent=1))
    lines = [
        "| tokens read | µs a token, in chunks | ms a single token | cache, KiB | formula, KiB | allocated, KiB |"
    ]
    lines.append("|---" * 6 + "|")
    for row in rows:
        sizes = [f"{row[f'{x}_bytes'] / 1024:.1f}" for x in ("held", "formula", "allocated")]
        cells = [f"{row['tokens']}", f"{row['us_per_token']:.2f}", f"{row['step_ms']:.2f}", *sizes]
        lines.append("| " + " | ".join(cells) + " |")
    equal = all(row["held_bytes"] == row["formula_bytes"] for row in rows)
    times = [row["us_per_token"] for row in rows]
    lines += ["", f"Cache and formula {'agree at every mark' if equal else 'DO NOT AGREE'}."]
    lines += [
        f"Time of a token in chunks: {min(times):.2f} to {max(times):.2f} µs, the last {times[-1]:.2f}."
    ]
    text = "\n".join(lines) + "\n"
    (folder / "results.md").write_text(text)
    draw(rows, folder / "results.png")
    return text


def draw(rows: list[dict], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    x = [row["tokens"] / 1e6 for row in rows]
    left.plot(x, [row["us_per_token"] for row in rows], marker="o", markersize=3)
    left.set_ylabel("µs a token")
    right.plot(x, [row["held_bytes"] / 1024 for row in rows], marker="o", markersize=3, label="cache")
    right.plot(x, [row["formula_bytes"] / 1024 for row in rows], linestyle=":", label="formula")
    right.set_ylabel("KiB")
    right.legend()
    for axis in (left, right):
        axis.set_xlabel("million tokens read")
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--every", type=int, default=500_000, help="tokens between two marks")
    parser.add_argument("--chunk", type=int, default=32768)
    parser.add_argument("--budget-seconds", type=float, default=10**9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="keep everything: what kernels read on a GPU")
    parser.add_argument("--small", action="store_true", help="a tiny tree: a smoke test, no claim")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hierarchical-stream"))
    options = parser.parse_args()
    tree = SMALL_TREE if options.small else TREE
    tree = replace(tree, retention=None) if options.full else tree
    model = make(tree, options.device)
    facts = {"environment": environment(options.device), "tree": asdict(tree), "model": SIZE}
    with torch.inference_mode():
        facts["differing_from_parallel"] = check(model, 600 if options.small else 20_000, options.device)
    rows = stream(model, options, lambda rows: report(rows, facts, options.out))
    print(report(rows, facts, options.out))


if __name__ == "__main__":
    main()
