"""Our counting against scikit-learn, seqeval and cases done by hand."""

import random

import pytest

from longnet.tasks.metrics import b_cubed, classification_report, docred_f1, set_f1


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
