"""The command `longnet extract`: train, predict, eval."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longnet.tasks.documents import OnInvalid, read_documents
from longnet.tasks.extraction import EntityExtractor, ExtractConfig, read_annotated, train_extractor
from longnet.tasks.metrics import set_f1


@dataclass(frozen=True, kw_only=True)
class ExtractPredict:
    """Find entities: one JSON line per document, offsets in characters of the text."""

    model: Path
    """Folder made by `longnet extract train`."""
    input: Path
    """Documents: .jsonl, .csv, a folder, or one text file."""
    output: Path | None = None
    """Where the lines go; standard output without it."""
    text: str = "text"
    """Field that holds the text."""
    batch_tokens: int = 65536
    """Tokens read at once, where documents are short."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""
    device: str = "auto"
    """auto: CUDA where there is one, else CPU."""


@dataclass(frozen=True, kw_only=True)
class ExtractEval:
    """Strict span precision, recall and F1: over all, and per label."""

    model: Path
    """Folder made by `longnet extract train`."""
    input: Path
    """Annotated documents."""
    batch_tokens: int = 65536
    """Tokens read at once, where documents are short."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""
    device: str = "auto"
    """auto: CUDA where there is one, else CPU."""


def extract(
    command: Annotated[
        Annotated[ExtractConfig, tyro.conf.subcommand("train", description="Train an entity extractor.")]
        | Annotated[ExtractPredict, tyro.conf.subcommand("predict")]
        | Annotated[ExtractEval, tyro.conf.subcommand("eval")],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Find entities in documents of any length, read whole: train, predict, eval."""
    if isinstance(command, ExtractConfig):
        _, summary, report = train_extractor(
            command,
            lambda e: print(
                f"epoch {e['epoch']}: validation span F1 {e['score']:.3f}, {e['seconds']:.0f} s",
                file=sys.stderr,
            ),
        )
        print(
            f"{summary.steps} steps in {summary.seconds:.0f} s, stopped by {summary.stopped}; epoch {summary.best_epoch}"
            f" kept: span F1 {report['f1']:.3f} -> {command.output}"
        )
    elif isinstance(command, ExtractPredict):
        _predict(command)
    else:
        _evaluate(command)


def _predict(command: ExtractPredict) -> None:
    extractor = EntityExtractor.load(command.model, command.device)
    documents = read_documents(command.input, text=command.text, on_invalid=command.on_invalid)
    stream = sys.stdout if command.output is None else open(command.output, "w", encoding="utf-8")  # noqa: SIM115
    try:
        for begin in range(0, len(documents), 16):
            part = documents[begin : begin + 16]
            found = extractor.extract([d.text for d in part], command.batch_tokens)
            for document, spans in zip(part, found, strict=True):
                entities = [
                    {"start": start, "end": end, "label": label, "text": document.text[start:end]}
                    for start, end, label in spans
                ]
                stream.write(json.dumps({"id": document.id, "entities": entities}) + "\n")
            stream.flush()
    finally:
        if command.output is not None:
            stream.close()


def _evaluate(command: ExtractEval) -> None:
    extractor = EntityExtractor.load(command.model, command.device)
    documents, gold = read_annotated(command.input, command.on_invalid)
    found = extractor.extract([d.text for d in documents], command.batch_tokens)
    labels = sorted({label for spans in gold for _, _, label in spans} | set(extractor.labels))
    for label in labels:
        own = [[[s for s in spans if s[2] == label] for spans in side] for side in (gold, found)]
        figures = set_f1(own[0], own[1])
        count = sum(map(len, own[0]))
        print(
            f"{label:>24}  precision {figures['precision']:.3f}  recall {figures['recall']:.3f}  F1 {figures['f1']:.3f}"
            f"  of {count}"
        )
    print(f"{len(documents)} documents, strict span F1 {set_f1(gold, found)['f1']:.4f}")
