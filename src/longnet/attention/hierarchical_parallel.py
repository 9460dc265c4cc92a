"""Causal hierarchical attention over one sequence that is spread over many ranks: equal to one device, forward and backward.

What a rank receives: the keys and values of the window's halo from its left neighbours, the summaries of all leaf blocks
(coarser levels are pooled by every rank from these), and the tokens of the distinct leaf blocks that its queries open, asked
for by number. The halo is independent of the sequence's length, the summaries are 1 / block of it. In backward the gradients
of all three go the same ways back and are summed in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longnet.attention.collectives import Flight, SequenceParallel, all_gather, all_to_all, reduce_scatter
from longnet.attention.dilated import AttentionOutput
from longnet.attention.hierarchical import _check, _parameters, _turn
from longnet.attention.hierarchical_torch import Far, Group, Parameters, parts
from longnet.attention.pyramid import pool, token_mass
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
    plan = _plan(pattern, parallel, q.shape[-1], scale)
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
    levels = len(plan.sizes)
    if level_bias is not None and level_bias.shape[1] < levels:
        raise ValueError(
            f"level_bias: expected the {levels} levels of {plan.num_tokens} tokens; got {tuple(level_bias.shape)}"
        )
    bias, mix = _parameters(q, levels, level_bias, router_mix)
    q_local, k_local = (q, k) if rotary is None else (_turn(q, rotary), _turn(k, rotary))
    own = plan.leaves[parallel.rank]
    mass = token_mass(k, prior_query, plan.scale)
    leaves = pool(k, v, mass, torch.zeros_like(mass), own, pattern.block)
    return AttentionOutput(*_Attention.apply(q, q_local, k, k_local, v, *leaves, bias, mix, plan))


def tokens_before(x: Tensor, reach: int, parallel: SequenceParallel) -> Tensor:
    """The `reach` rows before this rank's x (B, n, K, D), from its left neighbours; zeros before the sequence. A collective."""
    return _Before.apply(x, reach, parallel)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reach, parallel):
        plan = halo(parallel.shards, reach, parallel.rank)
        ctx.spec = (plan, parallel.everyone, x.shape[1], x.dtype)
        (rows,) = _sides(_lend((x,), plan, parallel.everyone).wait())
        missing = x.new_zeros(x.shape[0], reach - rows.shape[1], *x.shape[2:])
        return torch.cat((missing, rows), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyrefly: ignore
        plan, group, tokens, dtype = ctx.spec
        work = torch.promote_types(dtype, torch.float32)
        rows = gradient[:, gradient.shape[1] - sum(plan.received) :].to(work)
        (total,) = _collect(_give_back((rows,), plan, group), plan, tokens)
        return total.to(dtype), None, None


class _Plan(NamedTuple):
    pattern: HierarchicalPattern
    parallel: SequenceParallel
    scale: float
    num_tokens: int  # of the whole sequence
    halo: Halo
    leaves: tuple[int, ...]  # complete leaf blocks of every rank
    sizes: tuple[int, ...]  # nodes of every level


def _plan(pattern: HierarchicalPattern, parallel: SequenceParallel, width: int, scale: float | None) -> _Plan:
    shards = parallel.shards
    leaves, total = leaf_counts(pattern, shards), shards.borders[-1]
    before = halo(shards, (pattern.window_blocks - 1) * pattern.block, parallel.rank)
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    return _Plan(pattern, parallel, scale, total, before, leaves, pattern.node_counts(total))


class _Attention(torch.autograd.Function):
    """One node of the graph, so that every rank meets the same collectives in the same order, whatever its queries see."""

    @staticmethod
    def forward(ctx, q, q_local, k, k_local, v, kbar, vbar, mass, entropy, bias, mix, plan):
        group = plan.parallel.everyone
        borrowed = _lend((k_local, v), plan.halo, group)
        leaves = _gather_leaves((kbar, vbar, mass, entropy), plan, group)
        levels = _levels(leaves, plan)
        parameters = Parameters(plan.scale, bias, mix, None)
        groups = list(_groups(q, q_local, k.shape[2], parameters, plan))
        opened = []
        for part in groups:
            opened.append(part.add_far(Far(k, v, levels, 0, (0,) * len(levels))).get(0))
            part.state.collapse()
        blocks = _request(opened, k, v, plan, group) if plan.pattern.top_k else None
        before = _sides(borrowed.wait())
        # The opened blocks travel while the windows are attended to.
        fars = []
        for part in groups:
            first, (keys, values) = _window(part, before, (k_local, v), plan)
            fars.append(Far(keys, values, levels, first, (0,) * len(levels), blocks and blocks.read))
            part.add_window(keys, fars[-1])
            part.state.collapse()
        if blocks is not None:
            blocks.wait()
        pieces = []
        for part, leaf, far in zip(groups, opened, fars, strict=True):
            part.add_leaves(leaf, far)
            pieces.append(part.result())
        ctx.spec = (plan, blocks)
        ctx.save_for_backward(q, q_local, k_local, v, bias, mix, *before, *leaves)
        ctx.set_materialize_grads(False)
        if not pieces:
            return torch.zeros_like(q), bias.new_zeros(q.shape[0], q.shape[2], 0)
        return torch.cat([x for x, _ in pieces], 1).to(q.dtype), torch.cat([x for _, x in pieces], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):  # pyrefly: ignore
        plan, blocks = ctx.spec
        q, q_local, k_local, v, bias, mix, *rest = ctx.saved_tensors
        before, leaves = rest[:2], rest[2:]
        group = plan.parallel.everyone
        sums = _Sums((q, q_local, k_local, v, bias, mix), before, _levels(leaves, plan))
        if blocks is not None:
            blocks.begin_backward(sums.work)
        dout = torch.zeros_like(q) if dout is None else dout
        sums.add_groups(q, q_local, (k_local, v), before, dout, dlse, blocks, plan)
        borrowed = sum(plan.halo.received)
        # Everything is sent before anything is waited for.
        owed = _give_back([x[:, :borrowed] for x in sums.window], plan.halo, group)
        summaries = _scatter_leaves(sums.pull(plan), plan, group)
        own = [torch.zeros_like(x, dtype=sums.work) for x in (k_local, v)]
        if blocks is not None:
            blocks.collect(own, plan, group)
        returned = _collect(owed, plan.halo, k_local.shape[1])
        dk_local, dv = (x[:, borrowed:] + y for x, y in zip(sums.window, returned, strict=True))
        # kbar, vbar in the dtype of the keys, mass and entropy wide.
        dkbar, dvbar, dmass, dentropy = _own_leaves(summaries, plan)
        return (
            sums.queries[0].to(q.dtype), sums.queries[1].to(q.dtype), own[0].to(v.dtype), dk_local.to(v.dtype),
            (dv + own[1]).to(v.dtype), dkbar.to(v.dtype), dvbar.to(v.dtype), dmass, dentropy, *sums.parameters, None,
        )  # fmt: skip


def _groups(
    q: Tensor, q_local: Tensor, key_heads: int, parameters: Parameters, plan: _Plan
) -> Iterator[Group]:
    """The queries of this rank in the groups of the vectorised path."""
    start = plan.parallel.start
    for part in parts(start, q.shape[1], q, plan.pattern):
        yield Group(
            q[:, part], q_local[:, part], key_heads, plan.pattern, True, parameters, plan.num_tokens, start + part.start
        )  # fmt: skip


def _window(
    part: Group, before: Sequence[Tensor], own: Sequence[Tensor], plan: _Plan
) -> tuple[int, list[Tensor]]:
    """The first position that the window of a group needs, and keys and values from there to the group's end."""
    start, begin = plan.parallel.start, plan.halo.begin
    first = max(begin, (part.first_block - plan.pattern.window_blocks + 1) * plan.pattern.block)
    end = part.position + part.shape[1] - start
    if first >= start:
        return first, [x[:, first - start : end] for x in own]
    return first, [
        torch.cat((a[:, first - begin :], b[:, :end]), 1) for a, b in zip(before, own, strict=True)
    ]


class _Sums:
    """Gradients that groups of queries add to, in fp32 at least."""

    def __init__(
        self, inputs: Sequence[Tensor], before: Sequence[Tensor], levels: list[tuple[Tensor, ...]]
    ) -> None:
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
        self.levels = [tuple(x.detach().requires_grad_() for x in level) for level in levels]
        self.nodes = [[torch.zeros_like(x, dtype=self.work) for x in level] for level in levels]

    def add_groups(self, q, q_local, own, before, dout, dlse, blocks, plan: _Plan) -> None:
        """Recompute every group with gradients and add what its part of dout (and dlse) gives."""
        begin = plan.halo.begin
        parameters = Parameters(plan.scale, *self.inputs, None)
        for part in parts(plan.parallel.start, q.shape[1], q, plan.pattern):
            with torch.enable_grad():
                turned = [x[:, part].detach().requires_grad_() for x in (q, q_local)]
                position = plan.parallel.start + part.start
                group = Group(
                    *turned, own[0].shape[2], plan.pattern, True, parameters, plan.num_tokens, position
                )
                first, window = _window(group, before, own, plan)
                window = [x.detach().requires_grad_() for x in window]
                read = blocks and blocks.read
                far = Far(*window, self.levels, first, (0,) * len(self.levels), read)
                opened = group.add_far(far).get(0)
                group.add_window(window[0], far)
                group.add_leaves(opened, far)
                results = group.result()
            given = [dout[:, part].to(self.work)] + ([] if dlse is None else [dlse[:, :, part]])
            taken = [] if blocks is None or opened is None else [blocks.taken]
            inputs = [*turned, *window, *self.inputs, *(x for level in self.levels for x in level), *taken]
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
                pooled = pool(*self.levels[level - 1], plan.sizes[level], plan.pattern.radix)  # type: ignore[call-arg]
            given = [g.to(x.dtype) for g, x in zip(self.nodes[level], pooled, strict=True)]
            found = torch.autograd.grad(pooled, self.levels[level - 1], given)
            for target, gradient in zip(self.nodes[level - 1], found, strict=True):
                target.add_(gradient)
        return self.nodes[0]


def _levels(leaves: Sequence[Tensor], plan: _Plan) -> list[Any]:
    """All levels, pooled from the leaves of all ranks."""
    levels = [tuple(leaves)]
    for size in plan.sizes[1:]:
        levels.append(pool(*levels[-1], size, plan.pattern.radix))  # type: ignore[call-arg]
    return levels


def _gather_leaves(own: Sequence[Tensor], plan: _Plan, group: dist.ProcessGroup) -> list[Tensor]:
    """kbar, vbar, mass, entropy of this rank's leaves (B, leaves, K, ...) -> of all ranks'."""
    padded = max(plan.leaves)
    pairs = (torch.cat(own[:2], -1), torch.stack(own[2:], -1))  # two dtypes, two collectives
    flights = []
    for x in pairs:
        rows = x.new_zeros(padded, x.shape[0], *x.shape[2:])
        rows[: x.shape[1]] = x.transpose(0, 1)
        flights.append(all_gather(rows, group))
    keep = [slice(i * padded, i * padded + count) for i, count in enumerate(plan.leaves)]
    wide, narrow = (torch.cat([y[x] for x in keep]).transpose(0, 1) for y in (x.wait() for x in flights))
    return [*wide.chunk(2, -1), *narrow.unbind(-1)]


def _scatter_leaves(gradients: Sequence[Tensor], plan: _Plan, group: dist.ProcessGroup) -> Flight:
    """Start the sum of all ranks' gradients of all leaves; each gets those of its own."""
    kbar, vbar, mass, entropy = gradients
    total = torch.cat((kbar, vbar, mass[..., None], entropy[..., None]), -1).transpose(0, 1)
    padded = max(plan.leaves)
    rows = total.new_zeros(len(plan.leaves) * padded, *total.shape[1:])
    for i, part in enumerate(total.split(plan.leaves)):
        rows[i * padded : i * padded + len(part)] = part
    return reduce_scatter(rows, group)


def _own_leaves(summaries: Flight, plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = summaries.wait()[: plan.leaves[plan.parallel.rank]].transpose(0, 1)
    kbar, vbar = rows[..., :-2].chunk(2, -1)
    return kbar, vbar, rows[..., -2], rows[..., -1]


class _Blocks:
    """The distinct leaf blocks that this rank's queries open, its own included: keys and values (places, 2, block, D)."""

    def __init__(
        self, flight: Flight, place: Tensor, counts: list[int], asked: list[int], where: Sequence[Tensor]
    ) -> None:
        self.flight: Flight | None = flight
        self.place = place  # (leaves, B, K): where a block lies among the rows
        self.counts, self.asked = counts, asked  # blocks fetched from, and lent to, every rank
        self.where = where  # (sequence, own leaf, key head) of what was lent
        self.rows = self.gradient = torch.empty(0)
        self.at = self.taken = torch.empty(0)

    def wait(self) -> None:
        """Until the blocks are here."""
        assert self.flight is not None
        rows = self.flight.wait()
        self.flight = None
        # Places of absent blocks read row 0, so there must be one.
        self.rows = rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])

    def read(self, leaf: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, blocks, rows, K, places, block, D) of leaves (B, blocks, rows, K, places)."""
        sequence, key_head = _axes(leaf)
        self.at = self.place[leaf, sequence, key_head]
        self.taken = self.rows[self.at]
        if torch.is_grad_enabled():
            self.taken.requires_grad_()
        keys, values = self.taken.unbind(-3)
        return keys, values

    def begin_backward(self, work: torch.dtype) -> None:
        self.gradient = torch.zeros_like(self.rows, dtype=work)

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of what was read last."""
        # index_put_ rather than index_add_: it adds in a fixed order on CUDA, too.
        self.gradient.index_put_((self.at,), gradient.to(self.gradient.dtype), accumulate=True)

    def collect(self, own: Sequence[Tensor], plan: _Plan, group: dist.ProcessGroup) -> None:
        """Send the gradients home; add those of this rank's blocks to own = (dk, dv), each (B, n, K, D)."""
        rows = all_to_all(self.gradient[: sum(self.counts)], self.counts, self.asked, group).wait()
        for i, x in enumerate(own):
            view = _own_blocks(x, plan)
            view.index_put_(tuple(self.where), rows[:, i], accumulate=True)


def _own_blocks(x: Tensor, plan: _Plan) -> Tensor:
    """Complete blocks of this rank's x (B, n, K, D) as a view (B, leaves, K, block, D)."""
    count = plan.leaves[plan.parallel.rank]
    return x[:, : count * plan.pattern.block].unflatten(1, (count, plan.pattern.block)).transpose(2, 3)


def _axes(leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of sequence and key head that go with leaf (B, blocks, rows, K, places)."""
    batch, _, _, key_heads, _ = leaf.shape
    sequence = torch.arange(batch, device=leaf.device).view(-1, 1, 1, 1, 1)
    return sequence, torch.arange(key_heads, device=leaf.device).view(-1, 1)


def _request(
    opened: Sequence[Tensor | None], k: Tensor, v: Tensor, plan: _Plan, group: dist.ProcessGroup
) -> _Blocks:
    """Ask the owners for every distinct block of `opened` (-1: none), and send what other ranks ask of this one."""
    batch, _, key_heads, _ = k.shape
    each, device = batch * key_heads, k.device
    # One more leaf takes what is not opened.
    wanted = torch.zeros(sum(plan.leaves) + 1, batch, key_heads, dtype=torch.bool, device=device)
    for leaf in opened:
        if leaf is not None:
            wanted[leaf, *_axes(leaf)] = True
    numbers = wanted[:-1].flatten().nonzero().flatten()  # ascending, so by owner
    place = torch.zeros(wanted[:-1].shape, dtype=torch.int64, device=device)
    place.view(-1)[numbers] = torch.arange(len(numbers), device=device)
    firsts = [sum(plan.leaves[:i]) for i in range(len(plan.leaves) + 1)]
    borders = torch.tensor([each * x for x in firsts], device=device)
    counts = torch.searchsorted(numbers, borders).diff()
    ones = [1] * len(plan.leaves)
    both = torch.stack((counts, all_to_all(counts, ones, ones, group).wait())).tolist()
    asked = all_to_all(numbers, *both, group).wait()
    leaf = asked // each - firsts[plan.parallel.rank]
    where = (asked // key_heads % batch, leaf, asked % key_heads)
    rows = torch.stack([_own_blocks(x, plan)[where] for x in (k, v)], 1)
    return _Blocks(all_to_all(rows, both[1], both[0], group), place, *both, where)


def _lend(sides: Sequence[Tensor], plan: Halo, group: dist.ProcessGroup) -> Flight:
    """Start the exchange of the halo of each (B, n, K, D): rows (tokens, sides, B, K, D)."""
    parts = [torch.stack([x[:, a:b] for x in sides]) for a, b in plan.sent]
    rows = torch.cat(parts, 2).permute(2, 0, 1, 3, 4)
    return all_to_all(rows, [b - a for a, b in plan.sent], plan.received, group)


def _sides(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.permute(1, 2, 0, 3, 4).unbind(0)


def _give_back(gradients: Sequence[Tensor], plan: Halo, group: dist.ProcessGroup) -> Flight:
    """Start the inverse of `_lend`: gradients (B, tokens, K, D) of what was borrowed."""
    rows = torch.stack(list(gradients)).permute(2, 0, 1, 3, 4)
    return all_to_all(rows, plan.received, [b - a for a, b in plan.sent], group)


def _collect(flight: Flight, plan: Halo, tokens: int) -> tuple[Tensor, ...]:
    """Per side the sum (B, n, K, D) of what other ranks' gradients add to this rank's tokens."""
    rows = flight.wait()
    total = rows.new_zeros(tokens, *rows.shape[1:])
    for (a, b), part in zip(plan.sent, rows.split([b - a for a, b in plan.sent]), strict=True):
        total[a:b] += part
    return _sides(total)
