"""Entities of whole long documents, with character offsets: a start and an end tag per type on every byte."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.model.heads import MULTI, LongNetForTokenClassification
from longnet.tasks.classification import held_out
from longnet.tasks.documents import Document, OnInvalid, read_documents
from longnet.tasks.fit import FitConfig, FitSummary, build_model, fit, length_batches, pad, pick_device
from longnet.tasks.metrics import set_f1
from longnet.tasks.offsets import Offsets

Span = tuple[int, int, str]
"""(start, end, label), characters."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(FitConfig):
    """What `longnet extract train` does."""

    train: Path
    """.jsonl with text and entities: [{"start", "end", "label"}, ...], characters of the text; may be gzipped."""
    output: Path
    """Folder of the model to make."""
    validation: Path | None = None
    """Documents for early stopping; without it, a tenth of the training documents (by a hash of their ids)."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""


def entities_of(document: Document) -> list[Span]:
    """The gold spans of a document. Raises ValueError with its file and line."""
    spans = []
    for entity in document.fields["entities"]:
        given = entity if isinstance(entity, dict) else {}
        start, end, label = (given.get(name) for name in ("start", "end", "label"))
        if (
            type(start) is not int
            or type(end) is not int
            or not isinstance(label, str)
            or not 0 <= start < end <= len(document.text)
        ):
            raise ValueError(
                f"{document.source}: expected entities {{start, end, label}} with 0 <= start < end <="
                f" {len(document.text)} characters; got {entity!r}"
            )
        if "text" in entity and entity["text"] != document.text[start:end]:
            raise ValueError(
                f"{document.source}: entity {entity!r}: its text is {document.text[start:end]!r} at these offsets; offsets"
                " count characters, not bytes"
            )
        spans.append((start, end, label))
    return spans


def read_annotated(path: Path, on_invalid: OnInvalid) -> tuple[list[Document], list[list[Span]]]:
    """Documents with their gold spans."""
    documents = read_documents(path, required=("entities",), on_invalid=on_invalid)
    for document in documents:
        if not isinstance(document.fields["entities"], list):
            raise ValueError(
                f"{document.source}: expected a list of entities; got {document.fields['entities']!r}"
            )
    return documents, [entities_of(document) for document in documents]


def encode_tags(offsets: Offsets, spans: Iterable[Span], labels: Sequence[str]) -> np.ndarray:
    """(bytes, 2 L) of bool: column 2 l marks the first byte of every span of label l, column 2 l + 1 its last."""
    tags = np.zeros((len(offsets), 2 * len(labels)), bool)
    index = {label: i for i, label in enumerate(labels)}
    for start, end, label in spans:
        if label in index:
            first, last = offsets.bytes(start, end)
            tags[first, 2 * index[label]] = tags[last - 1, 2 * index[label] + 1] = True
    return tags


def decode_tags(offsets: Offsets, tags: np.ndarray, labels: Sequence[str], longest: int) -> list[Span]:
    """Spans from tags, sorted: a start goes with the nearest end of its label, an end without a start with the nearest start.

    So spans of different labels nest freely; of one label, spans that share a border do, and one strictly inside another
    is confused with it. Spans of more than `longest` bytes are not made.
    """
    spans = set()
    for i, label in enumerate(labels):
        starts = np.flatnonzero(tags[:, 2 * i]).tolist()
        ends = np.flatnonzero(tags[:, 2 * i + 1]).tolist()
        pairs, used = [], set()
        for start in starts:
            if (at := bisect_left(ends, start)) < len(ends):
                pairs.append((start, ends[at]))
                used.add(ends[at])
        for end in ends:
            if end not in used and (at := bisect_right(starts, end)):
                pairs.append((starts[at - 1], end))
        for first, last in pairs:
            if last - first < longest:
                spans.add((*offsets.characters(first, last + 1), label))
    return sorted(spans)


class EntityExtractor:
    """A trained model with its labels.

    Example:
        >>> EntityExtractor.load(Path("run")).extract(["Call me Ishmael."])  # doctest: +SKIP
        [[(8, 15, 'PER')]]
    """

    def __init__(self, model: LongNetForTokenClassification, labels: list[str], longest: int) -> None:
        self.model, self.labels, self.longest = model, labels, longest
        self.threshold = 0.5

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> EntityExtractor:
        """Raises ValueError for a folder that `longnet extract train` has not made."""
        try:
            task = json.loads((path / "task.json").read_text())
            labels, longest, threshold = task["entity_labels"], task["longest"], task["threshold"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"model: expected a folder made by `longnet extract train`; got {path}: {error!r}"
            ) from None
        model = LongNetForTokenClassification.from_pretrained(path).eval()
        torch.nn.Module.to(model, pick_device(device))
        extractor = cls(model, labels, longest)
        extractor.threshold = threshold
        return extractor

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        task = {"task": "extraction", "entity_labels": self.labels, "longest": self.longest}
        (path / "task.json").write_text(json.dumps({**task, "threshold": self.threshold}, indent=2))

    def extract(self, texts: Sequence[str], batch_tokens: int = 65536) -> list[list[Span]]:
        """Sorted spans (start, end, label) of every text, in characters."""
        results: list[list[Span]] = [[] for _ in texts]
        maps = [Offsets(text) for text in texts]
        for i, odds in self.odds(maps, batch_tokens):
            results[i] = decode_tags(maps[i], odds >= self.threshold, self.labels, self.longest)
        return results

    @torch.inference_mode()
    def odds(self, maps: Sequence[Offsets], batch_tokens: int = 65536) -> Iterator[tuple[int, np.ndarray]]:
        """(document, (bytes, 2 L) probabilities of its tags), documents in order of length."""
        if any(not len(offsets) for offsets in maps):
            raise ValueError("expected texts; got an empty one")
        device = next(self.model.parameters()).device
        for batch in length_batches([len(offsets) for offsets in maps], batch_tokens):
            rows, lengths = pad([maps[i].ids for i in batch], device)
            probabilities = self.model(input_ids=rows, lengths=lengths).logits.float().sigmoid().cpu().numpy()
            for row, i in enumerate(batch):
                yield i, probabilities[row, : len(maps[i])]


def train_extractor(
    config: ExtractConfig, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> tuple[EntityExtractor, FitSummary, dict[str, float]]:
    """Train, keep the best epoch by validation span F1, save to config.output.

    Raises:
        ValueError: bad input, with file and line; an output folder that exists.
    """
    if config.output.exists() and any(config.output.iterdir()):
        raise ValueError(f"output: expected a new or empty folder; got {config.output}; choose another")
    documents, gold = read_annotated(config.train, config.on_invalid)
    if config.validation is not None:
        others, others_gold = read_annotated(config.validation, config.on_invalid)
    else:
        marks = [held_out(document.id) for document in documents]
        if all(marks) or not any(marks):
            marks = [i == 0 for i in range(len(documents))]
        others, others_gold = _where(documents, marks, True), _where(gold, marks, True)
        documents, gold = _where(documents, marks, False), _where(gold, marks, False)
    if not any(gold) or not others:
        raise ValueError(
            f"{config.train}: expected at least two documents and one entity in training; got fewer"
        )
    extractor, summary, report = fit_extractor(
        config, [d.text for d in documents], gold, [d.text for d in others], others_gold, on_event
    )
    extractor.save(config.output)
    record = {"summary": asdict(summary), "validation": report}
    (config.output / "training.json").write_text(json.dumps(record, indent=2))
    return extractor, summary, report


def _where(items: list[Any], marks: list[bool], wanted: bool) -> list[Any]:
    return [item for item, mark in zip(items, marks, strict=True) if mark is wanted]


def fit_extractor(
    config: ExtractConfig,
    texts: Sequence[str],
    gold: Sequence[list[Span]],
    validation_texts: Sequence[str],
    validation_gold: Sequence[list[Span]],
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[EntityExtractor, FitSummary, dict[str, float]]:
    """As `train_extractor`, on texts in memory; writes nothing."""
    labels = sorted({label for spans in gold for _, _, label in spans})
    maps, others = [Offsets(text) for text in texts], [Offsets(text) for text in validation_texts]
    tags = [encode_tags(offsets, spans, labels) for offsets, spans in zip(maps, gold, strict=True)]
    widths = [
        b - a for m, spans in zip(maps, gold, strict=True) for s, e, _ in spans for a, b in [m.bytes(s, e)]
    ]
    names = [f"{border}-{label}" for label in labels for border in ("START", "END")]
    model = build_model(
        LongNetForTokenClassification,
        config,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=MULTI,
    )
    # Tags are rare: without this prior the first steps only learn that (Lin et al. 2017, section 3.3).
    torch.nn.init.constant_(model.classifier.bias, -5.0)
    extractor = EntityExtractor(model, labels, max(widths))
    device = next(model.parameters()).device
    report: dict[str, float] = {}

    def loss_of(batch: list[int]) -> Tensor:
        rows, lengths = pad([maps[i].ids for i in batch], device)
        wanted = torch.zeros(*rows.shape, len(names), device=device)
        counted = torch.zeros(*rows.shape, 1, device=device)
        for row, i in enumerate(batch):
            wanted[row, : len(maps[i])] = torch.from_numpy(tags[i]).to(device, wanted.dtype)
            counted[row, : len(maps[i])] = 1
        logits = model(input_ids=rows, lengths=lengths).logits.float()
        losses = F.binary_cross_entropy_with_logits(logits, wanted, weight=counted, reduction="sum")
        # Per tag that is there, not per byte: most bytes have none, and their number says nothing about the task.
        return losses / wanted.sum().clamp(min=1)

    def validate() -> float:
        spans: dict[float, list[list[Span]]] = {t: [[] for _ in others] for t in (0.2, 0.3, 0.4, 0.5, 0.6)}
        for i, odds in extractor.odds(others, config.batch_tokens):
            for threshold, found in spans.items():
                found[i] = decode_tags(others[i], odds >= threshold, labels, extractor.longest)
        scores = {t: set_f1(validation_gold, found) for t, found in spans.items()}
        extractor.threshold = max(scores, key=lambda t: scores[t]["f1"])
        report.update(scores[extractor.threshold], threshold=extractor.threshold)
        return report["f1"]

    sizes = [len(offsets) for offsets in maps]
    summary = fit(
        model, config, lambda g: length_batches(sizes, config.batch_tokens, g), loss_of, validate, on_event
    )
    with torch.no_grad():
        validate()
    return extractor, summary, report
