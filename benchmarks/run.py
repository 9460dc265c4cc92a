"""Measure dilated attention and its peers. Nothing is timed that was not first found correct."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

import peers
from cases import CASES, SMALL, Case
from longnet import dilated_attention


def inputs(case: Case, device: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [
        (1, case.tokens, heads, case.head_width) for heads in (case.heads, case.key_heads, case.key_heads)
    ]
    dtype = getattr(torch, case.dtype)
    return [torch.randn(s, device=device, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def check(case: Case, impl: str | None, device: str) -> None:
    """Output and gradients on the case's first tokens against the reference; raises if they disagree."""
    case = replace(case, tokens=min(case.tokens, 4096 if device == "cuda" else 256))
    q, k, v = inputs(case, device)
    dout = torch.randn_like(q)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(q, k, v, case.pattern, causal=case.causal, impl=impl).out
    true = dilated_attention(*exact, case.pattern, causal=case.causal, impl="reference").out
    got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    want = [true, *torch.autograd.grad(true, exact, dout.float())]
    bound = 2e-2 if case.dtype == "bfloat16" else 1e-4
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = ((a.float() - b).norm() / b.norm()).item()
        if not error < bound:
            raise SystemExit(
                f"{case.name} impl={impl}: {name} is off by {error:.2e} (bound {bound}); not timed"
            )


def quantiles(call, device: str) -> list[float]:
    """p20, median, p80 in milliseconds."""
    times = []
    for i in range(13):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            began = time.perf_counter()
            call()
            elapsed = 1e3 * (time.perf_counter() - began)
        if i >= 3:  # the first calls warm up
            times.append(elapsed)
    times.sort()
    return [times[2], (times[4] + times[5]) / 2, times[7]]


def measure(case: Case, who: str, attend, flops: int, device: str) -> dict:
    row: dict = {"case": case.name, "who": who, "tokens": case.tokens}
    q, k, v = inputs(case, device)
    try:
        out = attend(q, k, v)
        dout = torch.randn_like(out)

        def forward():
            with torch.no_grad():
                attend(q, k, v)

        row["forward_ms"] = quantiles(forward, device)
        row["backward_ms"] = quantiles(
            lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), device
        )
        del out
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
            extra = sum(x.nbytes for x in (q, *gradients))  # out and the gradients belong to the caller
            row["peak_extra_gib"] = (torch.cuda.max_memory_allocated() - before - extra) / 2**30
        row["forward_tflops"] = flops / row["forward_ms"][1] / 1e9
        row["backward_tflops"] = 2.5 * flops / row["backward_ms"][1] / 1e9
        row["us_per_1000_tokens"] = 1e6 * row["forward_ms"][1] / case.tokens
    except Exception as error:  # a peer that cannot run is a result
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def environment(device: str) -> dict:
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "device": device}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "none"
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return facts


def report(facts: dict, rows: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1))
    lines = [", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += ["Median [p20, p80]; flops count visible keys only, backward 2.5 times forward.", ""]
    lines += [
        "| case | who | forward ms | TFLOP/s | backward ms | TFLOP/s | extra GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['who']} | {row['error'].splitlines()[0]} | | | | |")
            continue
        f, b = ("{1:.2f} [{0:.2f}, {2:.2f}]".format(*row[key]) for key in ("forward_ms", "backward_ms"))
        extra = f"{row['peak_extra_gib']:.2f}" if "peak_extra_gib" in row else ""
        speed = [f"{row[key]:.4g}" for key in ("forward_tflops", "backward_tflops")]
        lines.append(f"| {row['case']} | {row['who']} | {f} | {speed[0]} | {b} | {speed[1]} | {extra} |")
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    good = [row for row in rows if "error" not in row]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(good)), layout="constrained")
    axes.barh([f"{row['case']} {row['who']}" for row in good], [row["forward_tflops"] for row in good])
    axes.set_xlabel("forward, TFLOP/s on visible keys")
    figure.savefig(folder / "results.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--impl", nargs="*", default=["auto"], choices=["auto", "strided"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="one tiny case")
    parser.add_argument(
        "--peers", action="store_true", help="also the library's dense attention, same tokens"
    )
    parser.add_argument("--torchscale", help="a checkout of microsoft/torchscale")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rows, facts = [], environment(options.device)
    for case in [SMALL] if options.small else [CASES[name] for name in options.cases]:
        flops = case.pattern.flops(case.tokens, case.heads, case.head_width, case.causal)
        jobs = []
        for name in options.impl:
            impl = None if name == "auto" else name
            try:
                check(case, impl, options.device)
            except ValueError as error:  # this path says that it cannot run here
                rows.append({"case": case.name, "who": f"longnet {name}", "error": str(error)})
                continue

            def ours(q, k, v, case=case, impl=impl):
                return dilated_attention(q, k, v, case.pattern, causal=case.causal, impl=impl).out

            jobs.append((f"longnet {name}", ours, flops))
        if options.peers and options.device == "cuda":
            jobs.append(("cuDNN segments", *peers.dense_segments(case, SDPBackend.CUDNN_ATTENTION)))
            jobs.append(("flash segments", *peers.dense_segments(case, SDPBackend.FLASH_ATTENTION)))
            jobs.append(("flex segments", *peers.flex_segments(case)))
        if options.torchscale:
            jobs.append(("torchscale", peers.torchscale(case, options.torchscale, options.device), flops))
        rows += [measure(case, who, attend, count, options.device) for who, attend, count in jobs]
    report(facts, rows, options.out)


if __name__ == "__main__":
    main()
