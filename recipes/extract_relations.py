"""Entities, clusters and relations of whole documents, against the same model truncated and against counting.

    python recipes/extract_relations.py --task scirex   --data DIR --output R.json     full papers; every two roles of a result are a relation
    python recipes/extract_relations.py --task redocred --data DIR --output R.json     trains on nine tenths of its dev set, tests on its test set
    python recipes/extract_relations.py --task ast      --output R.json                Python's standard library, annotated by its syntax trees

Splits: SciREX as given; Re-DocRED's dev set by a hash of the title (a tenth is validation); files of the standard library by a hash of their
path (a tenth test, a tenth validation), without test suites, 8 to 200 kB.

"co-occurrence": two entities are related if the relation is likely enough given their labels, where they share a sentence (or a
document, if that does better in training); for the end-to-end column its entities are those of a dictionary (`extract_entities.py`;
"regular expressions" for `ast`), mentions with equal strings being one entity.
"first N bytes": what lies behind them is missed.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from extract_entities import PATTERN, dictionary

from longnet.tasks.annotations import Annotation, Span, annotation_of, read_annotated
from longnet.tasks.classification import held_out
from longnet.tasks.convert import from_docred, from_python
from longnet.tasks.documents import Document
from longnet.tasks.extraction import ExtractConfig
from longnet.tasks.joint import fit_knowledge
from longnet.tasks.knowledge import named
from longnet.tasks.mentions import normalise
from longnet.tasks.scores import Scores, extraction_scores, facts
from results import record

# name: (bytes read, share of the time, tokens of a batch on a GPU)
RUNS = {
    "LongNet, whole documents": (None, 6.0, 65536),
    "LongNet, first 4,096 bytes": (4096, 1.5, 32768),
    "LongNet, first 512 bytes": (512, 0.5, 8192),
}
SMALLEST, LARGEST = 8_000, 200_000
SKIPPED = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages"))


@dataclass(frozen=True)
class Split:
    texts: list[str]
    gold: list[Annotation]

    def cut(self, most: int | None) -> Split:
        """The first `most` bytes of every text (whole characters), with what lies in them."""
        if most is None:
            return self
        texts = [t.encode("utf-8", "surrogateescape")[:most].decode("utf-8", "ignore") for t in self.texts]
        return Split(texts, [a.cut(len(t)) for t, a in zip(texts, self.gold, strict=True)])


def split_of(records: list[dict]) -> Split:
    documents = [Document(r["id"], r["text"], r["id"], r) for r in records]
    return Split([d.text for d in documents], [annotation_of(d) for d in documents])


def load(task: str, data: Path | None) -> dict[str, Split]:
    if task == "ast":
        root = data or Path(sysconfig.get_path("stdlib"))
        records = list(from_python(root, SMALLEST, LARGEST, SKIPPED))
        tenth = [int.from_bytes(hashlib.sha256(r["id"].encode()).digest()[:4], "big") % 10 for r in records]
        chosen = {"test": {0}, "validation": {1}, "train": set(range(2, 10))}
        return {
            name: split_of([r for r, t in zip(records, tenth, strict=True) if t in own])
            for name, own in chosen.items()
        }
    if data is None:
        raise SystemExit(f"--data: expected the folder of {task}")
    if task == "redocred":
        dev = list(from_docred(data / "dev.jsonl.gz"))
        return {
            "train": split_of([r for r in dev if not held_out(r["id"])]),
            "validation": split_of([r for r in dev if held_out(r["id"])]),
            "test": split_of(list(from_docred(data / "test.jsonl.gz"))),
        }
    splits = {}
    for name in ("train", "validation", "test"):
        documents, gold = read_annotated(data / f"{name}.jsonl.gz")
        splits[name] = Split([d.text for d in documents], gold)
    return splits


_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")


def pairs_of(text: str, annotation: Annotation, sentences: bool) -> set[tuple[str, str]]:
    """Ordered pairs of entities that share a sentence, or all of them."""
    if not sentences:
        return {(a, b) for a in annotation.clusters for b in annotation.clusters if a != b}
    ends = [m.start() for m in _SENTENCE.finditer(text)]
    groups, at, sentence = defaultdict(set), 0, 0
    sentence_of = []
    for start, _, _ in annotation.spans:  # sorted
        while at < len(ends) and ends[at] <= start:
            at, sentence = at + 1, sentence + 1
        sentence_of.append(sentence)
    for name, members in annotation.clusters.items():
        for i in members:
            groups[sentence_of[i]].add(name)
    return {(a, b) for group in groups.values() for a in group for b in group if a != b}


class Cooccurrence:
    """P(relation | labels of both entities, the pair comes into question), and the probability from which on it is claimed."""

    def __init__(self, train: Split) -> None:
        best = -1.0
        for sentences in (True, False):
            seen: Counter[tuple[str, str]] = Counter()
            held: Counter[tuple[str, str, str]] = Counter()
            for text, a in zip(train.texts, train.gold, strict=True):
                pairs = pairs_of(text, a, sentences)
                seen.update((a.label(h), a.label(t)) for h, t in pairs)
                held.update((a.label(h), a.label(t), r) for h, t, r in a.relations if (h, t) in pairs)
            rates = {key: count / seen[key[:2]] for key, count in held.items()}
            # All thresholds at once: claims in order of their rate, with hits = rate x pairs.
            wanted, hits, claims = sum(len(a.relations) for a in train.gold), 0, 0
            for key in sorted(rates, key=lambda k: -rates[k]):
                hits, claims = hits + held[key], claims + seen[key[:2]]
                f1 = 2 * hits / (claims + wanted)
                if f1 > best:
                    best, self.sentences = f1, sentences
                    self.claimed = defaultdict(list)
                    for (h, t, r), rate in rates.items():
                        if rate >= rates[key]:
                            self.claimed[h, t].append(r)

    def relate(self, text: str, a: Annotation) -> Annotation:
        pairs = pairs_of(text, a, self.sentences)
        labels = {name: a.label(name) for name in a.clusters}
        found = [(h, t, r) for h, t in pairs for r in self.claimed[labels[h], labels[t]]]
        return Annotation(a.spans, a.clusters, sorted(found))


def equal_strings(train: Split, texts: list[str], spans: list[list[Span]]) -> list[Annotation]:
    """Mentions with equal strings and labels as one entity, if such mentions mostly belong to one in training."""
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for text, a in zip(train.texts, train.gold, strict=True):
        members = {i for own in a.clusters.values() for i in own}
        for i, (s, e, _) in enumerate(a.spans):
            (inside if i in members else outside)[normalise(text[s:e])] += 1
    usual = sum(inside.values()) >= sum(outside.values())
    found = []
    for text, own in zip(texts, spans, strict=True):
        own, clusters = sorted(set(own)), defaultdict(list)
        for i, (s, e, label) in enumerate(own):
            name = normalise(text[s:e])
            known = inside[name] + outside[name]
            if inside[name] >= outside[name] if known else usual:
                clusters[name, label].append(i)
        found.append(Annotation(own, named(text, own, list(clusters.values()))))
    return found


_DEFINED = re.compile(r"^[ \t]*(?:async +)?(def|class) +(\w+)", re.M)
_IMPORTED = re.compile(
    r"^[ \t]*import +([\w.]+)|^[ \t]*from +\.*([\w.]+) +import +(\w+)|^# module ([\w.]+)$", re.M
)


def regular_expressions(texts: list[str]) -> list[list[Span]]:
    """Definitions and imports as they stand at the beginning of a line."""
    spans = []
    for text in texts:
        own = [(*m.span(2), "Class" if m[1] == "class" else "Function") for m in _DEFINED.finditer(text)]
        for m in _IMPORTED.finditer(text):
            own += [
                (*m.span(g), label)
                for g, label in ((1, "Module"), (2, "Module"), (3, "Name"), (4, "Module"))
                if m[g]
            ]
        spans.append(own)
    return spans


def flat(scores: Scores) -> dict[str, float]:
    return {
        **{name: own["f1"] for name, own in scores.items()},
        "ignore_f1": scores["relations_of_gold_entities"]["ignore_f1"],
        "scores": scores,  # pyrefly: ignore - precision and recall, for whoever reads the JSON
    }


def counted(task: str, splits: dict[str, Split], known: set) -> tuple[str, dict]:
    started = time.perf_counter()
    train, test = splits["train"], splits["test"]
    if task == "ast":
        name, spans = "regular expressions and co-occurrence", regular_expressions(test.texts)
    else:
        train_spans = [a.spans for a in train.gold]
        name, spans = "dictionary and co-occurrence", dictionary((train.texts, train_spans), test.texts)
    counts = Cooccurrence(train)
    entities = equal_strings(train, test.texts, spans)
    found = [counts.relate(t, a) for t, a in zip(test.texts, entities, strict=True)]
    related = [counts.relate(t, a) for t, a in zip(test.texts, test.gold, strict=True)]
    figures = flat(extraction_scores(test.texts, test.gold, found, related, known))
    return name, {**figures, "sentences": counts.sentences, "seconds": time.perf_counter() - started}


def neural(splits: dict[str, Split], known: set, args: argparse.Namespace) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128} if args.reduced else {}
    longest = max(len(t.encode("utf-8", "surrogateescape")) for s in splits.values() for t in s.texts)
    runs = {name: run for name, run in RUNS.items() if run[0] is None or run[0] < longest}
    unit = args.budget_minutes / (len(args.seeds) * sum(share for _, share, _ in runs.values()))
    for seed in args.seeds:
        for name, (most, share, tokens) in runs.items():
            config = ExtractConfig(
                train=args.output, output=args.output, preset="tiny" if args.reduced else "mini", model={**PATTERN, **small},
                seed=seed, epochs=300, patience=300, max_minutes=unit * share, device=args.device,
                batch_tokens=min(tokens, 16384) if args.reduced or args.task == "redocred" else tokens,
                pretrained=args.pretrained,
            )  # fmt: skip
            train, validation, test = (splits[part].cut(most) for part in ("train", "validation", "test"))
            extractor, summary, report = fit_knowledge(
                config, train.texts, train.gold, validation.texts, validation.gold,
                lambda e, name=name, seed=seed: print(name, seed, json.dumps(e), flush=True),
            )  # fmt: skip
            found, related = extractor.read(test.texts), extractor.relate(test.texts, test.gold)
            whole = splits["test"]
            figures = flat(extraction_scores(whole.texts, whole.gold, found, related, known))
            extra = {
                "seconds": summary.seconds,
                "epochs": summary.epochs,
                "steps": summary.steps,
                "seed": seed,
            }
            record(args.output, args.task, name, {**figures, **extra, "validation": report})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=("scirex", "redocred", "ast"), required=True)
    p.add_argument(
        "--data",
        type=Path,
        help="folder with the set's .jsonl.gz; for `ast` of Python files (default: stdlib)",
    )
    p.add_argument("--budget-minutes", type=float, default=8.0, help="all trainings together")
    p.add_argument("--device", default="auto")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--reduced", action="store_true", help="a model and a corpus for two cores")
    p.add_argument("--baselines-only", action="store_true", help="only what counts")
    p.add_argument(
        "--pretrained", type=Path, help="start from a `longnet train --objective mlm` model folder"
    )
    p.add_argument(
        "--output", type=Path, required=True, help="results are added to this JSON file; a .md is beside it"
    )
    args = p.parse_args()
    splits = load(args.task, args.data)
    if args.reduced:
        splits = {name: Split(s.texts[:24], s.gold[:24]) for name, s in splits.items()}
    sizes = {name: (len(s.texts), sum(len(a.relations) for a in s.gold)) for name, s in splits.items()}
    print(args.task, "documents and relations:", sizes, "Python", sys.version.split()[0], flush=True)
    known = facts(splits["train"].texts, splits["train"].gold)
    name, run = counted(args.task, splits, known)
    record(args.output, args.task, name, run)
    if not args.baselines_only:
        neural(splits, known, args)


if __name__ == "__main__":
    main()
