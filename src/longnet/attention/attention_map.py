"""What one query of hierarchical attention saw: every item of its softmax, with weight, score and place in the text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention import hierarchical_torch
from longnet.attention.hierarchical_torch import Far, Parameters
from longnet.attention.pyramid import Pyramid, build_pyramid, token_mass
from longnet.patterns import HierarchicalPattern


class Item(NamedTuple):
    """An item of the softmax: the tokens [begin, end) with this weight together.

    kind: "window" (one token), "opened" (a leaf block whose tokens are seen one by one) or "summary" (of level `level`,
    0 = leaves). score: what routing ranked a node by, the mean over the group's heads of softmax(sbar) within its level.
    """

    kind: str
    level: int
    begin: int
    end: int
    weight: float
    score: float


class AttentionMap(NamedTuple):
    """The items of one query and head, from the oldest tokens on; their weights sum to 1.

    tokens (N,): the weight of every token the query sees. A summary's weight is shared out as its value was pooled.
    descent: per level, coarsest first, (level, nodes that were scored, nodes opened).
    """

    items: list[Item]
    tokens: Tensor
    descent: list[tuple[int, int, int]]


def attention_map(
    q: Tensor,
    q_local: Tensor,
    k: Tensor,
    k_local: Tensor,
    pattern: HierarchicalPattern,
    scale: float,
    prior_query: Tensor,
    level_bias: Tensor,
    router_mix: Tensor,
) -> list[AttentionMap]:
    """One map per head of the last token's query.

    Which nodes are opened is asked of the vectorised path; the weights are worked out here from its choice:
    exp(logit - logsumexp of all logits), the logits being those of `hierarchical_attention`.

    Args:
        q, q_local: (H, D), the query without and with rotary turns.
        k, k_local: (N, K, D), the keys up to and including the query's token.
        prior_query (K, D), level_bias (H, >= levels), router_mix (H,): as for `hierarchical_attention`.
    """
    tokens, key_heads = k.shape[:2]
    work = torch.promote_types(k.dtype, torch.float32)
    sizes = pattern.node_counts(tokens)
    pyramid = build_pyramid(k[None], k[None], prior_query, scale, pattern.block, pattern.radix, sizes)
    levels = [pyramid.level(i) for i in range(len(sizes))]
    far, routes = Far.of(k[None], k[None], levels), []
    parameters = Parameters(scale, level_bias[:, : len(sizes)].to(work), router_mix.to(work), None)
    hierarchical_torch.attend(
        q[None, None], q_local[None, None], k_local[None], far, pattern, True, parameters, tokens, tokens - 1, routes
    )  # fmt: skip
    chosen = routes[0][1] if routes else {}
    maps = []
    for key_head in range(key_heads):
        opened = {level: x[0, 0, key_head][x[0, 0, key_head] >= 0] for level, x in chosen.items()}
        group = slice(key_head * q.shape[0] // key_heads, (key_head + 1) * q.shape[0] // key_heads)
        part = Parameters(scale, parameters.level_bias[group], parameters.router_mix[group], None)
        kbar, vbar, mass, entropy = (x[0, :, key_head].to(work) for x in pyramid[:4])
        one = Pyramid(kbar, vbar, mass, entropy, pyramid.sizes)
        head_keys = (k[:, key_head].to(work), k_local[:, key_head].to(work))
        queries = (q[group].to(work), q_local[group].to(work))
        pooling = token_mass(k[None], prior_query, scale)[0, :, key_head]
        maps += _maps_of_group(*queries, *head_keys, pattern, one, opened, part, pooling)
    return maps


def _maps_of_group(
    q: Tensor, q_local: Tensor, k: Tensor, k_local: Tensor, pattern: HierarchicalPattern, pyramid: Pyramid,
    opened: dict[int, Tensor], parameters: Parameters, pooling: Tensor,
) -> list[AttentionMap]:  # fmt: skip
    """The maps of the heads of one key head: q (G, D), k (N, D), the pyramid's tensors without batch and head."""
    scale, bias, mix, _ = parameters
    cover = pattern.cover((len(k) - 1) // pattern.block, len(k))
    begin, end = cover.local
    places: list[tuple[str, int, int, int]] = []  # kind, level, first and last token
    logits, scores, descent = [], [], []
    above = k.new_zeros(0, dtype=torch.int64)
    for level in range(len(cover.left) - 1, -1, -1):
        listed = torch.arange(*cover.left[level], device=k.device)
        children = (above[:, None] * pattern.radix + torch.arange(pattern.radix, device=k.device)).flatten()
        nodes = torch.cat((listed, children)).unique()
        above = opened.get(level, nodes[:0])
        if not len(nodes):
            continue
        at = nodes + sum(pyramid.sizes[:level])
        routed = scale * q @ pyramid.kbar[at].T + pyramid.entropy[at] + bias[:, level, None]
        score = torch.softmax(routed, 1).mean(0).tolist()
        taken = torch.isin(nodes, above)
        descent.append((level, len(nodes), int(taken.sum())))
        span = pattern.node_tokens(level)
        for index, (node, is_opened) in enumerate(zip(nodes.tolist(), taken.tolist(), strict=True)):
            if is_opened and level:
                continue  # its children are candidates one level down
            logit = routed[:, index]
            if is_opened:
                exact = torch.logsumexp(scale * q @ k[node * span : (node + 1) * span].T, 1)
                logit = (1 - mix) * exact + mix * logit
            places.append(("opened" if is_opened else "summary", level, node * span, (node + 1) * span))
            logits.append(logit)
            scores.append(score[index])
    window = scale * q_local @ k_local[begin:end].T
    places += [("window", -1, t, t + 1) for t in range(begin, end)]
    scores += [float("nan")] * (end - begin)
    weights = torch.softmax(torch.cat((*(x[:, None] for x in logits), window), 1), 1)
    maps = []
    for g in range(len(q)):
        items = [Item(*p, w, s) for p, w, s in zip(places, weights[g].tolist(), scores, strict=True)]
        items.sort(key=lambda item: item.begin)
        maps.append(AttentionMap(items, _by_token(items, scale * k @ q[g], pooling, len(k)), descent))
    return maps


def _by_token(items: list[Item], exact: Tensor, pooling: Tensor, tokens: int) -> Tensor:
    """(N,): an opened block's weight goes to its tokens by their softmax, a summary's by the weights it was pooled with."""
    result = exact.new_zeros(tokens)
    for item in items:
        inside = slice(item.begin, item.end)
        logits = exact if item.kind == "opened" else pooling
        result[inside] = item.weight * torch.softmax(logits[inside], 0)
    return result
