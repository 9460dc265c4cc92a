"""Joining softmaxes over disjoint sets of keys by their denominators. Associative, differentiable, torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over both key sets: lse = log(e^a + e^b), out = e^(a - lse) out_a + e^(b - lse) out_b.

    out (..., D) in any float dtype, lse (...) of the same leading shape, natural log; -inf marks an empty set.
    Weights are formed in the dtype of lse. Both sets empty gives out = 0, lse = -inf.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    finite = torch.where(lse == -torch.inf, 0, lse)
    weight_a, weight_b = torch.exp(lse_a - finite)[..., None], torch.exp(lse_b - finite)[..., None]
    out = torch.where(weight_a == 0, 0, weight_a * out_a) + torch.where(weight_b == 0, 0, weight_b * out_b)
    return out.to(out_a.dtype), lse
