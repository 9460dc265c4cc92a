"""Other people's attention, imported and never retyped. Each peer is a function q, k, v -> out with gradients."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
WINDOW = 2048


def dense_segments(case: Case, backend: SDPBackend) -> tuple[Attention, int]:
    """Dense attention within segments of 2048: the library's own speed on the same tokens, and its flops."""
    window = min(WINDOW, case.tokens)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q4, k4, v4 = (x.reshape(-1, window, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q4, k4, v4, is_causal=case.causal, enable_gqa=q.shape[2] != k.shape[2]
            )
        return out.transpose(1, 2).reshape(q.shape)

    pairs = window * (window + 1) // 2 if case.causal else window * window
    return attend, 4 * case.head_width * case.heads * pairs * (case.tokens // window)


def flex_segments(case: Case, device: str) -> tuple[Attention, int]:
    """FlexAttention, compiled, on the same segment-local shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window = min(WINDOW, case.tokens)
    compiled = torch.compile(flex_attention)
    mask = None
    if case.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, window, window, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q4, k4, v4 = (x.reshape(-1, window, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        out = compiled(q4, k4, v4, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2).reshape(q.shape)

    return attend, dense_segments(case, SDPBackend.MATH)[1]


def _torch_flash(q, k, v, dropout=0.0, bias=None, softmax_scale=None, is_causal=False):
    """torch's own flash kernel with the signature that torchscale expects."""
    n, m = q.shape[1], k.shape[1]
    result = torch.ops.aten._flash_attention_forward(
        q.contiguous(), k.contiguous(), v.contiguous(), None, None, n, m, dropout, is_causal, False
    )
    return result[0], result[1]


def _plain(q, k, v, dropout=0.0, bias=None, softmax_scale=None, is_causal=False):
    """A stand-in for the flash kernel on CPU."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v), scores.logsumexp(-1)


def rearrange(x: Tensor, formula: str, **sizes: int) -> Tensor:
    """einops' operation for torchscale's formulas, such as "b (n g) h d -> (b n) g h d", g=8: views and one reshape."""
    left, right = (
        [(g or n).split() for g, n in re.findall(r"\(([^)]*)\)|(\S+)", side)] for side in formula.split("->")
    )
    names: list[str] = []
    shape: list[int] = []
    for extent, group in zip(x.shape, left, strict=True):
        known = 1
        for name in group:
            known *= sizes.get(name, 1)
        names += group
        free = [n for n in group if n not in sizes]
        shape += [sizes[n] if n in sizes else extent // known for n in group]
        if len(free) > 1 or known * (extent // known) != extent:
            raise ValueError(f"cannot split {extent} into {group} with {sizes}")
    order = [names.index(n) for group in right for n in group if n != "1"]
    spare = [i for i, n in enumerate(names) if n == "1"]
    x = x.reshape(shape).permute(order + spare)
    extents = dict(zip([names[i] for i in order], x.shape, strict=False)) | {"1": 1}
    target = []
    for group in right:
        size = 1
        for name in group:
            size *= extents[name]
        target.append(size)
    return x.reshape(target)


def torchscale(case: Case, path: str, device: str) -> Attention:
    """torchscale's DilatedAttention from a checkout at `path`, its projections replaced by the identity."""
    if path not in sys.path:
        sys.path.insert(0, path)
    try:
        import einops  # noqa: F401
    except ImportError:
        sys.modules["einops"] = ModuleType("einops")
        sys.modules["einops"].rearrange = rearrange  # type: ignore[attr-defined]
    from torchscale.component import dilated_attention, multihead_attention

    multihead_attention.flash_attn_func = _torch_flash if device == "cuda" else _plain
    args = SimpleNamespace(
        multiway=False,
        xpos_rel_pos=False,
        flash_attention=True,
        seq_parallel=False,
        layernorm_eps=1e-5,
        segment_length=list(case.pattern.segment_lengths),
        dilated_ratio=list(case.pattern.dilation_rates),
    )
    module = dilated_attention.DilatedAttention(
        args, case.heads * case.head_width, case.heads, self_attention=True
    )
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(module, name, torch.nn.Identity())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(*(x.flatten(2) for x in (q, k, v)), is_causal=case.causal)[0].view(q.shape)

    return attend
