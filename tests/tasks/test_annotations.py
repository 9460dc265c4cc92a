"""Annotated documents: what is read is what was written, and every fault is said with file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.tasks.annotations import Annotation, annotation_of, read_annotated, record_of
from longnet.tasks.documents import Document

TEXT = "Ä. Weiß\r\nlives in 漢口."
ANNA = {"start": 0, "end": 7, "label": "PER"}
TOWN = {"start": 18, "end": 20, "label": "LOC"}


def document(**fields):
    return Document("d", TEXT, "x.jsonl:1", {"entities": [ANNA, TOWN], **fields})


def test_clusters_relations_and_roles():
    clusters = {
        "Anna": [{"start": 0, "end": 7}],
        "Town": [{"start": 18, "end": 20, "label": "LOC"}],
        "Nobody": [],
    }
    relations = [
        {"head": "Anna", "tail": "Town", "label": "lives in"},
        {"Who": "Anna", "Where": "Town", "How": "Nobody", "score": "12.5"},
    ]
    found = annotation_of(document(clusters=clusters, relations=relations))
    assert found.spans == [(0, 7, "PER"), (18, 20, "LOC")]
    assert found.clusters == {
        "Anna": [0],
        "Town": [1],
    }  # a cluster without mentions cannot be found in a text
    assert found.relations == [("Anna", "Town", "lives in"), ("Town", "Anna", "Where-Who")]
    assert found.label("Town") == "LOC"
    assert annotation_of(document()) == Annotation(found.spans, {}, [])


def test_cut_keeps_what_lies_before():
    annotation = Annotation(
        [(0, 2, "A"), (1, 9, "A"), (3, 5, "B")],
        {"x": [0, 1], "y": [2], "z": [1]},
        [("x", "y", "r"), ("x", "z", "r")],
    )
    assert annotation.cut(5) == Annotation(
        [(0, 2, "A"), (3, 5, "B")], {"x": [0], "y": [1]}, [("x", "y", "r")]
    )
    assert annotation.cut(9) == annotation


spans = st.tuples(st.integers(0, 10), st.integers(1, 9), st.sampled_from("AB")).map(
    lambda s: (s[0], s[0] + s[1], s[2])
)


@given(st.sets(spans, min_size=1), st.data())
def test_a_record_reads_back_as_it_was(chosen, data):
    ordered = sorted(chosen)
    names = ["e", "é\n", "\udcff", ""]
    members = st.sets(st.integers(0, len(ordered) - 1), min_size=1)
    clusters = {name: sorted(data.draw(members)) for name in names[: data.draw(st.integers(0, 4))]}
    pairs = [(h, t, "r") for h in clusters for t in clusters]
    relations = sorted(data.draw(st.sets(st.sampled_from(pairs)))) if pairs else []
    annotation = Annotation(ordered, clusters, relations)
    source = Document("d", "aé漢𝄞" * 5, "x:1")
    record = json.loads(json.dumps(record_of(source, annotation)))
    assert annotation_of(Document("d", source.text, "x:1", record)) == annotation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entities": 3}, "expected a list of entities"),
        ({"entities": [{"start": 0, "end": 2}]}, "expected entities {start, end, label}"),
        ({"entities": [{"start": 0, "end": 99, "label": "A"}]}, "0 <= start < end <= 21 characters"),
        (
            {"entities": [{"start": 0, "end": 2, "label": "A", "text": "Ä"}]},
            "offsets count characters, not bytes",
        ),
        ({"clusters": []}, "expected clusters {name: [mentions]}"),
        ({"clusters": {"a": 1}}, "cluster 'a' as a list of mentions"),
        (
            {"clusters": {"a": [{"start": 1, "end": 2}]}},
            "cluster 'a': expected its mentions among the entities",
        ),
        (
            {"clusters": {"a": [{**ANNA, "label": "LOC"}]}},
            "cluster 'a': expected its mentions among the entities",
        ),
        ({"clusters": {"a": [{"start": 2, "end": 1}]}}, "mentions {start, end} in cluster 'a'"),
        ({"relations": []}, "expected relations as a list, beside clusters"),
        ({"clusters": {"a": [ANNA]}, "relations": {}}, "expected relations as a list"),
        ({"clusters": {"a": [ANNA]}, "relations": ["a"]}, "expected relations {head, tail, label}"),
        ({"clusters": {"a": [ANNA]}, "relations": [{"head": "a", "tail": "b", "label": "r"}]}, "got 'b' in"),
        (
            {"clusters": {"a": [ANNA]}, "relations": [{"head": "a", "tail": "a", "label": 3}]},
            "label as a string",
        ),
        ({"clusters": {"a": [ANNA]}, "relations": [{"Who": "a"}]}, "two roles or more"),
        ({"clusters": {"a": [ANNA]}, "relations": [{"Who": "a", "Where": 7}]}, "got 7 in"),
    ],
)
def test_faults_are_named(fields, message):
    with pytest.raises(ValueError) as error:
        annotation_of(document(**fields))
    assert str(error.value).startswith("x.jsonl:1: ")
    assert message in str(error.value)


def test_two_clusters_of_one_name_and_two_documents_of_one_id(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ab", "entities": [], "clusters": {"a": [], "a": []}}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected every name of an object once; got 'a' twice"):
        read_annotated(path)
    path.write_text('{"id": 1, "text": "ab", "entities": []}\n' * 2)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: expected every id once"):
        read_annotated(path)
