"""Measure dilated attention and its peers. Nothing is timed that was not first found correct."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import time
from collections.abc import Callable
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


@torch.no_grad()
def check_peer(case: Case, attend: peers.Attention, device: str) -> None:
    """torchscale computes the same mixture with its own rule of head offsets; so does our reference when told so."""
    case = replace(case, tokens=min(case.tokens, 4096 if device == "cuda" else 256))
    q, k, v = inputs(case, device)
    pattern = replace(case.pattern, head_offsets="block")
    true = dilated_attention(
        q.float(), k.float(), v.float(), pattern, causal=case.causal, impl="reference"
    ).out
    error = ((attend(q, k, v).float() - true).norm() / true.norm()).item()
    if not error < (2e-2 if case.dtype == "bfloat16" else 1e-4):
        raise ValueError(f"off by {error:.2e} from the reference with block offsets; not timed")


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
    try:
        q, k, v = inputs(case, device)
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
        for key in ("forward", "backward"):
            row[f"{key}_us_per_1000_tokens"] = 1e6 * row[f"{key}_ms"][1] / case.tokens
    except Exception as error:  # a peer that cannot run is a result
        row["error"] = failure(error)
    if device == "cuda":
        torch.cuda.empty_cache()  # what one peer leaves behind is no other's burden
    return row


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0].replace("|", "/")[:200]


def ratios(rows: list[dict]) -> list[str]:
    """Every row of ours against every peer's of the same case: TFLOP/s, and time, forward and backward."""
    lines = []
    good = [row for row in rows if "error" not in row]
    for ours in (row for row in good if row["who"].startswith("longnet")):
        for peer in good:
            if peer["case"] != ours["case"] or peer["who"].startswith("longnet"):
                continue
            rate = [ours[f"{key}_tflops"] / peer[f"{key}_tflops"] for key in ("forward", "backward")]
            times = [sum(row[f"{key}_ms"][1] for key in ("forward", "backward")) for row in (peer, ours)]
            lines.append(
                f"- {ours['case']}, {ours['who']} / {peer['who']}: TFLOP/s forward {rate[0]:.2f}, backward {rate[1]:.2f}; "
                f"forward + backward {times[0] / times[1]:.2f} times as fast"
            )
    return lines


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
            lines.append(f"| {row['case']} | {row['who']} | {row['error']} | | | | |")
            continue
        f, b = ("{1:.2f} [{0:.2f}, {2:.2f}]".format(*row[key]) for key in ("forward_ms", "backward_ms"))
        extra = f"{row['peak_extra_gib']:.2f}" if "peak_extra_gib" in row else ""
        speed = [f"{row[key]:.4g}" for key in ("forward_tflops", "backward_tflops")]
        lines.append(f"| {row['case']} | {row['who']} | {f} | {speed[0]} | {b} | {speed[1]} | {extra} |")
    lines += ["", *ratios(rows)]
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no results.png")
        return
    good = [row for row in rows if "error" not in row]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(good)), layout="constrained")
    axes.barh([f"{row['case']} {row['who']}" for row in good], [row["forward_tflops"] for row in good])
    axes.set_xlabel("forward, TFLOP/s on visible keys")
    figure.savefig(folder / "results.png", dpi=150)


def jobs(case: Case, options: argparse.Namespace) -> dict[str, Callable[[], tuple[peers.Attention, int]]]:
    """Who is measured on a case: name -> a function that checks or builds it and gives (attention, flops)."""
    flops = case.pattern.flops(case.tokens, case.heads, case.head_width, case.causal)
    device, result = options.device, {}
    for name in options.impl:
        impl = None if name == "auto" else name

        def ours(impl=impl):
            check(case, impl, device)
            return (
                lambda q, k, v: dilated_attention(q, k, v, case.pattern, causal=case.causal, impl=impl).out,
                flops,
            )

        result[f"longnet {name}"] = ours
    if options.peers:
        backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        for name, backend in backends.items():
            result[f"{name} segments"] = lambda backend=backend: peers.dense_segments(case, backend)
        result["flex segments"] = lambda: peers.flex_segments(case, device)
    if options.torchscale:

        def torchscale():
            attend = peers.torchscale(case, options.torchscale, device)
            check_peer(case, attend, device)
            return attend, flops

        result["torchscale"] = torchscale
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--impl", nargs="*", default=["auto"], choices=["auto", "strided", "triton"])
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
        for who, build in jobs(case, options).items():
            try:
                attend, flops = build()
            except Exception as error:  # a path or peer that says it cannot run here is a result, too
                rows.append({"case": case.name, "who": who, "error": failure(error)})
                continue
            rows.append(measure(case, who, attend, flops, options.device))
            print(case.name, who, rows[-1].get("error", ""), flush=True)
    report(facts, rows, options.out)


if __name__ == "__main__":
    main()
