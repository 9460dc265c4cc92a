"""Hierarchical attention against cuDNN's dense attention and fla's NSA, on the same machine in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longnet import HierarchicalPattern, hierarchical_attention
from run import environment, quantiles

OPENED = HierarchicalPattern(radix=16, top_k=16, beam=32)
COVER = HierarchicalPattern(radix=16, top_k=0)


def tensors(tokens: int, heads: int, key_heads: int, width: int, batch: int = 1) -> list[torch.Tensor]:
    shapes = [(batch, tokens, h, width) for h in (heads, key_heads, key_heads)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]


def measure(name: str, attend, inputs: list[torch.Tensor], flops: float | None = None) -> dict:
    """One row: forward and backward, p20, median, p80 in ms; the peak of both beyond inputs."""
    row: dict = {"case": name, "tokens": inputs[0].shape[1]}
    try:
        out = attend(*inputs)
        dout = torch.randn_like(out)

        def forward() -> None:
            with torch.no_grad():
                attend(*inputs)

        row["forward_ms"] = quantiles(forward, "cuda")
        row["backward_ms"] = quantiles(
            lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), "cuda"
        )
        del out
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(attend(*inputs), inputs, dout)
        row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        if flops:
            row["forward_tflops"] = flops / row["forward_ms"][1] / 1e9
            row["backward_tflops"] = 2.5 * flops / row["backward_ms"][1] / 1e9
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    print(json.dumps(row), flush=True)
    return row


def cudnn(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fla", help="folder that holds the packages fla and einops")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 131072])
    parser.add_argument("--long", type=int, nargs="*", default=[1048576])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hierarchical"))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        measure(
            "cuDNN N=2048, 16 heads",
            cudnn,
            tensors(2048, 16, 16, 128, 64),
            4 * 64 * 16 * 128 * 2048 * 2049 / 2,
        )
    ]
    for key_heads in (16, 4, 1):
        inputs = tensors(131072, 16, key_heads, 128)
        rows.append(
            measure(
                f"cover, {key_heads} key heads",
                lambda q, k, v: hierarchical_attention(q, k, v, COVER, impl="triton").out,
                inputs,
                COVER.flops(131072, 16, 128),
            )
        )
    for tokens in options.tokens:
        for key_heads in (1, 4):
            inputs = tensors(tokens, 16, key_heads, 128)
            attend = lambda q, k, v: hierarchical_attention(q, k, v, OPENED, impl="triton").out  # noqa: E731
            rows.append(measure(f"opened, {key_heads} key heads", attend, inputs))
        rows.append(measure("cuDNN dense, 1 key head", cudnn, tensors(tokens, 16, 1, 128)))
        if options.fla:
            sys.path.insert(0, options.fla)
            from fla.ops.nsa import parallel_nsa

            gates = [torch.rand(1, tokens, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

            def nsa(q, k, v, gates=gates):
                out = parallel_nsa(
                    q=q, k=k, v=v, g_cmp=gates[0], g_slc=gates[1], block_counts=16, block_size=64
                )
                return out[0] if isinstance(out, tuple) else out

            rows.append(measure("fla NSA, 1 key head", nsa, tensors(tokens, 16, 1, 128)))
    for tokens in options.long:
        attend = lambda q, k, v: hierarchical_attention(q, k, v, OPENED, impl="triton").out  # noqa: E731
        rows.append(measure("opened, 1 key head", attend, tensors(tokens, 16, 1, 128)))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(
        json.dumps({"environment": environment("cuda"), "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
