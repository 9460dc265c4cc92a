"""Vectors that are read by number, many times each, and one gradient for all their readers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_rows(total: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """total[numbers] += rows, numbers of any shape, in a fixed order on any device."""
    if total.is_cuda:  # where index_add_ adds with atomics
        total.index_put_((numbers,), rows, accumulate=True)
    else:  # where index_put_ takes ten times as long
        total.index_add_(0, numbers.flatten(), rows.flatten(0, numbers.dim() - 1))


class Sums:
    """What readers add to the gradient of rows (-1, width) of x: in fp32 at least, in a fixed order on any device."""

    def __init__(self, x: Tensor, width: int) -> None:
        self.shape, self.device = (x.numel() // width, width), x.device
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.total: Tensor | None = None

    def add(self, numbers: Tensor, gradient: Tensor) -> None:
        if self.total is None:
            self.total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        add_rows(self.total, numbers, gradient.to(self.dtype))

    def take(self) -> Tensor | None:
        total, self.total = self.total, None
        return total


class _Source(torch.autograd.Function):
    """x as rows (-1, width). Its gradient is what the readers left in `sums`, all before this node's turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, sums: Sums) -> Tensor:
        ctx.sums, ctx.shape, ctx.dtype = sums, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return x.reshape(-1, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any) -> Any:  # pyrefly: ignore
        total = ctx.sums.take()
        return None if total is None else total.view(ctx.shape).to(ctx.dtype), None, None


class _Read(torch.autograd.Function):
    """rows at numbers (..., D)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, sums: Sums) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.sums = sums
        return F.embedding(numbers, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:  # pyrefly: ignore
        ctx.sums.add(ctx.saved_tensors[0], gradient)
        return None, None, None


class Vectors:
    """The vectors, or scalars, of x (B, M, K, ...), M of them for every sequence and key head.

    An ordinary gather would make a gradient as long as x for every reader: quadratic where many groups of queries read.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        width = x.shape[3] if x.dim() == 4 else 1
        self.sums = Sums(x, width) if torch.is_grad_enabled() and x.requires_grad else None
        self.rows: Tensor = x.reshape(-1, width) if self.sums is None else _Source.apply(x, width, self.sums)  # type: ignore

    @property
    def count(self) -> int:
        """M."""
        return self.x.shape[1]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Those of every key head: index (B, blocks, rows, K, C) along M; (B, blocks, rows, K, C, D)."""
        return self._read(index)

    def shared(self, index: Tensor) -> Tensor:
        """Those of all key heads: index (blocks, C); (B, blocks, C, K, D)."""
        return self._read(index[None, ..., None])

    def _read(self, index: Tensor) -> Tensor:
        """At index (B, ., ., K, ..)."""
        batch, count, key_heads = self.x.shape[:3]
        numbers = index
        if batch * key_heads > 1:
            first = _first_numbers(batch, count * key_heads if batch > 1 else 0, key_heads, self.x.device)
            numbers = index * key_heads + first.view(*first.shape, *(1,) * (index.dim() - 4))
        if self.sums is None:
            found = F.embedding(numbers, self.rows)
        else:
            found = _Read.apply(self.rows, numbers, self.sums)
        return found if self.x.dim() == 4 else found[..., 0]  # type: ignore


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a later backward pass keeps them
def _first_numbers(batch: int, stride: int, key_heads: int, device: torch.device) -> Tensor:
    """(B, 1, 1, K)"""
    sequence = torch.arange(batch, device=device) * stride
    return sequence.view(-1, 1, 1, 1) + torch.arange(key_heads, device=device)
