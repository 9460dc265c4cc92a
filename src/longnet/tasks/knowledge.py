"""Entities, which mentions name the same one, and relations between them, in whole long documents, with one model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet.model.relations import EntityInputs, LongNetForKnowledgeExtraction, Reading
from longnet.tasks.annotations import Annotation, Span
from longnet.tasks.extraction import EntityExtractor, decode_tags
from longnet.tasks.fit import autocast, length_batches, on_device, pad
from longnet.tasks.mentions import (
    Strings,
    all_pairs,
    candidate_antecedents,
    frequency_and_place,
    join,
    near_pairs,
    pair_distances,
)
from longnet.tasks.offsets import Offsets

# With more entities than MANY, only near pairs and the PROMISING best of every entity are looked at.
MANY, PROMISING = 128, 32
# How far above the threshold class a relation must be; the best on validation is kept.
MARGINS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
# How salient an entity's mentions must be on average; the best on validation is kept. Most mentions of a set may belong to no
# entity, so that 0.5 would leave out all entities of a model that is not sure.
SALIENCES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


@dataclass
class Mentions:
    """A document's mentions in numbers, and what their strings say about them."""

    spans: list[Span]
    strings: Strings
    first: np.ndarray
    last: np.ndarray
    label: np.ndarray
    frequency: np.ndarray
    place: np.ndarray
    pairs: np.ndarray
    features: np.ndarray

    @classmethod
    def of(cls, offsets: Offsets, spans: list[Span], labels: Sequence[str]) -> Mentions:
        index = {label: i for i, label in enumerate(labels)}
        strings = Strings([offsets.text[s:e] for s, e, _ in spans])
        first = offsets.starts[[s for s, _, _ in spans]] if spans else np.zeros(0, np.int64)
        last = offsets.starts[[e for _, e, _ in spans]] - 1 if spans else first
        label = np.asarray([index.get(name, len(labels)) for _, _, name in spans], np.int64)
        pairs, features = candidate_antecedents(strings, [name for _, _, name in spans], first)
        frequency, place = frequency_and_place(strings.names, first)
        return cls(spans, strings, first, last, label, frequency, place, pairs, features)

    def positions(self) -> np.ndarray:
        return np.unique(np.concatenate((self.first, self.last)))


@dataclass
class Entities:
    """The entities of one document in numbers: member (n,) mentions, entity (n,) whose each is, label (E,)."""

    member: np.ndarray
    entity: np.ndarray
    label: np.ndarray

    @classmethod
    def of(cls, mentions: Mentions, clusters: Sequence[Sequence[int]]) -> Entities:
        member = np.asarray([m for own in clusters for m in own], np.int64)
        entity = np.repeat(np.arange(len(clusters)), [len(own) for own in clusters])
        # The label most mentions have; of equals the first of the sorted labels.
        label = [np.bincount(mentions.label[list(own)]).argmax() for own in clusters]
        return cls(member, entity, np.asarray(label, np.int64))

    def tensors(self, mentions: Mentions, block: int, device: torch.device) -> EntityInputs:
        at = mentions.first[self.member] // block
        member, entity, blocks = (on_device(x, device) for x in (self.member, self.entity, at))
        return EntityInputs(member, entity, blocks, len(self.label))


class KnowledgeExtractor(EntityExtractor):
    """A trained model with its labels, relations, and which labels may stand in a relation.

    Example:
        >>> KnowledgeExtractor.load(Path("run")).read(["Ishmael sails on the Pequod."])  # doctest: +SKIP
        [Annotation(spans=[(0, 7, 'PER'), (21, 27, 'VEH')], clusters=..., relations=[('Ishmael', 'Pequod', 'sails on')])]
    """

    model: LongNetForKnowledgeExtraction  # pyrefly: ignore - narrower than the parent's
    task = "knowledge"
    model_class = LongNetForKnowledgeExtraction

    def __init__(self, model: Any, labels: list[str], longest: int, allowed: Sequence[Sequence[str]]) -> None:
        super().__init__(model, labels, longest)
        self.relation_labels: list[str] = list(model.config.relation_labels)
        index = {label: i for i, label in enumerate(labels)}
        self.allowed = np.zeros((len(labels) + 1, len(labels) + 1), bool)
        for head, tail in allowed:
            self.allowed[index[head], index[tail]] = True
        self.margin = 0.0
        self.salience = 0.5

    def settings(self) -> dict[str, Any]:
        pairs = [[self.labels[h], self.labels[t]] for h, t in np.argwhere(self.allowed).tolist()]
        chosen = {"margin": self.margin, "salience": self.salience}
        return {**super().settings(), "related_labels": pairs, **chosen}

    @classmethod
    def from_settings(cls, model: Any, task: dict[str, Any]) -> KnowledgeExtractor:
        extractor = cls(model, task["entity_labels"], task["longest"], task["related_labels"])
        extractor.margin, extractor.salience = task["margin"], task["salience"]
        return extractor

    @torch.inference_mode()
    def read(self, texts: Sequence[str], batch_tokens: int = 65536) -> list[Annotation]:
        """Mentions, entities and relations of every text."""
        results = [Annotation([])] * len(texts)
        maps = [Offsets(text) for text in texts]
        for i, mentions, reading, row in self.found(maps, batch_tokens):
            clusters = self.clusters(mentions, self.represent(mentions, reading, row))
            names = named(maps[i].text, mentions.spans, clusters)
            results[i] = self._relate(mentions, names, reading, row)
        return results

    def found(
        self, maps: Sequence[Offsets], batch_tokens: int
    ) -> Iterator[tuple[int, Mentions, Reading, int]]:
        """Mentions of every document, with the reading and the row that hold it; documents in order of length."""
        for batch, reading in self.readings(maps, batch_tokens, None):
            odds = reading.logits.float().sigmoid()
            for row, i in enumerate(batch):
                own = odds[row, : len(maps[i])].cpu().numpy()
                spans = decode_tags(maps[i], own >= self.threshold, self.labels, self.longest)
                yield i, Mentions.of(maps[i], spans, self.labels), reading, row

    @torch.inference_mode()
    def relate(
        self, texts: Sequence[str], given: Sequence[Annotation], batch_tokens: int = 65536
    ) -> list[Annotation]:
        """Relations between the entities of annotations: how document-level relation extraction is usually measured."""
        results = [Annotation([])] * len(texts)
        maps = [Offsets(text) for text in texts]
        known = [Mentions.of(m, a.spans, self.labels) for m, a in zip(maps, given, strict=True)]
        for batch, reading in self.readings(maps, batch_tokens, [m.positions() for m in known]):
            for row, i in enumerate(batch):
                results[i] = self._relate(known[i], given[i].clusters, reading, row)
        return results

    def readings(
        self, maps: Sequence[Offsets], batch_tokens: int, positions: Sequence[np.ndarray] | None
    ) -> Iterator[tuple[list[int], Reading]]:
        if any(not len(offsets) for offsets in maps):
            raise ValueError("expected texts; got an empty one")
        device = next(self.model.parameters()).device
        for batch in length_batches([len(offsets) for offsets in maps], batch_tokens):
            rows, lengths = pad([maps[i].ids for i in batch], device)
            wanted = None if positions is None else [on_device(positions[i], device) for i in batch]
            with autocast(device):
                yield batch, self.model.read(rows, lengths, wanted, self.threshold)

    def represent(self, mentions: Mentions, reading: Reading, row: int) -> Tensor:
        """(M, C) of a document's mentions, from the states of the bytes that were read nearest to their borders."""
        states, positions = reading.states[row], reading.positions[row]
        borders = on_device(np.stack((mentions.first, mentions.last), 1), states.device)
        right = torch.searchsorted(positions, borders).clamp(max=max(len(positions) - 1, 0))
        left = (right - 1).clamp(min=0)
        nearer = (positions[left] - borders).abs() < (positions[right] - borders).abs()
        numbers = (mentions.label, mentions.frequency, mentions.place)
        features = [on_device(x, states.device) for x in numbers]
        return self.model.knowledge.mentions(states[torch.where(nearer, left, right)], *features)

    def antecedents(self, mentions: Mentions, vectors: Tensor) -> Tensor:
        pairs, features = (on_device(x, vectors.device) for x in (mentions.pairs, mentions.features))
        return self.model.knowledge.antecedents(vectors, pairs, features)

    def clusters(self, mentions: Mentions, vectors: Tensor) -> list[list[int]]:
        """Every mention joins its best antecedent, if that scores above 0; entities of little salience are left out."""
        return [own for own, salience in self.joined(mentions, vectors) if salience >= self.salience]

    def joined(self, mentions: Mentions, vectors: Tensor) -> list[tuple[list[int], float]]:
        """All entities, and how salient their mentions are on average."""
        scores = self.antecedents(mentions, vectors).cpu().numpy()
        order = np.lexsort((mentions.pairs[:, 1], -scores, mentions.pairs[:, 0]))
        # The best candidate of every mention that has any.
        best = order[np.flatnonzero(np.diff(mentions.pairs[order, 0], prepend=-1))]
        links = [(i, j) for i, j in mentions.pairs[best[scores[best] > 0]].tolist()]
        salience = torch.sigmoid(self.model.knowledge.salience(vectors)[:, 0].float()).cpu().numpy()
        return [(own, float(salience[own].mean())) for own in join(len(mentions.spans), links)]

    def relation_scores(
        self,
        mentions: Mentions,
        clusters: Sequence[Sequence[int]],
        vectors: Tensor,
        reading: Reading,
        row: int,
    ) -> list[tuple[int, int, str, float]]:
        """(head, tail, label, score above the pair's threshold) of all that score more than the lowest margin."""
        if len(clusters) < 2 or not self.relation_labels:
            return []
        entities = Entities.of(mentions, clusters)
        inputs = entities.tensors(mentions, reading.block[row], vectors.device)
        pooled = self.model.knowledge.entities(vectors, inputs)
        pairs = self.pairs(entities, pooled)
        if not len(pairs):
            return []
        logits = self.relation_logits(mentions, entities, inputs, pooled, reading.memory[row], pairs)
        over = (logits[:, 1:] - logits[:, :1]).cpu().numpy()
        rows, kinds = np.nonzero(over > min(MARGINS))
        return [
            (int(pairs[q, 0]), int(pairs[q, 1]), self.relation_labels[r], float(over[q, r]))
            for q, r in zip(rows.tolist(), kinds.tolist(), strict=True)
        ]

    def relation_logits(
        self,
        mentions: Mentions,
        entities: Entities,
        inputs: EntityInputs,
        pooled: Tensor,
        memory: Tensor,
        pairs: np.ndarray,
    ) -> Tensor:
        between = pair_distances(pairs, mentions.first[entities.member], entities.entity)
        rows, gaps = (on_device(x, pooled.device) for x in (pairs, between))
        return self.model.knowledge.relations(pooled, memory, inputs, rows, gaps)

    def pairs(self, entities: Entities, pooled: Tensor) -> np.ndarray:
        """All pairs of few entities; of many, those that stand near each other or that the coarse score prefers."""
        if len(entities.label) <= MANY:
            return all_pairs(entities.label, self.allowed)
        near = near_pairs(entities.member, entities.entity)
        best = self.model.knowledge.best_tails(pooled, PROMISING).cpu().numpy()
        pairs = np.unique(np.concatenate((near, best)), axis=0)
        return pairs[self.allowed[entities.label[pairs[:, 0]], entities.label[pairs[:, 1]]]]

    def _relate(
        self, mentions: Mentions, clusters: dict[str, list[int]], reading: Reading, row: int
    ) -> Annotation:
        names = list(clusters)
        vectors = self.represent(mentions, reading, row)
        found = self.relation_scores(mentions, list(clusters.values()), vectors, reading, row)
        relations = sorted((names[h], names[t], r) for h, t, r, score in found if score > self.margin)
        return Annotation(mentions.spans, clusters, relations)


def named(text: str, spans: Sequence[Span], clusters: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Clusters by name: the string most of an entity's mentions have, of equals the longest, then the first; numbered if
    taken."""
    result: dict[str, list[int]] = {}
    for own in clusters:
        counts = Counter(" ".join(text[s:e].split()) for s, e, _ in (spans[i] for i in own))
        name = max(counts, key=lambda n: (counts[n], len(n)))
        number, free = 2, name
        while free in result:
            free, number = f"{name} ({number})", number + 1
        result[free] = list(own)
    return result


def load_extractor(path: Path, device: str = "auto") -> EntityExtractor:
    """Whatever `longnet extract train` has made: a `KnowledgeExtractor` if the data held clusters.

    Raises:
        ValueError: a folder that it has not made.
    """
    try:
        kind = json.loads((path / "task.json").read_text("utf-8")).get("task")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"model: expected a folder made by `longnet extract train`; got {path}: {error!r}"
        ) from None
    return (KnowledgeExtractor if kind == "knowledge" else EntityExtractor).load(path, device)
