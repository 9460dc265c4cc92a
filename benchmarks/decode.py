"""One token through a model after a short and after a long text, the rate of reading, and the size of the cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from longnet import DilatedPattern, LongNetConfig, LongNetForCausalLM
from longnet.model import LongNetCache
from run import environment


def timed(call, repeats: int, device: str) -> list[float]:
    """p20, median, p80 in milliseconds."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    times.sort()
    return [times[repeats // 5], times[repeats // 2], times[4 * repeats // 5]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 1048576])
    parser.add_argument("--chunk", type=int, default=65536)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode"))
    options = parser.parse_args()
    pattern = DilatedPattern.geometric(2**30)
    config = LongNetConfig.preset(
        "base", segment_lengths=list(pattern.segment_lengths), dilation_rates=list(pattern.dilation_rates)
    )
    torch.manual_seed(0)
    model = LongNetForCausalLM(config).to("cuda", torch.bfloat16).eval()
    rows = []
    cache = LongNetCache(config, 1, "cuda", torch.bfloat16)
    seconds = 0.0
    with torch.inference_mode():
        for target in sorted(options.tokens):
            while cache.get_seq_length() < target:
                n = min(options.chunk, target - cache.get_seq_length())
                ids = torch.randint(4, 260, (1, n), device="cuda")
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                end.record()
                end.synchronize()
                seconds += begin.elapsed_time(end) / 1e3
            token = torch.randint(4, 260, (1, 1), device="cuda")
            step = timed(lambda token=token: model(token, past_key_values=cache, use_cache=True), 60, "cuda")
            row = {"tokens": target, "step_ms": step, "cache_bytes": cache.nbytes()}
            row["formula_bytes"] = (
                pattern.cache_entries(config.num_attention_heads, config.num_key_value_heads)
                * config.num_hidden_layers * config.head_dim * 2 * 2
            )  # fmt: skip
            row["read_tokens_per_second"] = target / seconds
            rows.append(row)
            print(json.dumps(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    ratio = rows[-1]["step_ms"][1] / rows[0]["step_ms"][1]
    print(f"step after {rows[-1]['tokens']} tokens: {ratio:.3f} times the step after {rows[0]['tokens']}")
    result = {"environment": environment("cuda"), "model": "base", "rows": rows, "ratio": ratio}
    (options.out / "results.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
