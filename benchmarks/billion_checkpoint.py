"""`benchmarks/billion.py checkpoint`: ordinary training, the whole sequence at once, layers recomputed; and what it compares."""

from __future__ import annotations

import argparse
import gc
import json
import time

import numpy as np
import torch

from billion_setup import PEAK, build, low_residual, memory
from billion_train import distance, gradients
from longnet import LongNetForCausalLM
from longnet.model.tiles import set_tile
from longnet.train.offload import offload_layer_inputs


def checkpointed(options: argparse.Namespace, tokens: int) -> LongNetForCausalLM:
    """The model of `build`, its layers recomputed, in tiles, hidden states in bf16 wherever autocast is on; --offload."""
    model = build(options, tokens).train()
    model.gradient_checkpointing_enable()
    if options.offload:
        offload_layer_inputs(model)
    set_tile(model, options.tile)
    low_residual(model, options.device)
    return model


def compare(options: argparse.Namespace, ids: np.ndarray) -> dict:
    """Chunked gradients against those of recomputed layers: to fp32 on a short text, to one another on --compare tokens."""
    short, device = min(65536, options.compare), options.device
    model, part = checkpointed(options, short), ids[: short + 1]
    exact, whole = (gradients(model, part, device, None, low) for low in (False, True))
    chunked = gradients(model, part, device, max(1, short // 8))
    errors = {"checkpointed_to_fp32": distance(whole, exact), "chunked_to_fp32": distance(chunked, exact)}
    result = {"short": {"tokens": short, **errors, "chunked_to_checkpointed": distance(chunked, whole)}}
    print("gradients:", result["short"], flush=True)
    model, part = checkpointed(options, options.compare), ids[: options.compare + 1]
    memory(device)
    whole = gradients(model, part, device, None)
    result["peak_gib_checkpointed"] = memory(device)
    again = gradients(model, part, device, None)
    chunked = gradients(model, part, device, options.chunk)
    result["peak_gib_chunked"] = memory(device)
    result |= {"tokens": options.compare, "chunk": options.chunk, "checkpointed_twice": distance(again, whole),
               "chunked_to_checkpointed": distance(chunked, whole)}  # fmt: skip
    # Two roundings of one gradient differ by at most the sum of their errors; twice that is left for the longer text.
    result["at_most"] = {which: 2 * sum(e[which] for e in errors.values()) for which in ("all", "worst")}
    found = result["chunked_to_checkpointed"]
    result["equal"] = all(found[which] <= most for which, most in result["at_most"].items())
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
    where = ", their inputs in host memory" if result["offload"] else ""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}; layers recomputed{where}, tiles of {result['tile']} "
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
            f"{found['chunked_to_checkpointed']['all']:.4f} (two runs of the latter: "
            f"{found['checkpointed_twice']['all']:.4f}); at {short['tokens']:,} tokens to fp32: chunks "
            f"{short['chunked_to_fp32']['all']:.4f}, layers {short['checkpointed_to_fp32']['all']:.4f}",
        ]
    return "\n".join(lines) + "\n"


def checkpoint(options: argparse.Namespace, ids: np.ndarray, facts: dict, name: str) -> dict:
    """Every length of --tokens, --compare, then the longest that fits; files are written anew after each."""
    deadline = time.perf_counter() + options.max_seconds
    result = facts | {"tile": options.tile, "offload": options.offload, "rows": []}

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
        # With --offload the first step at a length pins host memory.
        result["rows"].append(attempt(options, ids, tokens, 1 + options.offload, deadline))
        write()
    write()
    print((options.out / f"{name}.md").read_text())
    if options.compare and not result["compare"]["equal"]:
        raise SystemExit(f"chunked gradients are off: {result['compare']}")
    return result
