"""One billion tokens on one GPU: a whole model reads them, and takes exact-gradient training steps on them.

    python benchmarks/billion.py read  --preset base --tokens 1000000000 --max-seconds 540 --state /tmp/read     # again: goes on
    python benchmarks/billion.py train --layers 4 --width 256 --tokens 1000000000 --chunk 1048576
    python benchmarks/billion.py train --preset base --tokens 134217728 --chunk 524288

The text is what stands in the source files below --root, in the order of their names, from the beginning again when it
ends before `--tokens` bytes do: every report says how many bytes are distinct. Weights are random: what is shown is cost,
exactness and memory, not quality. The pattern is geometric with ratio 4 and spans the whole text.
MFU counts 2 operations per weight and token and 4 D per visible pair (training: three and three and a half times that; the
recomputation is not counted), over the 989 TFLOP/s that NVIDIA states for dense bf16 products of a H100 or H200.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

from longnet import DilatedPattern, LongNetCache, LongNetConfig, LongNetForCausalLM, text
from longnet.train.chunked import chunked_backward
from longnet.train.evaluate import stream
from run import environment

PEAK = 989e12
SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inc", ".md", ".rst", ".txt"}


def corpus(path: Path, size: int, root: Path) -> tuple[np.ndarray, int]:
    """uint16 ids (size,) kept in `path`, and how many of them are distinct text."""
    distinct = path.with_suffix(".json")
    if path.exists() and distinct.exists() and path.stat().st_size == 2 * size:
        return np.memmap(path, np.uint16, "r"), json.loads(distinct.read_text())
    ids = np.memmap(path, np.uint16, "w+", shape=(size,))
    filled = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if file.suffix not in SUFFIXES or file.is_symlink():
                continue
            try:
                data = np.frombuffer(file.read_bytes(), np.uint8)[: size - filled]
            except OSError:
                continue
            ids[filled : filled + len(data)] = data.astype(np.uint16) + text.FIRST_BYTE
            filled += len(data)
        if filled == size:
            break
    if not filled:
        raise SystemExit(f"--root: expected source files below {root}; found none")
    distinct.write_text(json.dumps(filled))
    for begin in range(filled, size, filled):
        ids[begin : begin + filled] = ids[: min(filled, size - begin)]
    return ids, filled


def build(options: argparse.Namespace) -> LongNetForCausalLM:
    pattern = DilatedPattern.geometric(options.tokens, window=2048, ratio=4)
    spec = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    if options.preset:
        config = LongNetConfig.preset(options.preset, **spec)
    else:
        heads = max(1, options.width // 64)
        config = LongNetConfig(
            hidden_size=options.width, intermediate_size=-(-options.width * 8 // 3 // 64) * 64,
            num_hidden_layers=options.layers, num_attention_heads=heads, **spec,
        )  # fmt: skip
    torch.manual_seed(0)
    return LongNetForCausalLM(config).to(options.device)


def memory(device: str) -> float:
    """GiB at most since the last question."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def read(options: argparse.Namespace, ids: np.ndarray, facts: dict) -> dict:
    """Reads on from --state, if it is there, for at most --max-seconds; time per million tokens by position."""
    model = build(options).to(torch.bfloat16 if options.device == "cuda" else torch.float32).eval()
    state, log = options.state / "cache", options.state / "report.json"
    report = json.loads(log.read_text()) if log.exists() else {"marks": [], "seconds": 0.0, "bits": []}
    if log.exists():
        cache = LongNetCache.load(state, model.config, options.device)
    else:
        cache = LongNetCache(model.config, 1, options.device, model.dtype)
    begun = cache.host_positions[0]
    began = time.perf_counter()
    end = began + options.max_seconds
    marks = report["marks"]
    last = [began, begun]
    interval = max(options.chunk, options.tokens // 100)

    def show(done: int, cache_bytes: int) -> None:
        if begun + done - last[1] < interval:
            return
        now = time.perf_counter()
        rate = (begun + done - last[1]) / (now - last[0])
        left = (len(ids) - begun - done) / rate
        marks.append([begun + done, rate, memory(options.device), cache_bytes])
        line = f"{begun + done:>13,} tokens  {rate:>12,.0f} tokens/s  peak {marks[-1][2]:.2f} GiB"
        print(f"{line}  cache {cache_bytes / 2**20:.1f} MiB  {left:.0f} s to go", flush=True)
        last[:] = [now, begun + done]

    result = stream(
        model, ids[begun:], chunk=options.chunk, cache=cache, on_chunk=show, stop=lambda: time.perf_counter() > end
    )  # fmt: skip
    report["seconds"] += result.seconds
    report["bits"].append([list(result.borders), list(result.bits_per_byte)])
    report["read"] = cache.host_positions[0]
    options.state.mkdir(parents=True, exist_ok=True)
    cache.save(state)
    log.write_text(json.dumps(report))
    rates = [mark[1] for mark in marks]
    tenth = max(1, len(rates) // 10)
    flops = model.config.flops_per_token(options.tokens, training=False)
    overall = report["read"] / report["seconds"]
    return facts | {
        "parameters": model.num_parameters(), "read": report["read"], "seconds": report["seconds"], "tokens_per_second": overall,
        "mfu": flops * overall / PEAK, "peak_gib": max(m[2] for m in marks) if marks else 0, "cache_bytes": cache.nbytes(),
        "first_tenth_tokens_per_second": float(np.median(rates[:tenth])) if rates else 0,
        "last_tenth_tokens_per_second": float(np.median(rates[-tenth:])) if rates else 0, "marks": marks, "bits": report["bits"],
    }  # fmt: skip


def check(model: LongNetForCausalLM, ids: np.ndarray, device: str) -> dict:
    """Relative errors of all gradients on the first 65,536 tokens, against one backward pass over all of them in fp32.

    Raises SystemExit if those of the chunked pass exceed twice those of one pass in the same precision.
    """
    tokens = torch.from_numpy(np.asarray(ids[:65537]).astype(np.int64))[None].to(device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def gradients(chunk: int | None, low: bool) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            if chunk:
                chunked_backward(model, inputs, targets, chunk)
            else:
                model.token_losses(inputs, targets=targets).mean().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    exact, low = gradients(None, False), device == "cuda"
    errors = {
        name: ((gradients(chunk, low) - exact).norm() / exact.norm()).item()
        for name, chunk in (("whole", None), ("chunks_of_8192", 8192), ("chunks_of_10000", 10000))
    }
    print("relative gradient errors:", errors, flush=True)
    if max(errors.values()) > 2 * errors["whole"] + 1e-5:
        raise SystemExit(f"chunked gradients are off: {errors}; not timed")
    return errors


def train(options: argparse.Namespace, ids: np.ndarray, facts: dict) -> dict:
    """Steps of AdamW by `chunked_backward` on the same text: loss, seconds and memory of each."""
    model = build(options).train()
    facts["gradient_errors"] = check(model, ids, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    # 16 bits a token: int64 would be 8 GB. Copied, because a file opened for reading cannot be a tensor.
    tokens = torch.from_numpy(np.array(ids).view(np.int16))[None]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    steps, deadline = [], time.perf_counter() + options.max_seconds
    for step in range(options.steps):
        if step and time.perf_counter() + steps[-1]["seconds"] > deadline:
            break
        began = shown = time.perf_counter()

        def show(done: int, todo: int, step: int = step, began: float = began) -> None:
            nonlocal shown
            # The host runs ahead of the device: what is shown every 10 seconds is what has been launched.
            now = time.perf_counter()
            if now - shown > 10 or done == todo:
                shown = now
                print(f"step {step}: {done} of {todo} chunks, {now - began:.0f} s", flush=True)

        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss = chunked_backward(model, inputs, targets, options.chunk, on_chunk=show)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        steps.append({"loss": loss.item(), "gradient_norm": norm.item(), "seconds": time.perf_counter() - began,
                      "peak_gib": memory(options.device)})  # fmt: skip
        print(steps[-1], flush=True)
    flops = model.config.flops_per_token(options.tokens) * inputs.shape[1]
    best = min(s["seconds"] for s in steps)
    return facts | {"parameters": model.num_parameters(), "trained": inputs.shape[1], "chunk": options.chunk, "steps": steps,
                    "tokens_per_second": inputs.shape[1] / best, "mfu": flops / best / PEAK}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["read", "train"])
    parser.add_argument("--preset", help="a preset of LongNetConfig, instead of --layers and --width")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10**9)
    parser.add_argument("--chunk", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-seconds", type=float, default=540)
    parser.add_argument("--state", type=Path, default=Path("/tmp/longnet-billion"), help="where a read stops")
    parser.add_argument(
        "--text", type=Path, default=Path("/dev/shm/longnet-text"), help="where the ids are kept"
    )
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("stdlib")).parent)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    began = time.perf_counter()
    ids, distinct = corpus(options.text, options.tokens, options.root)
    facts = environment(options.device) | {
        "what": options.what,
        "tokens": options.tokens,
        "distinct_bytes": distinct,
    }
    facts["preparing_seconds"] = time.perf_counter() - began
    result = {"read": read, "train": train}[options.what](options, ids, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{options.what}-{options.preset or f'{options.layers}x{options.width}'}-{options.tokens}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1))
    print({key: value for key, value in result.items() if key not in ("marks", "bits", "steps")})


if __name__ == "__main__":
    main()
