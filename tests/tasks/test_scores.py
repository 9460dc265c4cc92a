"""Tuples of entities, by hand and against trying every combination."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.tasks.annotations import Annotation, role_tuples
from longnet.tasks.scores import aligned_tuples, tuple_scores

ROLES = ("Material", "Method", "Metric", "Task")


def binary(*tuples):
    """The relations that an annotation holds of tuples."""
    return sorted(
        {(t[a], t[b], f"{ROLES[a]}-{ROLES[b]}") for t in tuples for a, b in combinations(range(4), 2)}
    )


def test_tuples_are_cliques_of_relations():
    first, second = ("SNLI", "LSTM", "Accuracy", "NLI"), ("SNLI", "CNN", "Accuracy", "NLI")
    assert role_tuples(binary(first, second), ROLES) == {first, second}
    assert role_tuples([r for r in binary(first) if r[2] != "Method-Task"], ROLES) == set()
    assert role_tuples(binary(first), ROLES[:2]) == {first[:2]}
    assert role_tuples([("SNLI", "LSTM", "Method-Material"), ("a", "b", "uses")], ROLES) == set()


@given(st.sets(st.tuples(*[st.integers(0, 2)] * 4), max_size=6), st.sets(st.integers(0, 23), max_size=4))
def test_cliques_are_those_found_by_trying_all(tuples, dropped):
    named = {tuple(f"{role} {i}" for role, i in zip(ROLES, t, strict=True)) for t in tuples}
    relations = [r for i, r in enumerate(binary(*named)) if i not in dropped]
    every = product(*[[f"{role} {i}" for i in range(3)] for role in ROLES])
    wanted = {t for t in every if set(binary(t)) <= set(relations)}
    assert role_tuples(relations, ROLES) == wanted
    assert named <= wanted or dropped


def test_scores_of_tuples_by_hand():
    """Two documents with tuples and one without, which does not count however much is claimed in it."""
    gold = [{("d", "m", "a", "t"), ("d", "n", "a", "t")}, {("d", "m", "a", "t")}, set()]
    found = [{("d", "m", "a", "t"), ("d", "x", "a", "t")}, set(), {("d", "m", "a", "t")}]
    known = [set("dmnat"), set("dmat"), set()]
    scores = tuple_scores(gold, found, known)
    assert scores["tuples"] == {"precision": 0.25, "recall": 0.25, "f1": 0.25}
    # First document: three pairs of roles without Method are right; the three with it are right in one of two each.
    assert scores["pairs"]["f1"] == pytest.approx((3 * 1 + 3 * 0.5 + 6 * 0) / 12)


def test_tuples_with_entities_without_mentions_count_only_where_all_are_found():
    gold, found = [{("d", "m", "a", "t")}], [{("d", "m", "b", "t")}]
    scores = tuple_scores(gold, found, [{"d", "m", "t"}])
    assert scores["tuples"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    # Three pairs without Metric remain of the gold; those with it have no gold and are not averaged over.
    assert scores["pairs"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0}


def test_predicted_entities_stand_for_the_gold_ones_they_mostly_are():
    spans = [(i, i + 1, "X") for i in range(8)]
    gold = Annotation(spans, {"D": [0, 1], "M": [2], "A": [3], "T": [4]})
    clusters = {"d": [0, 1, 5], "m": [2], "a": [3], "t": [4], "u": [6]}
    relations = binary(("d", "m", "a", "t"), ("d", "u", "a", "t"))
    found = aligned_tuples(gold, Annotation(spans, clusters, relations), ROLES)
    assert found == {("D", "M", "A", "T"), ("D", ("unknown", "u"), "A", "T")}
