"""Causal hierarchical attention over one sequence that is spread over many ranks: equal to one device, forward and backward.

What a rank receives: the keys and values of the window's halo from its left neighbours, the summaries of all leaf blocks
(coarser levels are pooled by every rank from these), and the tokens of the distinct leaf blocks that its queries open, asked
for by number. The halo is independent of the sequence's length, the summaries are 1 / block of it. In backward the gradients
of all three go the same ways back and are summed in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longnet.attention.collectives import SequenceParallel
from longnet.attention.dilated import AttentionOutput
from longnet.attention.hierarchical import _check, _parameters
from longnet.attention.hierarchical_exchange import (
    Blocks,
    Leaves,
    Lent,
    by_side,
    collect,
    gather_leaves,
    give_back,
    lend,
    own_leaves,
    request,
    scatter_leaves,
)
from longnet.attention.hierarchical_torch import Far, Group, Parameters, parts
from longnet.attention.pyramid import pool, token_mass
from longnet.attention.rotary import turn
from longnet.attention.vectors import Vectors
from longnet.patterns import HierarchicalPattern
from longnet.schedule import Halo, halo, leaf_counts


def sequence_parallel_hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: HierarchicalPattern,
    parallel: SequenceParallel,
    *,
    causal: bool = True,
    scale: float | None = None,
    prior_query: Tensor | None = None,
    level_bias: Tensor | None = None,
    router_mix: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> AttentionOutput:
    """`hierarchical_attention` of the whole sequence, for the tokens of this rank. A collective: every rank calls it.

    Computed on any device by the vectorised path of `impl="torch"`. A retention bounds what is opened and thereby what travels.

    Args:
        q: (B, n, H, D), the n tokens of this rank; k, v: (B, n, K, D). n may be 0 and may differ between ranks.
        pattern: the tree, the cover and the budget; the same on all ranks.
        parallel: the ranks and their shards, which begin at multiples of the pattern's block.
        causal: True; a bidirectional sequence cannot be spread.
        scale, prior_query, level_bias, router_mix: as in `hierarchical_attention`, the same on all ranks; every rank gets its
            tokens' share of their gradients. level_bias has the levels of the whole sequence.
        rotary: (cos, sin), each (B or 1, n, 1, D / 2), of the tokens of this rank.

    Returns:
        AttentionOutput(out (B, n, H, D), lse (B, H, n)), equal to the rows of one device, as are all gradients.

    Raises:
        ValueError: arguments that do not fit together or with this rank's shard, shards that do not begin at leaf blocks, or a
            bidirectional call. Raised before anything is sent; other ranks then wait until their timeout.

    Example:
        >>> shards = Shards.even(num_tokens, dist.get_world_size(), block=pattern.block)  # doctest: +SKIP
        >>> out, lse = sequence_parallel_hierarchical_attention(q, k, v, pattern, SequenceParallel(shards))  # doctest: +SKIP
    """
    if not causal:
        raise ValueError(
            "expected causal=True: bidirectional hierarchical attention is not spread over ranks; use one rank a sequence"
        )
    if q.dim() != 4 or q.shape[1] != parallel.num_tokens:
        raise ValueError(
            f"q: expected the {parallel.num_tokens} tokens of rank {parallel.rank}, positions "
            f"{parallel.shards.span(parallel.rank)}; got shape {tuple(q.shape)}"
        )
    if parallel.num_tokens:
        _check(q, k, v, pattern, True, prior_query, level_bias, router_mix, rotary, None, None)
    total = parallel.shards.borders[-1]
    levels = pattern.num_levels(total)
    if level_bias is not None and level_bias.shape[1] < levels:
        raise ValueError(
            f"level_bias: expected the {levels} levels of {total} tokens; got {tuple(level_bias.shape)}"
        )
    plan = _Plan.of(pattern, parallel, q.shape[-1], scale)
    bias, mix = _parameters(q, levels, level_bias, router_mix)
    q_local, k_local = (q, k) if rotary is None else (turn(q, rotary), turn(k, rotary))
    mass = token_mass(k, prior_query, plan.scale)
    leaves = pool(k, v, mass, torch.zeros_like(mass), plan.leaves.own, pattern.block)
    return AttentionOutput(*_Attention.apply(q, q_local, k, k_local, v, *leaves, bias, mix, plan))


class _Plan(NamedTuple):
    pattern: HierarchicalPattern
    scale: float
    start: int  # position of this rank's first token
    num_tokens: int  # of the whole sequence
    sizes: tuple[int, ...]  # nodes of every level
    halo: Halo
    leaves: Leaves

    @classmethod
    def of(
        cls, pattern: HierarchicalPattern, parallel: SequenceParallel, width: int, scale: float | None
    ) -> _Plan:
        shards, rank = parallel.shards, parallel.rank
        leaves = Leaves(leaf_counts(pattern, shards), pattern.block, rank, parallel.everyone)
        before = halo(shards, (pattern.window_blocks - 1) * pattern.block, rank)
        scale = 1 / math.sqrt(width) if scale is None else float(scale)
        total = shards.borders[-1]
        return cls(pattern, scale, parallel.start, total, pattern.node_counts(total), before, leaves)


class _Attention(torch.autograd.Function):
    """One node of the graph, so that every rank meets the same collectives in the same order, whatever its queries see."""

    @staticmethod
    def forward(ctx, q, q_local, k, k_local, v, kbar, vbar, mass, entropy, bias, mix, plan):
        borrowed = lend((k_local, v), plan.halo, plan.leaves.group)
        leaves = gather_leaves((kbar, vbar, mass, entropy), plan.leaves)
        levels = _levels(leaves, plan)
        parameters = Parameters(plan.scale, bias, mix, None)
        groups = [
            _group(q[:, part], q_local[:, part], k.shape[2], parameters, plan, part.start)
            for part in parts(plan.start, q.shape[1], k_local, plan.pattern)
        ]
        opened = []
        far = Far.of(k, v, levels)
        for part in groups:
            opened.append(part.add_far(far).get(0))
            part.state.collapse()
        flight, lent = request(opened, k, v, plan.leaves) if plan.pattern.top_k else (None, None)
        before = by_side(borrowed.wait())
        # The opened blocks travel while the windows are attended to.
        fars = []
        for part in groups:
            first, (keys, values) = _window(part, before, (k_local, v), plan)
            fars.append(far._replace(k=Vectors(keys), v=Vectors(values), first_token=first))
            part.add_window(fars[-1].k, fars[-1])
            part.state.collapse()
        blocks = None if flight is None or lent is None else Blocks(flight.wait(), lent)
        pieces = []
        for part, leaf, far in zip(groups, opened, fars, strict=True):
            part.add_leaves(leaf, far if blocks is None else far._replace(read=blocks.read))
            pieces.append(part.result())
        # All tensors by this way: a layer that is recomputed then keeps none of them.
        kept = () if blocks is None else (blocks.rows, *blocks.lent[2:])
        ctx.spec = (plan, None if lent is None else lent[:2])
        ctx.save_for_backward(q, q_local, k_local, v, bias, mix, *before, *leaves, *kept)
        ctx.set_materialize_grads(False)
        if not pieces:
            return torch.zeros_like(q), bias.new_zeros(q.shape[0], q.shape[2], 0)
        return torch.cat([x for x, _ in pieces], 1).to(q.dtype), torch.cat([x for _, x in pieces], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):  # pyrefly: ignore
        plan, counts = ctx.spec
        q, q_local, k_local, v, bias, mix, *rest = ctx.saved_tensors
        before, leaves, kept = rest[:2], rest[2:6], rest[6:]
        sums = _Gradients((q, q_local, k_local, v, bias, mix), before, _levels(leaves, plan))
        blocks = Blocks(kept[0], Lent(*counts, *kept[1:]), sums.work) if kept else None
        dout = torch.zeros_like(q) if dout is None else dout
        # A caller's autocast would round what the forward did not.
        with torch.autocast(q.device.type, enabled=False):
            sums.add_groups(q, q_local, (k_local, v), before, dout, dlse, blocks, plan)
            leaf_gradients = sums.pull(plan)
        borrowed = sum(plan.halo.received)
        # Everything is sent before anything is waited for.
        owed = give_back([x[:, :borrowed] for x in sums.window], plan.halo, plan.leaves.group)
        summaries = scatter_leaves(leaf_gradients, plan.leaves)
        own = tuple(torch.zeros_like(x, dtype=sums.work) for x in (k_local, v))
        if blocks is not None:
            blocks.collect(own, plan.leaves)
        returned = collect(owed, plan.halo, k_local.shape[1])
        dk_local, dv = (x[:, borrowed:] + y for x, y in zip(sums.window, returned, strict=True))
        # kbar, vbar in the dtype of the keys, mass and entropy wide.
        dkbar, dvbar, dmass, dentropy = own_leaves(summaries, plan.leaves)
        return (
            sums.queries[0].to(q.dtype), sums.queries[1].to(q.dtype), own[0].to(v.dtype), dk_local.to(v.dtype),
            (dv + own[1]).to(v.dtype), dkbar.to(v.dtype), dvbar.to(v.dtype), dmass, dentropy, *sums.parameters, None,
        )  # fmt: skip


def _group(
    q: Tensor, q_local: Tensor, key_heads: int, parameters: Parameters, plan: _Plan, begin: int
) -> Group:
    """A group of this rank's queries, the first being its token `begin`."""
    position = plan.start + begin
    return Group(q, q_local, key_heads, plan.pattern, True, parameters, plan.num_tokens, position)


def _window(
    part: Group, before: Sequence[Tensor], own: Sequence[Tensor], plan: _Plan
) -> tuple[int, list[Tensor]]:
    """The first position that the window of a group needs, and keys and values from there to the group's end."""
    start, begin = plan.start, plan.halo.begin
    first = max(begin, (part.first_block - plan.pattern.window_blocks + 1) * plan.pattern.block)
    end = part.position + part.shape[1] - start
    if first >= start:
        return first, [x[:, first - start : end] for x in own]
    return first, [
        torch.cat((a[:, first - begin :], b[:, :end]), 1) for a, b in zip(before, own, strict=True)
    ]


class _Gradients:
    """Gradients that groups of queries add to, in fp32 at least."""

    def __init__(self, inputs: Sequence[Tensor], before: Sequence[Tensor], levels: list[Any]) -> None:
        q, q_local, k_local, v, bias, mix = inputs
        self.work = bias.dtype
        self.queries = [torch.zeros_like(x, dtype=self.work) for x in (q, q_local)]
        # The window's tokens: those of the halo, then the rank's own.
        self.window = [
            torch.cat((torch.zeros_like(a, dtype=self.work), torch.zeros_like(b, dtype=self.work)), 1)
            for a, b in zip(before, (k_local, v), strict=True)
        ]
        self.inputs = [x.detach().requires_grad_() for x in (bias, mix)]
        self.parameters = [torch.zeros_like(x) for x in (bias, mix)]
        self.levels: list[Any] = [tuple(x.detach().requires_grad_() for x in level) for level in levels]
        self.nodes = [[torch.zeros_like(x, dtype=self.work) for x in level] for level in levels]

    def add_groups(self, q, q_local, own, before, dout, dlse, blocks, plan: _Plan) -> None:
        """Recompute every group with gradients and add what its part of dout (and dlse) gives."""
        begin = plan.halo.begin
        parameters = Parameters(plan.scale, self.inputs[0], self.inputs[1], None)
        read = None if blocks is None else blocks.read
        for part in parts(plan.start, q.shape[1], own[0], plan.pattern):
            with torch.enable_grad():
                queries = [x[:, part].detach().requires_grad_() for x in (q, q_local)]
                group = _group(queries[0], queries[1], own[0].shape[2], parameters, plan, part.start)
                first, window = _window(group, before, own, plan)
                window = [x.detach().requires_grad_() for x in window]
                far = Far.of(window[0], window[1], self.levels, first, read=read)
                opened = group.add_far(far).get(0)
                group.add_window(far.k, far)
                group.add_leaves(opened, far)
                results = group.result()
            given = [dout[:, part].to(self.work)] + ([] if dlse is None else [dlse[:, :, part]])
            taken = [] if blocks is None or opened is None else [blocks.taken]
            inputs = [*queries, *window, *self.inputs, *(x for level in self.levels for x in level), *taken]
            found = torch.autograd.grad(results[: len(given)], inputs, given, allow_unused=True)
            rows = slice(first - begin, first - begin + window[0].shape[1])
            targets = [x[:, part] for x in self.queries] + [x[:, rows] for x in self.window]
            targets += [*self.parameters, *(x for level in self.nodes for x in level)]
            for target, gradient in zip(targets, found, strict=False):
                if gradient is not None:
                    target.add_(gradient)
            if taken:
                blocks.add(found[-1])

    def pull(self, plan: _Plan) -> list[Tensor]:
        """Gradients of the leaves: those of coarser levels are taken down to their children."""
        for level in range(len(self.levels) - 1, 0, -1):
            with torch.enable_grad():
                pooled = pool(*self.levels[level - 1], size=plan.sizes[level], children=plan.pattern.radix)
            given = [g.to(x.dtype) for g, x in zip(self.nodes[level], pooled, strict=True)]
            found = torch.autograd.grad(pooled, self.levels[level - 1], given)
            for target, gradient in zip(self.nodes[level - 1], found, strict=True):
                target.add_(gradient)
        return self.nodes[0]


def _levels(leaves: Sequence[Tensor], plan: _Plan) -> list[Any]:
    """All levels, pooled from the leaves of all ranks."""
    levels = [tuple(leaves)]
    for size in plan.sizes[1:]:
        levels.append(pool(*levels[-1], size=size, children=plan.pattern.radix))
    return levels
