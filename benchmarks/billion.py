"""One billion tokens on one GPU: a whole model reads them, and takes exact-gradient training steps on them.

    python benchmarks/billion.py read  --preset base --tokens 1000000000 --max-seconds 540 --state /tmp/read     # again: goes on
    python benchmarks/billion.py train --layers 4 --width 256 --tokens 1000000000 --chunk 1048576
    python benchmarks/billion.py train --preset base --tokens 134217728 --chunk 524288
    python benchmarks/billion.py checkpoint --preset base --tokens 65536 1048576 3145728 --compare 2097152

`checkpoint` is ordinary training, the whole sequence at once: layers recomputed in the backward pass, token-wise work in
tiles, the residual stream in bf16. It ends with the longest sequence that fits.

The text is what stands in the source files below --root, in the order of their names, from the beginning again when it
ends before `--tokens` bytes do: every report says how many bytes are distinct. Weights are random: what is shown is cost,
exactness and memory, not quality. The pattern is geometric with ratio 4 and spans the whole text.
MFU counts 2 operations per weight and token and 4 D per visible pair (training: three and three and a half times that; the
recomputation is not counted), over the 989 TFLOP/s that NVIDIA states for dense bf16 products of a H100 or H200.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

from longnet import DilatedPattern, LongNetCache, LongNetConfig, LongNetForCausalLM, text
from longnet.model.tiles import set_tile
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


def build(options: argparse.Namespace, tokens: int) -> LongNetForCausalLM:
    pattern = DilatedPattern.geometric(tokens, window=2048, ratio=4)
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
    model = (
        build(options, options.tokens)
        .to(torch.bfloat16 if options.device == "cuda" else torch.float32)
        .eval()
    )
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
    model = build(options, options.tokens).train()
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


def checkpointed(options: argparse.Namespace, tokens: int) -> LongNetForCausalLM:
    """The model of `build`, its layers recomputed, in tiles, hidden states in bf16 wherever autocast is on."""
    model = build(options, tokens).train()
    model.gradient_checkpointing_enable()
    set_tile(model, options.tile)

    def low(module: torch.nn.Module, inputs: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.bfloat16() if torch.is_autocast_enabled(options.device) else out

    # Autocast leaves the embedding in fp32, and with it the residual stream: twice the memory of every layer checkpoint.
    model.model.embed_tokens.register_forward_hook(low)
    return model


def gradients(
    model: LongNetForCausalLM, ids: np.ndarray, device: str, chunk: int | None, low: bool = True
) -> torch.Tensor:
    """All gradients of the mean loss on `ids`, one vector (fp32, on the host); whole, or in chunks."""
    tokens = torch.from_numpy(np.asarray(ids).astype(np.int64))[None].to(device)
    model.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=low):
        if chunk:
            chunked_backward(model, tokens[:, :-1], tokens[:, 1:], chunk)
        else:
            model.token_losses(tokens[:, :-1], targets=tokens[:, 1:]).mean().backward()
    flat = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat


def compare(options: argparse.Namespace, ids: np.ndarray) -> dict:
    """Chunked gradients against those of recomputed layers: to fp32 on a short text, to one another on --compare tokens."""

    def error(x: torch.Tensor, y: torch.Tensor) -> float:
        return ((x - y).norm() / y.norm()).item()

    short, result = min(65536, options.compare), {}
    model = checkpointed(options, short)
    exact = gradients(model, ids[: short + 1], options.device, None, low=False)
    whole = gradients(model, ids[: short + 1], options.device, None)
    chunked = gradients(model, ids[: short + 1], options.device, max(1, short // 8))
    result["short"] = {"tokens": short, "checkpointed_to_fp32": error(whole, exact), "chunked_to_fp32": error(chunked, exact),
                       "chunked_to_checkpointed": error(chunked, whole)}  # fmt: skip
    print("gradients:", result["short"], flush=True)
    model = checkpointed(options, options.compare)
    memory(options.device)
    part = ids[: options.compare + 1]
    whole = gradients(model, part, options.device, None)
    result["peak_gib_checkpointed"] = memory(options.device)
    chunked = gradients(model, part, options.device, options.chunk)
    result["peak_gib_chunked"] = memory(options.device)
    result |= {
        "tokens": options.compare,
        "chunk": options.chunk,
        "chunked_to_checkpointed": error(chunked, whole),
    }
    # Two roundings of one gradient differ by at most the sum of their errors; twice that is left for the longer text.
    result["at_most"] = 2 * (result["short"]["checkpointed_to_fp32"] + result["short"]["chunked_to_fp32"])
    result["equal"] = result["chunked_to_checkpointed"] <= result["at_most"]
    print("gradients:", result, flush=True)
    return result


def steps_at(options: argparse.Namespace, ids: np.ndarray, tokens: int, count: int, deadline: float) -> dict:
    """`count` AdamW steps on the first `tokens` tokens after one that is not timed on at most 65,536 of them."""
    model = checkpointed(options, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    text_ids = torch.from_numpy(np.asarray(ids[: tokens + 1]).astype(np.int64))[None].to(options.device)
    steps: list[dict] = []

    def step(length: int) -> dict:
        memory(options.device)
        began = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16):
            loss = model.token_losses(text_ids[:, :length], targets=text_ids[:, 1 : length + 1]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "gradient_norm": norm.item(), "seconds": time.perf_counter() - began,
                "peak_gib": memory(options.device)}  # fmt: skip

    # Compiles the kernels; the weights are put back, so that the first loss is that of the untrained model.
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    step(min(tokens, 65536))
    model.load_state_dict(untrained)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    for _ in range(count):
        steps.append(step(tokens))
        print(f"{tokens:>12,} tokens", steps[-1], flush=True)
        if time.perf_counter() + steps[-1]["seconds"] > deadline:
            break
    best = min(s["seconds"] for s in steps)
    flops = model.config.flops_per_token(tokens) * tokens
    return {"tokens": tokens, "steps": steps, "tokens_per_second": tokens / best, "mfu": flops / best / PEAK,
            "peak_gib": max(s["peak_gib"] for s in steps), "parameters": model.num_parameters()}  # fmt: skip


def attempt(options: argparse.Namespace, ids: np.ndarray, tokens: int, count: int, deadline: float) -> dict:
    """`steps_at`, or what it said when the memory was not enough."""
    try:
        return steps_at(options, ids, tokens, count, deadline)
    except torch.OutOfMemoryError as error:
        message = str(error).split(". ")[0]
    # After the except block: the traceback holds the tensors of every frame.
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        memory(options.device)
    print(f"{tokens:>12,} tokens do not fit: {message}", flush=True)
    return {"tokens": tokens, "error": message}


def next_length(rows: list[dict], largest: int, unit: int) -> int | None:
    """The next length to try: the double of the longest that fits, then halfway to the shortest that does not.

    Multiples of `unit`. None: the border is known to a twentieth, or `largest` fits.
    """
    fits = max((row["tokens"] for row in rows if "error" not in row), default=0)
    fails = min((row["tokens"] for row in rows if "error" in row), default=None)
    if not fits or fits >= largest:
        return None
    if fails is None:
        return min(2 * fits, largest)
    middle = (fits + fails) // 2 // unit * unit
    return None if fails - fits <= fits // 20 or middle <= fits else middle


def table(result: dict) -> str:
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}; layers recomputed, tiles of {result['tile']} "
        "tokens, bf16 autocast and residual stream, fp32 weights and AdamW; recomputation is not counted in MFU",
        "",
        "| tokens | tokens/s | MFU | peak GiB | seconds of the best step | loss of every step |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["tokens"]):
        if "error" in row:
            lines.append(f"| {row['tokens']:,} | | | | | does not fit: {row['error']} |")
            continue
        losses = " ".join(f"{step['loss']:.3f}" for step in row["steps"])
        best = min(step["seconds"] for step in row["steps"])
        speed = f"{row['tokens_per_second']:,.0f} | {100 * row['mfu']:.1f} %"
        lines.append(f"| {row['tokens']:,} | {speed} | {row['peak_gib']:.1f} | {best:.2f} | {losses} |")
    if found := result.get("compare"):
        short = found["short"]
        lines += [
            "",
            f"Gradients at {found['tokens']:,} tokens, chunks of {found['chunk']:,} against recomputed layers, both bf16: "
            f"{found['chunked_to_checkpointed']:.4f}; at {short['tokens']:,} tokens to fp32: chunks "
            f"{short['chunked_to_fp32']:.4f}, layers {short['checkpointed_to_fp32']:.4f}",
        ]
    return "\n".join(lines) + "\n"


def checkpoint(options: argparse.Namespace, ids: np.ndarray, facts: dict, name: str) -> dict:
    """Every length of --tokens, --compare, then the longest that fits; files are written anew after each."""
    deadline = time.perf_counter() + options.max_seconds
    result = facts | {"tile": options.tile, "rows": []}

    def write() -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1))
        (options.out / f"{name}.md").write_text(table(result))

    for tokens in options.tokens:
        result["rows"].append(attempt(options, ids, tokens, options.steps, deadline))
        write()
    if options.compare:
        result["compare"] = compare(options, ids)
        write()
    while (tokens := next_length(result["rows"], options.largest, min(options.tokens))) is not None:
        seconds = max(
            max(s["seconds"] for s in row["steps"]) / row["tokens"]
            for row in result["rows"]
            if "steps" in row
        )
        if time.perf_counter() + seconds * tokens > deadline:
            result["stopped"] = f"no time for {tokens:,} tokens"
            break
        result["rows"].append(attempt(options, ids, tokens, 1, deadline))
        write()
    write()
    print((options.out / f"{name}.md").read_text())
    if options.compare and not result["compare"]["equal"]:
        raise SystemExit(f"chunked gradients are off: {result['compare']}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["read", "train", "checkpoint"])
    parser.add_argument("--preset", help="a preset of LongNetConfig, instead of --layers and --width")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[10**9], help="checkpoint takes several lengths"
    )
    parser.add_argument("--tile", type=int, default=65536, help="checkpoint: tokens of a tile")
    parser.add_argument(
        "--compare",
        type=int,
        nargs="?",
        const=2097152,
        default=0,
        help="checkpoint: compare gradients at so many tokens",
    )
    parser.add_argument(
        "--largest", type=int, default=2**23, help="checkpoint: where the search for the longest ends"
    )
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
    several, lengths = options.what == "checkpoint", options.tokens
    if not several:
        if len(lengths) > 1:
            raise SystemExit(f"--tokens: expected one length for {options.what}; got {lengths}")
        options.tokens = lengths[0]
    size = max(*lengths, options.largest, options.compare) + 1 if several else options.tokens
    ids, distinct = corpus(options.text, size, options.root)
    facts = environment(options.device) | {
        "what": options.what,
        "tokens": options.tokens,
        "distinct_bytes": distinct,
    }
    facts["preparing_seconds"] = time.perf_counter() - began
    name = f"{options.what}-{options.preset or f'{options.layers}x{options.width}'}-{max(lengths)}"
    if several:
        checkpoint(options, ids, facts, name)
        return
    result = {"read": read, "train": train}[options.what](options, ids, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1))
    print({key: value for key, value in result.items() if key not in ("marks", "bits", "steps")})


if __name__ == "__main__":
    main()
