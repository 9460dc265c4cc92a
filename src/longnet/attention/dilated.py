"""`dilated_attention`: the public contract, the checks of its arguments, the choice of path, one autograd boundary."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longnet.attention import fused, strided
from longnet.attention.reference import dilated_attention_reference
from longnet.patterns import DilatedPattern
from longnet.shapes import Keys, Lengths, LogSumExp, Queries

Impl = Literal["triton", "strided", "reference"]
IMPLS = ("triton", "strided", "reference")

# Elements of q up to which our kernels, one launch a branch and direction, beat the library's calls (0.3 ms of host time each):
# H200, 12 heads of 64, 65,536 tokens, 2^25.6 elements: 1.5 + 5.1 against 3.3 + 5.3 ms. From twice as many on the library wins.
FEW_ELEMENTS = 2**26


class AttentionOutput(NamedTuple):
    """out (B, Nq, H, D) in the dtype of q; lse (B, H, Nq), the natural log of the softmax denominator."""

    out: Queries
    lse: LogSumExp


def dilated_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    pattern: DilatedPattern,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Lengths | None = None,
    start: int = 0,
    impl: Impl | None = None,
) -> AttentionOutput:
    """Dilated attention (LongNet, arXiv 2307.02486, equations 3-15), exact, with gradients through out and lse.

    out_t = sum_u p_tu v_u with p = softmax_u(scale q_t . k_u + log n_tu), where n_tu is the number of branches of `pattern`
    in which token t sees token u: one softmax over the multiset union of all branches' keys. This equals mixing branch
    outputs by their softmax denominators (equations 9-10); nothing is detached from the gradient.

    Args:
        q: (B, Nq, H, D). Causal queries may be fewer than the keys: they are then the last Nq tokens.
        k, v: (B, N, K, D), H a multiple of K; query head h reads key head h // (H / K).
        pattern: who sees whom.
        causal: a token sees no later token.
        scale: factor on q.k; 1 / sqrt(D) if None.
        lengths: (B,) integers; tokens at or beyond a sequence's length are no keys, and as queries give out 0, lse -inf.
        start: global position of k[:, 0]; the pattern is laid over global positions.
        impl: None picks the best path (`explain` says which and why); "triton", "strided", "reference" obey or raise.

    Returns:
        AttentionOutput(out, lse).

    Raises:
        ValueError: arguments that do not fit together, or an `impl` that cannot run here, with the reason.

    Example:
        >>> import torch
        >>> q = k = v = torch.randn(1, 100, 4, 16)
        >>> dilated_attention(q, k, v, DilatedPattern((16, 128), (1, 8))).out.shape
        torch.Size([1, 100, 4, 16])
    """
    _check(q, k, v, pattern, causal, lengths, start, impl)
    _check_scale(scale)
    chosen = _choose(q, k, v, lengths, scale)
    if impl is not None and impl != chosen:
        reason = _unsupported(impl, q, k, v, scale)
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot run here: {reason}; leave impl=None to use {chosen!r}")
        chosen = impl
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if chosen == "reference":
        refuse_meta(q)
        return AttentionOutput(*dilated_attention_reference(q, k, v, pattern, causal, scale, lengths, start))
    spec = (list(pattern.segment_lengths), list(pattern.dilation_rates), pattern.head_offsets)
    return AttentionOutput(*_forward(q, k, v, lengths, *spec, causal, scale, start, chosen))


def explain(q: Queries, k: Keys, v: Keys, pattern: DilatedPattern, *, lengths: Lengths | None = None) -> str:
    """Which path `dilated_attention` takes for these tensors, and for every path why it can or cannot run.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 100, 4, 16)
        >>> print(explain(q, q, q, DilatedPattern((16,), (1,))).split(":")[0])
        dilated_attention takes impl='strided'
    """
    chosen = _choose(q, k, v, lengths, None)
    lines = [f"dilated_attention takes impl={chosen!r}: {_why(chosen, q, k, v)}"]
    for impl in IMPLS:
        lines.append(f"  {impl}: {_unsupported(impl, q, k, v, None) or 'can run'}")
    return "\n".join(lines)


def _unsupported(impl: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> str | None:
    if impl == "triton":
        return fused.unsupported(q, k, v, scale)
    return strided.unsupported(q, k, v) if impl == "strided" else None


def _choose(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | None) -> str:
    """Library attention over strided views wherever the library takes these tensors; on GPUs our kernels where it does not.

    Sequences of different lengths are one launch a branch for the kernels, and one call each for the library; few elements
    leave the library waiting for the host. In deterministic mode the library's fast backward is out of the question, and
    the kernels are faster than its slow one.
    """
    library = strided.unsupported(q, k, v) is None
    few = q.numel() <= FEW_ELEMENTS
    prefers = q.is_cuda and (few or lengths is not None or torch.are_deterministic_algorithms_enabled())
    if (prefers or (q.is_cuda and not library)) and fused.unsupported(q, k, v, scale) is None:
        return "triton"
    return "strided" if library else "reference"


def _why(chosen: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    # Apart from the choice: torch.compile cannot trace the question whether cuDNN is switched on.
    if chosen == "reference":
        return f"{strided.unsupported(q, k, v)}; {fused.unsupported(q, k, v)}"
    if chosen == "triton":
        reason = strided.unsupported(q, k, v)
        return (
            reason or f"at most {FEW_ELEMENTS:,} elements of q, lengths within a batch, or deterministic mode"
        )
    if q.is_cuda:
        return f"{'cuDNN' if strided.has_cudnn(q) else 'FlashAttention'} over strided views"
    return "library attention over strided views"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    lengths: Tensor | None,
    start: int,
    impl: str | None,
) -> None:
    if not isinstance(pattern, DilatedPattern):
        raise ValueError(f"pattern: expected a DilatedPattern; got {type(pattern).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor; got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, tokens, heads, width); got shape {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected the floating dtype of q, k and v to agree; got {x.dtype}, q is {q.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} like q; got {x.device}; move it with .to()")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"expected k and v (B, N, K, D) with the B and D of q; got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    if min(q.shape[1:]) < 1 or min(k.shape[1:]) < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"expected at least one token and H a multiple of K; got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if q.shape[1] > k.shape[1] or (not causal and q.shape[1] != k.shape[1]):
        raise ValueError(
            f"expected as many queries as keys (causal: at most as many, the last tokens); got {q.shape[1]} queries, "
            f"{k.shape[1]} keys, causal={causal}"
        )
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False; got {causal!r}")
    if not isinstance(start, int | torch.SymInt) or start < 0:
        raise ValueError(f"start: expected an integer position >= 0; got {start!r}")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: expected None, 'triton', 'strided' or 'reference'; got {impl!r}")
    if lengths is not None and not isinstance(lengths, Tensor):
        raise ValueError(f"lengths: expected a tensor of {q.shape[0]} integers; got {type(lengths).__name__}")
    if lengths is not None:
        integers = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
        if lengths.shape != (q.shape[0],) or not integers:
            raise ValueError(
                f"lengths: expected {q.shape[0]} integers; got {lengths.dtype} of shape {tuple(lengths.shape)}"
            )


def refuse_meta(q: Tensor) -> None:
    """Raises ValueError for tensors of shapes alone."""
    if q.is_meta:
        raise ValueError(
            "expected tensors that hold data; got device 'meta'; load the weights, or use .to_empty()"
        )


def _check_scale(scale: float | None) -> None:
    number = scale is None or isinstance(scale, int | float | torch.SymFloat)
    if not number or (scale is not None and not -math.inf < scale < math.inf):
        raise ValueError(f"scale: expected a finite number, or None for 1 / sqrt(D); got {scale!r}")


@torch.library.custom_op("longnet::dilated_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_offsets: str,
    causal: bool,
    scale: float,
    start: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    path = fused if impl == "triton" else strided
    pattern = DilatedPattern(tuple(segment_lengths), tuple(dilation_rates), head_offsets)  # type: ignore[arg-type]
    return path.forward(q, k, v, lengths, pattern, causal, scale, start)


@torch.library.custom_op("longnet::dilated_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_offsets: str,
    causal: bool,
    scale: float,
    start: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    path = fused if impl == "triton" else strided
    pattern = DilatedPattern(tuple(segment_lengths), tuple(dilation_rates), head_offsets)  # type: ignore[arg-type]
    return path.backward(dout, dlse, q, k, v, out, lse, lengths, pattern, causal, scale, start)


@_forward.register_fake
def _(q, k, v, lengths, segment_lengths, dilation_rates, head_offsets, causal, scale, start, impl):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, num_queries, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, num_heads, num_queries), dtype=statistics)


@_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, *spec):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, lengths, *ctx.spec = inputs
    # One boundary around all branches: what is saved does not grow with their number.
    ctx.save_for_backward(q, k, v, lengths, *output)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout, dlse):
    q, k, v, lengths, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = _backward(dout, dlse, q, k, v, out, lse, lengths, *ctx.spec)
    return (*gradients, *[None] * 8)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _second_derivative(ctx, *gradients):
    raise NotImplementedError(
        "dilated_attention: expected first derivatives; got create_graph=True through the fast paths, whose second"
        " derivatives do not exist; use impl='reference'"
    )


_backward.register_autograd(_second_derivative)
