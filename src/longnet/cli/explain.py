"""The command explain: what a pattern costs, which path runs here, and a picture of who sees whom."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

import longnet
from longnet import DilatedPattern, HierarchicalPattern
from longnet.cli.explain_text import explain_text

# Tokens along each side of the picture: more could not be told apart.
SHOWN = 512


def explain(
    tokens: int = 65536,
    heads: int = 12,
    key_heads: int = 12,
    head_width: int = 64,
    window: int = 2048,
    ratio: int = 2,
    attention: Literal["dilated", "hierarchical"] = "dilated",
    block: int = 64,
    radix: int = 8,
    top_k: int = 16,
    plot: Path | None = None,
    model: Path | None = None,
    text: Path | None = None,
    position: int | None = None,
    layer: int = 0,
    head: int = 0,
) -> None:
    """Which attention path this machine takes, what a pattern costs at this length, and who sees whom.

    With --model and --text instead: what one query of a trained hierarchical model saw of a text, and how much each part
    weighed; the blocks that it opened, with their scores and their text.

    Args:
        tokens: Sequence length.
        heads: Query heads.
        key_heads: Key and value heads; fewer than query heads is grouped-query attention.
        head_width: Width of a head.
        window: Shortest segment (dilated), tokens seen one by one (hierarchical).
        ratio: By which dilated segments and rates grow.
        attention: A geometric dilated pattern, or a tree of summaries.
        block: Tokens of a leaf (hierarchical).
        radix: Children of a node (hierarchical).
        top_k: Leaves opened per query and key head (hierarchical).
        plot: Draw which of the last 512 tokens see which, or what the query of --model saw, into this picture file.
        model: Folder of a trained model.
        text: A text file for it.
        position: Byte of the text whose query is explained; the last one if not given.
        layer: Layer of the model, from 0.
        head: Head of the layer, from 0.
    """
    if (model is None) != (text is None):
        raise ValueError("expected --model and --text together, or neither")
    if model is not None and text is not None:
        explain_text(model, text, position, layer, head, plot)
        return
    if min(heads, key_heads, head_width) < 1 or heads % key_heads:
        raise ValueError(
            f"expected --heads, a multiple of --key-heads, and --head-width of at least 1; got {heads}, {key_heads}, {head_width}"
        )
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    dense = heads * tokens * (tokens + 1) // 2
    if attention == "dilated":
        dilated = DilatedPattern.geometric(tokens, window, ratio)
        q = torch.empty(1, 1, heads, head_width, device=device, dtype=dtype).expand(-1, tokens, -1, -1)
        k = torch.empty(1, 1, key_heads, head_width, device=device, dtype=dtype).expand(-1, tokens, -1, -1)
        print(longnet.explain(q, k, k, dilated))
        print(f"branches (segment length, dilation rate): {dilated.branches}")
        keys = dilated.visible_pairs(tokens, heads) / heads / tokens
        flops = dilated.flops(tokens, heads, head_width)
        entries = dilated.cache_entries(heads, key_heads)
        picture = dilated_picture(dilated, tokens, heads)
    else:
        tree = HierarchicalPattern(
            block=block, radix=radix, window_blocks=max(1, window // max(1, block)), top_k=top_k
        )
        levels = [
            f"{n} nodes of {tree.node_tokens(i)} tokens" for i, n in enumerate(tree.node_counts(tokens))
        ]
        print(f"tree: {', '.join(levels)}")
        scored, keys = tree.keys_per_query(tokens)
        print(f"the last query scores {scored} summaries")
        flops = tree.flops(tokens, heads, head_width)
        entries = key_heads * sum(tree.cache_entries(tokens))
        picture = tree_picture(tree, tokens)
    which = "a query, on average" if attention == "dilated" else "the last query"
    print(f"keys of {which}: {keys:.0f}; of a dense query, on average: {dense / heads / tokens:.0f}")
    print(f"forward: {flops / 1e9:.1f} GFLOP, {4 * head_width * dense / flops:.1f} times less than dense")
    print(f"streaming cache: {entries} keys per layer, {entries * head_width * 4 / 2**20:.1f} MiB in 16 bits")
    if plot is not None:
        draw(picture, max(0, tokens - SHOWN), attention, plot)


def dilated_picture(pattern: DilatedPattern, tokens: int, heads: int) -> np.ndarray:
    """(n, n): in how many branches, over all heads, each of the last n tokens sees each."""
    t = np.arange(max(0, tokens - SHOWN), tokens)
    seen = np.zeros((len(t), len(t)))
    for w, r in pattern.branches:
        for offset in {pattern.offset(h, r, heads) for h in range(heads)}:
            part = t % w % r == offset
            seen += (t[:, None] // w == t // w) & part[:, None] & part
    return np.where(t <= t[:, None], seen, 0)


def tree_picture(pattern: HierarchicalPattern, tokens: int) -> np.ndarray:
    """(n, n): how many tokens are summarised where each of the last n tokens sees each; 1 token by token, 0 not at all."""
    first = max(0, tokens - SHOWN)
    t = np.arange(first, tokens)
    seen = np.zeros((len(t), len(t)))
    for row in t:
        cover = pattern.cover(int(row) // pattern.block, tokens)
        line = seen[row - first]
        for level, (lo, hi) in enumerate(cover.left):
            span = pattern.node_tokens(level)
            line[max(0, lo * span - first) : max(0, hi * span - first)] = span
        line[max(0, cover.local[0] - first) : row - first + 1] = 1
    return seen


def draw(picture: np.ndarray, first: int, attention: str, path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(
            "--plot: expected matplotlib to be installed; install longnet-attention[plots]"
        ) from error
    figure, axes = plt.subplots(figsize=(6, 5.2), layout="constrained")
    extent = (first, first + len(picture), first + len(picture), first)
    shown = np.ma.masked_equal(picture, 0)
    image = axes.imshow(np.ma.log2(shown), extent=extent, interpolation="nearest", cmap="viridis_r")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    what = "branches and heads that see it" if attention == "dilated" else "tokens behind the summary"
    figure.colorbar(image, label=f"log2 of the {what}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture: {path}")
