"""Run by test_dilated_kernels.py under TRITON_INTERPRET=1: the kernels in fp32 and fp16 against the fp64 oracle."""

import sys

import torch

from conftest import assert_attention_within_budget
from longnet import DilatedPattern, dilated_attention

TWO = DilatedPattern((16, 50), (1, 3))
THREE = DilatedPattern((40, 70, 200), (1, 4, 6))
BLOCK = DilatedPattern((16, 50), (1, 3), "block")

# tokens, heads, key heads, width, pattern, options
CASES = {
    "lengths": [(n, 2, 2, 16, TWO, {"causal": causal}) for n in (1, 2, 15, 16, 17, 47) for causal in (True, False)],
    "groups": [
        (60, 6, 2, 16, TWO, {}), (60, 6, 1, 16, BLOCK, {}), (60, 4, 1, 16, BLOCK, {"causal": False}), (75, 8, 2, 16, THREE, {}),
    ],
    "widths": [(40, 2, 1, width, TWO, {}) for width in (24, 48, 80, 96, 128)],
    "windows": [
        (60, 3, 3, 16, THREE, {"start": 13}), (90, 4, 2, 16, TWO, {"start": 997, "queries": 31}),
        (90, 4, 2, 16, THREE, {"queries": 1}), (45, 2, 2, 16, BLOCK, {"start": 100, "queries": 44}),
    ],
    "batch": [
        (70, 4, 2, 16, TWO, {"lengths": [70, 0, 31]}), (70, 4, 2, 16, THREE, {"lengths": [1, 69, 70], "causal": False}),
        (70, 4, 2, 16, TWO, {"lengths": [70, 68, 40], "queries": 5}),
    ],
    "half": [(60, 4, 2, 64, TWO, {"dtype": torch.float16})],
}  # fmt: skip


def run(tensors, impl, pattern, dout, dlse, **options):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = dilated_attention(*tensors, pattern, impl=impl, **options)
    seen = torch.isfinite(lse)
    loss = (out * dout.to(out.dtype)).sum() + (torch.where(seen, lse, 0) * dlse.to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


def check(
    tokens, heads, key_heads, width, pattern, *, queries=None, lengths=None, dtype=torch.float32, **options
):
    g = torch.Generator().manual_seed(0)
    batch, queries = 1 if lengths is None else len(lengths), queries or tokens
    shapes = [(batch, queries, heads, width)] + [(batch, tokens, key_heads, width)] * 2
    # Views of a larger tensor whose other elements are NaN: nothing may be read from beyond an edge.
    tensors = []
    for shape in shapes:
        whole = torch.full((shape[0], shape[1] + 3, shape[2], shape[3] + 8), torch.nan, dtype=dtype)
        view = whole[:, 2:-1, :, : shape[3]]
        tensors.append(view.copy_(torch.randn(shape, generator=g)))
    dout = torch.randn(shapes[0], generator=g).to(dtype)
    dlse = torch.randn(batch, heads, queries, generator=g)
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths)
    exact = run([x.double() for x in tensors], "reference", pattern, dout, dlse, **options)
    peer = run(tensors, "reference", pattern, dout, dlse, **options)
    actual = run(tensors, "triton", pattern, dout, dlse, **options)
    assert_attention_within_budget(actual, exact, peer, len(pattern.branches))


for case in CASES[sys.argv[1]]:
    *shape, options = case
    check(*shape, **options)
