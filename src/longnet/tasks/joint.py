"""Training of `longnet extract`: entities, and jointly with them clusters and relations where the documents hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.model.relations import (
    LongNetForKnowledgeExtraction,
    Reading,
    adaptive_threshold_loss,
    antecedent_loss,
)
from longnet.tasks.annotations import Annotation, Span, read_annotated
from longnet.tasks.classification import held_out
from longnet.tasks.extraction import (
    TAG_PRIOR,
    EntityExtractor,
    ExtractConfig,
    ThresholdChoice,
    encode_tags,
    fit_extractor,
    longest_span,
    tag_fields,
    tag_loss,
)
from longnet.tasks.fit import FitSummary, build_model, fit, length_batches, on_device, pad
from longnet.tasks.knowledge import MARGINS, SALIENCES, Entities, KnowledgeExtractor, Mentions
from longnet.tasks.metrics import b_cubed, set_f1
from longnet.tasks.offsets import Offsets

# Pairs of entities of one document that a step of training looks at, besides the related ones.
TRAINED_PAIRS = 2048


def train_extractor(
    config: ExtractConfig, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> tuple[EntityExtractor, FitSummary, dict[str, float]]:
    """Train what the documents hold (entities; with clusters and relations if they have them), keep the best epoch, save.

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
    if not any(a.spans for a in gold) or not others:
        raise ValueError(
            f"{config.train}: expected at least two documents and one entity in training; got fewer"
        )
    texts, other_texts = [d.text for d in documents], [d.text for d in others]
    if any(a.clusters for a in gold):
        prepared = prepare(texts, gold, other_texts, others_gold)
        extractor, summary, report = fit_knowledge(config, prepared, on_event)
    else:
        spans, other_spans = [a.spans for a in gold], [a.spans for a in others_gold]
        extractor, summary, report = fit_extractor(config, texts, spans, other_texts, other_spans, on_event)
    extractor.save(config.output)
    record = {"summary": asdict(summary), "validation": report}
    (config.output / "training.json").write_text(json.dumps(record, indent=2))
    return extractor, summary, report


def _where(items: list[Any], marks: list[bool], wanted: bool) -> list[Any]:
    return [item for item, mark in zip(items, marks, strict=True) if mark is wanted]


def fit_knowledge(
    config: ExtractConfig,
    prepared: Prepared,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[KnowledgeExtractor, FitSummary, dict[str, float]]:
    """Train entities, clusters and relations jointly; writes nothing.

    The loss is the sum of four: tags (per tag), antecedents (per mention of an entity), salience (per mention),
    relations (per relation). The best epoch has the largest mean of validation span F1, B3 F1 of gold mentions and
    relation F1 of gold entities.
    """
    extractor = _new_extractor(config, prepared)
    device = next(extractor.model.parameters()).device
    trained, judged = prepared.trained, prepared.judged
    generator = np.random.default_rng(config.seed)
    report: dict[str, float] = {}

    def loss_of(batch: list[int]) -> Tensor:
        examples = [trained[i] for i in batch]
        rows, lengths = pad([e.offsets.ids for e in examples], device)
        positions = [on_device(e.mentions.positions(), device) for e in examples]
        reading = extractor.model.read(rows, lengths, positions)
        tags = [encode_tags(e.offsets, e.annotation.spans, extractor.labels) for e in examples]
        return tag_loss(reading.logits, tags) + graph_loss(extractor, examples, reading, generator)

    def validate() -> float:
        report.update(judge(extractor, judged, config.batch_tokens))
        return report["score"]

    sizes = [len(e.offsets) for e in trained]
    summary = fit(
        extractor.model,
        config,
        lambda g: length_batches(sizes, config.batch_tokens, g),
        loss_of,
        validate,
        on_event,
    )
    with torch.no_grad():
        validate()
        report |= choose_salience(extractor, judged, config.batch_tokens)
    return extractor, summary, report


def _new_extractor(config: ExtractConfig, prepared: Prepared) -> KnowledgeExtractor:
    fields = {**tag_fields(prepared.labels), "relation_labels": prepared.relation_labels}
    model = build_model(LongNetForKnowledgeExtraction, config, **fields)
    torch.nn.init.constant_(model.classifier.bias, TAG_PRIOR)
    with torch.no_grad():
        model.knowledge.relation.bias[0] = -TAG_PRIOR  # relations are as rare among pairs
    return KnowledgeExtractor(model, prepared.labels, prepared.longest, prepared.allowed)


@dataclass
class Example:
    """An annotated document in numbers: `together` is which candidate antecedents are right, `relations` (head, tail,
    relation)."""

    offsets: Offsets
    annotation: Annotation
    mentions: Mentions
    clusters: list[list[int]]
    together: np.ndarray
    salient: np.ndarray
    relations: np.ndarray

    @classmethod
    def of(
        cls, text: str, annotation: Annotation, labels: Sequence[str], relation_labels: Sequence[str]
    ) -> Example:
        offsets = Offsets(text)
        mentions = Mentions.of(offsets, annotation.spans, labels)
        clusters = list(annotation.clusters.values())
        owners: list[set[int]] = [set() for _ in annotation.spans]
        for c, own in enumerate(clusters):
            for i in own:
                owners[i].add(c)
        together = [bool(owners[i] & owners[j]) for i, j in mentions.pairs.tolist()]
        index = {name: c for c, name in enumerate(annotation.clusters)}
        kinds = {label: r for r, label in enumerate(relation_labels, 1)}
        relations = [
            (index[h], index[t], kinds[r]) for h, t, r in annotation.relations if r in kinds and h != t
        ]
        return cls(
            offsets, annotation, mentions, clusters, np.asarray(together, bool),
            np.asarray([bool(own) for own in owners], bool), np.asarray(relations, np.int64).reshape(-1, 3),
        )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """Documents to train on and to judge by, in numbers: made once for any number of trainings.

    allowed: labels of head and tail that training relates. longest: bytes of the longest mention.
    """

    labels: list[str]
    relation_labels: list[str]
    allowed: list[tuple[str, str]]
    longest: int
    trained: list[Example]
    judged: list[Example]


def prepare(
    texts: Sequence[str],
    gold: Sequence[Annotation],
    validation_texts: Sequence[str],
    validation_gold: Sequence[Annotation],
) -> Prepared:
    """What `fit_knowledge` needs of annotated documents; all labels are those of `gold`."""
    labels = sorted({label for a in gold for _, _, label in a.spans})
    relation_labels = sorted({label for a in gold for _, _, label in a.relations})
    allowed = sorted({(a.label(head), a.label(tail)) for a in gold for head, tail, _ in a.relations})
    trained, judged = (
        [Example.of(text, a, labels, relation_labels) for text, a in zip(t, g, strict=True)]
        for t, g in ((texts, gold), (validation_texts, validation_gold))
    )
    longest = longest_span([e.offsets for e in trained], [a.spans for a in gold])
    return Prepared(labels, relation_labels, allowed, longest, trained, judged)


def graph_loss(
    extractor: KnowledgeExtractor,
    examples: Sequence[Example],
    reading: Reading,
    generator: np.random.Generator,
) -> Tensor:
    """Losses of antecedents, salience and relations of a batch that was read with its gold mentions."""
    head, device = extractor.model.knowledge, reading.logits.device
    links, salience, relations = (torch.zeros((), device=device) for _ in range(3))
    mentions = salient = related = 0
    for row, e in enumerate(examples):
        if not e.mentions.spans:
            continue
        vectors = extractor.represent(e.mentions, reading, row)
        known = on_device(e.salient, device)
        salience = salience + F.binary_cross_entropy_with_logits(
            head.salience(vectors)[:, 0].float(), known.float(), reduction="sum"
        )
        # Rows, not a mask: the size of what a mask picks would have to be waited for.
        right = on_device(np.flatnonzero(e.together), device)
        anaphor = on_device(np.ascontiguousarray(e.mentions.pairs[:, 0]), device)
        # Mentions in no entity open none, and nobody knows what they name: they are candidates, not anaphors.
        links = links + antecedent_loss(extractor.antecedents(e.mentions, vectors), anaphor, right, known)
        relations = relations + relation_loss(extractor, e, vectors, reading, row, generator)
        mentions, salient, related = (
            mentions + len(known), salient + int(e.salient.sum()), related + len(e.relations)
        )  # fmt: skip
    return links / max(1, salient) + salience / max(1, mentions) + relations / max(1, related)


def relation_loss(
    extractor: KnowledgeExtractor,
    example: Example,
    vectors: Tensor,
    reading: Reading,
    row: int,
    generator: np.random.Generator,
) -> Tensor:
    """`adaptive_threshold_loss` over all pairs of gold entities, or, if they are many, all related ones and a sample of
    the others."""
    if len(example.clusters) < 2 or not extractor.relation_labels:
        return vectors.sum() * 0.0
    entities = Entities.of(example.mentions, example.clusters)
    inputs = entities.tensors(example.mentions, reading.block[row], vectors.device)
    pooled = extractor.model.knowledge.entities(vectors, inputs)
    gold = example.relations
    others = extractor.pairs(entities, pooled)
    if len(others) > TRAINED_PAIRS:
        others = others[generator.choice(len(others), TRAINED_PAIRS, replace=False)]
    pairs = np.unique(np.concatenate((gold[:, :2], others)), axis=0)
    if not len(pairs):
        return vectors.sum() * 0.0
    wanted = np.zeros((len(pairs), len(extractor.relation_labels) + 1), bool)
    count = len(example.clusters)
    wanted[np.searchsorted(pairs @ [count, 1], gold[:, :2] @ [count, 1]), gold[:, 2]] = True
    logits = extractor.relation_logits(example.mentions, entities, inputs, pooled, reading.memory[row], pairs)
    return adaptive_threshold_loss(logits, on_device(wanted, logits.device))


class SalienceChoice:
    """The salience that an extractor's entities need for the best B3 F1, over documents that come one by one."""

    def __init__(self, extractor: KnowledgeExtractor) -> None:
        self.extractor = extractor
        self.gold: list[list[tuple[int, Span]]] = []
        self.found: dict[float, list[list[tuple[int, Span]]]] = {least: [] for least in SALIENCES}

    def add(self, document: int, gold: Example, mentions: Mentions, vectors: Tensor) -> None:
        """One document with its gold mentions, or those that were found."""
        self.gold += [[(document, gold.mentions.spans[m]) for m in own] for own in gold.clusters]
        for own, salience in self.extractor.joined(mentions, vectors):
            entity = [(document, mentions.spans[m]) for m in own]
            for least, found in self.found.items():
                if salience >= least:
                    found.append(entity)

    def best(self) -> float:
        """Sets the extractor's salience, of equally good ones the largest; B3 F1."""
        scores = {least: b_cubed(self.gold, found)["f1"] for least, found in self.found.items()}
        self.extractor.salience = max(scores, key=lambda least: (scores[least], least))
        return scores[self.extractor.salience]


@torch.no_grad()
def choose_salience(
    extractor: KnowledgeExtractor, examples: Sequence[Example], batch_tokens: int
) -> dict[str, float]:
    """Sets the extractor's salience by entities of mentions that it finds itself: those are less salient than gold ones."""
    choice = SalienceChoice(extractor)
    for i, mentions, reading, row in extractor.found([e.offsets for e in examples], batch_tokens):
        choice.add(i, examples[i], mentions, extractor.represent(mentions, reading, row))
    return {"b_cubed_end_to_end": choice.best(), "salience": extractor.salience}


def judge(extractor: KnowledgeExtractor, examples: Sequence[Example], batch_tokens: int) -> dict[str, float]:
    """Validation: each document is read once. Sets the extractor's threshold, salience and margin."""
    choice, grouping = ThresholdChoice(extractor), SalienceChoice(extractor)
    gold_relations, found_relations = [], {margin: [] for margin in MARGINS}
    maps, positions = [e.offsets for e in examples], [e.mentions.positions() for e in examples]
    for batch, reading in extractor.readings(maps, batch_tokens, positions):
        odds = reading.logits.float().sigmoid()
        for row, i in enumerate(batch):
            e = examples[i]
            choice.add(e.offsets, odds[row, : len(e.offsets)].cpu().numpy(), e.annotation.spans)
            vectors = extractor.represent(e.mentions, reading, row)
            grouping.add(i, e, e.mentions, vectors)
            scored = extractor.relation_scores(e.mentions, e.clusters, vectors, reading, row)
            names = list(e.annotation.clusters)
            gold_relations.append(e.annotation.relations)
            for margin, found in found_relations.items():
                found.append([(names[h], names[t], r) for h, t, r, score in scored if score > margin])
    report = choice.best()
    report["b_cubed"] = grouping.best()
    parts = [report["f1"], report["b_cubed"]]
    if extractor.relation_labels:
        scores = {m: set_f1(gold_relations, found)["f1"] for m, found in found_relations.items()}
        extractor.margin = max(scores, key=lambda m: (scores[m], -abs(m)))
        report["relation_f1"] = scores[extractor.margin]
        parts.append(report["relation_f1"])
    return {**report, "score": sum(parts) / len(parts)}
