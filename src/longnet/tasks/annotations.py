"""What is known about a document: mentions, the entities they name, relations between entities. Read from and written as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from longnet.tasks.documents import Document, OnInvalid, read_documents

Span = tuple[int, int, str]
"""(start, end, label), characters."""


@dataclass(frozen=True)
class Annotation:
    """One document's knowledge, found or given.

    spans: mentions, sorted, each once. clusters: entity name -> indices of its mentions in `spans`, at least one.
    relations: (head entity, tail entity, label), sorted, each once.
    """

    spans: list[Span]
    clusters: dict[str, list[int]] = field(default_factory=dict)
    relations: list[tuple[str, str, str]] = field(default_factory=list)

    def label(self, name: str) -> str:
        """The label that most of an entity's mentions have; of equals the first in the alphabet."""
        labels = [self.spans[i][2] for i in self.clusters[name]]
        return min(set(labels), key=lambda label: (-labels.count(label), label))

    def cut(self, end: int) -> Annotation:
        """What is left of it in the first `end` characters."""
        kept = {i: n for n, i in enumerate(i for i, span in enumerate(self.spans) if span[1] <= end)}
        clusters = {
            name: [kept[i] for i in members if i in kept]
            for name, members in self.clusters.items()
            if any(i in kept for i in members)
        }
        relations = [r for r in self.relations if r[0] in clusters and r[1] in clusters]
        return Annotation([self.spans[i] for i in kept], clusters, relations)


def read_annotated(path: Path, on_invalid: OnInvalid = "fail") -> tuple[list[Document], list[Annotation]]:
    """Documents with their gold annotations.

    Raises:
        ValueError: with file and line, whatever `read_documents` or `annotation_of` finds wrong.
    """
    documents = read_documents(path, required=("entities",), on_invalid=on_invalid)
    return documents, [annotation_of(document) for document in documents]


def annotation_of(document: Document) -> Annotation:
    """The annotation in a document's fields `entities`, `clusters` (optional) and `relations` (optional).

    Entities without mentions cannot be found in a text: they are left out, and so are their relations.

    Raises:
        ValueError: with file and line.
    """
    spans = sorted(set(_spans(document)))
    index: dict[tuple[int, int, str | None], int] = {}
    for i, (start, end, label) in enumerate(spans):
        index[start, end, label] = i
        index.setdefault((start, end, None), i)
    given = document.fields.get("clusters")
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{document.source}: expected clusters {{name: [mentions]}}; got {given!r}")
    clusters = {name: _members(document, name, mentions, index) for name, mentions in (given or {}).items()}
    relations = document.fields.get("relations")
    if relations is not None and (given is None or not isinstance(relations, list)):
        raise ValueError(
            f"{document.source}: expected relations as a list, beside clusters whose names they use; got"
            f" {type(relations).__name__} {'without clusters' if given is None else ''}"
        )
    triples = {t for relation in relations or () for t in _binary(document, relation, clusters)}
    clusters = {name: members for name, members in clusters.items() if members}
    return Annotation(spans, clusters, sorted(t for t in triples if t[0] in clusters and t[1] in clusters))


def _spans(document: Document) -> Iterable[Span]:
    entities = document.fields["entities"]
    if not isinstance(entities, list):
        raise ValueError(f"{document.source}: expected a list of entities; got {entities!r}")
    for entity in entities:
        label = entity.get("label") if isinstance(entity, dict) else None
        if not isinstance(label, str) or not label:
            raise ValueError(f"{document.source}: expected entities {{start, end, label}}; got {entity!r}")
        yield (*_borders(document, entity, "entities {start, end, label}"), label)


def _borders(document: Document, mention: Any, what: str) -> tuple[int, int]:
    given = mention if isinstance(mention, dict) else {}
    start, end = given.get("start"), given.get("end")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(document.text):
        raise ValueError(
            f"{document.source}: expected {what} with 0 <= start < end <= {len(document.text)} characters; got {mention!r}"
        )
    if "text" in given and given["text"] != document.text[start:end]:
        raise ValueError(
            f"{document.source}: {mention!r}: its text is {document.text[start:end]!r} at these offsets; offsets count"
            " characters, not bytes"
        )
    return start, end


def _members(
    document: Document, name: str, mentions: Any, index: dict[tuple[int, int, str | None], int]
) -> list[int]:
    if not isinstance(mentions, list):
        raise ValueError(
            f"{document.source}: expected cluster {name!r} as a list of mentions; got {mentions!r}"
        )
    members = set()
    for mention in mentions:
        borders = _borders(document, mention, f"mentions {{start, end}} in cluster {name!r}")
        label = mention.get("label")
        if not (label is None or isinstance(label, str)) or (*borders, label) not in index:
            raise ValueError(
                f"{document.source}: cluster {name!r}: expected its mentions among the entities; got {mention!r}; add it to"
                " entities, with its label"
            )
        members.add(index[(*borders, label)])
    return sorted(members)


def _binary(document: Document, relation: Any, clusters: dict[str, list[int]]) -> list[tuple[str, str, str]]:
    """A relation {head, tail, label} as it is; one with roles {role: entity, ...} as one triple for every two roles.

    Roles in alphabetical order give head, tail and the label "Role-Role"; "score", SciREX's number, is no role.
    """
    if not isinstance(relation, dict):
        raise ValueError(f"{document.source}: expected relations {{head, tail, label}}; got {relation!r}")
    if {"head", "tail", "label"} <= set(relation):
        names = {"head": relation["head"], "tail": relation["tail"]}
        if not isinstance(relation["label"], str) or not relation["label"]:
            raise ValueError(f"{document.source}: expected a relation's label as a string; got {relation!r}")
    else:
        names = {role: name for role, name in sorted(relation.items()) if role != "score"}
    if len(names) < 2:
        raise ValueError(
            f"{document.source}: expected relations {{head, tail, label}}, or two roles or more that name clusters; got"
            f" {relation!r}"
        )
    for name in names.values():
        if not isinstance(name, str) or name not in clusters:
            known = ", ".join(list(clusters)[:5]) or "(none)"
            raise ValueError(
                f"{document.source}: expected relations between clusters of the document ({known}, ...); got {name!r} in"
                f" {relation!r}; add the cluster or remove the relation"
            )
    if "head" in names and "label" in relation:
        return [(names["head"], names["tail"], relation["label"])]
    return [(names[a], names[b], f"{a}-{b}") for a, b in combinations(names, 2)]


def role_tuples(relations: Iterable[tuple[str, str, str]], roles: Sequence[str]) -> set[tuple[str, ...]]:
    """The tuples (one entity a role, roles in alphabetical order) all of whose pairs are related: cliques.

    It undoes what reading does to relations with roles; tuples that were not there can only arise where others hold each
    of their pairs. On SciREX that is 2 of 1,059 in training and none in validation and test.

    Example:
        >>> sorted(role_tuples([("a", "b", "X-Y"), ("a", "c", "X-Z"), ("b", "c", "Y-Z"), ("a", "d", "X-Y")], "XYZ"))
        [('a', 'b', 'c')]
    """
    related = set(relations)
    found: set[tuple[str, ...]] = {(h, t) for h, t, label in related if label == f"{roles[0]}-{roles[1]}"}
    for i, role in enumerate(roles[2:], 2):
        names = {t for _, t, label in related if label == f"{roles[0]}-{role}"}
        found = {
            (*own, name)
            for own in found
            for name in names
            if all((own[j], name, f"{roles[j]}-{role}") in related for j in range(i))
        }
    return found


def record_of(document: Document, annotation: Annotation) -> dict[str, Any]:
    """The annotation as `longnet extract predict` writes it and `annotation_of` reads it."""

    def mention(i: int) -> dict[str, Any]:
        start, end, label = annotation.spans[i]
        return {"start": start, "end": end, "label": label, "text": document.text[start:end]}

    return {
        "id": document.id,
        "entities": [mention(i) for i in range(len(annotation.spans))],
        "clusters": {name: [mention(i) for i in members] for name, members in annotation.clusters.items()},
        "relations": [{"head": h, "tail": t, "label": r} for h, t, r in annotation.relations],
    }
