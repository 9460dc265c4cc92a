"""Dilated attention by our own Triton kernels: launches and tile tables; one launch per branch and direction."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.strided import has_triton
from longnet.patterns import DilatedPattern

KIB = 1024
LAUNCH_LIMIT = 65535  # CUDA: gridDim.y
LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Query rows and key rows of a program, load stages and warps; registers per thread, where the compiler would take more."""

    queries: int
    keys: int
    stages: int
    warps: int
    registers: int | None = None


class Tiles(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile


def unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if reason := _no_triton(q.device.type):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 or float32, not {q.dtype}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 128:
        return f"the kernels take head widths that are multiples of 8 from 16 to 128, not {q.shape[-1]}"
    if scale is not None and scale < 0:
        return f"the kernels take scale >= 0, not {scale}"
    if q.shape[0] > LAUNCH_LIMIT:
        return f"a launch takes at most {LAUNCH_LIMIT} sequences"
    return None


def _no_triton(device: str) -> str | None:
    if torch.compiler.is_compiling():
        # What follows cannot be traced, and torch.compile itself needs triton on CUDA.
        return None if device == "cuda" else "they are not compiled for other devices than CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device!r}"
    return None if has_triton() else "triton knows no driver for this device"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 227 * KIB
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def tiles(head_width: int, itemsize: int, shared: int, causal: bool = True) -> Tiles:
    """Tiles for a head width and size of element that fit into `shared` bytes of shared memory per program (99 KiB at least)."""
    # The first column: best of 8 to 19 tiles per kernel and width (H200, bf16, rows of 2048). The others fit.
    if itemsize == 4:
        # Products in fp32 are written out: 4 warps take the compiler twice as long (12 and 17 s for dq and dkv at D=96).
        return Tiles(*3 * (Tile(32, 32, 1, 8),))
    if head_width <= 64:
        return Tiles(Tile(64, 64, 2, 4), Tile(64, 64, 3, 4), Tile(32, 128, 3, 4))
    if shared >= 227 * KIB:
        # Two programs of 8 warps fit into the registers of a Hopper processor; without the cap it would be one.
        return Tiles(Tile(128, 64, 2, 8, 128), Tile(64, 32, 3, 4), Tile(64, 64, 2, 4))
    forward = Tile(64, 32, 2, 4) if causal or shared < 164 * KIB else Tile(64, 64, 3, 4)
    # 64 query rows of dkv would fit as well, but spill registers on GPUs before Hopper.
    if shared >= 164 * KIB:
        return Tiles(forward, Tile(64, 32, 3, 4), Tile(32, 64, 2, 4))
    return Tiles(forward, Tile(64, 32, 2, 4), Tile(32, 64, 2, 4))


class Launch(NamedTuple):
    """What all launches of one call share."""

    tensors: tuple[Tensor, Tensor, Tensor]
    lengths: Tensor | None
    causal: bool
    scale: float
    start: int
    pattern: DilatedPattern

    def strides(self) -> tuple[int, ...]:
        return tuple(s for x in self.tensors for s in x.stride()[:3])

    def branches(self) -> list[tuple[int, int]]:
        return sorted(self.pattern.branches, key=lambda branch: branch[1])

    def constants(self, tile: Tile, first: bool) -> dict:
        q, k, _ = self.tensors
        return {
            "G": q.shape[2] // k.shape[2], "D": q.shape[3], "BD": 1 << (q.shape[3] - 1).bit_length(), "BM": tile.queries,
            "BN": tile.keys, "STAGES": tile.stages, "CAUSAL": self.causal, "CYCLIC": self.pattern.head_offsets == "cyclic",
            "LENGTHS": self.lengths is not None, "FIRST": first, "PREC": "ieee" if q.dtype == torch.float32 else "tf32",
            "num_warps": tile.warps, "maxnreg": tile.registers,
        }  # fmt: skip

    def numbers(self, w: int, rate: int) -> tuple[int, ...]:
        q, k, _ = self.tensors
        return q.shape[1], k.shape[1], q.shape[2], w, rate, -(-q.shape[2] // rate), self.start

    def grid(self, w: int, rate: int, size: int, over_keys: bool) -> tuple[int, tuple[int, int]]:
        """Row tiles per segment, and the launch grid: segments x tiles x heads, sequences.

        Heads vary fastest: what runs at one time then reads neighbouring memory, and a segment's keys stay in the cache.
        """
        q, k, _ = self.tensors
        num_keys = k.shape[1]
        tokens = num_keys if over_keys else q.shape[1]
        segments = (self.start + num_keys - 1) // w - (self.start + num_keys - tokens) // w + 1
        rows = -(-min(w, tokens) // rate)
        count = -(-rows // size)
        return count, (count * segments * q.shape[2], q.shape[0])


def _prepare(q, k, v, lengths, pattern, causal, scale, start) -> Launch:
    allocate_descriptors()
    tensors = tuple(aligned(x) for x in (q, k, v))
    lengths = None if lengths is None else lengths.to(q.device, torch.int64)
    return Launch(tensors, lengths, causal, scale, start, pattern)


def aligned(x: Tensor) -> Tensor:
    """Descriptors want unit stride in D and everything else on 16 bytes."""
    fits = x.stride(-1) == 1 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    return x if fits and x.data_ptr() % 16 == 0 else x.contiguous()


def allocate_descriptors() -> None:
    """Kernels that make tensor descriptors ask for a few bytes of global memory per program."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    pattern: DilatedPattern,
    causal: bool,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor]:
    """out (B, Nq, H, D), lse (B, H, Nq); arguments as in `dilated_attention`, already checked."""
    from longnet.kernels.dilated_forward import dilated_forward

    batch, num_queries, num_heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    if not batch:
        return out, lse
    launch = _prepare(q, k, v, lengths, pattern, causal, scale, start)
    tile = tiles(width, q.element_size(), shared_memory(q.device), causal).forward
    with torch.cuda.device_of(q):
        for at, (w, rate) in enumerate(launch.branches()):
            count, grid = launch.grid(w, rate, tile.queries, over_keys=False)
            dilated_forward[grid](
                *launch.tensors, out, lse, launch.lengths, *launch.strides(), *launch.numbers(w, rate), count,
                scale * LOG2_E, **launch.constants(tile, at == 0),
            )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    pattern: DilatedPattern,
    causal: bool,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each summed over the branches in the order of their rates: two runs agree in every bit."""
    from longnet.kernels.cover import row_dot
    from longnet.kernels.dilated_backward import dilated_dkv, dilated_dq

    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.shape[0]:
        return grads
    dq, dk, dv = grads
    launch = _prepare(q, k, v, lengths, pattern, causal, scale, start)
    dout = aligned(dout.contiguous())
    chosen = tiles(q.shape[3], q.element_size(), shared_memory(q.device), causal)
    with torch.cuda.device_of(q):
        delta = row_dot(dout, out.contiguous(), dlse)
        for at, (w, rate) in enumerate(launch.branches()):
            shared = (launch.lengths, *launch.strides(), *launch.numbers(w, rate))
            scales = (scale, scale * LOG2_E)
            count, grid = launch.grid(w, rate, chosen.dq.queries, over_keys=False)
            dilated_dq[grid](
                *launch.tensors, dout, lse, delta, dq, *shared, count, *scales,
                **launch.constants(chosen.dq, at == 0),
            )  # fmt: skip
            count, grid = launch.grid(w, rate, chosen.dkv.keys, over_keys=True)
            dilated_dkv[grid](
                *launch.tensors, dout, lse, delta, dk, dv, *shared, count, *scales,
                **launch.constants(chosen.dkv, at == 0),
            )  # fmt: skip
    return dq, dk, dv
