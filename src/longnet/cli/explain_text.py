"""`longnet explain --model`: what one query of a trained model saw of a real text, as a listing and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from longnet import text
from longnet.attention.attention_map import AttentionMap, Item
from longnet.cli.models import load_model
from longnet.integrations.tokenizer import require_bytes
from longnet.model.hierarchical_layer import LongNetHierarchicalAttention

# Items that the listing names, and characters of text that it shows of each.
LISTED, SHOWN = 16, 90


def explain_text(
    folder: Path, file: Path, position: int | None, layer: int, head: int, plot: Path | None
) -> None:
    """Print what a head of a layer saw from a position, and draw it."""
    model, tokenizer = load_model(folder)
    require_bytes(tokenizer, "--model")
    data = np.frombuffer(file.read_bytes(), np.uint8)
    if not len(data):
        raise ValueError(f"--text: expected a file that is not empty; got {file}")
    position = len(data) - 1 if position is None else position
    if not 0 <= position < len(data):
        raise ValueError(f"--position: expected a byte of the text, 0 .. {len(data) - 1}; got {position}")
    kinds = model.config.attention_kinds()
    if not 0 <= layer < len(kinds) or kinds[layer] != "hierarchical":
        there = [i for i, kind in enumerate(kinds) if kind == "hierarchical"]
        raise ValueError(f"--layer: expected a hierarchical layer, one of {there}; got {layer}")
    if not 0 <= head < model.config.num_attention_heads:
        raise ValueError(f"--head: expected 0 .. {model.config.num_attention_heads - 1}; got {head}")
    data = data[: position + 1]
    maps = query_maps(model, torch.from_numpy(text.encode(data.tobytes()).astype(np.int64)), layer)
    print("\n".join(listing(maps[head], data.tobytes(), layer, head)))
    if plot is not None:
        draw_maps(maps, head, f"layer {layer}, byte {position}", plot)


@torch.no_grad()
def query_maps(model, ids: torch.Tensor, layer: int) -> list[AttentionMap]:
    """The maps of all heads of a layer for the last of ids (N,)."""
    attention = model.model.layers[layer].attention
    assert isinstance(attention, LongNetHierarchicalAttention)
    seen: list = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    try:
        model.model(input_ids=ids[None].to(model.device))
    finally:
        hook.remove()
    return attention.attention_maps(*seen[0])


def listing(found: AttentionMap, data: bytes, layer: int, head: int) -> list[str]:
    """Shares of the softmax, the opened blocks by score and the heaviest summaries, with their text."""
    position = len(data) - 1
    lines = [
        f"layer {layer}, head {head}, byte {position}, after {_excerpt(data, position - 60, position + 1)}"
    ]
    for kind in ("window", "opened", "summary"):
        mine = [item for item in found.items if item.kind == kind]
        tokens = sum(item.end - item.begin for item in mine)
        share = sum(item.weight for item in mine)
        name = {"window": "window", "opened": "opened blocks", "summary": "summaries"}[kind]
        lines.append(f"{name}: {share:.1%} of the weight on {len(mine)} items of {tokens} bytes")
    for level, scored, opened in found.descent:
        lines.append(f"level {level}: {scored} nodes scored, {opened} opened")
    opened = sorted((x for x in found.items if x.kind == "opened"), key=lambda x: (-x.score, x.begin))
    lines += ["opened blocks, by score:"] + [_line(item, data) for item in opened[:LISTED]]
    others = sorted((x for x in found.items if x.kind == "summary"), key=lambda x: (-x.weight, x.begin))
    lines += ["summaries, by weight:"] + [_line(item, data) for item in others[:LISTED]]
    return lines


def _line(item: Item, data: bytes) -> str:
    what = "block" if item.kind == "opened" else f"level {item.level}"
    excerpt = _excerpt(data, item.begin, item.end)
    return f"  {what} at bytes {item.begin} to {item.end}: score {item.score:.4f}, weight {item.weight:.4f}  {excerpt}"


def _excerpt(data: bytes, begin: int, end: int) -> str:
    shown = data[max(0, begin) : end].decode("utf-8", "replace")
    return repr(shown if len(shown) <= SHOWN else shown[: SHOWN - 2] + "..")


def draw_maps(maps: list[AttentionMap], head: int, title: str, path: Path) -> None:
    """Above: the head's weight per byte, by kind of item; below: every head's weight along the text."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(
            "--plot: expected matplotlib to be installed; install longnet-attention[plots]"
        ) from error
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6), layout="constrained", sharex=True, height_ratios=(2, 1)
    )
    items = maps[head].items
    groups = [("window", -1), ("opened", 0)]
    groups += sorted({(x.kind, x.level) for x in items if x.kind == "summary"})
    for kind, level in groups:
        mine = [x for x in items if (x.kind, x.level) == (kind, level)]
        if not mine:
            continue
        label = f"summaries of {mine[0].end - mine[0].begin} bytes" if kind == "summary" else kind
        density = [max(x.weight / (x.end - x.begin), 1e-12) for x in mine]
        above.bar(
            [x.begin for x in mine], density, [x.end - x.begin for x in mine], align="edge", label=label
        )
    above.set_yscale("log")
    above.set_ylabel("weight per byte")
    above.set_title(f"{title}, head {head}")
    above.legend(fontsize=8)
    tokens = maps[0].tokens.shape[0]
    bins = np.linspace(0, tokens, min(tokens, 400) + 1).astype(int)
    rows = [np.add.reduceat(m.tokens.float().cpu().numpy(), bins[:-1]) for m in maps]
    shown = np.log10(np.maximum(rows, 1e-6))
    image = below.imshow(
        shown,
        aspect="auto",
        extent=(0, tokens, len(maps) - 0.5, -0.5),
        interpolation="nearest",
        cmap="viridis",
    )
    below.set_ylabel("head")
    below.set_xlabel("byte of the text")
    figure.colorbar(image, ax=below, label="log10 of the weight")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture: {path}")
