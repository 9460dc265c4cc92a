"""The command `longnet extract`: train, predict, eval, convert."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from longnet.tasks.annotations import Annotation, read_annotated, record_of
from longnet.tasks.convert import from_docred, from_python
from longnet.tasks.documents import Document, OnInvalid, read_documents
from longnet.tasks.extraction import ExtractConfig
from longnet.tasks.graph import build_graph, writer
from longnet.tasks.joint import train_extractor
from longnet.tasks.knowledge import KnowledgeExtractor, load_extractor
from longnet.tasks.metrics import set_f1
from longnet.tasks.scores import extraction_scores, facts


@dataclass(frozen=True, kw_only=True)
class ExtractPredict:
    """Find entities, and what a model has learned of clusters and relations: one JSON line per document, offsets in
    characters."""

    model: Path
    """Folder made by `longnet extract train`."""
    input: Path
    """Documents: .jsonl, .csv, a folder, or one text file."""
    output: Path | None = None
    """Where the lines go; standard output without it."""
    graph: Path | None = None
    """Also write a knowledge graph of all documents: .graphml, .jsonld, or a picture (.png, .svg, .pdf) of a small one."""
    merge_names: bool = False
    """In the graph, entities of one label and name (case and white space aside) are one, in whatever document."""
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
    """Strict span scores over all and per label; scores of clusters and relations where the model and the documents have them."""

    model: Path
    """Folder made by `longnet extract train`."""
    input: Path
    """Annotated documents."""
    known: Path | None = None
    """Training documents, for "Ign F1": relations that they hold (by the entities' names) do not count."""
    batch_tokens: int = 65536
    """Tokens read at once, where documents are short."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""
    device: str = "auto"
    """auto: CUDA where there is one, else CPU."""


@dataclass(frozen=True, kw_only=True)
class ExtractConvert:
    """Make annotated documents: from DocRED's JSON, or from Python source files, whose syntax trees are the annotation."""

    format: Literal["docred", "python"]
    """docred: a list, or one document a line, gzipped or not. python: a file or a folder."""
    input: Path
    """What to convert."""
    output: Path
    """The .jsonl to write."""


def extract(
    command: Annotated[
        Annotated[ExtractConfig, tyro.conf.subcommand("train", description="Train an extractor.")]
        | Annotated[ExtractPredict, tyro.conf.subcommand("predict")]
        | Annotated[ExtractEval, tyro.conf.subcommand("eval")]
        | Annotated[ExtractConvert, tyro.conf.subcommand("convert")],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Find entities and relations in documents of any length, read whole: train, predict, eval, convert."""
    if isinstance(command, ExtractConfig):
        _train(command)
    elif isinstance(command, ExtractPredict):
        _predict(command)
    elif isinstance(command, ExtractEval):
        _evaluate(command)
    else:
        _convert(command)


def _train(command: ExtractConfig) -> None:
    _, summary, report = train_extractor(
        command,
        lambda e: print(
            f"epoch {e['epoch']}: validation score {e['score']:.3f}, {e['seconds']:.0f} s", file=sys.stderr
        ),
    )
    names = {"f1": "span F1", "b_cubed": "B3 F1", "relation_f1": "relation F1"}
    figures = ", ".join(f"{name} {report[key]:.3f}" for key, name in names.items() if key in report)
    print(
        f"{summary.steps} steps in {summary.seconds:.0f} s, stopped by {summary.stopped}; epoch {summary.best_epoch}"
        f" kept: {figures} -> {command.output}"
    )


def _predict(command: ExtractPredict) -> None:
    write_graph = None if command.graph is None else writer(command.graph)
    extractor = load_extractor(command.model, command.device)
    if write_graph is not None and not isinstance(extractor, KnowledgeExtractor):
        raise ValueError(
            f"graph: expected a model that was trained on documents with clusters; got {command.model}, which finds entities"
            " only; train on clusters and relations, or leave --graph out"
        )
    documents = read_documents(command.input, text=command.text, on_invalid=command.on_invalid)
    found: list[Annotation] = []

    def results() -> Iterator[tuple[Document, Annotation]]:
        for begin in range(0, len(documents), 16):
            part = documents[begin : begin + 16]
            texts = [d.text for d in part]
            if isinstance(extractor, KnowledgeExtractor):
                yield from zip(part, extractor.read(texts, command.batch_tokens), strict=True)
            else:
                spans = extractor.extract(texts, command.batch_tokens)
                yield from zip(part, map(Annotation, spans), strict=True)

    stream = sys.stdout if command.output is None else open(command.output, "w", encoding="utf-8")  # noqa: SIM115
    try:
        for document, annotation in results():
            record = record_of(document, annotation)
            if not isinstance(extractor, KnowledgeExtractor):
                record = {"id": record["id"], "entities": record["entities"]}
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            found.append(annotation)
    finally:
        if command.output is not None:
            stream.close()
    if write_graph is not None and command.graph is not None:
        graph = build_graph(zip(documents, found, strict=True), command.merge_names)
        write_graph(graph, command.graph)
        print(
            f"{graph.number_of_nodes()} entities, {graph.number_of_edges()} relations -> {command.graph}",
            file=sys.stderr,
        )


def _evaluate(command: ExtractEval) -> None:
    extractor = load_extractor(command.model, command.device)
    documents, gold = read_annotated(command.input, command.on_invalid)
    texts = [d.text for d in documents]
    known = set()
    if command.known is not None:
        others, annotations = read_annotated(command.known, command.on_invalid)
        known = facts([d.text for d in others], annotations)
    if isinstance(extractor, KnowledgeExtractor):
        found = extractor.read(texts, command.batch_tokens)
    else:
        found = [Annotation(spans) for spans in extractor.extract(texts, command.batch_tokens)]
    labels = sorted({label for a in gold for _, _, label in a.spans} | set(extractor.labels))
    for label in labels:
        own = [[[s for s in a.spans if s[2] == label] for a in side] for side in (gold, found)]
        print(_line(label, set_f1(own[0], own[1])) + f"  of {sum(map(len, own[0]))}")
    if isinstance(extractor, KnowledgeExtractor) and any(a.clusters for a in gold):
        related = extractor.relate(texts, gold, command.batch_tokens)
        scores = extraction_scores(texts, gold, found, related, known)
        del scores["spans"]
        if not any(a.relations for a in gold):
            scores = {name: own for name, own in scores.items() if "relation" not in name}
        for name, figures in scores.items():
            ignored = f"  Ign F1 {figures['ignore_f1']:.3f}" if known and "ignore_f1" in figures else ""
            print(_line(name.replace("_", " "), figures) + ignored)
    spans = set_f1([a.spans for a in gold], [a.spans for a in found])
    print(f"{len(documents)} documents, strict span F1 {spans['f1']:.4f}")


def _line(name: str, figures: dict[str, float]) -> str:
    return f"{name:>26}  precision {figures['precision']:.3f}  recall {figures['recall']:.3f}  F1 {figures['f1']:.3f}"


def _convert(command: ExtractConvert) -> None:
    if not command.input.exists():
        raise ValueError(f"input: expected an existing file or folder; got {command.input}")
    if command.output.suffix != ".jsonl":
        raise ValueError(f"output: expected a file name ending in .jsonl; got {command.output}")
    records = list(from_docred(command.input) if command.format == "docred" else from_python(command.input))
    if not records:
        raise ValueError(f"{command.input}: expected at least one document; got none")
    with open(command.output, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    print(f"{len(records)} documents -> {command.output}")
