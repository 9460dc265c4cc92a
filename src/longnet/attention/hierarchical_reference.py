"""The oracle of hierarchical attention: explicit covers, one query at a time. Slow, any float dtype, obviously right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longnet.patterns import HierarchicalPattern

Node = tuple[Tensor, Tensor, Tensor, Tensor]  # kbar (D,), vbar (D,), Z, entropy


def hierarchical_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_local: Tensor,
    k_local: Tensor,
    pattern: HierarchicalPattern,
    causal: bool,
    scale: float,
    prior_query: Tensor,
    level_bias: Tensor,
    router_mix: Tensor,
    lengths: Tensor | None = None,
    routes: dict | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D) and lse (B, H, N) by the definition. `routes`, if a dict, receives {(b, key head, t, level): opened}."""
    batch, tokens, heads, _ = q.shape
    group = heads // k.shape[2]
    out, lse = torch.zeros_like(q), q.new_full((batch, heads, tokens), -math.inf)
    outs, sums, places = [], [], []
    for b in range(batch):
        length = tokens if lengths is None else int(lengths[b])
        for kh in range(k.shape[2]):
            tree = _tree(k[b, :, kh], v[b, :, kh], prior_query[kh], pattern, causal, scale, length)
            for t in range(length):
                nodes, leaves = _descend(
                    q, b, t, kh, group, tree, pattern, causal, scale, level_bias, tokens, routes
                )
                for h in range(kh * group, (kh + 1) * group):
                    begin, end = pattern.cover(t // pattern.block, tokens, causal).local
                    end = min(end, length, t + 1 if causal else length)
                    weights = [scale * (k_local[b, begin:end, kh] @ q_local[b, t, h])]
                    values = [v[b, begin:end, kh]]
                    for level, j in nodes:
                        kbar, vbar, _, entropy = tree[level][j]
                        weights.append((scale * (q[b, t, h] @ kbar) + entropy + level_bias[h, level])[None])
                        values.append(vbar[None])
                    for j in leaves:
                        kbar, _, _, entropy = tree[0][j]
                        part = slice(j * pattern.block, min(length, (j + 1) * pattern.block))
                        x = scale * (k[b, part, kh] @ q[b, t, h])
                        routed = scale * (q[b, t, h] @ kbar) + entropy + level_bias[h, 0]
                        mass = (1 - router_mix[h]) * torch.logsumexp(x, 0) + router_mix[h] * routed
                        weights.append(mass[None])
                        values.append((torch.softmax(x, 0) @ v[b, part, kh])[None])
                    flat = torch.cat(weights)
                    places.append((b, t, h))
                    outs.append(torch.softmax(flat, 0) @ torch.cat(values))
                    sums.append(torch.logsumexp(flat, 0))
    if places:
        b, t, h = torch.tensor(places, device=q.device).T
        out, lse = out.index_put((b, t, h), torch.stack(outs)), lse.index_put((b, h, t), torch.stack(sums))
    return out, lse


def _tree(
    k: Tensor, v: Tensor, prior: Tensor, pattern: HierarchicalPattern, causal: bool, scale: float, length: int
) -> list[dict[int, Node]]:
    """Per level {node: summary}; nodes without a valid token are absent."""
    levels: list[dict[int, Node]] = []
    for level, size in enumerate(pattern.node_counts(len(k), causal)):
        nodes: dict[int, Node] = {}
        for j in range(size):
            if level == 0:
                part = slice(j * pattern.block, min(length, (j + 1) * pattern.block))
                keys, values = k[part], v[part]
                if not len(keys):
                    continue
                masses, entropies = (
                    scale * (keys @ prior),
                    torch.zeros(len(keys), dtype=k.dtype, device=k.device),
                )
            else:
                children = [
                    levels[-1][c]
                    for c in range(j * pattern.radix, (j + 1) * pattern.radix)
                    if c in levels[-1]
                ]
                if not children:
                    continue
                keys, values, masses, entropies = (torch.stack(x) for x in zip(*children, strict=True))
            a = torch.softmax(masses, 0)
            entropy = (a * (entropies - torch.log_softmax(masses, 0))).sum()
            nodes[j] = (a @ keys, a @ values, torch.logsumexp(masses, 0), entropy)
        levels.append(nodes)
    return levels


def _descend(q, b, t, kh, group, tree, pattern, causal, scale, level_bias, tokens, routes):
    """(unopened nodes as (level, j), opened leaves) of one query token and key head."""
    block = t // pattern.block
    cover = pattern.cover(block, tokens, causal)
    opened: list[int] = []
    unopened: list[tuple[int, int]] = []
    for level in range(len(tree) - 1, -1, -1):
        candidates = {j for lo, hi in (cover.left[level], cover.right[level]) for j in range(lo, hi)}
        candidates |= {c for j in opened for c in range(j * pattern.radix, (j + 1) * pattern.radix)}
        order = sorted(candidates & tree[level].keys())
        opened = []
        if order and pattern.opened(level):
            kbar = torch.stack([tree[level][j][0] for j in order])
            entropy = torch.stack([tree[level][j][3] for j in order])
            part = slice(kh * group, (kh + 1) * group)
            logits = scale * (q[b, t, part] @ kbar.T) + entropy + level_bias[part, level, None]
            score = dict(zip(order, torch.softmax(logits, 1).mean(0).tolist(), strict=True))
            allowed = [j for j in order if j >= pattern.first_openable(block, level)]
            opened = sorted(sorted(allowed, key=lambda j: (-score[j], j))[: pattern.opened(level)])
        if routes is not None:
            routes[b, kh, t, level] = opened
        unopened += [(level, j) for j in order if j not in opened]
    return unopened, opened
