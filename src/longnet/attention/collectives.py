"""The ranks that share a sequence, and the collectives between them: rows of a tensor in, rows of a tensor out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet.schedule import Shards

# torch 2.13 renames both and warns about the names that 2.11 knows.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_to_all = dist.all_to_all_single


class SequenceParallel:
    """The ranks that share a sequence, in the order of their shards, and the process groups among them.

    Args:
        shards: which positions each rank of a sequence keeps; the same on all ranks.
        replicas: the global ranks of every sequence that is worked on at the same time, all of one length, each rank in one of
            them; the same on all ranks. None: one sequence over everybody.
        timeout: how long a rank waits for another; None is torch's default. Every subgroup gets it.

    Raises:
        ValueError: replicas that do not hold every rank once, or not as many shards as ranks of a replica.
    """

    def __init__(
        self,
        shards: Shards,
        replicas: Sequence[Sequence[int]] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        world = dist.get_world_size()
        replicas = [range(world)] if replicas is None else replicas
        if sorted(rank for replica in replicas for rank in replica) != list(range(world)):
            raise ValueError(f"replicas: expected each of {world} ranks once; got {replicas}")
        if any(len(replica) != shards.ranks for replica in replicas):
            raise ValueError(f"expected {shards.ranks} ranks in every replica, one per shard; got {replicas}")
        self.shards, self.replicas, self.timeout = shards, replicas, timeout
        (self.rank,) = (list(x).index(dist.get_rank()) for x in replicas if dist.get_rank() in x)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    @property
    def start(self) -> int:
        """Position of this rank's first token."""
        return self.shards.span(self.rank)[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank."""
        begin, end = self.shards.span(self.rank)
        return end - begin

    def with_shards(self, shards: Shards) -> SequenceParallel:
        """The same ranks and process groups for a sequence of another length."""
        if shards.ranks != self.shards.ranks:
            raise ValueError(f"shards: expected {self.shards.ranks}; got {shards.ranks}")
        other = copy.copy(self)
        other.shards = shards
        return other

    def groups(self, members: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """Process groups among ranks of this sequence, made when first needed, by all ranks for all ranks.

        torch names a group that only its members make (`use_local_synchronization`) after the number of groups they already
        have, which differs between ranks of overlapping groups: they would wait for each other under different names.
        """
        for some in members:
            if some in self._groups:
                continue
            for replica in self.replicas:
                made = dist.new_group([replica[i] for i in some], timeout=self.timeout)
                if dist.get_rank() in replica or some not in self._groups:
                    self._groups[some] = made  # pyrefly: ignore
        return self._groups

    @property
    def everyone(self) -> dist.ProcessGroup:
        """All ranks of this sequence."""
        members = tuple(range(self.shards.ranks))
        return self.groups([members])[members]


class Flight(NamedTuple):
    """A collective under way."""

    work: dist.Work
    target: Tensor
    home: torch.device
    source: Tensor  # kept alive until `wait`

    def wait(self) -> Tensor:
        """The rows that arrived."""
        self.work.wait()
        return self.target.to(self.home)


def all_gather(rows: Tensor, group: dist.ProcessGroup) -> Flight:
    """The rows (R, ...) of all members, one after the other: (members R, ...). R is the same everywhere."""
    target, source = _buffers(rows, rows.shape[0] * dist.get_world_size(group), group)
    return Flight(_all_gather(target, source, group=group, async_op=True), target, rows.device, source)


def reduce_scatter(rows: Tensor, group: dist.ProcessGroup) -> Flight:
    """The inverse: (members R, ...) -> (R, ...), the sum over members of this rank's part."""
    target, source = _buffers(rows, rows.shape[0] // dist.get_world_size(group), group)
    return Flight(_reduce_scatter(target, source, group=group, async_op=True), target, rows.device, source)


def all_to_all(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Flight:
    """Of the rows (sum of sent, ...) the first sent[0] go to member 0, and so on; what arrives is in the members' order, too."""
    target, source = _buffers(rows, sum(received), group)
    work = _all_to_all(target, source, list(received), list(sent), group=group, async_op=True)
    return Flight(work, target, rows.device, source)  # pyrefly: ignore - asynchronous: there is one


def _buffers(rows: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """An empty target of `count` rows, and the source. gloo has no such collectives on CUDA tensors."""
    source = rows.cpu() if rows.is_cuda and dist.get_backend(group) == "gloo" else rows
    target = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype, device=source.device)
    return target, source.contiguous()
