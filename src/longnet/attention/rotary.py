"""Rotary turns of queries and keys: the pairs (x[i], x[i + D / 2]) of a token by its angles, rounded once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from longnet.attention.strided import has_triton


def turn(x: Tensor, rotary: tuple[Tensor, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """x (B, N, H, D) turned, computed in fp32 at least and rounded to `dtype` (None: x's).

    rotary: (cos, sin), each (B or 1, N, 1, D / 2) fp32 (fp64 for x in fp64). On a GPU one pass over memory, and one over its
    gradient; elsewhere, and where angles learn or a compiler fuses it itself, `turn_by_torch`.
    """
    dtype = dtype or x.dtype
    cos, sin = rotary
    if not _one_pass(x, dtype, cos, sin):
        return turn_by_torch(x, rotary, dtype)
    return _Turn.apply(x, cos, sin, dtype, False)  # type: ignore[return-value]


def turn_by_torch(x: Tensor, rotary: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)


def angle_gradients(
    turns: Iterable[tuple[Tensor, Tensor]], like: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of cos and sin, as `like`, from what they turned: x and the gradient of x turned, of every turn."""
    dcos, dsin = (torch.zeros_like(y) for y in like)
    for x, gradient in turns:
        first, second = x.to(dcos.dtype).chunk(2, dim=-1)
        to_first, to_second = gradient.to(dcos.dtype).chunk(2, dim=-1)
        dcos += (to_first * first + to_second * second).sum_to_size(dcos.shape)
        dsin += (to_second * first - to_first * second).sum_to_size(dsin.shape)
    return dcos, dsin


def _one_pass(x: Tensor, dtype: torch.dtype, cos: Tensor, sin: Tensor) -> bool:
    types = (torch.float32, torch.bfloat16, torch.float16)
    fits = x.is_cuda and x.dtype in types and dtype in types and cos.dtype == sin.dtype == torch.float32
    fits = fits and x.shape[0] < 2**16 and not (cos.requires_grad or sin.requires_grad)
    return fits and not torch.compiler.is_compiling() and has_triton()


class _Turn(torch.autograd.Function):
    """x turned, or turned back; its gradient is the other way, again a turn."""

    @staticmethod
    def forward(  # pyrefly: ignore
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool
    ) -> Tensor:
        from longnet.kernels.rotary import turned

        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.back = x.dtype, back
        return turned(x, cos, sin, dtype, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyrefly: ignore
        cos, sin = ctx.saved_tensors
        return _Turn.apply(gradient, cos, sin, ctx.dtype, not ctx.back), None, None, None, None  # type: ignore
