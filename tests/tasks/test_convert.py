"""Annotated documents from DocRED's JSON and from Python sources: offsets exact, relations as the source means them."""

import io
import itertools
import json
import sysconfig
import tokenize
from pathlib import Path

import pytest

from longnet.tasks.annotations import annotation_of
from longnet.tasks.convert import from_docred, from_python
from longnet.tasks.documents import Document
from longnet.tasks.python_source import annotate_source

DOCRED = {
    "title": "Té",
    "sents": [["Wéi", "lives", "."], ["He", "likes", "New", "York", "."], []],
    "vertexSet": [
        [{"name": "Wéi", "pos": [0, 1], "sent_id": 0, "type": "PER"}, {"name": "He", "pos": [0, 1], "sent_id": 1, "type": "PER"},
         {"name": "Wéi", "pos": [0, 1], "sent_id": 0, "type": "PER"}],
        [{"name": "New York", "pos": [2, 4], "sent_id": 1, "type": "LOC"}],
    ],
    "labels": [{"r": "P1", "h": 0, "t": 1, "evidence": [1]}],
}  # fmt: skip


def test_docred_by_hand(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([DOCRED, DOCRED]))
    first, second = from_docred(path)
    assert first["text"] == "Wéi lives .\nHe likes New York .\n"
    found = annotation_of(Document(first["id"], first["text"], "", first))
    assert [first["text"][s:e] for s, e, _ in found.spans] == ["Wéi", "He", "New York"]
    assert found.clusters == {"0 Wéi": [0, 1], "1 New York": [2]}
    assert found.relations == [("0 Wéi", "1 New York", "P1")]
    assert (first["id"], second["id"]) == ("Té", "Té (2)")
    path.write_text(json.dumps(DOCRED) + "\n")
    assert next(from_docred(path)) == first
    for broken in (
        {**DOCRED, "vertexSet": [[{**DOCRED["vertexSet"][1][0], "pos": [2, 9]}]]},
        {"title": "x"},
        [3],
    ):
        path.write_text(json.dumps([DOCRED, broken]))
        with pytest.raises(ValueError, match=r"dev\.json: document 2: expected title, sents, vertexSet"):
            list(from_docred(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="expected DocRED's JSON"):
        list(from_docred(path))


SOURCE = '''"""Ä docstring."""
import os, sys as system
import a.b
from .near import thing as other, also
from . import sibling


class Base: pass


class Derived(Base, other, os.PathLike):
    @staticmethod
    def fixed(self): self.run()

    def run(self, size=limit()):
        self.walk(); helper(self.walk)
        def inner(self): self.walk()
        return (lambda self: self.run())(self), self.field()

    def walk(self): return self.run
    field = property(run)
    def field2(self): self.field2 = 1; self.field2()


def limit(): return also(twice())
def twice(): pass
async def helper(x):
    twice = 1; return Derived(), limit(), x(), helper()
limit()
'''


def relations_of(record):
    return {(r["head"], r["label"], r["tail"]) for r in record["relations"]}


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_python_by_hand(ends):
    record = annotate_source(SOURCE.replace("\n", ends).encode(), "m")
    found = relations_of(record)
    assert {r for r in found if r[1] == "imports"} == {
        ("m", "imports", name) for name in (
            "import os", "import sys", "import a.b", "import .near", "import .near:thing", "import .near:also",
            "import .:sibling",
        )
    }  # fmt: skip
    assert {r for r in found if r[1] == "inherits"} == {
        ("Derived", "inherits", "Base"), ("Derived", "inherits", "import .near:thing"),
    }  # fmt: skip
    assert {r for r in found if r[1] == "calls"} == {
        ("Derived.run", "calls", "Derived.walk"), ("Derived.run", "calls", "helper"),
        ("Derived", "calls", "limit"),  # a default is computed by the class's body
        # `twice` is bound twice, so nothing is certain about it; recursion and calls of parameters are left out.
        ("limit", "calls", "import .near:also"), ("helper", "calls", "Derived"), ("helper", "calls", "limit"),
        ("m", "calls", "limit"),
    }  # fmt: skip
    assert ("Derived.run", "defines", "Derived.run.inner") in found
    assert ("Derived", "defines", "Derived.walk") in found
    assert len({r for r in found if r[1] == "defines"}) == 10
    annotation = annotation_of(Document("m", record["text"], "", record))
    assert {n: len(own) for n, own in annotation.clusters.items() if n in ("Derived.walk", "Derived.run", "limit", "Base")} == {
        "Derived.walk": 3, "Derived.run": 2, "limit": 4, "Base": 2,
    }  # fmt: skip


@pytest.mark.parametrize("data", [b"\xff", b"def", b"a\x00", "\ufeffx = 1".encode(), b"def \\\n f(): pass"])
def test_sources_that_are_left_out(data, tmp_path):
    assert annotate_source(data, "m") is None
    (tmp_path / "bad.py").write_bytes(data)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_bytes(b"import os\n")
    assert [r["id"] for r in from_python(tmp_path)] == ["p/__init__.py"]
    assert list(from_python(tmp_path, smallest=11)) == []


@pytest.mark.parametrize("name", ["argparse.py", "heapq.py", "json/decoder.py", "asyncio/locks.py"])
def test_definitions_equal_those_of_the_tokenizer(name):
    """Another road to the same names: the token after `def` or `class`."""
    data = (Path(sysconfig.get_path("stdlib")) / name).read_bytes()
    record = annotate_source(data, "m")
    source, shift = data.decode(), len("# module m\n")
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    tokens = list(tokenize.generate_tokens(io.StringIO(source, newline="").readline))
    expected = {
        begins[t.start[0] - 1] + t.start[1] + shift
        for before, t in itertools.pairwise(tokens)
        if before.type == t.type == tokenize.NAME and before.string in ("def", "class")
    }
    firsts = {
        own[0]["start"] if name not in ("m",) else -1
        for name, own in record["clusters"].items()
        if own[0]["label"] in ("Function", "Class")
    }
    starts = {m["start"] for own in record["clusters"].values() for m in own}
    assert expected <= starts
    assert len(firsts) == len(expected)
    assert all(record["text"][e["start"] : e["end"]] == e["text"] for e in record["entities"])
    assert all(e["text"].replace(".", "").isidentifier() for e in record["entities"])
