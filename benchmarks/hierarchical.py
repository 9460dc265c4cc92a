"""Hierarchical attention against the library's dense attention and fla's NSA, on the same machine in the same run.

PYTHONPATH=src python benchmarks/hierarchical.py --fla FOLDER_WITH_FLA_AND_EINOPS --groups cover whole cost memory
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hierarchical_cases import CASES, COVER, OPENED, SMALL, SMALL_CASES, SMALL_COVER, Case
from longnet import HierarchicalPattern, hierarchical_attention
from run import environment

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
GROUPS = ("cover", "whole", "cost", "memory")
# Seconds that the timed calls of one direction may take together, beyond the least number of them.
PATIENCE = 2.0


def inputs(case: Case, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(case.batch, case.tokens, heads, case.width) for heads in (case.heads, case.key_heads, case.key_heads)]  # fmt: skip
    return [torch.randn(s, device=device, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def pattern_of(case: Case, small: bool) -> HierarchicalPattern:
    if case.who == "cover":
        return SMALL_COVER if small else COVER
    return SMALL if small else OPENED[case.beam, case.radix]


def attention(case: Case, options: argparse.Namespace) -> Attention:
    if case.who == "dense":
        return dense(options.device)
    if case.who == "nsa":
        return nsa(case, options)
    pattern = pattern_of(case, options.small)
    impl = "triton" if options.device == "cuda" else "torch"
    return lambda q, k, v: hierarchical_attention(q, k, v, pattern, impl=impl).out  # type: ignore[arg-type]


def dense(device: str) -> Attention:
    backend = SDPBackend.CUDNN_ATTENTION if device == "cuda" else SDPBackend.MATH

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    return attend


def nsa(case: Case, options: argparse.Namespace) -> Attention:
    """fla's operation with its compressed and its selected branch: 16 blocks of 64, no window."""
    if not options.fla:
        raise ValueError("no --fla given")
    if options.fla not in sys.path:
        sys.path.insert(0, options.fla)
    from fla.ops.nsa import parallel_nsa

    shape = (case.batch, case.tokens, case.heads)
    gates = [torch.rand(shape, device=options.device, dtype=torch.bfloat16) for _ in range(2)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = parallel_nsa(q=q, k=k, v=v, g_cmp=gates[0], g_slc=gates[1], block_counts=16, block_size=64)
        return out[0] if isinstance(out, tuple) else out

    return attend


def check(case: Case, options: argparse.Namespace) -> None:
    """The first tokens, kernels against plain tensor operations in fp32; raises if they disagree.

    Scores differ by rounding, so a near tie may fall the other way: a few tokens may differ where blocks are opened.
    """
    case = replace(case, tokens=min(case.tokens, 4096), batch=1)
    q, k, v = inputs(case, options.device)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    pattern = pattern_of(case, options.small)
    out = attention(case, options)(q, k, v)
    true = hierarchical_attention(*exact, pattern, impl="torch").out
    differ = (out.float() - true).norm(dim=-1) > 0.03 * true.norm(dim=-1)
    allowed = 0.02 if pattern.top_k else 0.0
    if not differ.float().mean() <= allowed:
        raise ValueError(f"{differ.float().mean():.2%} of the outputs differ from fp32; not timed")
    if not pattern.top_k:
        dout = torch.randn_like(true)
        got = torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))
        want = torch.autograd.grad(true, exact, dout)
        for name, a, b in zip("qkv", got, want, strict=True):
            if not (a.float() - b).norm() < 2e-2 * b.norm():
                raise ValueError(f"d{name} differs from fp32; not timed")


def timed(call: Callable[[], object], device: str) -> list[float]:
    """p20, median, p80 in milliseconds of 3 to 10 calls, after two that warm up.

    On a GPU the calls are queued one behind the other, as in training: where the host needs longer for a call than the device,
    its time is what counts.
    """
    call()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    count = max(3, min(10, int(PATIENCE / (time.perf_counter() - began))))
    if device == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = sorted(begin.elapsed_time(end) for begin, end in events)
    else:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        times.sort()
    return [times[count // 5], (times[(count - 1) // 2] + times[count // 2]) / 2, times[-1 - count // 5]]


def visible(case: Case, options: argparse.Namespace) -> float | None:
    """Operations forward on the keys that are visible; None where the count would depend on the peer's own rules."""
    if case.who == "dense":
        return 4 * case.batch * case.heads * case.width * case.tokens * (case.tokens + 1) / 2
    if case.who == "nsa":
        return None
    return pattern_of(case, options.small).flops(case.tokens, case.heads, case.width)


def measure(case: Case, options: argparse.Namespace) -> dict:
    """One row: milliseconds forward and backward, TFLOP/s, and the peak beyond the inputs."""
    row: dict = {"group": case.group, "who": case.who, "case": case.name, "tokens": case.tokens}
    row |= {"heads": case.heads, "key_heads": case.key_heads, "width": case.width, "batch": case.batch}
    row["radix"], began = case.radix, time.perf_counter()
    try:
        if case.who in ("opened", "cover"):
            check(case, options)
        attend, tensors = attention(case, options), inputs(case, options.device)
        with torch.no_grad():
            row["forward_ms"] = timed(lambda: attend(*tensors), options.device)
        out = attend(*tensors)
        dout = torch.randn_like(out)
        backward = lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)  # noqa: E731
        row["backward_ms"] = timed(backward, options.device)
        del out, backward
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(attend(*tensors), tensors, dout)
            row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        total = case.batch * case.tokens
        row["us_per_token"] = 1e3 * (row["forward_ms"][1] + row["backward_ms"][1]) / total
        if flops := visible(case, options):
            row["forward_tflops"] = flops / row["forward_ms"][1] / 1e9
            row["backward_tflops"] = 2.5 * flops / row["backward_ms"][1] / 1e9
    except Exception as error:  # a peer that cannot run here is a row that says why
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    row["seconds"] = time.perf_counter() - began  # with checks, compilation and a peer's own tuning
    print(json.dumps(row), flush=True)
    return row


def ratios(rows: list[dict]) -> list[str]:
    """What the rows say next to each other."""
    good = [row for row in rows if "error" not in row]
    lines = []
    for row in good:
        if row["who"] == "cover":
            lines += [_rates(row, base) for base in good if base["group"] == "cover" and base["who"] == "dense"
                      and base["width"] == row["width"]]  # fmt: skip
        elif row["group"] == "whole" and row["who"] == "opened":
            lines += [_speedup(row, base) for base in good if base["group"] == "whole" and base["who"] != "opened"
                      and all(base[x] == row[x] for x in ("tokens", "key_heads"))]  # fmt: skip
        elif row["group"] == "memory" and "peak_gib" in row:
            each = row["peak_gib"] * 2**20 / row["tokens"]
            lines.append(
                f"{row['case']}: peak {row['peak_gib']:.1f} GiB beyond the inputs, {each:.2f} KiB a token"
            )
    cost = [row for row in good if row["group"] == "cost"]
    for shape in dict.fromkeys((row["heads"], row["radix"]) for row in cost):
        lines += _growth([row for row in cost if (row["heads"], row["radix"]) == shape])
    return lines


def _rates(row: dict, base: dict) -> str:
    forward, backward = (row[f"{d}_tflops"] / base[f"{d}_tflops"] for d in ("forward", "backward"))
    return f"{row['case']}: {forward:.2f} of the rate of {base['case']} forward, {backward:.2f} backward"


def _speedup(row: dict, base: dict) -> str:
    times = [x["forward_ms"][1] + x["backward_ms"][1] for x in (base, row)]
    return f"{row['case']}: {times[0] / times[1]:.2f} times as fast as {base['who']}, forward and backward"


def _growth(cost: list[dict]) -> list[str]:
    lines = []
    for row in cost[1:]:
        grown = row["us_per_token"] / cost[0]["us_per_token"]
        log = math.log(row["tokens"]) / math.log(cost[0]["tokens"])
        flops = [x["forward_tflops"] * x["forward_ms"][1] / x["tokens"] for x in (cost[0], row)]
        lines.append(
            f"{row['heads']} heads, radix {row['radix']}, {row['tokens']} tokens: a token costs {grown:.2f} times "
            f"what it costs at {cost[0]['tokens']}; the logarithm grows {log:.3f} times, its operations {flops[1] / flops[0]:.2f}"
        )
    return lines


def report(rows: list[dict], facts: dict, folder: Path) -> str:
    """Write JSON and Markdown; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1))
    lines = [", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += ["Median [p20, p80]; flops count visible keys only, backward 2.5 times forward.", ""]  # fmt: skip
    lines += [
        "| case | forward ms | TFLOP/s | backward ms | TFLOP/s | µs a token | extra GiB |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['error']} | | | | | |")
            continue
        cells = [row["case"]]
        for direction in ("forward", "backward"):
            low, middle, high = row[f"{direction}_ms"]
            rate = row.get(f"{direction}_tflops")
            cells += [f"{middle:.2f} [{low:.2f}, {high:.2f}]", "" if rate is None else f"{rate:.0f}"]
        cells += [
            f"{row['us_per_token']:.3f}",
            f"{row['peak_gib']:.2f}" if "peak_gib" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", *(f"- {line}" for line in ratios(rows))]) + "\n"
    (folder / "results.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fla", help="folder that holds the packages fla and einops")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--tokens", nargs="+", type=int, help="only cases of these lengths")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny cases: a smoke test, no claim")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hierarchical"))
    options = parser.parse_args()
    facts, rows, text = environment(options.device), [], "no case of these lengths"
    for case in SMALL_CASES if options.small else CASES:
        if case.group in options.groups and case.tokens in (options.tokens or (case.tokens,)):
            rows.append(measure(case, options))
            text = report(rows, facts, options.out)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    print(text)


if __name__ == "__main__":
    main()
