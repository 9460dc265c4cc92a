"""How an extractor does on annotated documents: spans, clusters, relations, each counted as `longnet.tasks.metrics` says."""

from __future__ import annotations

from collections.abc import Sequence

from longnet.tasks.annotations import Annotation, Span
from longnet.tasks.mentions import normalise
from longnet.tasks.metrics import (
    align_clusters,
    align_relations,
    b_cubed,
    cluster_f1,
    docred_f1,
    muc,
    set_f1,
)

Scores = dict[str, dict[str, float]]


def surface_names(text: str, annotation: Annotation) -> dict[str, set[str]]:
    """Entity -> the normalised strings of its mentions."""
    return {
        name: {normalise(text[s:e]) for s, e, _ in (annotation.spans[i] for i in members)}
        for name, members in annotation.clusters.items()
    }


def facts(texts: Sequence[str], annotations: Sequence[Annotation]) -> set[tuple[str, str, str]]:
    """(head string, tail string, relation) of everything that annotations hold: what "Ign F1" ignores."""
    return {
        (a, b, label)
        for text, annotation in zip(texts, annotations, strict=True)
        for names in [surface_names(text, annotation)]
        for head, tail, label in annotation.relations
        for a in names[head]
        for b in names[tail]
    }


def mention_sets(annotation: Annotation) -> dict[str, set[Span]]:
    """Entity -> its mentions as spans."""
    return {name: {annotation.spans[i] for i in own} for name, own in annotation.clusters.items()}


def relation_scores(
    texts: Sequence[str],
    gold: Sequence[Annotation],
    predicted: Sequence[Annotation],
    known: set[tuple[str, str, str]] = frozenset(),  # type: ignore[assignment]
) -> dict[str, float]:
    """DocRED's F1 and Ign F1 of relations whose ends are predicted clusters, aligned with gold ones by `align_clusters`."""
    aligned = [
        align_relations(p.relations, align_clusters(mention_sets(g), mention_sets(p)))
        for g, p in zip(gold, predicted, strict=True)
    ]
    names = [surface_names(text, g) for text, g in zip(texts, gold, strict=True)]
    return docred_f1([g.relations for g in gold], aligned, names, known)


def extraction_scores(
    texts: Sequence[str],
    gold: Sequence[Annotation],
    predicted: Sequence[Annotation],
    related: Sequence[Annotation] | None = None,
    known: set[tuple[str, str, str]] = frozenset(),  # type: ignore[assignment]
) -> Scores:
    """Everything from spans on ("end to end") and, with `related`, relations predicted between gold entities.

    Keys: spans (strict), muc, b_cubed (over all mentions of all documents), clusters (SciREX), relations (end to end),
    relations_of_gold_entities (DocRED's setting).
    """
    spans = set_f1([g.spans for g in gold], [p.spans for p in predicted])
    sides = [
        [
            {(i, mention) for mention in own}
            for i, annotation in enumerate(side)
            for own in mention_sets(annotation).values()
        ]
        for side in (gold, predicted)
    ]
    scores: Scores = {
        "spans": spans,
        "muc": muc(*sides),
        "b_cubed": b_cubed(*sides),
        "clusters": cluster_f1([mention_sets(g) for g in gold], [mention_sets(p) for p in predicted]),
        "relations": relation_scores(texts, gold, predicted, known),
    }
    if related is not None:
        names = [surface_names(text, g) for text, g in zip(texts, gold, strict=True)]
        triples = [a.relations for a in related]
        scores["relations_of_gold_entities"] = docred_f1([g.relations for g in gold], triples, names, known)
    return scores
