"""Annotated documents from others' formats: DocRED's JSON, and Python source files, whose own grammar says what is in them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longnet.tasks.python_source import annotate_source

Record = dict[str, Any]


def from_docred(path: Path) -> Iterator[Record]:
    """Records {id, text, entities, clusters, relations} from DocRED's or Re-DocRED's JSON: a list, or one document a
    line; gzipped or not.

    Tokens are joined by spaces, sentences by line ends. A cluster is named by its number and its first mention, so that
    the ends "h" and "t" stay visible.

    Raises:
        ValueError: with the document's number, what is missing or lies outside.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = data.decode()
        documents = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.splitlines() if x]
        )
    except ValueError as error:
        raise ValueError(f"{path}: expected DocRED's JSON; got {error}") from None
    seen: dict[str, int] = {}
    for number, document in enumerate(documents, 1):
        try:
            record = _docred_record(document)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: document {number}: expected title, sents, vertexSet and labels as in DocRED; got {error!r}"
            ) from None
        # Titles are ids, and Re-DocRED has none twice; other sets may.
        seen[record["id"]] = count = seen.get(record["id"], 0) + 1
        yield record if count == 1 else {**record, "id": f"{record['id']} ({count})"}


def _docred_record(document: dict[str, Any]) -> Record:
    text, borders = "", []
    for sentence in document["sents"]:
        own = []
        for token in sentence:
            own.append((len(text), len(text) + len(token)))
            text += token + " "
        text = text[:-1] + "\n" if own else text
        borders.append(own)
    entities, clusters, names = {}, {}, []
    for number, mentions in enumerate(document["vertexSet"]):
        spans = set()
        for mention in mentions:
            first, after = mention["pos"]
            own = borders[mention["sent_id"]]
            if not 0 <= first < after <= len(own):
                raise IndexError(f"mention {mention!r} outside of its sentence of {len(own)} tokens")
            start, end = own[first][0], own[after - 1][1]
            spans.add((start, end, mention["type"]))
            entities[start, end, mention["type"]] = None
        names.append(f"{number} {mentions[0]['name']}")
        clusters[names[-1]] = [{"start": s, "end": e, "label": label} for s, e, label in sorted(spans)]
    relations = [
        {"head": names[label["h"]], "tail": names[label["t"]], "label": label["r"]}
        for label in document.get("labels", [])
    ]
    return {
        "id": document["title"],
        "text": text,
        "entities": [
            {"start": s, "end": e, "label": label, "text": text[s:e]} for s, e, label in sorted(entities)
        ],
        "clusters": clusters,
        "relations": relations,
    }


def from_python(
    path: Path, smallest: int = 0, largest: int | None = None, skip: frozenset[str] = frozenset()
) -> Iterator[Record]:
    """Records of the Python files below a folder (or of one file), by name; files that are no UTF-8 or do not parse are left out.

    Args:
        smallest, largest: bytes of the files that are taken.
        skip: names of folders that are left out, wherever below `path` they are.
    """
    root = path if path.is_dir() else path.parent
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        relative = file.relative_to(root)
        if skip & set(relative.parts) or not file.is_file():
            continue
        data = file.read_bytes()
        if len(data) < smallest or (largest is not None and len(data) > largest):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        record = annotate_source(data, module)
        if record is not None:
            yield {"id": relative.as_posix(), **record}
