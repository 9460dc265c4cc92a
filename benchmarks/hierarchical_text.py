"""What a token of hierarchical attention costs while a real text grows: queries, keys and values of a trained model's layers.

Neighbours in a text open much the same blocks; tokens of random data do not, which is the kernels' worst case and is timed beside
it in the same shape. Books follow each other as one text. What is timed is the attention of one layer, forward and backward.

    python recipes/long_text.py --data BOOKS --out runs/long-text --models hierarchical --equal 50 20000000
    PYTHONPATH=src python benchmarks/hierarchical_text.py --model runs/long-text/hierarchical-0 --books BOOKS/train.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path

import torch

from hierarchical import timed
from longnet import LongNetForCausalLM
from longnet.model.hierarchical_layer import LongNetHierarchicalAttention
from longnet.text import encode
from run import environment

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def text(path: Path, tokens: int) -> torch.Tensor:
    """(1, tokens): the books of a .jsonl.gz, one after the other."""
    parts, count = [], 0
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            parts.append(torch.as_tensor(encode(json.loads(line)["text"])))
            count += len(parts[-1])
            if count >= tokens:
                return torch.cat(parts)[None, :tokens]
    raise SystemExit(f"{path}: expected at least {tokens} bytes of text; it holds {count}; lower --tokens")


@torch.no_grad()
def projections(model: LongNetForCausalLM, ids: torch.Tensor, layer: int) -> tuple[Tensors, tuple]:
    """q, k, v of a layer, and its rotary angles, as a forward pass over `ids` makes them."""
    attention, seen = model.model.layers[layer].attention, []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    model.model(input_ids=ids)
    hook.remove()
    hidden, rotary = seen[0]
    # Values lie among queries and keys as they were projected, which would all be kept.
    return tuple(x.contiguous() for x in attention._project(hidden)), rotary


def measure(
    attention: LongNetHierarchicalAttention, tensors: Tensors, rotary: tuple | None, device: str
) -> dict:
    """rotary: the layer's; None: without turns, one query near and far."""
    tensors = tuple(x.detach().requires_grad_() for x in tensors)
    attend = lambda: attention._attend(*tensors, rotary, None, None)  # noqa: E731
    with torch.no_grad():
        forward = timed(attend, device)
    out = attend()
    dout = torch.randn_like(out)
    backward = timed(lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True), device)
    each = 1e3 * (forward[1] + backward[1]) / tensors[0].shape[1]
    return {"forward_ms": forward, "backward_ms": backward, "us_per_token": each}


def report(rows: list[dict], facts: dict, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.json").write_text(json.dumps(facts | {"rows": rows}, indent=1))
    lines = [f"{k}: {v}" for k, v in facts.items()]
    lines += ["", "| tokens | data | forward ms | backward ms | µs a token | against the shortest |"]
    lines += ["|---" * 6 + "|"]
    for row in rows:
        first = next(r for r in rows if r["data"] == row["data"])
        cells = [str(row["tokens"]), row["data"]]
        for low, middle, high in (row["forward_ms"], row["backward_ms"]):
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        cells += [f"{row['us_per_token']:.3f}", f"{row['us_per_token'] / first['us_per_token']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    result = "\n".join(lines) + "\n"
    (folder / "text.md").write_text(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a hierarchical model")
    parser.add_argument("--books", type=Path, required=True, help=".jsonl.gz with a text a line")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--tokens", nargs="+", type=int, default=[65536 * 4**i for i in range(4)])
    parser.add_argument(
        "--plain",
        action="store_true",
        help="without rotary turns, as hierarchical.py's cases; half the memory",
    )
    parser.add_argument("--radix", type=int, help="of the tree that is timed; default: the model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hierarchical"))
    options = parser.parse_args()
    device = options.device
    model = LongNetForCausalLM.from_pretrained(options.model).to(device)
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()
    config = model.config
    shape = {"heads": config.num_attention_heads, "key heads": config.num_key_value_heads, "width": config.head_dim}  # fmt: skip
    tree = config.hierarchical | ({"radix": options.radix} if options.radix else {})
    result, rows = "", []
    facts = environment(device) | shape | {"tree": tree, "rotary": not options.plain}
    ids = text(options.books, max(options.tokens)).long().to(device)
    for layer in options.layers:
        attention = model.model.layers[layer].attention
        attention.pattern = replace(attention.pattern, radix=options.radix or attention.pattern.radix)
        for tokens in options.tokens:
            tensors, rotary = projections(model, ids[:, :tokens], layer)
            rotary = None if options.plain else rotary
            kinds = [f"text, layer {layer}"] + ["random"] * (layer == options.layers[0])
            for data in kinds:
                if data == "random":
                    tensors = tuple(x.normal_() for x in tensors)
                rows.append({"tokens": tokens, "data": data} | measure(attention, tensors, rotary, device))
                print(json.dumps(rows[-1]), flush=True)
                result = report(rows, facts, options.out)
            del tensors
    print(result)


if __name__ == "__main__":
    main()
