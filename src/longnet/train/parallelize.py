"""Training on many ranks: rendezvous and preflight, DeviceMesh (dp x sp), FSDP2, sharded batches, what only the leader does.

Under `torchrun` every rank holds a part of every window (sp) and of the batch (dp), and 1 / ranks of all parameters, moments
and gradients (FSDP2 over dp x sp). Ranks talk in tensors and JSON, never in pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from longnet.attention.collectives import SequenceParallel
from longnet.model.config import LongNetConfig
from longnet.schedule import Shards, exchanges
from longnet.train.checkpoint import CheckpointWriteError, Groups
from longnet.train.data import WindowSampler


class RanksDisagree(ValueError):
    """Ranks were started differently: the message, equal on all of them, names every differing field."""


def world_size() -> int:
    """How many ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_leader() -> bool:
    """Whether this process writes files and prints: rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


# A rank that reported reads the verdict at once, if it still runs.
_READ_TIMEOUT = timedelta(seconds=10)


def connect(fields: dict[str, Any], device: torch.device, timeout: timedelta) -> None:
    """Rendezvous, compare `fields` across ranks, and only then make the default process group.

    Raises:
        RanksDisagree: on every rank, with the same text.
        RuntimeError: a rank did not appear within `timeout`.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun hands the same store to every attempt: without a prefix, a restarted rank finds the addresses of dead peers
    # and gloo never connects.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"longnet/attempt{attempt}", store)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "ranks": world,
    }
    preflight(store, rank, world, {**versions, **fields}, timeout)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # Bound to its device, NCCL connects here and not at the first collective, and no barrier has to guess a device.
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=timeout,
        device_id=device if on_gpu else None,
    )  # fmt: skip


def preflight(store: dist.Store, rank: int, world: int, fields: dict[str, Any], timeout: timedelta) -> None:
    """Compare `fields` (anything JSON) of all ranks through the store; 3 store operations a rank, no collective.

    Rank 0, whose process may hold the store, does not fail before the others have read why.

    Raises:
        RanksDisagree: naming every differing field, with the ranks that hold each value; the same text on every rank.
        RuntimeError: a rank that did not report within `timeout`.
    """
    store.set(f"preflight/{rank}", json.dumps(fields, sort_keys=True))
    if rank == 0:
        reports = []
        for other in range(world):
            key = f"preflight/{other}"
            try:
                store.wait([key], timeout)
            except RuntimeError as error:
                message = f"expected rank {other} of {world} within {timeout}; it did not report"
                store.set("preflight/verdict", message)
                _wait_for_readers(store, range(1, other))
                raise RuntimeError(message) from error
            reports.append(json.loads(store.get(key)))
        verdict = _differences(reports)
        store.set("preflight/verdict", verdict)
        if verdict:
            _wait_for_readers(store, range(1, world))
    else:
        store.wait(["preflight/verdict"], timeout * 2)
        verdict = store.get("preflight/verdict").decode()
        if verdict:
            store.set(f"preflight/read/{rank}", "")
    if verdict:
        raise RanksDisagree(verdict)


def _wait_for_readers(store: dist.Store, ranks: range) -> None:
    """Until these ranks have read the verdict, or are taken to be gone."""
    with contextlib.suppress(RuntimeError):
        store.wait([f"preflight/read/{rank}" for rank in ranks], _READ_TIMEOUT)


def _differences(reports: list[dict[str, Any]]) -> str:
    """Empty where all reports agree."""
    lines = []
    for name in sorted({name for report in reports for name in report}):
        holders = defaultdict(list)
        for rank, report in enumerate(reports):
            holders[json.dumps(report.get(name), sort_keys=True)].append(rank)
        if len(holders) > 1:
            values = (f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in holders.items())
            lines.append(f"{name}: {'; '.join(values)}")
    if not lines:
        return ""
    return "expected the same on all ranks; differing: " + " | ".join(lines) + "; start all ranks alike"


def check_layout(
    world: int, sequence_parallel: int, sequence_length: int, batch_size: int, block: int = 1
) -> int:
    """The number of data-parallel replicas, or ValueError where the ranks cannot be laid out as dp x sp.

    block: tokens that no border between ranks may divide; see `shard_block`.
    """
    if world % sequence_parallel:
        raise ValueError(
            f"sequence_parallel: expected a divisor of the {world} ranks that were started; got {sequence_parallel}; "
            "start that many ranks with torchrun --nproc-per-node"
        )
    replicas = world // sequence_parallel
    if batch_size % replicas:
        raise ValueError(
            f"batch_size: expected a multiple of the {replicas} replicas ({world} ranks / sequence_parallel "
            f"{sequence_parallel}); got {batch_size}"
        )
    if sequence_length < 2 * sequence_parallel:
        raise ValueError(
            f"sequence_length: expected at least two tokens a rank; got {sequence_length} over {sequence_parallel} ranks"
        )
    if -(-sequence_length // block) < sequence_parallel:
        raise ValueError(
            f"sequence_length: expected at least one leaf block of {block} tokens a rank; got {sequence_length} over "
            f"{sequence_parallel} ranks; use longer windows, fewer ranks or a smaller block"
        )
    return replicas


def shard_block(model: LongNetConfig) -> int:
    """Tokens that no border between ranks may divide: those of a leaf block of hierarchical layers, or 1."""
    return model.hierarchical_pattern().block if "hierarchical" in model.attention_kinds() else 1


class Parallel:
    """This rank's place in dp x sp, and what it does together with the others."""

    def __init__(
        self,
        sequence_parallel: int,
        sequence_length: int,
        batch_size: int,
        device: torch.device,
        timeout: timedelta,
        block: int = 1,
    ) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        replicas = check_layout(self.world, sequence_parallel, sequence_length, batch_size, block)
        self.mesh = init_device_mesh(device.type, (replicas, sequence_parallel), mesh_dim_names=("dp", "sp"))
        # The same ranks as one dimension, for FSDP: gradients are summed over sp as well as over dp.
        self.flat = init_device_mesh(device.type, (self.world,), mesh_dim_names=("dp_sp",))
        shards = Shards.even(sequence_length, sequence_parallel, block=block)
        self.sequence = SequenceParallel(shards, self.mesh.mesh.tolist(), timeout)
        rows = batch_size // replicas
        replica = self.rank // sequence_parallel
        self.rows = slice(replica * rows, (replica + 1) * rows)
        self.last = self.sequence.rank == sequence_parallel - 1

    def apply(self, model: Any) -> None:
        """Shard the parameters over all ranks and let attention work across the ranks of a sequence. In place."""
        if self.sequence.shards.ranks > 1:
            self._make_groups(model.config)
            for layer in model.model.layers:
                layer.attention.sequence_parallel = self.sequence
        for layer in model.model.layers:
            fully_shard(layer, mesh=self.flat)
        fully_shard(model, mesh=self.flat)
        register_fsdp_forward_method(model, "token_losses")

    def _make_groups(self, config: LongNetConfig) -> None:
        """All process groups that the layers will use, while nothing is under way: NCCL makes one by splitting that of all
        ranks, which may wait for ever beside other collectives of it."""
        kinds, heads = config.attention_kinds(), (config.num_attention_heads, config.num_key_value_heads)
        members: list[tuple[int, ...]] = []
        if "dilated" in kinds:
            members += [e.members for e in exchanges(config.pattern(), *heads, self.sequence.shards)]
        if "hierarchical" in kinds:
            members.append(tuple(range(self.sequence.shards.ranks)))
        self.sequence.groups(members)

    def batch(self, sampler: WindowSampler) -> tuple[Tensor, Tensor]:
        """(ids, targets) of this rank: labels are shifted *before* the sequence is cut, so no shard loses its last one."""
        begin, end = self.sequence.shards.span(self.sequence.rank)
        window = sampler.next_batch(self.rows, slice(begin, end if self.last else end + 1))
        ids = window[:, : end - begin]
        targets = torch.full_like(ids, -100)
        targets[:, : window.shape[1] - 1] = window[:, 1:]
        return ids.to(self.device), targets.to(self.device)

    def backward(self, model: Any, sampler: WindowSampler, accumulation: int, autocast: bool) -> float:
        """One forward and backward; returns this rank's share of the mean loss over all valid tokens of all ranks."""
        ids, targets = self.batch(sampler)
        count = (targets != -100).sum()
        dist.all_reduce(count)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            losses = model.token_losses(ids, targets=targets, start=self.sequence.start)
        share = losses.sum() / (count.clamp(min=1) * accumulation)
        (share * self.world).backward()  # FSDP averages gradients over ranks; they must add up
        return float(share.detach())

    def agree(self, loss: float, stop: bool) -> tuple[float, bool, str]:
        """(loss of all ranks, whether any was asked to stop, which ranks have a loss that is no number)."""
        mine = torch.tensor([loss, float(stop)], dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        table = torch.stack(everyone).cpu()
        broken = (~table[:, 0].isfinite()).nonzero().flatten().tolist()
        return float(table[:, 0].sum()), bool(table[:, 1].any()), ", ".join(map(str, broken))

    def full(self, x: Tensor) -> Tensor:
        """The whole tensor on the leader's CPU; elsewhere an empty one. All ranks call, in the same order."""
        if not isinstance(x, DTensor):
            return x
        whole = x.full_tensor()
        return whole.cpu() if self.rank == 0 else whole.new_empty(0)

    def on_leader(self, function: Callable[[], Any]) -> Any:
        """Run `function` on the leader; every rank gets its JSON result, or its ValueError or OSError."""
        error, answer = None, {}
        if self.rank == 0:
            try:
                answer = {"result": function()}
            except (ValueError, OSError) as problem:
                error = problem
                answer = {"error": str(problem), "os": isinstance(problem, OSError)}
        answer = self._json(answer)
        if error is not None:
            raise error
        if "error" in answer:
            raise (CheckpointWriteError if answer["os"] else ValueError)(answer["error"])
        return answer["result"]

    def _json(self, value: Any) -> Any:
        """The leader's value on every rank."""
        data = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, 0)
        text = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(text, 0)
        return json.loads(bytes(text.cpu().tolist()))

    def distribute(self, tensors: Groups | None, like: Mapping[tuple[str, str], Tensor]) -> Groups:
        """The leader's tensors on every rank, one at a time; those named in `like` sharded as it is. Bits are kept."""
        layout = self._json(
            [
                (group, name, list(x.shape), str(x.dtype).removeprefix("torch."))
                for group, members in (tensors or {}).items()
                for name, x in members.items()
            ]
        )
        result: Groups = {}
        for group, name, shape, dtype in layout:
            whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            if self.rank == 0 and tensors is not None:
                whole.copy_(tensors[group][name])
            dist.broadcast(whole, 0)
            target = like.get((group, name))
            if isinstance(target, DTensor) and target.shape == whole.shape:
                whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
            else:
                whole = whole.cpu()
            result.setdefault(group, {})[name] = whole
        return result
