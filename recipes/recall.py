"""Multi-query associative recall from scratch: what each attention can find, at the trained length and beyond it.

A text begins with key-value pairs; later, among filler, keys are asked for and the next token must be the key's value. All
models have the same layers and width and see the same batches. Writes JSON, a plot and a Markdown table.

    python recipes/recall.py --out recall --seeds 0 1 2            # minutes on a GPU, about an hour on two cores
    python recipes/recall.py --out recall --steps 400 --models dense opened
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from longnet import LongNetConfig, LongNetForCausalLM

FILLER, KEYS, VALUES, VOCABULARY = 4, 5, 69, 133
TREE = {"block": 8, "radix": 4, "window_blocks": 2, "guard": 1, "top_k": 2, "beam": 8}
MODELS = {
    "dense": {"attention": "hierarchical", "hierarchical": TREE | {"window_blocks": 10**6}},
    "local": {"segment_lengths": [16], "dilation_rates": [1]},
    "dilated": {"segment_lengths": [16, 64, 256, 1024, 4096], "dilation_rates": [1, 4, 16, 64, 256]},
    "summaries": {"attention": "hierarchical", "hierarchical": TREE | {"top_k": 0}},
    "opened": {"attention": "hierarchical", "hierarchical": TREE},
}


def batch(
    size: int, length: int, pairs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, targets (size, length): targets are -100 except after a key that is asked for."""
    keys = torch.rand(size, 64, generator=generator).argsort(1)[:, :pairs] + KEYS
    values = torch.randint(VALUES, VOCABULARY, (size, pairs), generator=generator)
    ids = torch.full((size, length), FILLER)
    targets = torch.full((size, length), -100)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + torch.rand(size, length - 2 * pairs, generator=generator).argsort(1)[:, :pairs]
    ids.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return ids, targets


def build(name: str, seed: int) -> LongNetForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LongNetForCausalLM(
        LongNetConfig(vocab_size=VOCABULARY, initializer_range=0.05, **size, **MODELS[name])
    )


@torch.no_grad()
def accuracy(model: LongNetForCausalLM, length: int, pairs: int, device: str) -> float:
    generator = torch.Generator().manual_seed(10**6 + length)
    right = asked = 0
    for _ in range(max(1, 2048 // length)):
        ids, targets = (x.to(device) for x in batch(8, length, pairs, generator))
        guess = model(ids).logits.argmax(-1)
        right += int((guess == targets).sum())
        asked += int((targets != -100).sum())
    return right / asked


def run(name: str, seed: int, options: argparse.Namespace) -> dict:
    model = build(name, seed).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, options.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    curve, began = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        ids, targets = (
            x.to(options.device) for x in batch(options.batch, options.length, options.pairs, generator)
        )
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, options.steps // 8) == 0:
            curve.append((step, round(accuracy(model, options.length, options.pairs, options.device), 4)))
            print(
                f"{name} seed {seed} step {step}: loss {loss.item():.3f}, accuracy {curve[-1][1]:.3f}",
                flush=True,
            )
    lengths = [options.length * 2**i for i in range(options.doublings + 1)]
    found = {n: accuracy(model, n, options.pairs, options.device) for n in lengths}
    parameters = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - began
    return {
        "model": name,
        "seed": seed,
        "parameters": parameters,
        "curve": curve,
        "accuracy": found,
        "seconds": seconds,
    }


def report(rows: list[dict], folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "device": options.device, "tree": TREE}
    facts |= {k: getattr(options, k) for k in ("steps", "batch", "length", "pairs", "learning_rate")}
    (folder / "recall.json").write_text(json.dumps({"setting": facts, "rows": rows}, indent=1))
    lengths = list(rows[0]["accuracy"])
    lines = [
        "| model | seeds | " + " | ".join(f"{n}" for n in lengths) + " |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    means = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        means[name] = [[row["accuracy"][n] for row in mine] for n in lengths]
        cells = [f"{sum(x) / len(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in means[name]]
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    (folder / "recall.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, cells in means.items():
        axes.plot(lengths, [sum(x) / len(x) for x in cells], marker="o", label=name)
    axes.axvline(options.length, color="grey", linestyle=":", label="trained length")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("accuracy")
    axes.legend()
    figure.savefig(folder / "recall.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--doublings", type=int, default=4, help="test lengths up to 2^this times the trained one"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rows: list[dict] = []
    for seed in options.seeds:
        for name in options.models:
            rows.append(run(name, seed, options))
            report(rows, options.out, options)


if __name__ == "__main__":
    main()
