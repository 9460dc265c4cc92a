"""The command `longnet classify`: train, predict, eval."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from longnet.tasks.classification import (
    ClassifyConfig,
    DocumentClassifier,
    plot_confusion,
    read_labelled,
    train_classifier,
)
from longnet.tasks.documents import OnInvalid, read_documents
from longnet.tasks.metrics import classification_report


@dataclass(frozen=True, kw_only=True)
class ClassifyPredict:
    """Predict labels: one JSON line per document, with probabilities and the passages that counted most."""

    model: Path
    """Folder made by `longnet classify train`."""
    input: Path
    """Documents: .jsonl, .csv, a folder, or one text file."""
    output: Path | None = None
    """Where the lines go; standard output without it."""
    text: str = "text"
    """Field that holds the text."""
    passages: int = 3
    """Passages per document."""
    batch_tokens: int = 65536
    """Tokens read at once, where documents are short."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""
    device: str = "auto"
    """auto: CUDA where there is one, else CPU."""


@dataclass(frozen=True, kw_only=True)
class ClassifyEval:
    """Accuracy, F1 per class and over all, and a picture of the confusion matrix."""

    model: Path
    """Folder made by `longnet classify train`."""
    input: Path
    """Labelled documents."""
    label: str = "label"
    """Field that holds the label."""
    text: str = "text"
    """Field that holds the text."""
    report: Path | None = None
    """Write all figures to this JSON file."""
    confusion: Path | None = None
    """Draw the confusion matrix to this picture (needs matplotlib)."""
    batch_tokens: int = 65536
    """Tokens read at once, where documents are short."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""
    device: str = "auto"
    """auto: CUDA where there is one, else CPU."""


def classify(
    command: Annotated[
        Annotated[ClassifyConfig, tyro.conf.subcommand("train", description="Train a document classifier.")]
        | Annotated[ClassifyPredict, tyro.conf.subcommand("predict")]
        | Annotated[ClassifyEval, tyro.conf.subcommand("eval")],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Classify documents of any length, read whole: train, predict, eval."""
    if isinstance(command, ClassifyConfig):
        _train(command)
    elif isinstance(command, ClassifyPredict):
        _predict(command)
    else:
        _evaluate(command)


def _train(config: ClassifyConfig) -> None:
    def show(event: dict[str, Any]) -> None:
        print(
            f"epoch {event['epoch']}: validation macro F1 {event['score']:.3f}, {event['seconds']:.0f} s",
            file=sys.stderr,
        )

    if config.max_bytes is not None:
        print(f"reading only the first {config.max_bytes} bytes of every document", file=sys.stderr)
    _, summary, report = train_classifier(config, show)
    print(
        f"{summary.steps} steps in {summary.seconds:.0f} s, stopped by {summary.stopped}; epoch {summary.best_epoch} kept:"
        f" accuracy {report['accuracy']:.3f}, macro F1 {report['macro_f1']:.3f} -> {config.output}"
    )


def _predict(command: ClassifyPredict) -> None:
    classifier = DocumentClassifier.load(command.model, command.device)
    documents = read_documents(command.input, text=command.text, on_invalid=command.on_invalid)
    stream = sys.stdout if command.output is None else open(command.output, "w", encoding="utf-8")  # noqa: SIM115
    cut = 0
    try:
        # A few documents at a time: lines appear while the rest is read.
        for begin in range(0, len(documents), 64):
            part = documents[begin : begin + 64]
            predictions = classifier.predict(
                [d.text for d in part], passages=command.passages, batch_tokens=command.batch_tokens
            )
            for document, prediction in zip(part, predictions, strict=True):
                cut += prediction.truncated
                stream.write(json.dumps({"id": document.id, **vars(prediction)}) + "\n")
            stream.flush()
    finally:
        if command.output is not None:
            stream.close()
    if cut:
        print(
            f"{cut} documents were longer than the {classifier.max_bytes} bytes this model reads",
            file=sys.stderr,
        )


def _evaluate(command: ClassifyEval) -> None:
    classifier = DocumentClassifier.load(command.model, command.device)
    documents, gold = read_labelled(
        command.input,
        command.label,
        command.text,
        classifier.multi_label,
        command.on_invalid,
        classifier.labels,
    )
    logits = classifier.logits([classifier.ids(d.text) for d in documents], command.batch_tokens)
    odds = torch.sigmoid(logits) if classifier.multi_label else torch.softmax(logits, -1)
    report = classification_report(gold, [classifier.chosen(row) for row in odds], classifier.labels)
    for label, figures in report["per_class"].items():
        print(
            f"{label:>24}  precision {figures['precision']:.3f}  recall {figures['recall']:.3f}"
            f"  F1 {figures['f1']:.3f}  of {figures['support']}"
        )
    print(
        f"{report['documents']} documents, accuracy {report['accuracy']:.4f}, macro F1 {report['macro_f1']:.4f}"
    )
    if command.report is not None:
        command.report.write_text(json.dumps(report, indent=2))
    if command.confusion is not None:
        if "confusion" not in report:
            raise ValueError("confusion: expected single labels; a multi-label model has no confusion matrix")
        if not plot_confusion(report["confusion"], classifier.labels, command.confusion):
            raise ValueError(
                'confusion: expected matplotlib; install it with pip install "longnet-attention[plots]"'
            )
