"""What travels between the ranks of a hierarchical layer: the tokens before a shard, the summaries of leaf blocks, and opened
blocks; and back again their gradients. No attention here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longnet.attention.collectives import Flight, SequenceParallel, all_gather, all_to_all, reduce_scatter
from longnet.attention.vectors import add_rows
from longnet.schedule import Halo, halo


def lend(tensors: Sequence[Tensor], plan: Halo, group: dist.ProcessGroup) -> Flight:
    """Start the exchange of the halo of each (B, n, K, D): rows (tokens, sides, B, K, D)."""
    parts = [torch.stack([x[:, a:b] for x in tensors]) for a, b in plan.sent]
    rows = torch.cat(parts, 2).permute(2, 0, 1, 3, 4)
    return all_to_all(rows, [b - a for a, b in plan.sent], plan.received, group)


def by_side(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows (tokens, sides, B, K, D) -> per side (B, tokens, K, D)."""
    return rows.permute(1, 2, 0, 3, 4).unbind(0)


def give_back(gradients: Sequence[Tensor], plan: Halo, group: dist.ProcessGroup) -> Flight:
    """Start the inverse of `lend`: gradients (B, tokens, K, D) of what was borrowed."""
    rows = torch.stack(list(gradients)).permute(2, 0, 1, 3, 4)
    return all_to_all(rows, plan.received, [b - a for a, b in plan.sent], group)


def collect(flight: Flight, plan: Halo, tokens: int) -> tuple[Tensor, ...]:
    """Per side the sum (B, n, K, D) of what other ranks' gradients add to this rank's tokens."""
    rows = flight.wait()
    total = rows.new_zeros(tokens, *rows.shape[1:])
    for (a, b), part in zip(plan.sent, rows.split([b - a for a, b in plan.sent]), strict=True):
        total[a:b] += part
    return by_side(total)


def tokens_before(x: Tensor, reach: int, parallel: SequenceParallel) -> Tensor:
    """The `reach` rows before this rank's x (B, n, K, D), from its left neighbours; zeros before the sequence. A collective."""
    return _Before.apply(x, reach, parallel)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reach, parallel):
        plan = halo(parallel.shards, reach, parallel.rank)
        ctx.spec = (plan, parallel.everyone, x.shape[1], x.dtype)
        (rows,) = by_side(lend((x,), plan, parallel.everyone).wait())
        missing = x.new_zeros(x.shape[0], reach - rows.shape[1], *x.shape[2:])
        return torch.cat((missing, rows), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyrefly: ignore
        plan, group, tokens, dtype = ctx.spec
        work = torch.promote_types(dtype, torch.float32)
        rows = gradient[:, gradient.shape[1] - sum(plan.received) :].to(work)
        (total,) = collect(give_back((rows,), plan, group), plan, tokens)
        return total.to(dtype), None, None


class Leaves(NamedTuple):
    """The complete leaf blocks of every rank: how many, of how many tokens; and which of the ranks of `group` this is."""

    counts: tuple[int, ...]
    block: int
    rank: int
    group: dist.ProcessGroup

    @property
    def own(self) -> int:
        """This rank's."""
        return self.counts[self.rank]


def gather_leaves(own: tuple[Tensor, ...], leaves: Leaves) -> list[Tensor]:
    """kbar, vbar, mass, entropy of this rank's leaves (B, leaves, K, ...) -> of all ranks'."""
    padded = max(leaves.counts)
    pairs = (torch.cat(own[:2], -1), torch.stack(own[2:], -1))  # two dtypes, two collectives
    flights = []
    for x in pairs:
        rows = x.new_zeros(padded, x.shape[0], *x.shape[2:])
        rows[: x.shape[1]] = x.transpose(0, 1)
        flights.append(all_gather(rows, leaves.group))
    keep = [slice(i * padded, i * padded + count) for i, count in enumerate(leaves.counts)]
    wide, narrow = (torch.cat([y[x] for x in keep]).transpose(0, 1) for y in (x.wait() for x in flights))
    return [*wide.chunk(2, -1), *narrow.unbind(-1)]


def scatter_leaves(gradients: Sequence[Tensor], leaves: Leaves) -> Flight:
    """Start the sum of all ranks' gradients of all leaves; each gets those of its own."""
    kbar, vbar, mass, entropy = gradients
    total = torch.cat((kbar, vbar, mass[..., None], entropy[..., None]), -1).transpose(0, 1)
    padded = max(leaves.counts)
    rows = total.new_zeros(len(leaves.counts) * padded, *total.shape[1:])
    for i, part in enumerate(total.split(leaves.counts)):
        rows[i * padded : i * padded + len(part)] = part
    return reduce_scatter(rows, leaves.group)


def own_leaves(summaries: Flight, leaves: Leaves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = summaries.wait()[: leaves.own].transpose(0, 1)
    kbar, vbar = rows[..., :-2].chunk(2, -1)
    return kbar, vbar, rows[..., -2], rows[..., -1]


class Lent(NamedTuple):
    """Which leaf blocks this rank's queries open, and which of its own it lends to others."""

    fetched: list[int]  # blocks from every rank, this one included
    lent: list[int]  # blocks to every rank
    place: Tensor  # (leaves, B, K): where an opened block lies among the fetched ones
    sequence: Tensor  # of every lent block; its own leaf and key head
    leaf: Tensor
    key_head: Tensor


class Blocks:
    """The distinct leaf blocks that this rank's queries open, its own included: keys and values (places, 2, block, D)."""

    def __init__(self, rows: Tensor, lent: Lent, work: torch.dtype | None = None) -> None:
        # Places of absent blocks read row 0, so there must be one.
        self.rows = rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])
        self.lent = lent
        self.gradient = None if work is None else torch.zeros_like(self.rows, dtype=work)
        self.at = self.taken = rows

    def read(self, leaf: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, blocks, rows, K, places, block, D) of leaves (B, blocks, rows, K, places)."""
        at = self.lent.place[leaf, *_axes(leaf)]
        taken = self.rows[at]
        if self.gradient is not None:
            self.at, self.taken = at, taken.requires_grad_()
        keys, values = taken.unbind(-3)
        return keys, values

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of what was read last, `taken`."""
        assert self.gradient is not None
        add_rows(self.gradient, self.at, gradient.to(self.gradient.dtype))
        self.at = self.taken = self.rows

    def collect(self, own: tuple[Tensor, ...], leaves: Leaves) -> None:
        """Send the gradients home; add those of this rank's blocks to own = (dk, dv), each (B, n, K, D)."""
        assert self.gradient is not None
        fetched, lent, _, *where = self.lent
        rows = all_to_all(self.gradient[: sum(fetched)], fetched, lent, leaves.group).wait()
        for i, x in enumerate(own):
            _own_blocks(x, leaves).index_put_(tuple(where), rows[:, i], accumulate=True)


def _own_blocks(x: Tensor, leaves: Leaves) -> Tensor:
    """Complete blocks of this rank's x (B, n, K, D) as a view (B, leaves, K, block, D)."""
    return x[:, : leaves.own * leaves.block].unflatten(1, (leaves.own, leaves.block)).transpose(2, 3)


def _axes(leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of sequence and key head that go with leaf (B, blocks, rows, K, places)."""
    batch, _, _, key_heads, _ = leaf.shape
    sequence = torch.arange(batch, device=leaf.device).view(-1, 1, 1, 1, 1)
    return sequence, torch.arange(key_heads, device=leaf.device).view(-1, 1)


def request(opened: Sequence[Tensor | None], k: Tensor, v: Tensor, leaves: Leaves) -> tuple[Flight, Lent]:
    """Ask the owners for every distinct block of `opened` (-1: none), and start to send what other ranks ask of this one."""
    batch, _, key_heads, _ = k.shape
    each, device = batch * key_heads, k.device
    # One more leaf takes what is not opened.
    wanted = torch.zeros(sum(leaves.counts) + 1, batch, key_heads, dtype=torch.bool, device=device)
    for leaf in opened:
        if leaf is not None:
            wanted[leaf, *_axes(leaf)] = True
    numbers = wanted[:-1].flatten().nonzero().flatten()  # ascending, so by owner
    place = torch.zeros(wanted[:-1].shape, dtype=torch.int64, device=device)
    place.view(-1)[numbers] = torch.arange(len(numbers), device=device)
    firsts = [sum(leaves.counts[:i]) for i in range(len(leaves.counts) + 1)]
    borders = torch.tensor([each * x for x in firsts], device=device)
    counts = torch.searchsorted(numbers, borders).diff()
    ones = [1] * len(leaves.counts)
    others = all_to_all(counts, ones, ones, leaves.group).wait()
    fetched, lent = torch.stack((counts, others)).tolist()  # one wait for the device
    asked = all_to_all(numbers, fetched, lent, leaves.group).wait()
    where = (asked // key_heads % batch, asked // each - firsts[leaves.rank], asked % key_heads)
    rows = torch.stack([_own_blocks(x, leaves)[where] for x in (k, v)], 1)
    return all_to_all(rows, lent, fetched, leaves.group), Lent(fetched, lent, place, *where)
