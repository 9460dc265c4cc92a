"""Entities of LitBank or SciREX documents, read whole, against windows, a truncated reader and a dictionary.

    python recipes/extract_entities.py --task litbank --data DIR --output R.json

"windows of 512": the same model whose attention ends at 512 bytes, which is what reading 512-byte windows one by one is.
"first 4,096 bytes": entities behind them are missed. "dictionary": every training entity's text, with its likeliest label,
wherever it stands as whole words; an entry is kept if it was an entity in at least half of its training occurrences.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections import Counter
from pathlib import Path

from longnet.tasks.annotations import Span
from longnet.tasks.extraction import ExtractConfig, fit_extractor
from longnet.tasks.metrics import set_f1
from results import record

PATTERN = {"segment_lengths": [512, 4096, 32768], "dilation_rates": [1, 8, 64]}
# name: (pattern, bytes read, share of the time)
RUNS = {
    "LongNet, whole documents": (PATTERN, None, 1.0),
    "LongNet, windows of 512 bytes": ({"segment_lengths": [512], "dilation_rates": [1]}, None, 1.0),
    "LongNet, first 4,096 bytes": (PATTERN, 4096, 0.5),
}


def read(path: Path) -> tuple[list[str], list[list[Span]]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        records = [json.loads(line) for line in stream]
    spans = [[(e["start"], e["end"], e["label"]) for e in r["entities"]] for r in records]
    return [r["text"] for r in records], spans


def cut(texts: list[str], gold: list[list[Span]], most: int | None) -> tuple[list[str], list[list[Span]]]:
    """The first `most` bytes of every text (whole characters), with the spans that end there."""
    if most is None:
        return texts, gold
    short = [t.encode()[:most].decode("utf-8", "ignore") for t in texts]
    return short, [[s for s in spans if s[1] <= len(t)] for t, spans in zip(short, gold, strict=True)]


def dictionary(train: tuple[list[str], list[list[Span]]], texts: list[str]) -> list[list[Span]]:
    counts: dict[str, Counter[str]] = {}
    for text, spans in zip(*train, strict=True):
        for start, end, label in spans:
            counts.setdefault(text[start:end], Counter())[label] += 1
    words = re.compile(r"\w+|[^\w\s]")

    def occurrences(text: str) -> list[tuple[int, int]]:
        tokens = [m.span() for m in words.finditer(text)]
        ends = [e for _, e in tokens]
        return [
            (start, end)
            for i, (start, _) in enumerate(tokens)
            for end in ends[i : i + 10]
            if text[start:end] in counts
        ]

    seen = Counter(text[s:e] for text in train[0] for s, e in occurrences(text))
    kept = {name: c.most_common(1)[0][0] for name, c in counts.items() if 2 * sum(c.values()) >= seen[name]}
    return [[(s, e, kept[t[s:e]]) for s, e in occurrences(t) if t[s:e] in kept] for t in texts]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--task", choices=("litbank", "scirex"), required=True, help="names the rows of the results"
    )
    p.add_argument(
        "--data", type=Path, required=True, help="folder with train, validation and test .jsonl.gz"
    )
    p.add_argument("--budget-minutes", type=float, default=8.0, help="all runs together")
    p.add_argument("--device", default="auto")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--reduced", action="store_true", help="a model and a corpus for two cores")
    p.add_argument("--baselines-only", action="store_true", help="only the dictionary")
    p.add_argument(
        "--pretrained", type=Path, help="start from a `longnet train --objective mlm` model folder"
    )
    p.add_argument(
        "--output", type=Path, required=True, help="results are added to this JSON file; a .md is beside it"
    )
    args = p.parse_args()
    splits = {name: read(args.data / f"{name}.jsonl.gz") for name in ("train", "validation", "test")}
    if args.reduced:
        splits = {name: (texts[:24], gold[:24]) for name, (texts, gold) in splits.items()}
    started = time.perf_counter()
    found = dictionary(splits["train"], splits["test"][0])
    seconds = time.perf_counter() - started
    record(args.output, args.task, "dictionary", {**set_f1(splits["test"][1], found), "seconds": seconds})
    if not args.baselines_only:
        neural(splits, args)


def neural(splits: dict, args: argparse.Namespace) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128} if args.reduced else {}
    unit = args.budget_minutes / (len(args.seeds) * sum(share for _, _, share in RUNS.values()))
    for seed in args.seeds:
        for name, (pattern, most, share) in RUNS.items():
            config = ExtractConfig(
                train=args.data, output=args.output, preset="tiny" if args.reduced else "mini", model={**pattern, **small},
                seed=seed, epochs=300, patience=300, max_minutes=unit * share, device=args.device,
                batch_tokens=16384 if args.reduced else 65536, pretrained=args.pretrained,
            )  # fmt: skip
            train, validation = (cut(*splits[part], most) for part in ("train", "validation"))
            extractor, summary, report = fit_extractor(config, *train, *validation)
            found = extractor.extract(cut(*splits["test"], most)[0])
            figures = {
                **set_f1(splits["test"][1], found),
                "seconds": summary.seconds,
                "epochs": summary.epochs,
            }
            record(args.output, args.task, name, {**figures, "validation_f1": report["f1"], "seed": seed})


if __name__ == "__main__":
    main()
