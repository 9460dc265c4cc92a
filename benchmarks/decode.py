"""Cost of a token after much or little has been read, rate of chunked reading, size of the cache. Writes JSON, prints a table.

The model is 12 layers, 768 wide, 12 heads of 64, untrained: time and memory do not depend on the weights. Steps are timed
just before the end of a segment of every branch, where a query sees the most rows: the dearest moment at either length.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from longnet import DilatedPattern, LongNetCache, LongNetConfig, LongNetForCausalLM
from longnet.model.graph import GraphedStep
from run import environment

SIZE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def patterns(far: int, window: int) -> dict[str, DilatedPattern]:
    """The presets' bounded pattern, and one whose longest segment spans everything that is read."""
    bounded = DilatedPattern((window, 4 * window, 16 * window), (1, 4, 16))
    return {"bounded": bounded, "geometric": DilatedPattern.geometric(far, window=window)}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make(pattern: DilatedPattern, size: dict, device: str) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = LongNetConfig(
        **size, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LongNetForCausalLM(config).to(device, dtype).eval()


def read(model: LongNetForCausalLM, cache: LongNetCache, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits (1, V) after the last of ids (1, N)."""
    for part in ids.split(chunk, dim=1):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def check(model: LongNetForCausalLM, ids: torch.Tensor, chunk: int, device: str) -> float:
    """Relative error of streamed logits (chunks, then single tokens) against one parallel pass; raises if they disagree."""
    cache = LongNetCache(model.config, 1, ids.device, model.dtype)
    read(model, cache, ids[:, :-5], chunk)
    got = torch.cat([read(model, cache, ids[:, i : i + 1], 1) for i in range(ids.shape[1] - 5, ids.shape[1])])
    want = model(input_ids=ids, logits_to_keep=5).logits[0]
    error = float((got - want).float().norm() / want.float().norm())
    if not error < (5e-2 if device == "cuda" else 1e-4):
        raise SystemExit(
            f"streamed logits differ from the parallel pass by {error:.2e} of their norm; not timed"
        )
    return error


def steps(model: LongNetForCausalLM, cache: LongNetCache, count: int, device: str) -> list[float]:
    """p20, median, p80 milliseconds of `count` single-token steps; three more before them warm up."""
    token = torch.full((1, 1), 65, device=cache.device)
    captured = GraphedStep(model, cache) if device == "cuda" else None
    times = []
    for i in range(count + 3):
        began = now(device)
        if captured is None:
            read(model, cache, token, 1)
        else:
            captured(token)
        elapsed = 1e3 * (now(device) - began)
        if i >= 3:
            times.append(elapsed)
    times.sort()
    return [times[count // 5], times[count // 2], times[count * 4 // 5]]


@torch.inference_mode()
def measure(name: str, pattern: DilatedPattern, options: argparse.Namespace, size: dict) -> dict:
    device, count = options.device, options.steps
    model = make(pattern, size, device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 260, (1, options.far), generator=generator).to(device)
    row: dict = {"pattern": name, "branches": pattern.branches}
    row["streaming_error"] = check(
        model, ids[:, : options.near + options.near // 3], options.chunk // 3, device
    )
    cache = LongNetCache(model.config, 1, device, model.dtype)
    heads, width = model.config.num_attention_heads, model.config.head_dim
    entries = pattern.cache_entries(heads, model.config.num_key_value_heads)
    row["cache_bytes_formula"] = (
        2 * size["num_hidden_layers"] * entries * width * torch.finfo(model.dtype).bits // 8
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for label, end in (("near", options.near), ("far", options.far)):
        position = cache.host_positions[0]
        part = ids[:, position : end - count - 3]
        began = now(device)
        read(model, cache, part, options.chunk)
        row[f"prefill_tokens_per_second_{label}"] = part.shape[1] / (now(device) - began)
        row[f"step_ms_{label}"] = steps(model, cache, count, device)
        row[f"tokens_read_{label}"] = cache.host_positions[0]
        row[f"cache_bytes_{label}"] = cache.nbytes()
    if device == "cuda":
        row["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
    row["far_over_near"] = row["step_ms_far"][1] / row["step_ms_near"][1]
    row["cache_matches_formula"] = row["cache_bytes_far"] == row["cache_bytes_formula"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--near", type=int, default=8192, help="tokens read before the first timing")
    parser.add_argument("--far", type=int, default=1048576, help="tokens read before the second")
    parser.add_argument("--chunk", type=int, default=16384, help="tokens read at once")
    parser.add_argument("--steps", type=int, default=60, help="timed single-token steps")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model and stream: a smoke test, no claim"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"))
    options = parser.parse_args()
    window, size = 2048, SIZE
    if options.small:
        window, size = 64, SMALL
        options.near, options.far, options.chunk, options.steps = 256, 2048, 100, 10
    rows = []
    for name, pattern in patterns(options.far, window).items():
        row = measure(name, pattern, options, size)
        rows.append(row)
        near, far = row["step_ms_near"], row["step_ms_far"]
        print(
            f"{name}: {len(pattern.branches)} branches, streamed = parallel to {row['streaming_error']:.1e}"
        )
        for label, (low, middle, high) in (("near", near), ("far", far)):
            tokens, rate = row[f"tokens_read_{label}"], row[f"prefill_tokens_per_second_{label}"]
            print(
                f"  after {tokens:>8} tokens: step {middle:.2f} ms [{low:.2f}, {high:.2f}], read at {rate:,.0f} tokens/s"
            )
        print(
            f"  far / near {row['far_over_near']:.3f}; cache {row['cache_bytes_far']} bytes, formula "
            f"{row['cache_bytes_formula']}: {'equal' if row['cache_matches_formula'] else 'NOT EQUAL'}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    facts = environment(options.device) | {"model": size, "chunk": options.chunk, "steps": options.steps}
    (options.out / "results.json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
