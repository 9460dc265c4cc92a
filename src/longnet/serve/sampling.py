"""Draw the next id of every slot of a batch. A draw depends on its own request alone: its logits, its seed, its step."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 23  # of a uniform number: it and its half step are exact in fp32, so it is never 0 nor 1


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor | None, seeds: Tensor, steps: Tensor) -> Tensor:
    """ids (S,) from logits (S, V) fp32; no host synchronisation.

    Args:
        temperature: (S,); 0 takes the likeliest id.
        top_p: (S,) in (0, 1]: the fewest likeliest ids that hold this mass; 1 keeps all. None does so without sorting them.
        seeds, steps: (S,) int64. argmax(logits / temperature + Gumbel noise of (seed, step, id)) is a draw from the softmax.

    Example:
        >>> one = torch.ones(1)
        >>> sample(torch.tensor([[0.0, 5.0]]), 0 * one, one, one.long(), one.long())
        tensor([1])
    """
    greedy = logits.argmax(-1)
    scaled = logits / temperature.clamp(min=1e-6)[:, None]
    if top_p is not None:
        ordered, index = scaled.sort(-1, descending=True)
        mass = torch.softmax(ordered, -1)
        # An id stays if the ids before it do not yet reach top_p, so the first always stays.
        cut = (mass.cumsum(-1) - mass >= top_p[:, None]) & (top_p < 1)[:, None]
        scaled = scaled.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), -torch.inf)
    drawn = (scaled + gumbel(seeds, steps, logits.shape[1])).argmax(-1)
    return torch.where(temperature > 0, drawn, greedy)


def gumbel(seeds: Tensor, steps: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise (S, count) in fp32, a pure function of (seed, step, column): the same on every device.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014), applied to the seed, then the step, then the column.
    """
    columns = torch.arange(count, device=seeds.device)
    bits = _mix(_mix(_mix(seeds)[:, None] + steps[:, None]) + columns)
    uniform = (_shifted(bits, 64 - _BITS).float() + 0.5) * 2.0**-_BITS
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64 bits in which every input bit flips every output bit half of the time; int64 wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros coming in from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
