"""Our counting against scikit-learn, seqeval and cases done by hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.tasks.metrics import (
    align_clusters,
    align_relations,
    b_cubed,
    classification_report,
    cluster_f1,
    docred_f1,
    muc,
    set_f1,
)


def test_classification_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = random.Random(0)
    labels = ["a", "b", "c", "never"]
    gold = [generator.choice("aabc") for _ in range(80)]
    predicted = [generator.choice([g, "a", "c"]) for g in gold]
    report = classification_report([[g] for g in gold], [[p] for p in predicted], labels)
    assert report["accuracy"] == pytest.approx(sklearn.accuracy_score(gold, predicted))
    assert report["macro_f1"] == pytest.approx(sklearn.f1_score(gold, predicted, average="macro"))
    assert report["confusion"] == sklearn.confusion_matrix(gold, predicted, labels=labels).tolist()
    for i, f1 in enumerate(sklearn.f1_score(gold, predicted, average=None, labels=labels[:3])):
        assert report["per_class"][labels[i]]["f1"] == pytest.approx(f1)


def test_multi_label_equals_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = random.Random(1)
    gold, predicted = ([[x for x in "abc" if generator.random() < 0.5] for _ in range(50)] for _ in range(2))
    report = classification_report(gold, predicted, list("abc"))
    table = [[[int(x in own) for x in "abc"] for own in side] for side in (gold, predicted)]
    assert report["accuracy"] == pytest.approx(sklearn.accuracy_score(*table))
    assert report["macro_f1"] == pytest.approx(sklearn.f1_score(*table, average="macro"))
    assert report["micro_f1"] == pytest.approx(sklearn.f1_score(*table, average="micro"))
    assert "confusion" not in report


def test_strict_span_f1_equals_seqeval():
    seqeval = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme").IOB2
    generator = random.Random(2)

    def spans():
        found, at = [], 0
        while at < 40:
            width = generator.randint(1, 4)
            if generator.random() < 0.5:
                found.append((at, min(40, at + width), generator.choice("XY")))
            at += width
        return found

    def tags(own):
        row = ["O"] * 40
        for start, end, label in own:
            row[start:end] = [f"B-{label}"] + [f"I-{label}"] * (end - start - 1)
        return row

    gold = [spans() for _ in range(20)]
    predicted = [[s for s in own if generator.random() < 0.7] or spans() for own in gold]
    expected = seqeval.f1_score(
        [tags(g) for g in gold], [tags(p) for p in predicted], mode="strict", scheme=scheme
    )
    assert 0 < expected < 1
    assert set_f1(gold, predicted)["f1"] == pytest.approx(expected)


def test_b_cubed_by_hand():
    figures = b_cubed([[1, 2, 3], [4, 5], [6]], [[1, 2], [3, 4, 5], [7]])
    assert figures["precision"] == pytest.approx((1 + 1 + 1 / 3 + 2 / 3 + 2 / 3 + 0) / 6)
    assert figures["recall"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3 + 1 + 1 + 0) / 6)
    assert b_cubed([], []) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_docred_f1_by_hand():
    gold = [[(0, 1, "r"), (1, 2, "r")], [(0, 1, "s")]]
    predicted = [[(0, 1, "r"), (2, 1, "r")], [(0, 1, "s"), (0, 1, "s")]]
    names = [{0: {"A"}, 1: {"B", "b"}, 2: {"C"}}, {0: {"D"}, 1: {"E"}}]
    figures = docred_f1(gold, predicted, names, {("A", "b", "r"), ("C", "B", "r")})
    assert figures["f1"] == pytest.approx(2 / 3)
    # One of the two hits stood in training; the wrong triple stays, though its names stood there too.
    precision, recall = 1 / 2, 2 / 3
    assert figures["ignore_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_muc_by_hand():
    # Vilain et al. 1995: the key A-B-C-D against the response A-B, C-D: one of three links is missing.
    figures = muc([list("ABCD")], [list("AB"), list("CD")])
    assert (figures["recall"], figures["precision"]) == (pytest.approx(2 / 3), 1.0)
    # A mention that the other side lacks is a part by itself; single mentions have no links.
    figures = muc([list("ABC"), ["X"]], [list("AB"), list("CD")])
    assert (figures["recall"], figures["precision"]) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    assert muc([["A"]], [["A"]])["f1"] == 0.0


def test_clusters_are_aligned_by_more_than_half():
    gold = {"x": [1, 2, 3], "y": [4, 5], "z": [3, 6]}
    predicted = {"a": [1, 2, 9], "b": [4, 9], "c": [3], "d": [7], "e": [1, 3]}
    # Half of b's mentions are not enough; c is x's and z's alike, and x is first.
    assert align_clusters(gold, predicted) == {"a": "x", "c": "x", "e": "x"}
    figures = cluster_f1([gold, {}], [predicted, {"f": [1]}])
    assert (figures["precision"], figures["recall"]) == (pytest.approx(3 / 6), pytest.approx(1 / 3))


def test_relations_of_aligned_clusters():
    aligned = {"a": "x", "c": "x", "b": "y"}
    relations = [("a", "b", "r"), ("c", "b", "r"), ("d", "b", "r"), ("d", "a", "s")]
    found = align_relations(relations, aligned)
    assert found == {("x", "y", "r"), (("unknown", "d"), "y", "r"), (("unknown", "d"), "x", "s")}
    figures = docred_f1([[("x", "y", "r")]], [found], [{"x": {"X"}, "y": {"Y"}}])
    assert (figures["precision"], figures["recall"]) == (pytest.approx(1 / 3), 1.0)


clusterings = st.lists(st.integers(0, 4), min_size=1, max_size=12).map(
    lambda owner: [[m for m, o in enumerate(owner) if o == c] for c in sorted(set(owner))]
)


@given(clusterings, clusterings, st.permutations(range(12)))
def test_cluster_scores_have_the_properties_of_scores(gold, predicted, renamed):
    for score in (b_cubed, muc):
        figures = score(gold, predicted)
        assert all(0 <= v <= 1 + 1e-12 for v in figures.values())
        exchanged = score(predicted, gold)
        assert figures["precision"] == pytest.approx(exchanged["recall"])
        moved = score(
            [[renamed[m] for m in c] for c in reversed(gold)], [[renamed[m] for m in c] for c in predicted]
        )
        assert moved == pytest.approx(figures)
    assert b_cubed(gold, gold)["f1"] == pytest.approx(1)
    named = {str(i): c for i, c in enumerate(gold)}
    assert cluster_f1([named], [named])["f1"] == pytest.approx(1)
    if any(len(c) > 1 for c in gold):
        assert muc(gold, gold)["f1"] == pytest.approx(1)


triples = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from("rs")))


@given(triples, triples, triples)
def test_ignoring_known_facts_only_takes_from_precision(gold, predicted, known):
    names = {i: {str(i)} for i in range(3)}
    facts = {(str(h), str(t), r) for h, t, r in known}
    figures = docred_f1([gold], [predicted], [names], facts)
    assert figures["ignore_f1"] <= figures["f1"] + 1e-12
    assert docred_f1([gold], [predicted], [names])["ignore_f1"] == pytest.approx(figures["f1"])
    assert figures["f1"] == pytest.approx(set_f1([gold], [predicted])["f1"])
