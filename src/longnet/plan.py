"""What training on a sequence takes, before it is run: memory by part, operations, traffic, time; and what fits. No torch.

N tokens, width d, SwiGLU f, query and key heads a = H D and k = K D wide, e bytes a number (2 under autocast, else 4). What a
layer keeps of a token for its backward pass, residual stream, gradients and softmax denominators in fp32:

    2 residuals 8 d + e (3 d normed [2 d without autocast] + a + 2 k projected + a + k turned + a out + 4 f SwiGLU) + 4 H

The constants follow from what autograd keeps (tests count it) and agree with the measured steps in docs/one-billion-tokens.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from longnet.patterns import HierarchicalPattern
from longnet.schedule import Shards, traffic

# Logits of a loss that exist at one time: model/transformer.py.
LOSS_LOGITS = 2**25
# Tokens of a tile where layers are recomputed.
TILE = 65536
# Of the memory only this share is given away: the rest is for what is not counted, and for the allocator.
SHARE = 0.9
# Where the search for the longest sequence ends.
LIMIT = 10**12


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`devices` alike that share every sequence: bytes of memory and of host memory for each, operations and bytes a second.

    `rate` is what products really reach, not what the maker states; `link` and `host_link` what a device receives from others
    and copies from and to its host.
    """

    memory: float
    devices: int = 1
    host_memory: float = 0
    rate: float = 300e12
    link: float = 50e9
    host_link: float = 25e9

    def __post_init__(self) -> None:
        values = (self.memory, self.devices, self.rate, self.link, self.host_link)
        if min(values) <= 0 or self.host_memory < 0:
            raise ValueError(
                "expected memory, devices, rate, link and host_link above 0 and host_memory of at least 0; got "
                f"{values} and {self.host_memory}"
            )


@dataclass(frozen=True, kw_only=True)
class Job:
    """Training steps of a model (`config`: a LongNetConfig) on `batch` sequences of `tokens` at once."""

    config: Any
    tokens: int
    batch: int = 1
    autocast: bool = True
    fused_norms: bool = True
    """CUDA keeps a norm's input and one number a row; the CPU also its output, and under autocast an fp32 copy."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch) < 1:
            raise ValueError(f"expected at least one token and one sequence; got {self.tokens}, {self.batch}")

    @property
    def element(self) -> int:
        return 2 if self.autocast else 4

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """d, f, a, k."""
        c = self.config
        heads = (c.num_attention_heads, c.num_key_value_heads)
        return c.hidden_size, c.intermediate_size, heads[0] * c.head_dim, heads[1] * c.head_dim

    def layer(self) -> int:
        """Bytes that a layer keeps of one token for its backward pass."""
        d, f, a, k = self.widths
        heads, key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        normed = 3 if self.autocast else 2
        kept = 8 * d + self.element * (normed * d + 3 * (a + k) + 4 * f) + 4 * (2 * heads + key_heads + 2)
        if not self.fused_norms:
            kept += 4 * (2 * d + a + k) + (4 * (a + k) if self.autocast else 0)
        return kept

    def working(self, tokens: int, recompute: bool, tile: int = TILE) -> int:
        """Bytes beside what all layers keep, at the worst moment of the backward pass over so many tokens.

        At the loss: the last states and their gradients, or three times the logits that exist at once. In a layer that is
        recomputed in tiles: its norms, queries, keys, values and residuals, their gradients, and the SwiGLU of one tile.
        """
        d, f, a, k = self.widths
        e, vocabulary = self.element, self.config.vocab_size
        angles = 4 * self.config.head_dim + 16  # and ids and targets
        last = 8 * d if self.fused_norms else 12 * d
        logits = 12 * vocabulary * min(tokens, LOSS_LOGITS // vocabulary)
        loss = tokens * last + max(logits, tokens * 8 * d)
        if not recompute:
            return loss + tokens * angles
        if tile >= tokens:
            return max(loss, tokens * (self.layer() + 8 * d)) + tokens * angles
        held = 8 * d + 2 * e * (a + k) + 4 * self.config.num_attention_heads
        scratch = int(1.875 * e * a) if self.autocast else 0  # cuDNN keeps dq of 3/8 of the rows in fp32
        attention = held + 4 * d + 2 * e * (a + k) + scratch
        swiglu = tokens * (held + 8 * d) + tile * (e * (6 * f + 2 * d) + 4 * d)
        return max(loss, tokens * attention, swiglu) + tokens * angles

    def kept(self, tokens: int, recompute: bool) -> int:
        """Bytes that all layers keep of so many tokens: everything, or their inputs, the residual stream between layers."""
        layer = 4 * self.config.hidden_size if recompute else self.layer()
        return tokens * self.config.num_hidden_layers * layer

    def rows(self, chunk: int) -> int:
        """Bytes of the keys and values that the chunked pass keeps, and of hierarchical states at the borders."""
        kinds = self.config.attention_kinds()
        pattern, heads, key_heads = self._pattern()
        count = 0
        for w, r in pattern.branches:
            if chunk % w and chunk < self.tokens:
                segments = -(-self.tokens // w)
                rows = segments * pattern.rows(w, r) if segments > 1 else -(-self.tokens // r)
                count += rows * len(pattern.slots(r, heads, key_heads))
        dilated = kinds.count("dilated") * count * self.config.head_dim * 2 * self.element
        hierarchical = kinds.count("hierarchical")
        if hierarchical:
            state = state_bytes(self.config.hierarchical_pattern(), self.config, self.tokens, self.element)
            hierarchical *= state * (-(-self.tokens // chunk) - 1)
        return self.batch * (dilated + hierarchical)

    def windows(self, chunk: int) -> int:
        """Numbers in the segments where a chunk begins, of one layer's keys, in all branches that the chunked pass keeps."""
        pattern, heads, key_heads = self._pattern()
        rows = sum(
            len(pattern.slots(r, heads, key_heads)) * min(pattern.rows(w, r), -(-self.tokens // r))
            for w, r in pattern.branches
            if chunk % w and chunk < self.tokens
        )
        return self.batch * rows * self.config.head_dim

    def row_gradients(self, chunk: int) -> int:
        """Bytes of the gradients of kept rows, fp32: one segment of every branch and layer, and one set to spare."""
        layers = self.config.attention_kinds().count("dilated")
        return (layers + 1) * self.windows(chunk) * 8

    def staged(self, chunk: int) -> int:
        """Bytes on the device where rows are kept by the host: of two layers, the segments where a chunk begins and ends."""
        return 2 * 2 * self.windows(chunk) * 2 * self.element

    def copied(self, chunk: int) -> int:
        """Bytes that travel between host and device for one layer and chunk: keys and values, two segments in and one out on
        the way there, twice one in on the way back."""
        return self.windows(chunk) * 5 * 2 * self.element

    def _pattern(self) -> tuple[Any, int, int]:
        return self.config.pattern(), self.config.num_attention_heads, self.config.num_key_value_heads


def state_bytes(pattern: HierarchicalPattern, config: Any, num_tokens: int, element: int = 2) -> int:
    """Bytes that one hierarchical layer holds of one sequence at a border: tokens (k, k turned, v) and summaries with their mass
    and entropy."""
    tokens, nodes = pattern.cache_entries(num_tokens)
    key_width = config.head_dim * element
    return config.num_key_value_heads * (tokens * 3 * key_width + nodes * (2 * key_width + 8))


def best_chunk(job: Job, recompute: bool = False, limit: float = math.inf) -> int:
    """The chunk, a power of two times the shortest segment, that needs the least memory; the larger of equals.

    What is kept falls with the chunk and activations rise, so the optimum grows with the square root of N. With a `limit`
    on the bytes of activations, because rows lie elsewhere: the largest chunk within it, or the smallest of all.
    """
    shortest = min(job.config.pattern().segment_lengths)
    doublings = 1 + max(0, math.ceil(math.log2(max(1, job.tokens / shortest))))
    sizes = [min(job.tokens, shortest * 2**i) for i in reversed(range(doublings))]

    def activations(chunk: int) -> int:
        n = chunk * job.batch
        return job.kept(n, recompute) + job.working(n, recompute)

    if limit < math.inf:
        found = (c for c in sizes if activations(c) + job.row_gradients(c) + job.staged(c) <= limit)
        return next(found, sizes[-1])
    return min(sizes, key=lambda chunk: activations(chunk) + job.row_gradients(chunk) + job.rows(chunk))


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to take a step: options of `longnet train`, bytes on a device by part, and what it costs each device."""

    name: str
    options: dict[str, Any]
    memory: dict[str, int]
    host: int = 0
    flops: float
    received: int = 0
    copied: int = 0
    seconds: float
    problem: str = ""
    """Why it cannot be taken; empty where it fits."""

    @property
    def total(self) -> int:
        return sum(self.memory.values())


# Fewer operations first.
_WAYS = {
    "whole": (False, False, False),
    "checkpointed": (True, False, False),
    "checkpointed, offloaded": (True, False, True),
    "chunked": (False, True, False),
    "chunked, offloaded": (False, True, True),
    "chunked and checkpointed": (True, True, False),
    "chunked and checkpointed, offloaded": (True, True, True),
}


def strategies(job: Job, machine: Machine) -> tuple[Strategy, ...]:
    """All ways to take a step, with what they need, and why those that do not fit do not.

    In chunks on one device only, and offloaded only where there is host memory.

    Raises:
        ValueError: hierarchical layers, whose memory depends on what they open, or a bidirectional model.

    Example:
        >>> from longnet import LongNetConfig
        >>> job = Job(config=LongNetConfig.preset("base"), tokens=2**20)
        >>> [s.name for s in strategies(job, Machine(memory=80 * 2**30)) if not s.problem]
        ['checkpointed', 'chunked', 'chunked and checkpointed']
    """
    if set(job.config.attention_kinds()) != {"dilated"} or job.config.bidirectional:
        raise ValueError(
            "plan: expected a causal model with dilated attention in every layer, whose memory is a formula; got "
            f"{sorted(set(job.config.attention_kinds()))}, bidirectional={job.config.bidirectional}; measure one step instead"
        )
    return tuple(
        _strategy(name, job, machine)
        for name, (_, chunked, offload) in _WAYS.items()
        if (machine.devices == 1 or not chunked) and (machine.host_memory or not offload)
    )


def pick(job: Job, machine: Machine) -> tuple[Strategy, str]:
    """The fastest of the strategies that fit, and why: what it needs, and what the others lack.

    Raises:
        ValueError: nothing fits; the text says what each way would need.
    """
    ways = strategies(job, machine)
    fitting = [s for s in ways if not s.problem]
    lacking = "; ".join(f"{s.name} {s.problem}" for s in ways if s.problem)
    if not fitting:
        raise ValueError(
            f"expected a model and {job.batch} x {job.tokens} tokens that fit into {machine.memory / 2**30:.1f} GiB; {lacking}; "
            "shorten the sequence, take a smaller batch or more devices"
        )
    best = min(fitting, key=lambda s: s.seconds)
    needs = f"needs about {best.total / 2**30:.2f} of {machine.memory / 2**30:.2f} GiB"
    if best.host:
        needs += f" and {best.host / 2**30:.2f} of {machine.host_memory / 2**30:.2f} GiB of host memory"
    return best, "; ".join(filter(None, (f"{needs}, the fastest that fits", lacking)))


def largest(name: str, job: Job, machine: Machine) -> int:
    """The most tokens a sequence may have under a strategy, the pattern being what it is, to three digits; 0: none.

    LIMIT stands for any length: chunks that end where the longest segments end keep nothing.
    """

    def fits(tokens: int) -> bool:
        return not _strategy(name, replace(job, tokens=tokens), machine).problem

    # From the length that is asked for, down or up: every trial looks at what the ranks exchange.
    low = max(job.tokens, machine.devices)
    while not fits(low):
        if low == machine.devices:
            return 0
        low = max(low // 2, machine.devices)
    while fits(2 * low):
        low *= 2
        if low > LIMIT:
            return LIMIT
    high = 2 * low
    while high - low > low // 1000 + 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low // (unit := 10 ** max(0, len(str(low)) - 3)) * unit


def _strategy(name: str, job: Job, machine: Machine) -> Strategy:
    recompute, chunked, offload = _WAYS[name]
    config, ranks = job.config, machine.devices
    shard = -(-job.tokens // ranks)
    memory = {"weights": _weights(job, ranks)}
    options: dict[str, Any] = {"sequence_strategy": "chunked" if chunked else "whole", "offload": offload}
    options |= {"gradient_checkpointing": recompute, "tile_tokens": TILE if recompute else None}
    spare = SHARE * machine.memory - memory["weights"] if offload else math.inf
    chunk = best_chunk(job, recompute, spare) if chunked else shard
    options["chunk_tokens"] = chunk if chunked else None
    n, layers, host, copied = chunk * job.batch, config.num_hidden_layers, 0, 0
    memory |= {
        "activations": job.kept(n, recompute),
        "working set": job.working(n, recompute),
        "kept rows": 0,
    }
    if chunked:
        rows = job.rows(chunk)
        memory["kept rows"] = job.row_gradients(chunk) + (job.staged(chunk) if offload else rows)
        if offload:
            host, copied = rows, layers * job.copied(chunk) * -(-job.tokens // chunk)
    elif offload:
        # Of the inputs of layers the device holds one in use and one under way; the last is still there in the backward pass.
        host = memory["activations"]
        memory["activations"], copied = host // layers * min(2, layers), host // layers * (2 * layers - 1)
    forward, backward = _exchange(job, ranks)
    memory["exchange"] = forward * (1 if recompute else layers) + backward
    flops = _flops(job, chunk if chunked else job.tokens, recompute, recompute and n > TILE) / ranks
    parameters = config.num_parameters()
    received = layers * (forward * (2 if recompute else 1) + backward)
    received += int(3 * 4 * parameters * (ranks - 1) / ranks)  # gathered twice, gradients scattered once
    # As if nothing that travels were hidden behind computation.
    seconds = flops / machine.rate + copied / machine.host_link + received / machine.link
    return Strategy(
        name=name, options=options, memory=memory, host=host, flops=flops, received=received, copied=copied, seconds=seconds,
        problem=_problem(sum(memory.values()), host, machine),
    )  # fmt: skip


def _problem(total: int, host: int, machine: Machine) -> str:
    if total > (most := SHARE * machine.memory):
        return f"needs {total / 2**30:.1f} GiB of {most / 2**30:.1f} that may be filled"
    if host > (most := SHARE * machine.host_memory):
        return f"needs {host / 2**30:.1f} GiB of host memory of {most / 2**30:.1f} that may be filled"
    return ""


def _weights(job: Job, ranks: int) -> int:
    """Weights, gradients and two moments in fp32, in equal parts; copies of matrices in 16 bits; two gathered layers."""
    parameters, matrices = job.config.num_parameters(), job.config.matrix_parameters()
    gathered = 0 if ranks == 1 else 4 * (2 * matrices // job.config.num_hidden_layers + parameters - matrices)
    return 16 * parameters // ranks + (2 * matrices if job.autocast else 0) + gathered


def _flops(job: Job, chunk: int, recompute: bool, tiled: bool) -> float:
    """Of a step: the model's own, and what is computed again: all chunks but the last, layers, and what is done in tiles."""
    config, n = job.config, job.tokens
    forward = config.flops_per_token(n, training=False)
    matrices = 2 * config.matrix_parameters()
    again = (n - chunk) / n * forward + recompute * forward + tiled * matrices
    return job.batch * n * (config.flops_per_token(n) + again)


def _exchange(job: Job, ranks: int) -> tuple[int, int]:
    """Bytes that a rank receives in one layer, forward and backward; the most of the first, a middle and the last rank."""
    if ranks == 1:
        return 0, 0
    pattern, heads, key_heads = job._pattern()
    shards = Shards.even(job.tokens, ranks)
    rows = {"batch": job.batch, "element_size": job.element}
    found = [
        traffic(pattern, heads, key_heads, job.config.head_dim, shards, rank, **rows)
        for rank in {0, ranks // 2, ranks - 1}
    ]
    return max(x.forward for x in found), max(x.backward for x in found)


def reading(job: Job, machine: Machine, chunk: int) -> Strategy:
    """Reading the sequences once, chunk by chunk, weights and states in `job.element` bytes, nothing kept for gradients."""
    d, f, _, _ = job.widths
    config, e, n = job.config, job.element, min(chunk, job.tokens) * job.batch
    pattern, heads, key_heads = job._pattern()
    rows = sum(
        len(pattern.slots(r, heads, key_heads)) * min(pattern.rows(w, r), -(-job.tokens // r))
        for w, r in pattern.branches
    )
    logits = config.vocab_size * min(n, LOSS_LOGITS // config.vocab_size) * (e + 8)
    memory = {
        "weights": e * config.num_parameters(),
        "state": job.batch * config.num_hidden_layers * rows * config.head_dim * 2 * e,
        "working set": n * (e * (5 * d + 3 * f) + 4 * config.head_dim + 16) + logits,
    }
    flops = job.batch * job.tokens * config.flops_per_token(job.tokens, training=False)
    total = sum(memory.values())
    return Strategy(
        name="reading", options={"chunk": chunk}, memory=memory, flops=flops, seconds=flops / machine.rate,
        problem=_problem(total, 0, machine),
    )  # fmt: skip
