"""Hierarchical attention by gathers and batched products: any device, any dtype, causal or not, linear memory and time.

Queries are taken a few blocks at a time; what such a group gathers is dropped again and recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longnet.attention.hierarchical_lists import Lists
from longnet.attention.vectors import Vectors
from longnet.patterns import HierarchicalPattern

# Query tokens per group: bounds the gathered keys of opened blocks. A GPU takes more tokens at once, as long as what is
# gathered of keys and values stays below so many elements; and up to FORWARD times as many where no gradients are wanted, for
# which a group's intermediate results would live on together: once for every PER_GROUP bytes of memory that it has. Smaller
# groups leave it waiting for the host.
GROUP, GROUP_CUDA, GATHERED, FORWARD, PER_GROUP = 256, 4096, 2**28, 4, 2**33


class Far(NamedTuple):
    """What lies behind the window. k, v begin at token `first_token`, `levels[l]` = (kbar, vbar, mass, entropy) at node
    `first_node[l]`. `read`: leaves (B, blocks, rows, K, places) -> their keys and values (..., block, D), where they are not
    taken from k and v."""

    k: Vectors
    v: Vectors
    levels: Sequence[tuple[Vectors, ...]]
    first_token: int
    first_node: tuple[int, ...]
    read: Callable[[Tensor], Sequence[Tensor]] | None = None

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        levels: Sequence[Sequence[Tensor]],
        first_token: int = 0,
        first_node: tuple[int, ...] | None = None,
        read: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ) -> Far:
        """k, v (B, *, K, D); levels: kbar, vbar (B, nodes, K, D), mass and entropy without D."""
        nodes = [tuple(Vectors(x) for x in level) for level in levels]
        first_node = (0,) * len(levels) if first_node is None else first_node
        return cls(Vectors(k), Vectors(v), nodes, first_token, first_node, read)


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
    outs, sums, local = [], [], Vectors(k_local)
    times = 1 if torch.is_grad_enabled() else at_once(k_local.device)
    # Split at once: the gradient of a slice would be as long as the text.
    sizes = [part.stop - part.start for part in parts(start, q.shape[1], k_local, pattern, times)]
    position = start
    for part, part_local in zip(q.split(sizes, 1), q_local.split(sizes, 1), strict=True):
        arguments = (part, part_local, local, far, pattern, causal, parameters, num_tokens, position, routes)
        position += part.shape[1]
        if torch.is_grad_enabled() and routes is None:
            out, lse = checkpoint(_group, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        else:
            out, lse = _group(*arguments)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 2)


def at_once(device: torch.device) -> int:
    """How many times as many queries a group may have where no gradients are wanted."""
    if device.type != "cuda":
        return 1
    return max(1, min(FORWARD, torch.cuda.get_device_properties(device).total_memory // PER_GROUP))


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


def _group(
    q: Tensor, q_local: Tensor, k_local: Vectors, far: Far, pattern: HierarchicalPattern, causal: bool,
    parameters: Parameters, num_tokens: int, position: int, routes: list | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    group = Group(q, q_local, k_local.x.shape[2], pattern, causal, parameters, num_tokens, position)
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

    def add_window(self, k_local: Vectors, far: Far) -> None:
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
            nodes = _candidates(lists, level, opened, self.pattern, self.causal, self.q.shape)
            opened = None
            if nodes is not None:
                least = None if lists.least is None else lists.least[level][None, :, None, None, None]
                rest = (far, self.pattern, self.causal, self.parameters, least)
                opened = _add_summaries(self.state, self.q, nodes, level, *rest)
            if opened is not None:
                chosen[level] = opened
        return chosen

    def add_leaves(self, opened: Tensor | None, far: Far) -> None:
        """Attend to the tokens of opened leaves."""
        if opened is not None:
            _add_leaves(self.state, self.q, opened, far, self.pattern, self.parameters, self.causal)

    def result(self) -> tuple[Tensor, Tensor]:
        """out (B, n, H, D), lse (B, H, n)."""
        out, lse = self.state.result()
        return out.reshape(self.shape), lse.reshape(self.shape[:3]).transpose(1, 2)


class _Softmax:
    """Pieces of one softmax: the log of a piece's mass, the least finite number where it is empty, and its mean of the values."""

    def __init__(self, work: torch.dtype) -> None:
        self.work, self.least = work, torch.finfo(work).min
        self.pieces: list[tuple[Tensor, Tensor]] = []

    def exponentials(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of the logits, finite, and exp(logits - largest), 0 where they are -inf."""
        top = logits.detach().amax(-1, keepdim=True).clamp(min=self.least)
        return top[..., 0], torch.exp(logits - top)

    def join(self, top: Tensor, total: Tensor, out: Tensor) -> None:
        """A piece of mass exp(top) total, total 0 or at least 1; out: total times its mean."""
        total = total.clamp(min=1)
        self.pieces.append((total.log() + top, out.to(self.work) / total[..., None]))

    def result(self) -> tuple[Tensor, Tensor]:
        """out (..., D), lse (...), -inf where nothing was seen."""
        out, lse = self._joined()
        return out, lse.masked_fill(lse <= self.least / 2, -torch.inf)

    def _joined(self) -> tuple[Tensor, Tensor]:
        masses = torch.stack([mass for mass, _ in self.pieces])
        means = torch.stack([mean for _, mean in self.pieces])
        return (torch.softmax(masses, 0)[..., None] * means).sum(0), torch.logsumexp(masses, 0)

    def collapse(self) -> None:
        """Keep the pieces so far as one."""
        if self.pieces:
            out, lse = self._joined()
            self.pieces = [(lse, out)]


def _add_window(state, q_local, k_local, far, pattern, causal, parameters, num_tokens, position) -> None:
    blocks, rows = q_local.shape[1:3]
    block, window, device = pattern.block, pattern.window_blocks, q_local.device
    first_block = position // block
    # No farther than the text goes: a window may be wider than everything there is.
    left = min(window - 1, first_block + blocks - 1)
    right = 0 if causal else min(window - 1, max(0, (num_tokens - 1) // block - first_block))
    if blocks == 1:
        begin = max(0, first_block - left) * block
        end = position + rows if causal else min(num_tokens, (first_block + right + 1) * block)
        token = torch.arange(begin, end, device=device)[None]
        span = slice(begin - far.first_token, end - far.first_token)
        keys, values, hidden = k_local.x[:, None, span], far.v.x[:, None, span], None
    else:
        block_index = torch.arange(first_block, first_block + blocks, device=device)
        token = (block_index - left)[:, None] * block + torch.arange(
            (left + 1 + right) * block, device=device
        )
        at = (token - far.first_token).clamp(0, k_local.count - 1)
        keys, values = k_local.shared(at), far.v.shared(at)
        hidden = ((token < 0) | (token >= num_tokens))[None, :, None]
    if causal:
        row = position + torch.arange(blocks * rows, device=device).view(1, blocks, rows, 1)
        later = token[None, :, None] > row
        hidden = later if hidden is None else hidden | later
    if parameters.lengths is not None:
        beyond = (token >= parameters.lengths[:, None, None])[:, :, None]
        hidden = beyond if hidden is None else hidden | beyond
        values = values.masked_fill(beyond[:, :, 0, :, None, None], 0)
    logits = parameters.scale * torch.einsum("bnrkgd,bnckd->bnrkgc", q_local, keys).to(state.work)
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, :, :, None, None], -torch.inf)
    top, p = state.exponentials(logits)
    state.join(top, p.sum(-1), torch.einsum("bnrkgc,bnckd->bnrkgd", p.to(values.dtype), values))


def _candidates(lists, level, opened, pattern, causal, shape) -> Tensor | None:
    """Candidates of a level (B, blocks, rows, K, C), ascending but for the -1 where there is none, or None if nobody has any."""
    batch, blocks, rows, key_heads = shape[:4]
    parts = [x[None, :, None, None].expand(batch, blocks, rows, key_heads, -1) for x in lists.nodes[level]]
    if opened is not None and opened.shape[-1]:
        children = opened[..., None] * pattern.radix + torch.arange(pattern.radix, device=opened.device)
        # Those of a left list's parents lie before the level's left list.
        parts.insert(0, children.masked_fill(opened[..., None] < 0, -1).flatten(-2))
    if not parts:
        return None
    nodes = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return nodes if causal else nodes.sort(-1).values


def _routed(q, nodes, level, far, parameters) -> Tensor:
    """scale q . kbar + entropy + bias (B, blocks, rows, K, G, C) of nodes (B, blocks, rows, K, C), from the first kept."""
    kbar, _, _, entropy = far.levels[level]
    bias = parameters.level_bias[:, level].view(1, 1, 1, *q.shape[3:5], 1)
    products = q @ kbar[nodes].transpose(-1, -2)
    return torch.add(entropy[nodes][..., None, :] + bias, products, alpha=parameters.scale)


def _add_summaries(state, q, nodes, level, far, pattern, causal, parameters, least) -> Tensor | None:
    """Score the candidates, open the best, attend to the others. Returns the opened ones, ascending, the -1 first."""
    _, vbar, mass, _ = far.levels[level]
    at, hidden = nodes - far.first_node[level] if far.first_node[level] else nodes, nodes < 0
    if not causal:  # the last parent may lack children
        hidden = hidden | (at >= vbar.count)
    at = at.clamp(0, vbar.count - 1)
    if parameters.lengths is not None:
        hidden = hidden | (mass[at] == -torch.inf)
    logits = _routed(q, at, level, far, parameters)
    opened = None
    if count := min(pattern.opened(level), nodes.shape[-1]):
        closed = hidden if least is None else hidden | (nodes < least)
        if count == nodes.shape[-1]:
            opened = nodes.masked_fill(closed, -1).sort(-1).values
            hidden = hidden | ~closed
        else:
            opened, places, taken = _best(logits.detach(), nodes, hidden, closed, count, state.least)
            hidden = hidden.scatter(-1, places, hidden.gather(-1, places) | taken)
    logits = logits.masked_fill(hidden[..., None, :], -torch.inf)
    top, p = state.exponentials(logits)
    state.join(top, p.sum(-1), p.to(vbar.x.dtype) @ vbar[at])
    return opened


def _best(logits, nodes, hidden, closed, count, lowest) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best scored nodes that are not closed, ascending, the -1 first; the places of the best; which were taken."""
    score = torch.softmax(logits.masked_fill(hidden[..., None, :], lowest), -1).mean(-2)
    best = score.masked_fill(closed, -1).sort(stable=True, dim=-1, descending=True)
    places, taken = best.indices[..., :count], best.values[..., :count] >= 0
    return nodes.gather(-1, places).masked_fill(~taken, -1).sort(-1).values, places, taken


def _add_leaves(state, q, opened, far, pattern, parameters, causal) -> None:
    """Opened leaves: weight (1 - beta) lse + beta sbar, value the softmax mean of the leaf's tokens."""
    leaf = (opened - far.first_node[0]).clamp(min=0)
    token = leaf[..., None] * pattern.block + torch.arange(pattern.block, device=q.device)
    token = token + (far.first_node[0] * pattern.block - far.first_token)
    absent, valid = opened < 0, None
    if parameters.lengths is not None:
        valid = token + far.first_token < parameters.lengths.view(-1, 1, 1, 1, 1, 1)
    if far.read is None:
        last = far.k.count - 1
        if not causal:  # the last leaf may be cut off
            valid = token <= last if valid is None else valid & (token <= last)
        at = token.clamp(0, last).flatten(-2)
        keys, values = far.k[at], far.v[at]
    else:
        keys, values = (x.flatten(-3, -2) for x in far.read(leaf))
    x = parameters.scale * (q @ keys.transpose(-1, -2)).to(state.work)
    if valid is not None:
        # An absent leaf gets logits of its own, finite, and no weight below.
        valid = (valid | absent[..., None]).flatten(-2)
        values = values.masked_fill(~valid[..., None], 0)
        x = x.masked_fill(~valid[..., None, :], -torch.inf)
    x = x.unflatten(-1, (-1, pattern.block))
    routed = _routed(q, leaf, 0, far, parameters)
    beta = parameters.router_mix.to(state.work).view(1, 1, 1, *q.shape[3:5], 1)
    weight = torch.lerp(torch.logsumexp(x, -1), routed, beta).masked_fill(absent[..., None, :], -torch.inf)
    top, share = state.exponentials(weight)
    p = (share[..., None] * torch.softmax(x, -1)).flatten(-2)
    state.join(top, share.sum(-1), p.to(values.dtype) @ values)
