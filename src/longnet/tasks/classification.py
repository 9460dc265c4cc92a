"""Document classification: whole documents in, labels with probabilities and the passages that counted out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.model.folder import load_whole
from longnet.model.heads import MULTI, SINGLE, LongNetForSequenceClassification
from longnet.tasks.documents import Document, OnInvalid, read_documents
from longnet.tasks.fit import FitConfig, FitSummary, build_model, fit, length_batches, pad, pick_device
from longnet.tasks.metrics import classification_report
from longnet.tasks.offsets import Offsets

PASSAGE_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(FitConfig):
    """What `longnet classify train` does."""

    train: Path
    """Labelled documents: .jsonl, .csv (both may be gzipped) or a folder with one folder per class."""
    output: Path
    """Folder of the model to make."""
    validation: Path | None = None
    """Documents for early stopping; without it, a tenth of the training documents (by a hash of their ids)."""
    label: str = "label"
    """Field that holds the label, or the list of labels (in CSV: separated by "|")."""
    text: str = "text"
    """Field that holds the text."""
    multi_label: bool = False
    """A document has any number of labels."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a label counts inversely to its frequency."""
    max_bytes: int | None = None
    """Read only the beginning of longer documents; None reads all of every document."""
    on_invalid: OnInvalid = "fail"
    """Bytes that are no UTF-8: fail, replace, or keep as they are."""


@dataclass(frozen=True)
class Prediction:
    """labels: the likeliest one, or all with probability >= 0.5. passages: {start, end, weight, text}, characters."""

    labels: list[str]
    probabilities: dict[str, float]
    passages: list[dict[str, Any]]
    truncated: bool


class DocumentClassifier:
    """A trained model with its labels.

    Example:
        >>> classifier = DocumentClassifier.load(Path("run"))  # doctest: +SKIP
        >>> classifier.predict(["a long text"])[0].labels  # doctest: +SKIP
        ['fiction']
    """

    def __init__(
        self,
        model: LongNetForSequenceClassification,
        labels: list[str],
        multi_label: bool,
        max_bytes: int | None,
    ) -> None:
        self.model, self.labels, self.multi_label, self.max_bytes = model, labels, multi_label, max_bytes

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> DocumentClassifier:
        """Raises ValueError for a folder that `longnet classify train` has not made."""
        try:
            task = json.loads((path / "task.json").read_text())
            labels, multi, most = task["labels"], task["multi_label"], task["max_bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"model: expected a folder made by `longnet classify train`; got {path}: {error!r}"
            ) from None
        model = load_whole(LongNetForSequenceClassification, path).eval()
        torch.nn.Module.to(model, pick_device(device))
        return cls(model, labels, multi, most)

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        task = {"task": "classification", "labels": self.labels, "multi_label": self.multi_label}
        (path / "task.json").write_text(json.dumps({**task, "max_bytes": self.max_bytes}, indent=2))

    def ids(self, text: str) -> np.ndarray:
        return Offsets(text).ids[: self.max_bytes]

    @torch.inference_mode()
    def logits(self, ids: Sequence[np.ndarray], batch_tokens: int = 65536) -> Tensor:
        """(documents, labels) fp32 on the CPU."""
        logits = torch.empty(len(ids), len(self.labels))
        for batch, output in self._outputs(ids, batch_tokens, False):
            logits[batch] = output.logits.float().cpu()
        return logits

    def predict(
        self, texts: Sequence[str], *, passages: int = 3, batch_tokens: int = 65536
    ) -> list[Prediction]:
        """One prediction per text, in order, with the `passages` that got most pooling weight."""
        maps = [Offsets(text) for text in texts]
        ids = [offsets.ids[: self.max_bytes] for offsets in maps]
        results: list[Any] = [None] * len(texts)
        with torch.inference_mode():
            for batch, output in self._outputs(ids, batch_tokens, passages > 0):
                odds = self._probabilities(output.logits.float()).cpu()
                for row, i in enumerate(batch):
                    weights = None
                    if passages > 0:
                        weights = output.pooling_weights[row, : len(ids[i])].float().cpu().numpy()
                    results[i] = self._prediction(maps[i], odds[row], weights, passages, len(ids[i]))
        return results

    def _outputs(
        self, ids: Sequence[np.ndarray], batch_tokens: int, pooling: bool
    ) -> Iterator[tuple[list[int], Any]]:
        if any(not len(row) for row in ids):
            raise ValueError("expected texts; got an empty one")
        device = next(self.model.parameters()).device
        for batch in length_batches([len(row) for row in ids], batch_tokens):
            rows, lengths = pad([ids[i] for i in batch], device)
            yield batch, self.model(input_ids=rows, lengths=lengths, return_pooling=pooling)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def chosen(self, odds: Tensor) -> list[str]:
        """The labels that probabilities (L,) amount to."""
        if not self.multi_label:
            return [self.labels[int(odds.argmax())]]
        return [label for label, p in zip(self.labels, odds.tolist(), strict=True) if p >= 0.5]

    def _prediction(
        self, offsets: Offsets, odds: Tensor, weights: np.ndarray | None, count: int, read: int
    ) -> Prediction:
        found = [] if weights is None else important_passages(offsets, weights, count)
        probabilities = dict(zip(self.labels, [round(p, 6) for p in odds.tolist()], strict=True))
        return Prediction(self.chosen(odds), probabilities, found, read < len(offsets))


def important_passages(offsets: Offsets, weights: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The `count` windows of about 256 bytes with most weight, moved to word borders where there are any near.

    weights: (bytes read,), summing to 1. Windows do not overlap; start and end are characters of the text.
    """
    cumulative = np.concatenate(([0.0], np.cumsum(weights, dtype=np.float64)))
    borders = [0]
    while borders[-1] < len(weights):
        _, last = offsets.characters(0, min(borders[-1] + PASSAGE_BYTES, len(weights)))
        end = int(offsets.starts[last])
        if end < len(weights):
            # Back to the last white space of this window, so that words stay whole; nothing to do in scripts without.
            begin = offsets.characters(borders[-1], borders[-1] + 1)[0]
            space = max(offsets.text.rfind(c, begin + (last - begin) // 2, last) for c in " \n\t")
            end = int(offsets.starts[space + 1]) if space >= 0 else end
        borders.append(end)
    borders[-1] = len(weights)
    mass = np.diff(cumulative[borders])
    passages = []
    for i in np.argsort(-mass, kind="stable")[:count].tolist():
        start, end = offsets.characters(borders[i], borders[i + 1])
        passages.append(
            {"start": start, "end": end, "weight": float(mass[i]), "text": offsets.text[start:end]}
        )
    return passages


def labels_of(document: Document, name: str, multi_label: bool) -> list[str]:
    """The labels of a document. Raises ValueError with its file and line."""
    value = document.fields[name]
    if multi_label and isinstance(value, str):
        value = [part.strip() for part in value.split("|") if part.strip()]
    many = value if isinstance(value, list) else [value]
    if any(not isinstance(x, str | int) or isinstance(x, bool) for x in many) or (
        isinstance(value, list) and not multi_label
    ):
        wanted = "a list of labels" if multi_label else "one label (multi_label allows several)"
        raise ValueError(f"{document.source}: {name!r}: expected {wanted}; got {value!r}")
    return [str(x) for x in many]


def read_labelled(
    path: Path,
    label: str,
    text: str,
    multi_label: bool,
    on_invalid: OnInvalid,
    known: Sequence[str] | None = None,
) -> tuple[list[Document], list[list[str]]]:
    """Documents and their labels; with `known`, other labels are an error that names file and line."""
    documents = read_documents(path, required=(label,), text=text, on_invalid=on_invalid)
    labels = [labels_of(document, label, multi_label) for document in documents]
    for document, own in zip(documents, labels, strict=True):
        if known is not None and (unknown := sorted(set(own) - set(known))):
            raise ValueError(
                f"{document.source}: expected labels among {', '.join(known)}; got {', '.join(unknown)}; the model was not"
                " trained on them"
            )
    return documents, labels


def held_out(document_id: str, share: int = 10) -> bool:
    """Whether a document belongs to the held-out 1 / share: by a hash of its id, the same on every machine."""
    return (
        int.from_bytes(hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).digest()[:4], "big")
        % share
        == 0
    )


def train_classifier(
    config: ClassifyConfig, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> tuple[DocumentClassifier, FitSummary, dict[str, Any]]:
    """Train, keep the best epoch by validation macro F1, save to config.output.

    Returns:
        (classifier, summary, report of the validation documents).

    Raises:
        ValueError: bad input, with file and line; an output folder that exists.
    """
    if config.output.exists() and any(config.output.iterdir()):
        raise ValueError(f"output: expected a new or empty folder; got {config.output}; choose another")
    given = (config.label, config.text, config.multi_label, config.on_invalid)
    documents, gold = read_labelled(config.train, *given)
    known = sorted({label for own in gold for label in own})
    if len(known) < 2 and not config.multi_label:
        raise ValueError(f"{config.train}: expected at least two different labels; got {', '.join(known)}")
    if config.validation is not None:
        others, others_gold = read_labelled(config.validation, *given, known)
    else:
        marks = [held_out(document.id) for document in documents]
        if len(documents) > 1 and (all(marks) or not any(marks)):
            marks = [i == 0 for i in range(len(documents))]
        others = [d for d, mark in zip(documents, marks, strict=True) if mark]
        others_gold = [g for g, mark in zip(gold, marks, strict=True) if mark]
        documents = [d for d, mark in zip(documents, marks, strict=True) if not mark]
        gold = [g for g, mark in zip(gold, marks, strict=True) if not mark]
    if not documents or not others:
        raise ValueError(
            f"{config.train}: expected at least two documents, to hold one out; give --validation"
        )
    classifier, summary, report = fit_classifier(
        config, known, [d.text for d in documents], gold, [d.text for d in others], others_gold, on_event
    )
    classifier.save(config.output)
    record = {"summary": asdict(summary), "validation": report}
    (config.output / "training.json").write_text(json.dumps(record, indent=2))
    return classifier, summary, report


def fit_classifier(
    config: ClassifyConfig,
    labels: list[str],
    texts: Sequence[str],
    gold: Sequence[list[str]],
    validation_texts: Sequence[str],
    validation_gold: Sequence[list[str]],
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[DocumentClassifier, FitSummary, dict[str, Any]]:
    """As `train_classifier`, on texts in memory; writes nothing."""
    multi = config.multi_label
    model = build_model(
        LongNetForSequenceClassification,
        config,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=MULTI if multi else SINGLE,
    )
    classifier = DocumentClassifier(model, labels, multi, config.max_bytes)
    ids, others = [classifier.ids(t) for t in texts], [classifier.ids(t) for t in validation_texts]
    targets = _targets(gold, labels, multi)
    weights = _class_weights(gold, labels, config.class_weights, multi)
    device = next(model.parameters()).device
    report: dict[str, Any] = {}

    def loss_of(batch: list[int]) -> Tensor:
        rows, lengths = pad([ids[i] for i in batch], device)
        logits, wanted = model(input_ids=rows, lengths=lengths).logits.float(), targets[batch].to(device)
        weight = None if weights is None else weights.to(device)
        if multi:
            return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
        # "sum" over the batch and division by its size: a document of a rare class counts more in every batch, also in
        # a batch of one, where PyTorch's weighted mean would cancel the weight.
        return F.cross_entropy(logits, wanted, weight=weight, reduction="sum") / len(batch)

    def validate() -> float:
        logits = classifier.logits(others, config.batch_tokens)
        predicted = [classifier.chosen(row) for row in classifier._probabilities(logits)]
        report.update(classification_report(validation_gold, predicted, labels))
        return report["macro_f1"] + 1e-3 * report["accuracy"]  # accuracy breaks ties

    sizes = [len(row) for row in ids]
    summary = fit(
        model, config, lambda g: length_batches(sizes, config.batch_tokens, g), loss_of, validate, on_event
    )
    with torch.no_grad():
        validate()
    return classifier, summary, report


def _targets(gold: Sequence[list[str]], labels: list[str], multi: bool) -> Tensor:
    index = {label: i for i, label in enumerate(labels)}
    if not multi:
        return torch.tensor([index[own[0]] for own in gold])
    targets = torch.zeros(len(gold), len(labels))
    for row, own in enumerate(gold):
        targets[row, [index[label] for label in own]] = 1
    return targets


def _class_weights(gold: Sequence[list[str]], labels: list[str], kind: str, multi: bool) -> Tensor | None:
    """Single label: documents / (labels x count). Multi-label: negatives / positives, at most 100."""
    if kind == "none":
        return None
    counts = Counter(label for own in gold for label in own)
    if multi:
        return torch.tensor([min(100.0, (len(gold) - counts[c]) / max(1, counts[c])) for c in labels])
    return torch.tensor([len(gold) / (len(labels) * max(1, counts[c])) for c in labels])


def plot_confusion(confusion: list[list[int]], labels: list[str], picture: Path) -> bool:
    """Draw a confusion matrix, rows normalised; False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    counts = np.array(confusion, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.0, 0.35 * len(labels) + 2)
    figure, axes = pyplot.subplots(figsize=(side, side))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="gold")
    axes.set_xticks(range(len(labels)), [label[:24] for label in labels], rotation=90)
    axes.set_yticks(range(len(labels)), [label[:24] for label in labels])
    if len(labels) <= 20:
        for i, j in np.argwhere(counts > 0).tolist():
            axes.text(
                j,
                i,
                str(int(counts[i, j])),
                ha="center",
                va="center",
                color="w" if shares[i, j] > 0.5 else "k",
            )
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return True
