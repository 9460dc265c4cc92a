"""Knowledge graphs: what is written reads back, whatever the names; pictures of small ones only."""

import json

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.tasks.annotations import Annotation
from longnet.tasks.documents import Document
from longnet.tasks.graph import (
    PICTURE_NODES,
    build_graph,
    draw,
    read_jsonld,
    write_graphml,
    write_jsonld,
    writer,
)


def two_documents():
    first = Annotation(
        [(0, 4, "PER"), (14, 18, "LOC")], {"Anna": [0], "Köln": [1]}, [("Anna", "Köln", "lives in")]
    )
    second = Annotation(
        [(0, 4, "PER"), (11, 15, "LOC")],
        {"ANNA": [0], "Köln": [1]},
        [("ANNA", "Köln", "lives in"), ("Köln", "ANNA", "knows")],
    )
    texts = ["Anna lives in Köln.", "ANNA loves Köln."]
    return list(
        zip([Document(f"d{i}", text, "") for i, text in enumerate(texts)], [first, second], strict=True)
    )


def test_documents_are_apart_or_merged_by_name():
    graph = build_graph(two_documents())
    assert sorted(graph) == ["d0#Anna", "d0#Köln", "d1#ANNA", "d1#Köln"]
    merged = build_graph(two_documents(), merge=True)
    assert sorted(merged) == ["LOC/köln", "PER/anna"]
    assert merged.edges["PER/anna", "LOC/köln", "lives in"]["documents"] == ["d0", "d1"]
    assert merged.edges["LOC/köln", "PER/anna", "knows"]["documents"] == ["d1"]
    assert merged.nodes["PER/anna"]["mentions"] == [
        {"document": "d0", "start": 0, "end": 4, "text": "Anna"},
        {"document": "d1", "start": 0, "end": 4, "text": "ANNA"},
    ]


def test_graphml_reads_back(tmp_path):
    graph = build_graph(two_documents())
    write_graphml(graph, tmp_path / "g.graphml")
    again = networkx.read_graphml(tmp_path / "g.graphml", force_multigraph=True)
    assert set(again) == set(graph)
    assert set(again.edges(keys=True)) == set(graph.edges(keys=True))
    for node, data in graph.nodes(data=True):
        assert json.loads(again.nodes[node]["mentions"]) == data["mentions"]
        assert (again.nodes[node]["label"], again.nodes[node]["name"]) == (data["label"], data["name"])


TEXTS = st.text(
    st.characters() | st.sampled_from("\x00\x0b<&\"'\r\n\udcff\ufffe#:%$"), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4, unique=True), TEXTS, TEXTS, st.text(max_size=3))
def test_any_name_can_be_written(tmp_path_factory, names, label, relation, identity):
    folder = tmp_path_factory.mktemp("graph")
    text = "".join(names)
    spans, at = [], 0
    for name in names:
        spans.append((at, at + len(name), label))
        at += len(name)
    clusters = {name: [i] for i, name in enumerate(names)}
    annotation = Annotation(spans, clusters, [(names[0], names[-1], relation)])
    graph = build_graph([(Document(identity, text, ""), annotation)])
    write_jsonld(graph, folder / "g.jsonld")
    again = read_jsonld(folder / "g.jsonld")
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(again.edges(keys=True)) == set(graph.edges(keys=True))
    write_graphml(graph, folder / "g.graphml")
    flat = networkx.read_graphml(folder / "g.graphml", force_multigraph=True)
    assert (len(flat), flat.number_of_edges()) == (len(graph), 1)
    offsets = [json.loads(d["mentions"])[0] for _, d in flat.nodes(data=True)]
    assert sorted((m["start"], m["end"]) for m in offsets) == [s[:2] for s in spans]


def test_jsonld_is_linked_data(tmp_path):
    write_jsonld(build_graph(two_documents(), merge=True), tmp_path / "g.jsonld")
    data = json.loads((tmp_path / "g.jsonld").read_text())
    assert data["@context"]["name"] == "http://schema.org/name"
    anna = next(n for n in data["@graph"] if n["name"] == "Anna")
    assert anna["@type"] == "urn:longnet:label:PER"
    assert anna["urn:longnet:relation:lives%20in"] == [{"@id": "urn:longnet:entity:LOC%2Fk%C3%B6ln"}]


def test_pictures_of_small_graphs(tmp_path):
    draw(build_graph(two_documents()), tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    draw(networkx.MultiDiGraph(), tmp_path / "empty.png")
    odd = networkx.MultiDiGraph()
    odd.add_node("a", label="$x", name="$\\frac{1}{ $\x00\udcff", mentions=[])
    draw(odd, tmp_path / "odd.svg")
    large = networkx.MultiDiGraph()
    for i in range(PICTURE_NODES + 1):
        large.add_node(i, label="X", name=str(i), mentions=[])
    with pytest.raises(
        ValueError, match=f"at most {PICTURE_NODES} entities in a picture; got {PICTURE_NODES + 1}"
    ):
        draw(large, tmp_path / "large.png")
    assert not (tmp_path / "large.png").exists()
    large.add_edge(0, 1, key="r", label="r")  # entities without relations are left out of a picture
    draw(large, tmp_path / "large.png")


def test_what_cannot_be_written_is_said_before_work_starts(tmp_path):
    with pytest.raises(ValueError, match=r"a file name ending in \.graphml, \.jsonld"):
        writer(tmp_path / "g.xml")
    with pytest.raises(ValueError, match="an existing folder"):
        writer(tmp_path / "none" / "g.png")
