"""`hierarchical_attention`: the public contract, the checks of its arguments, the choice of path."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from longnet.attention import hierarchical_torch
from longnet.attention.dilated import AttentionOutput, refuse_meta
from longnet.attention.hierarchical_reference import hierarchical_attention_reference
from longnet.attention.hierarchical_torch import Far, Parameters
from longnet.attention.pyramid import build_pyramid
from longnet.attention.rotary import turn, turn_by_torch
from longnet.attention.strided import has_triton
from longnet.patterns import HierarchicalPattern
from longnet.shapes import Keys, Lengths, Queries

HierarchicalImpl = Literal["triton", "torch", "reference"]


def hierarchical_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    pattern: HierarchicalPattern,
    *,
    causal: bool = True,
    scale: float | None = None,
    prior_query: Tensor | None = None,
    level_bias: Tensor | None = None,
    router_mix: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    lengths: Lengths | None = None,
    impl: HierarchicalImpl | None = None,
) -> AttentionOutput:
    """Local attention, summaries of all that is farther, and the most relevant blocks opened: one softmax.

    Every visible token counts exactly once: by itself inside the window, by itself in an opened leaf block, or in exactly one
    summary. With sbar = scale q . kbar + entropy + level_bias, the items' logits are scale q . k (window), sbar (summary,
    value vbar) and (1 - beta) logsumexp(scale q . k_leaf) + beta sbar (opened leaf, value the leaf's softmax mean), and
    out = softmax(logits) . values. From the coarsest level down, each query token and key head opens the nodes with the highest
    score, the mean over the group's heads of softmax(sbar) among the level's candidates; ties go to the lower node. Opening
    has no gradient; beta carries the router's score into the output. With everything opened and beta = 0 this is dense
    softmax attention.

    Args:
        q: (B, N, H, D); k, v: (B, N, K, D), H a multiple of K.
        pattern: the tree, the cover and the budget.
        causal: a token sees no later token.
        scale: factor on q . k; 1 / sqrt(D) if None.
        prior_query: (K, D), pooling weights softmax(scale prior . k); None pools by the mean.
        level_bias: (H, L) with L >= pattern.num_levels(N, causal); None means 0.
        router_mix: (H,) beta in [0, 1]; None means 1.
        rotary: (cos, sin), each (B or 1, N, 1, D / 2): turns q and k inside the window only.
        lengths: (B,) integers; tokens at or beyond a sequence's length are no keys, and as queries give out 0, lse -inf.
        impl: None picks the best path; "triton", "torch", "reference" obey or raise.

    Returns:
        AttentionOutput(out (B, N, H, D), lse (B, H, N) natural log).

    Raises:
        ValueError: arguments that do not fit together, or an `impl` that cannot run here, with the reason.

    Example:
        >>> import torch
        >>> q = k = v = torch.randn(1, 100, 4, 16)
        >>> pattern = HierarchicalPattern(block=4, radix=4, window_blocks=2, top_k=2)
        >>> hierarchical_attention(q, k, v, pattern).out.shape
        torch.Size([1, 100, 4, 16])
    """
    _check(q, k, v, pattern, causal, prior_query, level_bias, router_mix, rotary, lengths, impl)
    chosen = impl or ("triton" if unsupported(q, k, pattern, causal) is None else "torch")
    if chosen == "triton" and (reason := unsupported(q, k, pattern, causal)):
        raise ValueError(f"impl='triton' cannot run here: {reason}; leave impl=None to use 'torch'")
    tokens, _, width = q.shape[1:]
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    levels = pattern.num_levels(tokens, causal)
    level_bias, router_mix = _parameters(q, levels, level_bias, router_mix)
    if chosen == "reference":
        q_local, k_local = (x if rotary is None else turn_by_torch(x, rotary, x.dtype) for x in (q, k))
        prior = torch.zeros_like(k[0, 0]) if prior_query is None else prior_query
        return AttentionOutput(
            *hierarchical_attention_reference(
                q,
                k,
                v,
                q_local,
                k_local,
                pattern,
                causal,
                scale,
                prior.to(q.dtype),
                level_bias,
                router_mix,
                lengths,
            )
        )
    if chosen == "triton":
        from longnet.attention.hierarchical_fused import attend

        out, lse = attend(q, k, v, rotary, prior_query, lengths, pattern, scale, level_bias, router_mix)
    else:
        q_local, k_local = (x if rotary is None else turn(x, rotary) for x in (q, k))
        sizes = pattern.node_counts(tokens, causal)
        pyramid = build_pyramid(k, v, prior_query, scale, pattern.block, pattern.radix, sizes, lengths)
        far = Far.of(k, v, [pyramid.level(i) for i in range(levels)])
        parameters = Parameters(scale, level_bias, router_mix, lengths)
        out, lse = hierarchical_torch.attend(q, q_local, k_local, far, pattern, causal, parameters, tokens)
        out = out.to(q.dtype)
    if lengths is not None:
        beyond = torch.arange(tokens, device=q.device) >= lengths[:, None]
        out = out.masked_fill(beyond[..., None, None], 0)
        lse = lse.masked_fill(beyond[:, None], -torch.inf)
    return AttentionOutput(out, lse)


def _parameters(
    q: Tensor, levels: int, level_bias: Tensor | None, router_mix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """level_bias (H, levels) and router_mix (H,), or their defaults, in fp32 at least."""
    work, heads = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    bias = torch.zeros(heads, levels, device=q.device) if level_bias is None else level_bias[:, :levels]
    mix = torch.ones(heads, device=q.device) if router_mix is None else router_mix
    return bias.to(work), mix.to(work)


def unsupported(q: Tensor, k: Tensor, pattern: HierarchicalPattern, causal: bool) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    if not q.is_cuda or not has_triton():
        return "it needs a CUDA device and triton"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16; got {q.dtype}"
    if not causal:
        return "it is causal"
    if not 16 <= q.shape[3] <= 128 or q.shape[3] % 8:
        return f"it takes head widths 16, 24, .. 128; got {q.shape[3]}"
    if pattern.block not in (16, 32, 64, 128) or pattern.radix & (pattern.radix - 1):
        return f"it takes blocks of 16 to 128 and a radix that is a power of two; got {pattern.block}, {pattern.radix}"
    if pattern.retention is not None:
        return "it keeps everything; got a retention"
    if pattern.top_k == 0:
        return None
    beam = pattern.opened(1)
    if beam & (beam - 1) or not 16 <= beam * pattern.radix <= 1024:
        return f"it takes a beam that is a power of two with 16 <= beam * radix <= 1024; got {beam} * {pattern.radix}"
    longest = pattern.radix * (pattern.guard + 1) - 1
    if pattern.levels is not None:
        longest = max(longest, k.shape[1] // pattern.node_tokens(pattern.levels - 1))
    if longest > 32:
        return f"it opens from lists of at most 32 nodes; this pattern lists up to {longest}"
    return None


def _check(q, k, v, pattern, causal, prior_query, level_bias, router_mix, rotary, lengths, impl) -> None:
    if not isinstance(pattern, HierarchicalPattern):
        raise ValueError(f"pattern: expected a HierarchicalPattern; got {type(pattern).__name__}")
    refuse_meta(q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.dtype != q.dtype or not x.is_floating_point() or x.device != q.device:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, tokens, heads, width), the floating dtype and the device of q; got "
                f"shape {tuple(x.shape)}, {x.dtype}, {x.device}"
            )
    batch, tokens, heads, width = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (batch, tokens, width):
        raise ValueError(
            f"expected k and v (B, N, K, D) with the B, N and D of q; got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if min(tokens, heads, width) < 1 or k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(
            f"expected at least one token and H a multiple of K; got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    levels = pattern.num_levels(tokens, causal)
    if prior_query is not None and prior_query.shape != k.shape[2:]:
        raise ValueError(f"prior_query: expected shape {tuple(k.shape[2:])}; got {tuple(prior_query.shape)}")
    if level_bias is not None and (
        level_bias.dim() != 2 or level_bias.shape[0] != heads or level_bias.shape[1] < levels
    ):
        raise ValueError(f"level_bias: expected ({heads}, >= {levels}); got {tuple(level_bias.shape)}")
    if router_mix is not None and router_mix.shape != (heads,):
        raise ValueError(f"router_mix: expected shape ({heads},); got {tuple(router_mix.shape)}")
    if rotary is not None:
        shapes = [tuple(x.shape) for x in rotary]
        fitting = [(rows, tokens, 1, width // 2) for rows in (1, batch)]
        if width % 2 or any(shape not in fitting for shape in shapes):
            expected = f"(cos, sin), each ({batch} or 1, {tokens}, 1, {width / 2:g})"
            raise ValueError(f"rotary: expected {expected}; got {' and '.join(map(str, shapes))}")
    if lengths is not None and (lengths.shape != (batch,) or lengths.is_floating_point()):
        raise ValueError(
            f"lengths: expected {batch} integers; got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False; got {causal!r}")
    if impl not in (None, "triton", "torch", "reference"):
        raise ValueError(f"impl: expected None, 'triton', 'torch' or 'reference'; got {impl!r}")
