"""Documents from JSON Lines, CSV, folders and plain files. Whatever is wrong is said with file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longnet.tasks.offsets import Offsets

OnInvalid = Literal["fail", "replace", "keep"]
"""Bytes that are no UTF-8: an error; U+FFFD each; or kept, each as one lone surrogate (Python's "surrogateescape")."""

_ERRORS = {"fail": "strict", "replace": "replace", "keep": "surrogateescape"}


@dataclass(frozen=True)
class Document:
    """One text. `source` is "file:line" (or the file), `fields` what else stood there."""

    id: str
    text: str
    source: str
    fields: dict[str, Any] = field(default_factory=dict)


def read_documents(
    path: Path, *, required: tuple[str, ...] = (), text: str = "text", on_invalid: OnInvalid = "fail"
) -> list[Document]:
    """All documents of a file or folder, whole.

    .jsonl (one object a line, any line ends) and .csv (a header line), gzipped or not: a field `text`, an optional "id",
    and the fields in `required`. A folder: every file below it is a document; the first folder below is its "label".
    Any other file is one document.

    Raises:
        ValueError: with file and line: no such path, broken lines, missing fields, texts that are empty or no text,
            invalid UTF-8 under "fail", an id met twice.
    """
    if not path.exists():
        raise ValueError(f"expected an existing file or folder of documents; got {path}")
    documents, seen = [], {}
    for document in _records(path, text, on_invalid):
        if not document.text.strip():
            raise ValueError(f"{document.source}: expected a text; got an empty one; remove the document")
        try:
            Offsets(document.text)
        except ValueError as error:
            raise ValueError(f"{document.source}: {error}") from None
        missing = [name for name in required if document.fields.get(name) in (None, "")]
        if missing:
            found = ", ".join(sorted({text, "id", *document.fields}))
            raise ValueError(f"{document.source}: expected {', '.join(missing)}; got only the fields {found}")
        if document.id in seen:
            raise ValueError(
                f"{document.source}: expected every id once; got {document.id!r}, which {seen[document.id]} has; rename one"
            )
        seen[document.id] = document.source
        documents.append(document)
    if not documents:
        raise ValueError(f"{path}: expected at least one document; got none")
    return documents


def _records(path: Path, text: str, on_invalid: OnInvalid) -> Iterator[Document]:
    name = path.name.removesuffix(".gz")
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            parts = file.relative_to(path).parts
            fields = {"label": parts[0]} if len(parts) > 1 else {}
            content = _decode(_bytes(file), str(file), on_invalid)
            yield Document("/".join(parts), content, str(file), fields)
    elif name.endswith(".jsonl"):
        yield from _json_lines(path, text, on_invalid)
    elif name.endswith(".csv"):
        yield from _csv_rows(path, text, on_invalid)
    else:
        yield Document(path.name, _decode(_bytes(path), str(path), on_invalid), str(path))


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzip file; got {error}") from None


def _decode(data: bytes, source: str, on_invalid: OnInvalid, first_line: int | None = 1) -> str:
    """`first_line` None: the source names its line already."""
    try:
        return data.decode("utf-8", _ERRORS[on_invalid])
    except UnicodeDecodeError as error:
        line = "" if first_line is None else f":{first_line + data[: error.start].count(10)}"
        raise ValueError(
            f"{source}{line}: expected UTF-8; got byte {data[error.start]:#04x} at offset {error.start}; convert the file,"
            ' or choose on_invalid "replace" or "keep"'
        ) from None


class _TwiceError(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would silently keep the last of two values, so of two clusters of one name."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return record


def _json_lines(path: Path, text: str, on_invalid: OnInvalid) -> Iterator[Document]:
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            record = json.loads(_decode(line, source, on_invalid, None), object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: expected a JSON object; got {error}") from None
        except _TwiceError as error:
            raise ValueError(f"{source}: expected every name of an object once; got {error} twice") from None
        if not isinstance(record, dict):
            raise ValueError(f"{source}: expected a JSON object; got {type(record).__name__}")
        if not isinstance(record.get(text), str):
            raise ValueError(
                f"{source}: expected a string {text!r}; got fields {', '.join(map(str, record)) or '(none)'}"
            )
        fields = {k: v for k, v in record.items() if k not in (text, "id")}
        yield Document(str(record.get("id", f"{path.name}:{number}")), record[text], source, fields)


def _csv_rows(path: Path, text: str, on_invalid: OnInvalid) -> Iterator[Document]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB would refuse long documents
    content = _decode(_bytes(path), str(path), on_invalid).removeprefix("\ufeff")
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    line = 1
    try:
        if text not in (reader.fieldnames or ()):
            raise ValueError(
                f"{path}:1: expected a column {text!r}; got columns {', '.join(reader.fieldnames or ())}"
            )
        line = reader.line_num
        for row in reader:
            source, line = f"{path}:{line + 1}", reader.line_num
            if None in row or None in row.values():
                raise ValueError(
                    f"{source}: expected {len(reader.fieldnames or ())} columns; got more or fewer"
                )
            fields = {k: v for k, v in row.items() if k not in (text, "id")}
            yield Document(row.get("id") or f"{path.name}:{line}", row[text], source, fields)
    except csv.Error as error:
        raise ValueError(f"{path}:{line + 1}: expected CSV; got {error}") from None
