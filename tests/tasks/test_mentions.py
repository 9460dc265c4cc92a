"""Features and candidates against the same things found by looking at every pair."""

import random

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.tasks.mentions import (
    ACRONYM,
    BUCKETS,
    CONTAINED,
    DIFFERENT,
    EQUAL,
    FIRST_WORD,
    LAST_WORD,
    NEIGHBOURS,
    Strings,
    all_pairs,
    candidate_antecedents,
    frequency_and_place,
    join,
    near_pairs,
    normalise,
    pair_distances,
)


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ("Visual  Question\r\nAnswering", "visual question answering", EQUAL),
        ("Visual Question Answering", "VQA", ACRONYM),
        ("V.Q.A.", "Visual Question Answering", ACRONYM),
        ("Willi Schneider", "Schneider", LAST_WORD),
        ("New York", "New Jersey", FIRST_WORD),
        ("COCO dataset v2", "dataset", CONTAINED),
        ("Paris", "Oslo", DIFFERENT),
        ("ﬁle", "file", EQUAL),
        ("?!", "…", DIFFERENT),
    ],
)
def test_how_two_strings_agree(a, b, kind):
    strings = Strings([a, b])
    assert strings.agreement(0, 1) == strings.agreement(1, 0) == kind


def test_normalise_is_idempotent_and_frequencies_count():
    assert normalise(" \uff23öln\t\nSÜD ") == "cöln süd"
    frequency, place = frequency_and_place(["a", "b", "a", "a"], np.asarray([0, 63, 64, 6400]))
    assert frequency.tolist() == [2, 1, 2, 2]
    assert place.tolist() == [0, 0, 1, 6]


def test_candidates_hold_the_same_string_however_far_away():
    texts = [
        "Long Short Term Memory",
        *[f"x{i} y{i}" for i in range(200)],
        "LSTM",
        "long short term  memory",
        "Term Memory",
    ]
    strings = Strings(texts)
    pairs, features = candidate_antecedents(strings, ["A"] * len(texts), np.arange(len(texts)) * 10)
    found = {tuple(p): tuple(f) for p, f in zip(pairs.tolist(), features.tolist(), strict=True)}
    assert found[201, 0][1] == ACRONYM
    assert found[202, 0][1] == EQUAL
    assert found[203, 202][1] == LAST_WORD
    assert found[203, 202] == (3, LAST_WORD, 1)
    assert all(i > j for i, j in found)


def test_candidates_grow_linearly():
    def count(n):
        generator = random.Random(0)
        texts = [generator.choice("abcdefg") + " " + generator.choice("xyz") for _ in range(n)]
        return len(candidate_antecedents(Strings(texts), ["A"] * n, np.arange(n))[0])

    assert count(2000) <= 2000 * 24
    assert count(4000) == pytest.approx(2 * count(2000), rel=0.02)


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))
    )
)
def test_join_gives_connected_components(case):
    count, links = case
    graph = networkx.Graph(links)
    graph.add_nodes_from(range(count))
    assert join(count, links) == sorted(sorted(c) for c in networkx.connected_components(graph))


def test_pairs_and_distances_equal_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(30):
        entities = int(generator.integers(2, 8))
        entity = np.concatenate((np.arange(entities), generator.integers(0, entities, 12)))
        member = generator.permutation(len(entity))
        at = np.sort(generator.integers(0, 3000, len(entity)))[member]
        allowed = generator.random((3, 3)) < 0.5
        labels = generator.integers(0, 3, entities)
        pairs = all_pairs(labels, allowed)
        assert {tuple(p) for p in pairs.tolist()} == {
            (h, t)
            for h in range(entities)
            for t in range(entities)
            if h != t and allowed[labels[h], labels[t]]
        }
        for (h, t), found in zip(pairs.tolist(), pair_distances(pairs, at, entity).tolist(), strict=True):
            gaps = [int(b) - int(a) for a in at[entity == h] for b in at[entity == t]]
            after, before = [g for g in gaps if g >= 0], [-g for g in gaps if g <= 0]
            best = min(after + before)
            first = bool(after) and min(after) <= min(before, default=10**9)
            assert found == int(np.log2(1 + best)) + BUCKETS * first


def test_near_pairs_are_those_a_few_mentions_apart():
    generator = np.random.default_rng(1)
    entity = np.concatenate((np.arange(40), generator.integers(0, 40, 30)))
    member = generator.permutation(70)
    place = {int(m): int(e) for m, e in zip(member, entity, strict=True)}
    expected = {(place[i], place[j]) for i in range(70) for j in range(70)
                if 0 < abs(i - j) <= NEIGHBOURS and place[i] != place[j]}  # fmt: skip
    assert {tuple(p) for p in near_pairs(member, entity).tolist()} == expected
    assert near_pairs(np.asarray([0]), np.asarray([0])).shape == (0, 2)
