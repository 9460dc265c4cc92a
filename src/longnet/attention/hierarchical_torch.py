"""Hierarchical attention by gathers and batched products: any device, any dtype, causal or not, linear memory.

Queries are taken a few blocks at a time; what such a group gathers is dropped again and recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longnet.patterns import HierarchicalPattern

# Query tokens per group: bounds the gathered keys of opened blocks. A GPU takes more tokens at once, as long as what is
# gathered of keys and values stays below so many elements; and FORWARD times as many where no gradients are wanted, for which a
# group's intermediate results would live on together. Smaller groups leave it waiting for the host.
GROUP, GROUP_CUDA, GATHERED, FORWARD = 256, 4096, 2**28, 4


class Far(NamedTuple):
    """What lies behind the window. k, v begin at token `first_token`, `levels[l]` = (kbar, vbar, mass, entropy) at node
    `first_node[l]`. `read`: leaves (B, blocks, rows, K, places) -> their keys and values (..., block, D), where they are not
    taken from k and v."""

    k: Tensor
    v: Tensor
    levels: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
    first_token: int
    first_node: tuple[int, ...]
    read: Callable[[Tensor], Sequence[Tensor]] | None = None


class Parameters(NamedTuple):
    """scale, level_bias (H, levels), router_mix (H,), and per sequence the number of valid tokens or None."""

    scale: float
    level_bias: Tensor
    router_mix: Tensor
    lengths: Tensor | None


def attend(
    q: Tensor,
    q_local: Tensor,
    k_local: Tensor,
    far: Far,
    pattern: HierarchicalPattern,
    causal: bool,
    parameters: Parameters,
    num_tokens: int,
    start: int = 0,
    routes: list | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, n, H, D), lse (B, H, n) of the queries at positions start .. start + n - 1 of a sequence of `num_tokens`.

    q, q_local (B, n, H, D); k_local (B, *, K, D) begins at token far.first_token, like far.k. `routes`, if a list, receives
    per group (begin, {level: opened (B, n, K, places), -1 where nothing}).
    """
    outs, sums = [], []
    times = 1 if torch.is_grad_enabled() else FORWARD
    for part in parts(start, q.shape[1], k_local, pattern, times):
        arguments = (
            q[:, part],
            q_local[:, part],
            k_local,
            far,
            pattern,
            causal,
            parameters,
            num_tokens,
            start + part.start,
            routes,
        )
        if torch.is_grad_enabled() and routes is None:
            out, lse = checkpoint(_group, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        else:
            out, lse = _group(*arguments)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 2)


def parts(start: int, count: int, k: Tensor, pattern: HierarchicalPattern, times: int = 1) -> Iterator[slice]:
    """The `count` queries from position `start` on in groups that are either within a block or whole blocks, on a GPU `times` as
    many at once."""
    group = GROUP
    if k.is_cuda:
        per_token = 2 * k.shape[0] * k.shape[2] * k.shape[3] * max(1, pattern.top_k) * pattern.block
        group = times * max(GROUP, min(GROUP_CUDA, GATHERED // per_token))
    whole, begin = max(1, group // pattern.block) * pattern.block, 0
    while begin < count:
        into, left = (start + begin) % pattern.block, count - begin
        size = (
            min(pattern.block - into, left)
            if into or left < pattern.block
            else min(whole, left // pattern.block * pattern.block)
        )
        yield slice(begin, begin + size)
        begin += size


class Lists(NamedTuple):
    """What some blocks of queries list: bounds (levels, 4, blocks), left lo and hi, right lo and hi; `longest` of every level,
    the nodes of the longest list left and right; least (levels, blocks), the first node that may be opened.

    What sizes a tensor is kept on the host: asking the device for it would wait for all that was queued.
    """

    bounds: Tensor
    longest: tuple[tuple[int, int], ...]
    least: Tensor

    @classmethod
    def of(
        cls,
        pattern: HierarchicalPattern,
        num_tokens: int,
        causal: bool,
        first: int,
        count: int,
        device: torch.device,
    ) -> Lists:
        # The causal lists of a block are the same from its first token to its last.
        whole = -(-num_tokens // pattern.block) * pattern.block if causal else num_tokens
        return _lists(pattern, whole, causal, first, count, device)


@functools.lru_cache(maxsize=256)
def _lists(
    pattern: HierarchicalPattern, num_tokens: int, causal: bool, first: int, count: int, device: torch.device
) -> Lists:
    bounds = pattern.bounds(num_tokens, causal, first, count)
    longest = (bounds[:, 1::2] - bounds[:, ::2]).max(-1)
    blocks, levels = range(first, first + count), range(len(bounds))
    least = [[pattern.first_openable(block, level) for block in blocks] for level in levels]
    found = (_upload(torch.from_numpy(bounds), device), tuple(map(tuple, longest.tolist())))
    return Lists(*found, _upload(torch.tensor(least), device))


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without waiting for what was queued there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _group(
    q: Tensor, q_local: Tensor, k_local: Tensor, far: Far, pattern: HierarchicalPattern, causal: bool,
    parameters: Parameters, num_tokens: int, position: int, routes: list | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    group = Group(q, q_local, k_local.shape[2], pattern, causal, parameters, num_tokens, position)
    group.add_window(k_local, far)
    chosen = group.add_far(far)
    group.add_leaves(chosen.get(0), far)
    if routes is not None and group.sees_far:
        flat = {level: x.flatten(1, 2) for level, x in chosen.items()}
        routes.append((position, flat))
    return group.result()


class Group:
    """The queries from `position` on, within a block or whole blocks, and what they have seen so far of their one softmax."""

    def __init__(
        self, q: Tensor, q_local: Tensor, key_heads: int, pattern: HierarchicalPattern, causal: bool,
        parameters: Parameters, num_tokens: int, position: int,
    ) -> None:  # fmt: skip
        self.shape = q.shape
        batch, n, heads, width = q.shape
        self.blocks, self.first_block = -(-n // pattern.block), position // pattern.block
        shape = (batch, self.blocks, n // self.blocks, key_heads, heads // key_heads, width)
        self.q, self.q_local = (x.reshape(shape) for x in (q, q_local))
        self.pattern, self.causal, self.parameters = pattern, causal, parameters
        self.num_tokens, self.position = num_tokens, position
        self.state = _Softmax(torch.promote_types(q.dtype, torch.float32))

    @property
    def sees_far(self) -> bool:
        """Whether anything lies behind the window of any of them."""
        return self.first_block + self.blocks > self.pattern.window_blocks or not self.causal

    def add_window(self, k_local: Tensor, far: Far) -> None:
        """Attend to the tokens of the window."""
        rest = (self.pattern, self.causal, self.parameters, self.num_tokens, self.position)
        _add_window(self.state, self.q_local, k_local, far, *rest)

    def add_far(self, far: Far) -> dict[int, Tensor]:
        """Attend to unopened summaries; per level the opened nodes (B, blocks, rows, K, places), -1 where there is none."""
        chosen: dict[int, Tensor] = {}
        if not self.sees_far:
            return chosen
        span = (self.first_block, self.blocks)
        lists = Lists.of(self.pattern, self.num_tokens, self.causal, *span, self.q.device)
        opened = None
        for level in range(len(far.levels) - 1, -1, -1):
            nodes = _candidates(lists, level, opened, self.pattern, self.q.shape)
            opened = None
            if nodes is not None:
                rest = (far, self.pattern, self.parameters, lists.least[level])
                opened = _add_summaries(self.state, self.q, nodes, level, *rest)
            if opened is not None:
                chosen[level] = opened
        return chosen

    def add_leaves(self, opened: Tensor | None, far: Far) -> None:
        """Attend to the tokens of opened leaves."""
        if opened is not None:
            _add_leaves(self.state, self.q, opened, far, self.pattern, self.parameters)

    def result(self) -> tuple[Tensor, Tensor]:
        """out (B, n, H, D), lse (B, H, n)."""
        out, lse = self.state.result()
        return out.reshape(self.shape), lse.reshape(self.shape[:3]).transpose(1, 2)


class _Softmax:
    """Pieces of one softmax: logits (..., items) and their values, joined at the end."""

    def __init__(self, work: torch.dtype) -> None:
        self.work = work
        self.pieces: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, values: Tensor, equation: str) -> None:
        """logits (B, blocks, rows, K, G, items); values such that einsum(equation, p, values) has shape (..., D)."""
        top = logits.amax(-1, keepdim=True).detach()
        top = torch.where(top == -torch.inf, 0, top)
        p = torch.exp(logits - top)
        total = p.sum(-1)
        out = torch.einsum(equation, p.to(values.dtype), values).to(self.work)
        # (log of the piece's mass, its unnormalised mean)
        self.pieces.append((torch.where(total > 0, torch.log(torch.where(total > 0, total, 1)) + top[..., 0], -torch.inf),
                            out / torch.where(total > 0, total, 1)[..., None]))  # fmt: skip

    def result(self) -> tuple[Tensor, Tensor]:
        masses = torch.stack([mass for mass, _ in self.pieces])
        lse = torch.logsumexp(masses, 0)
        finite = torch.where(lse == -torch.inf, 0, lse)
        out = sum(torch.exp(mass - finite)[..., None] * mean for mass, mean in self.pieces)
        return out, lse  # type: ignore[return-value]

    def collapse(self) -> None:
        """Keep the pieces so far as one."""
        if self.pieces:
            out, lse = self.result()
            self.pieces = [(lse, out)]


def _add_window(state, q_local, k_local, far, pattern, causal, parameters, num_tokens, position) -> None:
    blocks, rows = q_local.shape[1:3]
    block, window, device = pattern.block, pattern.window_blocks, q_local.device
    first_block = position // block
    # No farther than the text goes: a window may be wider than everything there is.
    left = min(window - 1, first_block + blocks - 1)
    right = 0 if causal else min(window - 1, max(0, (num_tokens - 1) // block - first_block))
    block_index = torch.arange(first_block, first_block + blocks, device=device)
    reach = torch.arange((left + 1 + right) * block, device=device)
    token = (block_index - left)[:, None] * block + reach
    row = position + torch.arange(blocks * rows, device=device).view(blocks, rows)
    ok = (token >= 0) & (token < num_tokens)
    at = (token - far.first_token).clamp(0, k_local.shape[1] - 1)
    keys, values = k_local[:, at], far.v[:, at]  # (B, blocks, items, K, D)
    visible = (
        ok[:, None, :] & (token[:, None, :] <= row[..., None])
        if causal
        else ok[:, None, :].expand(-1, rows, -1)
    )
    visible = visible[None]
    if parameters.lengths is not None:
        visible = visible & (token < parameters.lengths[:, None, None])[:, :, None, :]
        values = torch.where((ok & (token < parameters.lengths[:, None, None]))[..., None, None], values, 0)
    logits = parameters.scale * torch.einsum("bnrkgd,bnckd->bnrkgc", q_local, keys).to(state.work)
    logits = logits.masked_fill(~visible[:, :, :, None, None], -torch.inf)
    state.add(logits, values, "bnrkgc,bnckd->bnrkgd")


def _candidates(lists, level, opened, pattern, shape) -> Tensor | None:
    """Candidates of a level, ascending, -1 where there is none: (B, blocks, rows, K, C), or None if nobody has any."""
    batch, _, rows, key_heads = shape[:4]
    bounds, device = lists.bounds[level], lists.bounds.device
    parts = []
    for side, longest in enumerate(lists.longest[level]):
        if longest > 0:
            lo, hi = bounds[2 * side], bounds[2 * side + 1]
            node = lo[:, None] + torch.arange(longest, device=device)
            node = torch.where(node < hi[:, None], node, -1)
            parts.append(node[None, :, None, None].expand(batch, -1, rows, key_heads, -1))
    if opened is not None and opened.shape[-1]:
        children = opened[..., None] * pattern.radix + torch.arange(pattern.radix, device=device)
        parts.append(torch.where(opened[..., None] >= 0, children, -1).flatten(-2))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else _ascending(torch.cat(parts, -1))


def _ascending(nodes: Tensor) -> Tensor:
    """Sorted, with the -1 at the end."""
    last = torch.iinfo(nodes.dtype).max
    nodes = torch.where(nodes < 0, last, nodes).sort(-1).values
    return torch.where(nodes == last, -1, nodes)


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x (B, M, K, ...) at index (B, blocks, rows, K, C) along M: (B, blocks, rows, K, C, ...)."""
    b, kh = _corners(x.shape[0], x.shape[2], x.device)
    return x[b, index, kh]


@functools.lru_cache(maxsize=64)
def _corners(batch: int, key_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0, 1, .. along the first and the fourth of five dimensions."""
    with torch.inference_mode(False):  # a later backward pass keeps them
        b, kh = (torch.arange(count, device=device) for count in (batch, key_heads))
    return b.view(-1, 1, 1, 1, 1), kh.view(1, 1, 1, -1, 1)


def _add_summaries(state, q, nodes, level, far, pattern, parameters, least) -> Tensor | None:
    """Score the candidates, open the best, attend to the others. Returns the opened ones, ascending, -1 filled."""
    kbar, vbar, mass, entropy = far.levels[level]
    size = kbar.shape[1]
    at = nodes - far.first_node[level]
    ok = (nodes >= 0) & (at < size)
    at = at.clamp(0, size - 1)
    ok = ok & (_rows_of(mass, at) > -torch.inf)
    bias = parameters.level_bias[:, level].view(1, 1, 1, *q.shape[3:5], 1)
    logits = parameters.scale * torch.einsum("bnrkgd,bnrkcd->bnrkgc", q, _rows_of(kbar, at)).to(state.work)
    logits = logits + _rows_of(entropy, at)[..., None, :] + bias
    logits = logits.masked_fill(~ok[..., None, :], -torch.inf)
    opened, unopened = None, ok
    count = min(pattern.opened(level), nodes.shape[-1])
    if count:
        with torch.no_grad():
            some = ok.any(-1)[..., None, None]
            score = torch.softmax(torch.where(some, logits, 0), -1).mean(-2)
            score = torch.where(ok & (nodes >= least[None, :, None, None, None]), score, -1)
            best = score.sort(stable=True, dim=-1, descending=True)
            places = best.indices[..., :count]
            taken = best.values[..., :count] >= 0
            unopened = ok.scatter(-1, places, ok.gather(-1, places) & ~taken)
            opened = _ascending(torch.where(taken, nodes.gather(-1, places), -1))
    state.add(
        logits.masked_fill(~unopened[..., None, :], -torch.inf), _rows_of(vbar, at), "bnrkgc,bnrkcd->bnrkgd"
    )
    return opened


def _add_leaves(state, q, opened, far, pattern, parameters) -> None:
    """Opened leaves: weight (1 - beta) lse + beta sbar, value the softmax mean of the leaf's tokens."""
    kbar, _, _, entropy = far.levels[0]
    ok = opened >= 0
    leaf = (opened - far.first_node[0]).clamp(0, kbar.shape[1] - 1)
    token = opened[..., None] * pattern.block + torch.arange(pattern.block, device=q.device)
    if far.read is None:
        at = (token - far.first_token).clamp(0, far.k.shape[1] - 1)
        valid = ok[..., None] & (token - far.first_token < far.k.shape[1])
        keys, values = (_rows_of(x, at.flatten(-2)).unflatten(-2, at.shape[-2:]) for x in (far.k, far.v))
    else:
        keys, values = far.read(leaf)
        valid = ok[..., None].expand(token.shape)
    if parameters.lengths is not None:
        valid = valid & (token < parameters.lengths.view(-1, 1, 1, 1, 1, 1))
    values = torch.where(valid[..., None], values, 0)
    x = parameters.scale * torch.einsum("bnrkgd,bnrktcd->bnrkgtc", q, keys).to(state.work)
    # An absent leaf gets logits of 0 here and a weight of -inf below.
    x = x.masked_fill(~(valid | ~ok[..., None])[..., None, :, :], -torch.inf)
    bias = parameters.level_bias[:, 0].view(1, 1, 1, *q.shape[3:5], 1)
    beta = parameters.router_mix.to(state.work).view(1, 1, 1, *q.shape[3:5], 1)
    routed = parameters.scale * torch.einsum("bnrkgd,bnrktd->bnrkgt", q, _rows_of(kbar, leaf)).to(state.work)
    routed = routed + _rows_of(entropy, leaf)[..., None, :] + bias
    weight = (1 - beta) * torch.logsumexp(x, -1) + beta * routed
    weight = weight.masked_fill(~ok[..., None, :], -torch.inf)
    means = torch.einsum("bnrkgtc,bnrktcd->bnrkgtd", torch.softmax(x, -1).to(values.dtype), values)
    state.add(weight, means, "bnrkgt,bnrkgtd->bnrkgd")
