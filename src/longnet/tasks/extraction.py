"""Entities of whole long documents, with character offsets: a start and an end tag per type on every byte."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.model.folder import load_whole
from longnet.model.heads import MULTI, LongNetForTokenClassification
from longnet.tasks.annotations import Span
from longnet.tasks.documents import OnInvalid
from longnet.tasks.fit import (
    FitConfig,
    FitSummary,
    autocast,
    build_model,
    fit,
    length_batches,
    on_device,
    pad,
    pick_device,
)
from longnet.tasks.metrics import set_f1
from longnet.tasks.offsets import Offsets


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(FitConfig):
    """What `longnet extract train` does."""

    train: Path
    """.jsonl (also gzipped) with text, entities and, to learn them, clusters and relations; offsets are characters."""
    output: Path
    """Folder of the model to make."""
    validation: Path | None = None
    """Documents for early stopping; without it, a tenth of the training documents (by a hash of their ids)."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""


def encode_tags(offsets: Offsets, spans: Iterable[Span], labels: Sequence[str]) -> np.ndarray:
    """(bytes, 2 L) of bool: column 2 l marks the first byte of every span of label l, column 2 l + 1 its last."""
    tags = np.zeros((len(offsets), 2 * len(labels)), bool)
    index = {label: i for i, label in enumerate(labels)}
    for start, end, label in spans:
        if label in index:
            first, last = offsets.bytes(start, end)
            tags[first, 2 * index[label]] = tags[last - 1, 2 * index[label] + 1] = True
    return tags


# Probability of a tag before training: tags are rare, and without this the first steps only learn that (Lin et al. 2017,
# section 3.3).
TAG_PRIOR = -5.0


def tag_fields(labels: Sequence[str]) -> dict[str, Any]:
    """Configuration of a token classifier with a start and an end tag per label."""
    names = [f"{border}-{label}" for label in labels for border in ("START", "END")]
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": MULTI,
    }


def longest_span(maps: Sequence[Offsets], gold: Sequence[Iterable[Span]]) -> int:
    """In bytes."""
    borders = (m.bytes(s, e) for m, spans in zip(maps, gold, strict=True) for s, e, _ in spans)
    return max(last - first for first, last in borders)


def tag_loss(logits: Tensor, tags: Sequence[np.ndarray]) -> Tensor:
    """Binary cross entropy of logits (B, N, 2 L) for the rows' tags (n_b, 2 L), per tag that is there.

    Not per byte: most bytes have none, and their number says nothing about the task.
    """
    wanted, counted = torch.zeros_like(logits, dtype=torch.float32), torch.zeros_like(logits[..., :1]).float()
    for row, own in enumerate(tags):
        wanted[row, : len(own)] = on_device(own, wanted.device)
        counted[row, : len(own)] = 1
    losses = F.binary_cross_entropy_with_logits(logits.float(), wanted, weight=counted, reduction="sum")
    return losses / wanted.sum().clamp(min=1)


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

    task = "extraction"
    model_class: type[LongNetForTokenClassification] = LongNetForTokenClassification

    def __init__(self, model: LongNetForTokenClassification, labels: list[str], longest: int) -> None:
        self.model, self.labels, self.longest = model, labels, longest
        self.threshold = 0.5

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> EntityExtractor:
        """Raises ValueError for a folder that `longnet extract train` has not made."""
        try:
            task = json.loads((path / "task.json").read_text("utf-8"))
            model = load_whole(cls.model_class, path).eval()
            extractor = cls.from_settings(model, task)
            extractor.threshold = task["threshold"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"model: expected a folder made by `longnet extract train`; got {path}: {error!r}"
            ) from None
        torch.nn.Module.to(model, pick_device(device))
        return extractor

    @classmethod
    def from_settings(cls, model: Any, task: dict[str, Any]) -> EntityExtractor:
        return cls(model, task["entity_labels"], task["longest"])

    def settings(self) -> dict[str, Any]:
        """What task.json holds besides the name of the task."""
        return {"entity_labels": self.labels, "longest": self.longest, "threshold": self.threshold}

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        task = {"task": self.task, **self.settings()}
        (path / "task.json").write_text(json.dumps(task, indent=2, ensure_ascii=False), "utf-8")

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
            with autocast(device):
                logits = self.model(input_ids=rows, lengths=lengths).logits
            probabilities = logits.float().sigmoid().cpu().numpy()
            for row, i in enumerate(batch):
                yield i, probabilities[row, : len(maps[i])]


class ThresholdChoice:
    """The threshold of an extractor's tags with the best span F1, over documents that come one by one."""

    GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

    def __init__(self, extractor: EntityExtractor) -> None:
        self.extractor = extractor
        self.gold: list[list[Span]] = []
        self.found: dict[float, list[list[Span]]] = {t: [] for t in self.GRID}

    def add(self, offsets: Offsets, odds: np.ndarray, gold: list[Span]) -> None:
        """One document: odds (bytes, 2 L)."""
        self.gold.append(gold)
        for threshold, found in self.found.items():
            found.append(
                decode_tags(offsets, odds >= threshold, self.extractor.labels, self.extractor.longest)
            )

    def best(self) -> dict[str, float]:
        """Sets the extractor's threshold, of equally good ones that nearest to 0.5; its scores."""
        scores = {t: set_f1(self.gold, found) for t, found in self.found.items()}
        self.extractor.threshold = max(scores, key=lambda t: (scores[t]["f1"], -abs(t - 0.5)))
        return {**scores[self.extractor.threshold], "threshold": self.extractor.threshold}


def fit_extractor(
    config: ExtractConfig,
    texts: Sequence[str],
    gold: Sequence[list[Span]],
    validation_texts: Sequence[str],
    validation_gold: Sequence[list[Span]],
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[EntityExtractor, FitSummary, dict[str, float]]:
    """Train on texts in memory, keep the best epoch by validation span F1; writes nothing."""
    labels = sorted({label for spans in gold for _, _, label in spans})
    maps, others = [Offsets(text) for text in texts], [Offsets(text) for text in validation_texts]
    tags = [encode_tags(offsets, spans, labels) for offsets, spans in zip(maps, gold, strict=True)]
    model = build_model(LongNetForTokenClassification, config, **tag_fields(labels))
    torch.nn.init.constant_(model.classifier.bias, TAG_PRIOR)
    extractor = EntityExtractor(model, labels, longest_span(maps, gold))
    device = next(model.parameters()).device
    report: dict[str, float] = {}

    def loss_of(batch: list[int]) -> Tensor:
        rows, lengths = pad([maps[i].ids for i in batch], device)
        return tag_loss(model(input_ids=rows, lengths=lengths).logits, [tags[i] for i in batch])

    def validate() -> float:
        choice = ThresholdChoice(extractor)
        for i, odds in extractor.odds(others, config.batch_tokens):
            choice.add(others[i], odds, validation_gold[i])
        report.update(choice.best())
        return report["f1"]

    sizes = [len(offsets) for offsets in maps]
    summary = fit(
        model, config, lambda g: length_batches(sizes, config.batch_tokens, g), loss_of, validate, on_event
    )
    with torch.no_grad():
        validate()
    return extractor, summary, report
