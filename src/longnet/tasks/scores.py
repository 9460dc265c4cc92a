"""How an extractor does on annotated documents: spans, clusters, relations, each counted as `longnet.tasks.metrics` says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

from longnet.tasks.annotations import Annotation, Span, role_tuples
from longnet.tasks.mentions import normalise
from longnet.tasks.metrics import (
    align_clusters,
    align_relations,
    b_cubed,
    cluster_f1,
    docred_f1,
    mean_set_f1,
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


def aligned_tuples(gold: Annotation, predicted: Annotation, roles: Sequence[str]) -> set[tuple[Any, ...]]:
    """`role_tuples` of a prediction in the names of the gold entities that `align_clusters` finds."""
    aligned = align_clusters(mention_sets(gold), mention_sets(predicted))
    return {
        tuple(aligned.get(name, ("unknown", name)) for name in own)
        for own in role_tuples(predicted.relations, roles)
    }


def tuple_scores(
    gold: Sequence[Collection[tuple[Any, ...]]],
    predicted: Sequence[Collection[tuple[Any, ...]]],
    known: Sequence[Collection[str]],
) -> Scores:
    """n-ary relations as SciREX counts them (Jain et al. 2020, section 5): one entity a role.

    A tuple is right if all of its entities are. tuples: whole ones. pairs: their projections to every two roles. Both are
    means over documents with gold (and, for pairs, over the pairs of roles), not micro averages.

    Args:
        gold, predicted: per document, tuples of gold entities' names, all of the same length.
        known: per document, the entities with mentions. What names another one cannot be found and is no gold.
    """
    size = len(next((own for side in gold for own in side), ()))
    scores: Scores = {}
    for key, places in (("pairs", list(combinations(range(size), 2))), ("tuples", [tuple(range(size))])):
        wanted, found = (
            [{tuple(own[i] for i in at) for own in tuples} for at in places for tuples in side]
            for side in (gold, predicted)
        )
        entities = [names for _ in places for names in known]
        wanted = [{t for t in own if set(t) <= set(n)} for own, n in zip(wanted, entities, strict=True)]
        scores[key] = mean_set_f1(wanted, found)
    return scores


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
