"""What the classification recipes share: the models that are compared, and the baselines.

Compared on the same documents: the LongNet that reads whole documents (from masked-span pre-training, and from
nothing), the same LongNet that sees only the first 4,096 or 512 bytes, TF-IDF + logistic regression, and the most frequent label.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from runs import WARM_DOCUMENTS, Row, log, machine, run_rows, settings, summary_of

from longnet.tasks.classification import ClassifyConfig, fit_classifier
from longnet.tasks.fit import autocast, pick_device
from longnet.tasks.metrics import classification_report
from results import by_length, finished, record

COMPARED = ("whole", "4096", "512", "scratch")
TFIDF = "TF-IDF + logistic regression"
MAJORITY = "most frequent label"


@dataclass(frozen=True)
class Split:
    """Texts and their single labels."""

    texts: list[str]
    labels: list[str]


def read_lines(path: Path) -> list[dict]:
    """The records of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def compare(task: str, splits: dict[str, Split], args: argparse.Namespace) -> None:
    """Run what `args` asks for on `splits` and write the figures."""
    labels = sorted(set(splits["train"].labels))
    # A label that training has never seen cannot be learned: such documents are counted, not hidden.
    for name in ("validation", "test"):
        known = [label in labels for label in splits[name].labels]
        if not all(known):
            print(
                f"{task}: {known.count(False)} {name} documents have a label without training documents; left out"
            )
            kept = [
                (t, y) for t, y, k in zip(splits[name].texts, splits[name].labels, known, strict=True) if k
            ]
            splits[name] = Split([t for t, _ in kept], [y for _, y in kept])
    if not args.baselines_only:
        run_rows(
            task,
            len(splits["test"].texts),
            args,
            lambda row, seed, minutes: neural(splits, labels, args, row, seed, minutes),
        )
    baselines(task, splits, labels, args)  # last: no GPU waits for them


def score(gold: list[str], predicted: list[str], labels: list[str]) -> dict[str, float]:
    report = classification_report([[g] for g in gold], [[p] for p in predicted], labels)
    return {"accuracy": report["accuracy"], "macro_f1": report["macro_f1"]}


def test_scores(test: Split, predicted: list[str], labels: list[str]) -> dict:
    """Of all test documents, and of the long ones."""

    def some(own: list[int]) -> dict[str, float]:
        return score([test.labels[i] for i in own], [predicted[i] for i in own], labels)

    return {**some(list(range(len(predicted)))), "longer_than": by_length(test.texts, some)}


def baselines(task: str, splits: dict[str, Split], labels: list[str], args: argparse.Namespace) -> None:
    test = splits["test"]
    facts = {"documents": len(test.texts), "machine": machine(torch.device("cpu"))}
    if not finished(args.output, task, MAJORITY):
        most = Counter(splits["train"].labels).most_common(1)[0][0]
        record(args.output, task, MAJORITY, {**test_scores(test, [most] * len(test.texts), labels), **facts})
    if not finished(args.output, task, TFIDF):
        record(args.output, task, TFIDF, {**tfidf(splits, labels), **facts})


def tfidf(splits: dict[str, Split], labels: list[str]) -> dict:
    """Word 1- and 2-grams, one class against the rest; regularisation and class weights chosen on validation.

    Deterministic: one run is all seeds.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier

    started = time.perf_counter()
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, max_features=100_000)
    x = {name: (vectorizer.fit_transform if name == "train" else vectorizer.transform)(splits[name].texts)
         for name in ("train", "validation", "test")}  # fmt: skip
    best, predicted = -1.0, []
    for alpha, weight in itertools.product((1e-3, 1e-4, 1e-5), (None, "balanced")):
        model = SGDClassifier(loss="log_loss", alpha=alpha, class_weight=weight, max_iter=50, random_state=0)
        model.fit(x["train"], splits["train"].labels)
        figures = score(splits["validation"].labels, model.predict(x["validation"]).tolist(), labels)
        if figures["macro_f1"] + 1e-3 * figures["accuracy"] > best:
            best = figures["macro_f1"] + 1e-3 * figures["accuracy"]
            predicted = model.predict(x["test"]).tolist()
    return {**test_scores(splits["test"], predicted, labels), "seconds": time.perf_counter() - started}


def neural(
    splits: dict[str, Split],
    labels: list[str],
    args: argparse.Namespace,
    row: Row,
    seed: int,
    minutes: float | None,
) -> dict | None:
    most = WARM_DOCUMENTS if minutes is None else None
    train, validation, test = (Split(s.texts[:most], s.labels[:most]) for s in splits.values())
    config = ClassifyConfig(
        **settings(row, seed, minutes, args), max_bytes=row.bytes, class_weights="balanced",
        batch_tokens=8192 if args.reduced else 65536 if row.bytes is None else 32768,
    )  # fmt: skip
    gold = [[[y] for y in split.labels] for split in (train, validation)]
    classifier, summary, report = fit_classifier(
        config, labels, train.texts, gold[0], validation.texts, gold[1], log(config, row.name)
    )
    with autocast(pick_device(args.device)):
        logits = classifier.logits([classifier.ids(t) for t in test.texts])
    if minutes is None:
        return None
    predicted = [labels[i] for i in logits.argmax(-1).tolist()]
    extra = {**summary_of(summary), "validation_macro_f1": report["macro_f1"]}
    return {**test_scores(test, predicted, labels), **extra}
