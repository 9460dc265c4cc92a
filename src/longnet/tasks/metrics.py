"""What is counted, and how: classification, spans, clusters, relations. Plain Python; no model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any


def precision_recall_f1(hits: float, predicted: float, gold: float) -> dict[str, float]:
    """precision = hits / predicted, recall = hits / gold, f1 their harmonic mean; 0 where a denominator is 0."""
    precision = hits / predicted if predicted else 0.0
    recall = hits / gold if gold else 0.0
    total = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / total if total else 0.0}


def classification_report(
    gold: Sequence[Iterable[str]], predicted: Sequence[Iterable[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """Of label sets, one per document (a single label is a set of one).

    accuracy: documents whose set is exactly right. macro_f1: mean F1 over the labels that gold or prediction has (as
    scikit-learn counts it). micro_f1: over all decisions. per_class: precision, recall, f1, support. confusion[i][j], for
    single labels only: documents of gold label i predicted as label j.
    """
    pairs = [(set(g), set(p)) for g, p in zip(gold, predicted, strict=True)]
    per_class, hits = {}, 0
    for label in labels:
        both = sum(label in g and label in p for g, p in pairs)
        support, claimed = sum(label in g for g, _ in pairs), sum(label in p for _, p in pairs)
        per_class[label] = {
            **precision_recall_f1(both, claimed, support),
            "support": support,
            "predicted": claimed,
        }
        hits += both
    present = [c["f1"] for c in per_class.values() if c["support"] or c["predicted"]]
    micro = precision_recall_f1(hits, sum(len(p) for _, p in pairs), sum(len(g) for g, _ in pairs))
    report = {
        "documents": len(pairs),
        "accuracy": sum(g == p for g, p in pairs) / len(pairs) if pairs else 0.0,
        "macro_f1": sum(present) / len(present) if present else 0.0,
        "micro_f1": micro["f1"],
        "per_class": per_class,
    }
    if all(len(g) == len(p) == 1 for g, p in pairs):
        index = {label: i for i, label in enumerate(labels)}
        confusion = [[0] * len(labels) for _ in labels]
        for g, p in pairs:
            confusion[index[next(iter(g))]][index[next(iter(p))]] += 1
        report["confusion"] = confusion
    return report


def set_f1(gold: Sequence[Iterable[Hashable]], predicted: Sequence[Iterable[Hashable]]) -> dict[str, float]:
    """Micro precision, recall and F1 of things that must be equal to count, per document, each once.

    For spans (start, end, label) this is strict span F1: nested spans count like any other.
    """
    pairs = [(set(g), set(p)) for g, p in zip(gold, predicted, strict=True)]
    return precision_recall_f1(
        sum(len(g & p) for g, p in pairs), sum(len(p) for _, p in pairs), sum(len(g) for g, _ in pairs)
    )


def mean_set_f1(
    gold: Sequence[Iterable[Hashable]], predicted: Sequence[Iterable[Hashable]]
) -> dict[str, float]:
    """Precision, recall and F1 of every document that has gold, then their means: SciREX's count, where `set_f1` is micro."""
    scores = [set_f1([g], [p]) for g, p in zip(gold, predicted, strict=True) if set(g)]
    keys = ("precision", "recall", "f1")
    return {key: sum(own[key] for own in scores) / len(scores) if scores else 0.0 for key in keys}


def b_cubed(gold: Sequence[Iterable[Hashable]], predicted: Sequence[Iterable[Hashable]]) -> dict[str, float]:
    """B3 of one document's clusters (Bagga and Baldwin 1998), over mentions.

    precision: mean over predicted mentions of |its predicted cluster and its gold cluster| / |its predicted cluster|;
    recall the same with the roles exchanged. A mention that the other side lacks scores 0.
    """
    gold_of = {m: c for c in map(frozenset, gold) for m in c}
    predicted_of = {m: c for c in map(frozenset, predicted) for m in c}
    empty: frozenset[Hashable] = frozenset()
    precision = sum(len(c & gold_of.get(m, empty)) / len(c) for m, c in predicted_of.items() if m in gold_of)
    recall = sum(
        len(c & predicted_of.get(m, empty)) / len(c) for m, c in gold_of.items() if m in predicted_of
    )
    p = precision / len(predicted_of) if predicted_of else 0.0
    r = recall / len(gold_of) if gold_of else 0.0
    return {"precision": p, "recall": r, "f1": 2 * p * r / (p + r) if p + r else 0.0}


def muc(gold: Sequence[Iterable[Hashable]], predicted: Sequence[Iterable[Hashable]]) -> dict[str, float]:
    """MUC (Vilain et al. 1995), over the links that join a cluster's mentions.

    recall = sum_k (|K| - parts(K)) / sum_k (|K| - 1) over gold clusters K, where parts(K) counts the predicted clusters
    that K is spread over, a mention in none being a part by itself; precision with the roles exchanged. Single mentions
    have no links.
    """

    def links(clusters: list[frozenset[Hashable]], others: list[frozenset[Hashable]]) -> tuple[int, int]:
        owner = {m: i for i, c in enumerate(others) for m in c}
        parts = [len({owner.get(m, ("alone", m)) for m in c}) for c in clusters]
        return sum(len(c) - n for c, n in zip(clusters, parts, strict=True)), sum(
            len(c) - 1 for c in clusters
        )

    g, p = ([frozenset(c) for c in side if c] for side in (gold, predicted))
    (right, claimed), (found, wanted) = links(p, g), links(g, p)
    precision, recall = right / claimed if claimed else 0.0, found / wanted if wanted else 0.0
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}


def align_clusters(
    gold: Mapping[str, Iterable[Hashable]], predicted: Mapping[str, Iterable[Hashable]]
) -> dict[str, str]:
    """Predicted name -> gold name, where more than half of the predicted cluster's mentions are the gold cluster's.

    The rule of SciREX (Jain et al. 2020), here with mentions that must be equal. Of several gold clusters that share
    mentions, the one with most of them counts, of equals the first name.
    """
    owners: dict[Hashable, list[str]] = {}
    for name, mentions in gold.items():
        for mention in set(mentions):
            owners.setdefault(mention, []).append(name)
    aligned = {}
    for name, mentions in predicted.items():
        own, shared = set(mentions), {}
        for mention in own:
            for other in owners.get(mention, ()):
                shared[other] = shared.get(other, 0) + 1
        best = min(shared, key=lambda other: (-shared[other], other), default=None)
        if best is not None and 2 * shared[best] > len(own):
            aligned[name] = best
    return aligned


def cluster_f1(
    gold: Sequence[Mapping[str, Iterable[Hashable]]], predicted: Sequence[Mapping[str, Iterable[Hashable]]]
) -> dict[str, float]:
    """Of whole entities: precision = predicted clusters that `align_clusters` aligns; recall = gold clusters something
    is aligned with."""
    aligned = [align_clusters(g, p) for g, p in zip(gold, predicted, strict=True)]
    claimed, wanted = sum(map(len, predicted)), sum(map(len, gold))
    precision = sum(map(len, aligned)) / claimed if claimed else 0.0
    recall = sum(len(set(a.values())) for a in aligned) / wanted if wanted else 0.0
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}


def align_relations(
    relations: Iterable[tuple[str, str, str]], aligned: Mapping[str, str]
) -> set[tuple[Any, Any, str]]:
    """Predicted relations in the names of gold entities; an end that is aligned with none can equal no gold relation."""
    return {
        (aligned.get(head, ("unknown", head)), aligned.get(tail, ("unknown", tail)), label)
        for head, tail, label in relations
    }


def docred_f1(
    gold: Sequence[Iterable[tuple[Any, Any, str]]],
    predicted: Sequence[Iterable[tuple[Any, Any, str]]],
    names: Sequence[dict[Any, set[str]]],
    train_facts: set[tuple[str, str, str]] = frozenset(),  # type: ignore[assignment]
) -> dict[str, float]:
    """Relation F1 as DocRED's evaluation counts it (Yao et al. 2019).

    f1: micro over triples (head, tail, relation) of all documents. ignore_f1: the same recall, but a correct triple that
    stood in the training set leaves precision: (hits - hits_in_train) / (predicted - hits_in_train).

    Args:
        names: per document, entity -> surface names; a triple stood in training if any (head name, tail name, relation) of
            its entities' names is in `train_facts`.
    """
    hits = known = claimed = wanted = 0
    for g, p, name in zip(gold, predicted, names, strict=True):
        right = set(g) & set(p)
        claimed, wanted, hits = claimed + len(set(p)), wanted + len(set(g)), hits + len(right)
        known += sum(
            any((a, b, r) in train_facts for a in name[head] for b in name[tail]) for head, tail, r in right
        )
    plain = precision_recall_f1(hits, claimed, wanted)
    precision, recall = (hits - known) / (claimed - known) if claimed > known else 0.0, plain["recall"]
    both = precision + recall
    return {**plain, "ignore_f1": 2 * precision * recall / both if both else 0.0}
