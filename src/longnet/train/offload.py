"""The inputs of recomputed layers in host memory, from the forward to the backward pass.

Where layers are recomputed, the graph keeps of each its input (B, N, hidden). It goes to the host while the layer computes, and
comes back while the layer after it goes backward: the device holds two of them, one in use and one under way.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Bytes of a piece of host memory: torch rounds pinned allocations up to powers of two, which could double a large one.
PIECE = 2**26


class _Kept:
    """A layer's input in host memory, in pieces, and what was kept before it: the backward pass will ask for that next."""

    def __init__(self, x: Tensor, before: weakref.ref[_Kept] | None, pinned: bool) -> None:
        self.shape, self.before = x.shape, before
        self.pieces = [torch.empty(len(part), dtype=x.dtype, pin_memory=pinned) for part in _parts(x)]


class _Moving(NamedTuple):
    """A copy that was begun, and its end on the device of `x`."""

    kept: _Kept
    x: Tensor
    done: torch.cuda.Event | None


class HostInputs:
    """Stands where layers have their checkpoint function, calls that one, and keeps their inputs (B, N, hidden) on the host.

    On CUDA host memory is pinned and copies are queued on a stream of their own. Memory of the device is allocated and freed
    by the computing stream alone, which waits for a copy before it frees what is copied: the stream's order makes it safe to
    use again, and no block waits for the host to look at an event, as it would with `record_stream`. Elsewhere copies are
    done at once.
    """

    def __init__(self, checkpoint: Callable[..., Any], device: Any) -> None:
        self.last: weakref.ref[_Kept] | None = None
        self.leaving: _Moving | None = None
        self.coming: _Moving | None = None
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.copies = torch.cuda.Stream(device) if self.device.type == "cuda" else None

    def __call__(self, function: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
        """checkpoint(function, hidden, *others). Only `hidden` is kept on the host."""
        # Hooks live as long as what they packed: they must not hold `hidden`, of which they see an alias.
        address, shape = hidden.data_ptr(), hidden.shape

        def pack(x: Tensor) -> Any:
            return self._send(x) if (x.data_ptr(), x.shape) == (address, shape) else x

        # What the layer saves within is not seen here: checkpoints have hooks of their own.
        with saved_tensors_hooks(pack, self._unpack):
            return self.checkpoint(function, hidden, *others)

    def _send(self, x: Tensor) -> _Kept:
        self._forget()
        if self.leaving is not None:  # its copy has had the time of a layer
            self._wait(self.leaving)
        x = x.detach().contiguous()  # the graph would hold what holds the graph
        kept = _Kept(x, self.last, self.copies is not None)
        self.leaving, self.last = self._move(kept, x, kept.pieces, _parts(x)), weakref.ref(kept)
        return kept

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.leaving is not None and self.leaving.kept is packed:  # the last layer's is still there
            found, self.leaving = self.leaving, None
        else:
            if self.coming is None or self.coming.kept is not packed:
                self._fetch(packed)
            found, self.coming = self.coming, None
        assert found is not None
        self._wait(found)
        before = packed.before and packed.before()
        if before is not None:
            self._fetch(before)
        return found.x

    def _fetch(self, kept: _Kept) -> None:
        self._forget()
        x = torch.empty(kept.shape, dtype=kept.pieces[0].dtype, device=self.device)
        self.coming = self._move(kept, x, _parts(x), kept.pieces)

    def _move(self, kept: _Kept, x: Tensor, targets: Any, sources: Any) -> _Moving:
        """Queue copies after what the computation has queued so far."""
        stream, done = self.copies, None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            if stream is not None:
                done = torch.cuda.Event()
                done.record(stream)
        return _Moving(kept, x, done)

    def _wait(self, moving: _Moving) -> None:
        """What the computation queues from here on comes after this copy."""
        if moving.done is not None:
            torch.cuda.current_stream(self.device).wait_event(moving.done)

    def _forget(self) -> None:
        """Give up what was fetched for a backward pass that ended early."""
        if self.coming is not None:
            self._wait(self.coming)
            self.coming = None

    def __del__(self) -> None:
        self._forget()


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Views of x, one after the other, of PIECE bytes at most."""
    return x.view(-1).split(PIECE // x.element_size())


def offload_layer_inputs(model: Any) -> None:
    """Let `model` (any LongNet model with layers under .model) keep the inputs of its recomputed layers in host memory.

    Gradients are those without it, bit for bit. Call it after the model has moved to its device.

    Raises:
        ValueError: layers that are not recomputed, which keep more than their inputs.

    Example:
        >>> from longnet import LongNetConfig, LongNetForCausalLM
        >>> model = LongNetForCausalLM(LongNetConfig.preset("tiny", num_hidden_layers=2)).train()
        >>> model.gradient_checkpointing_enable()
        >>> offload_layer_inputs(model)
        >>> model.token_losses(torch.arange(4, 260)[None]).mean().backward()
    """
    layers = model.model.layers
    if not layers[0].gradient_checkpointing:
        raise ValueError(
            "expected a model whose layers are recomputed; got one whose layers are not; call "
            "model.gradient_checkpointing_enable()"
        )
    inputs = HostInputs(layers[0]._gradient_checkpointing_func, next(model.parameters()).device)
    for layer in layers:
        layer._gradient_checkpointing_func = inputs
