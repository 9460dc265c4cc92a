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
import re
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from extract_entities import dictionary
from runs import WARM_DOCUMENTS, Row, log, machine, parser, run_rows, settings, summary_of

from longnet.tasks.annotations import Annotation, Span, annotation_of, read_annotated, role_tuples
from longnet.tasks.classification import held_out
from longnet.tasks.convert import from_docred, from_python
from longnet.tasks.documents import Document
from longnet.tasks.extraction import ExtractConfig
from longnet.tasks.joint import Prepared, fit_knowledge, prepare
from longnet.tasks.knowledge import named
from longnet.tasks.mentions import normalise
from longnet.tasks.scores import Scores, aligned_tuples, extraction_scores, facts, tuple_scores
from results import by_length, finished, record

COMPARED = ("whole", "4096", "512", "scratch")
TASKS = {"scirex": "SciREX", "redocred": "Re-DocRED", "ast": "Python's standard library"}
ROLES = ("Material", "Method", "Metric", "Task")
Tuples = set[tuple[str, ...]]
SMALLEST, LARGEST = 8_000, 200_000
SKIPPED = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages"))


@dataclass(frozen=True)
class Split:
    """tuples: SciREX's results as the set has them; None for other sets."""

    texts: list[str]
    gold: list[Annotation]
    tuples: list[Tuples] | None = None

    def first(self, count: int | None) -> Split:
        return Split(self.texts[:count], self.gold[:count], self.tuples and self.tuples[:count])

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
        tuples = [{tuple(r[role] for role in ROLES) for r in d.fields["relations"]} for d in documents]
        splits[name] = Split([d.text for d in documents], gold, tuples)
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


def test_scores(test: Split, found: list[Annotation], related: list[Annotation], known: set) -> dict:
    """F1 of everything, of all documents and of the long ones; for SciREX also of its tuples."""
    scores = extraction_scores(test.texts, test.gold, found, related, known)

    def some(own: list[int]) -> dict[str, float]:
        parts = ([side[i] for i in own] for side in (test.texts, test.gold, found, related))
        return {key: value["f1"] for key, value in extraction_scores(*parts).items() if key in MEASURES}

    figures = {
        **{name: own["f1"] for name, own in scores.items()},
        "ignore_f1": scores["relations_of_gold_entities"]["ignore_f1"],
        "longer_than": by_length(test.texts, some),
    }
    if test.tuples is not None:
        more = n_ary(test.gold, test.tuples, found, related)
        figures |= {key: own["f1"] for key, own in more.items()}
        scores |= more
    return {**figures, "scores": scores}


MEASURES = ("spans", "relations", "relations_of_gold_entities")


def n_ary(
    gold: list[Annotation], tuples: list[Tuples], found: list[Annotation], related: list[Annotation]
) -> Scores:
    """SciREX's 4-tuples (without the score) and their projections to two roles, end to end and between gold entities."""
    names = [a.clusters for a in gold]
    ends = [aligned_tuples(g, f, ROLES) for g, f in zip(gold, found, strict=True)]
    given = [role_tuples(a.relations, ROLES) for a in related]
    return {
        **tuple_scores(tuples, ends, names),
        **{f"{key}_of_gold_entities": own for key, own in tuple_scores(tuples, given, names).items()},
    }


def counted(task: str, splits: dict[str, Split], known: set) -> dict:
    started = time.perf_counter()
    train, test = splits["train"], splits["test"]
    if task == "ast":
        spans = regular_expressions(test.texts)
    else:
        spans = dictionary((train.texts, [a.spans for a in train.gold]), test.texts)
    counts = Cooccurrence(train)
    entities = equal_strings(train, test.texts, spans)
    found = [counts.relate(t, a) for t, a in zip(test.texts, entities, strict=True)]
    related = [counts.relate(t, a) for t, a in zip(test.texts, test.gold, strict=True)]
    figures = test_scores(test, found, related, known)
    return {**figures, "sentences": counts.sentences, "seconds": time.perf_counter() - started}


class Comparison:
    """Trains and tests the models of one task. Documents are prepared once for every truncation, not once a training."""

    def __init__(self, splits: dict[str, Split], known: set, args: argparse.Namespace) -> None:
        self.splits, self.known, self.args = splits, known, args
        self.prepared: dict[tuple[int | None, bool], Prepared] = {}

    def documents(self, row: Row, warm: bool) -> Prepared:
        key = (row.bytes, warm)
        if key not in self.prepared:
            most = WARM_DOCUMENTS if warm else None
            train, judged = (self.splits[part].first(most).cut(row.bytes) for part in ("train", "validation"))
            self.prepared[key] = prepare(train.texts, train.gold, judged.texts, judged.gold)
        return self.prepared[key]

    def train(self, row: Row, seed: int, minutes: float | None) -> dict | None:
        tokens = 65536 if row.bytes is None else 32768 if row.bytes == 4096 else 8192
        config = ExtractConfig(
            **settings(row, seed, minutes, self.args),
            batch_tokens=min(tokens, 16384) if self.args.reduced or self.args.task == "redocred" else tokens,
        )
        prepared = self.documents(row, minutes is None)
        extractor, summary, report = fit_knowledge(config, prepared, log(config, row.name))
        whole = self.splits["test"].first(WARM_DOCUMENTS if minutes is None else None)
        test = whole.cut(row.bytes)
        found, related = extractor.read(test.texts), extractor.relate(test.texts, test.gold)
        if minutes is None:
            return None
        figures = test_scores(whole, found, related, self.known)
        return {**figures, **summary_of(summary), "validation": report}


def main() -> None:
    p = parser(__doc__, COMPARED)
    p.add_argument("--task", choices=tuple(TASKS), required=True)
    args = p.parse_args()
    began, task = time.perf_counter(), TASKS[args.task]
    splits = load(args.task, args.data)
    if args.reduced:
        splits = {name: s.first(24) for name, s in splits.items()}
    sizes = {name: (len(s.texts), sum(len(a.relations) for a in s.gold)) for name, s in splits.items()}
    print(task, "documents and relations:", sizes, "Python", sys.version.split()[0], flush=True)
    known = facts(splits["train"].texts, splits["train"].gold)
    print(f"{task}: read after {time.perf_counter() - began:.1f} s", flush=True)
    if not args.baselines_only:
        run_rows(task, len(splits["test"].texts), args, Comparison(splits, known, args).train)
    first = "regular expressions" if args.task == "ast" else "dictionary"
    baseline = f"{first} and co-occurrence"
    if not finished(args.output, task, baseline):
        figures = counted(args.task, splits, known)
        facts_of_run = {"documents": len(splits["test"].texts), "machine": machine(torch.device("cpu"))}
        record(args.output, task, baseline, {**figures, **facts_of_run})


if __name__ == "__main__":
    main()
