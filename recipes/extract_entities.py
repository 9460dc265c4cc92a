"""Entities of LitBank, read whole, against windows, a truncated reader and a dictionary.

    python recipes/extract_entities.py --data DIR --output R.json

"windows of 512 bytes": the same model whose attention ends at 512 bytes, which is what reading 512-byte windows one by one is.
"first N bytes": entities behind them are missed. "dictionary": every training entity's text, with its likeliest label,
wherever it stands as whole words; an entry is kept if it was an entity in at least half of its training occurrences.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from pathlib import Path

import torch
from classification import read_lines
from runs import WARM_DOCUMENTS, Row, log, machine, parser, run_rows, settings, summary_of

from longnet.tasks.annotations import Span
from longnet.tasks.extraction import ExtractConfig, fit_extractor
from longnet.tasks.metrics import set_f1
from results import by_length, finished, record

TASK, BASELINE = "LitBank entities", "dictionary"
COMPARED = ("whole", "windows", "4096", "512", "scratch")
Split = tuple[list[str], list[list[Span]]]


def read(path: Path) -> Split:
    records = read_lines(path)
    spans = [[(e["start"], e["end"], e["label"]) for e in r["entities"]] for r in records]
    return [r["text"] for r in records], spans


def cut(texts: list[str], gold: list[list[Span]], most: int | None) -> Split:
    """The first `most` bytes of every text (whole characters), with the spans that end there."""
    if most is None:
        return texts, gold
    short = [t.encode()[:most].decode("utf-8", "ignore") for t in texts]
    return short, [[s for s in spans if s[1] <= len(t)] for t, spans in zip(short, gold, strict=True)]


def dictionary(train: Split, texts: list[str]) -> list[list[Span]]:
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


def test_scores(test: Split, found: list[list[Span]]) -> dict:
    """Of all test documents, and of the long ones."""
    texts, gold = test

    def f1(own: list[int]) -> dict[str, float]:
        return {"f1": set_f1([gold[i] for i in own], [found[i] for i in own])["f1"]}

    return {**set_f1(gold, found), "longer_than": by_length(texts, f1)}


def neural(
    splits: dict[str, Split], args: argparse.Namespace, row: Row, seed: int, minutes: float | None
) -> dict | None:
    most = WARM_DOCUMENTS if minutes is None else None
    train, validation, test = (cut(texts[:most], gold[:most], row.bytes) for texts, gold in splits.values())
    config = ExtractConfig(
        **settings(row, seed, minutes, args), batch_tokens=16384 if args.reduced else 32768
    )
    extractor, summary, report = fit_extractor(config, *train, *validation, log(config, row.name))
    found = extractor.extract(test[0])
    if minutes is None:
        return None
    extra = {**summary_of(summary), "validation_f1": report["f1"]}
    return {**test_scores(splits["test"], found), **extra}


def main() -> None:
    args = parser(__doc__, COMPARED).parse_args()
    splits = {name: read(args.data / f"{name}.jsonl.gz") for name in ("train", "validation", "test")}
    if args.reduced:
        splits = {name: (texts[:24], gold[:24]) for name, (texts, gold) in splits.items()}
    if not args.baselines_only:
        run_rows(
            TASK,
            len(splits["test"][0]),
            args,
            lambda row, seed, minutes: neural(splits, args, row, seed, minutes),
        )
    if not finished(args.output, TASK, BASELINE):
        started = time.perf_counter()
        found = dictionary(splits["train"], splits["test"][0])
        facts = {"documents": len(found), "machine": machine(torch.device("cpu"))}
        figures = {**test_scores(splits["test"], found), "seconds": time.perf_counter() - started}
        record(args.output, TASK, BASELINE, {**figures, **facts})


if __name__ == "__main__":
    main()
