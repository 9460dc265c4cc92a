"""From files to a memory-mapped stream of tokens with document borders, and from there to shuffled windows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longnet.integrations.tokenizer import BYTES, load_tokenizer
from longnet.text import Tokenizer

FORMAT = 3
SUFFIXES = (".txt", ".md", ".py", ".gz", ".jsonl")
_READ = 1 << 16
_DTYPES = {"uint16": np.uint16, "uint32": np.uint32}
Split = Literal["train", "validation"]


@dataclass
class PreparationReport:
    """What `prepare` read and what it could not: `bad` names file and offset, `unlisted` counts files by suffix."""

    documents: int = 0
    validation_documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    bad: list[str] = field(default_factory=list)
    unlisted: dict[str, int] = field(default_factory=dict)


def prepare(
    inputs: list[Path],
    output: Path,
    *,
    tokenizer: Tokenizer = BYTES,
    on_bad: Literal["skip", "fail"] = "skip",
    suffixes: tuple[str, ...] = SUFFIXES,
    encoding: str = "utf-8",
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
) -> PreparationReport:
    """Turn files and folders into a token directory: tokens.bin (uint16, or uint32 for more than 2^16 ids), documents.npy
    (start offsets), meta.json, and the tokenizer's files unless it is the bytes'.

    A document is a file, or a line's "text" in a .jsonl file; both may be gzipped. It ends with `tokenizer.end`. Folders are
    read recursively in sorted order; files with other suffixes are counted. Empty, binary, undecodable, unreadable or
    truncated inputs, and those that the tokenizer cannot write, are counted and reported with file and offset;
    `on_bad="fail"` raises on the first. The directory appears whole or not at all. `max_bytes` counts bytes of text, and
    one for the end of a document.

    Which documents are held out follows from a hash of each document's bytes: adding text moves no old document to the
    other split, and copies of one document are never in both. Training documents come first in tokens.bin. Neither split is
    empty by chance: the smallest hash of at least two documents is held out, the largest of any number is not.

    Raises:
        ValueError: no readable document, an existing output, bad arguments, or bad input under "fail".
    """
    if output.exists():
        raise ValueError(
            f"output: expected a path that does not exist; got {output}; remove it or choose another"
        )
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: expected a number in [0, 1); got {validation_fraction}")
    try:
        "x".encode(encoding)  # a codec may be known and yet not be one of text
    except LookupError as error:
        raise ValueError(
            f'encoding: expected one that Python knows, such as "latin-1"; got {encoding!r}'
        ) from error
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: expected None or at least 1; got {max_bytes}")
    for path in inputs:
        if not path.exists():
            raise ValueError(f"expected an existing file or folder; got {path}")
    report = PreparationReport()
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        offsets, hashes = [0], []
        with open(temporary / "unsorted.bin", "wb") as stream:
            files = _files(inputs, suffixes, report)
            for document, ids in _documents(files, report, on_bad, encoding, tokenizer):
                stream.write(np.append(ids, tokenizer.dtype(tokenizer.end)).tobytes())
                hashes.append(int.from_bytes(hashlib.sha256(document).digest()[:8], "big"))
                offsets.append(offsets[-1] + len(ids) + 1)
                report.text_bytes += len(document) + 1
                if max_bytes is not None and report.text_bytes >= max_bytes:
                    break
        report.documents, report.tokens = len(hashes), offsets[-1]
        if not report.documents:
            raise ValueError(
                f"expected at least one readable document in {[str(p) for p in inputs]}; bad: {report.bad}; files of "
                f"other suffixes: {report.unlisted}"
            )
        held_out = [h < validation_fraction * 2**64 for h in hashes]
        if validation_fraction and len(hashes) > 1 and not any(held_out):
            held_out[hashes.index(min(hashes))] = True
        if all(held_out):
            held_out[hashes.index(max(hashes))] = False
        report.validation_documents = sum(held_out)
        if tokenizer is not BYTES:
            tokenizer.save(temporary)
        _write_split(temporary, offsets, held_out, tokenizer)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _write_split(folder: Path, offsets: list[int], held_out: list[bool], tokenizer: Tokenizer) -> None:
    """tokens.bin, documents.npy and meta.json from unsorted.bin: training documents first, each group in reading order."""
    order = sorted(range(len(held_out)), key=held_out.__getitem__)
    source, digest, sorted_offsets, border = (
        np.memmap(folder / "unsorted.bin", tokenizer.dtype, "r"),
        hashlib.sha256(),
        [0],
        0,
    )
    with open(folder / "tokens.bin", "wb") as stream:
        for i in order:
            ids = source[offsets[i] : offsets[i + 1]]
            stream.write(ids.tobytes())
            digest.update(ids.tobytes())
            sorted_offsets.append(sorted_offsets[-1] + len(ids))
            border = border if held_out[i] else sorted_offsets[-1]
    (folder / "unsorted.bin").unlink()
    np.save(folder / "documents.npy", np.array(sorted_offsets, np.int64))
    meta = {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "vocab_size": len(tokenizer.spelling),
        "dtype": np.dtype(tokenizer.dtype).name,
        "tokens": sorted_offsets[-1],
        "train_tokens": border,
        "sources": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _files(inputs: list[Path], suffixes: tuple[str, ...], report: PreparationReport) -> Iterator[Path]:
    for path in inputs:
        if not path.is_dir():
            yield path
            continue
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            if file.suffix in suffixes:
                yield file
            else:
                suffix = file.suffix or "none"
                report.unlisted[suffix] = report.unlisted.get(suffix, 0) + 1


def _documents(
    files: Iterator[Path], report: PreparationReport, on_bad: str, encoding: str, tokenizer: Tokenizer
) -> Iterator[tuple[bytes, np.ndarray]]:
    """UTF-8 documents and their ids."""

    def bad(message: str) -> None:
        if on_bad == "fail":
            raise ValueError(message)
        report.bad.append(message)

    for path in files:
        try:
            data = path.read_bytes()
            data = _gunzip(data) if path.suffix == ".gz" else data
        except (OSError, ValueError) as error:
            bad(f"{path}: unreadable: {error}")
            continue
        lines, offset = path.name.removesuffix(".gz").endswith(".jsonl"), 0
        for number, part in enumerate(data.splitlines(keepends=True) if lines else [data], 1):
            name = f"{path}:{number} (byte {offset})" if lines else str(path)
            offset += len(part)
            if lines and not part.strip():
                continue
            try:
                text = part.decode(encoding)
                document = (
                    json.loads(text, object_pairs_hook=_once)["text"].encode() if lines else text.encode()
                )
            except UnicodeDecodeError as error:
                where = (
                    f"not {encoding}: byte {part[error.start]:#04x} at offset {error.start} ({error.reason})"
                )
                bad(f"{name}: {_binary(part) or where}")
                continue
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                bad(f'{name}: expected a JSON object with "text": {error!r}')
                continue
            problem, ids = _binary(document) or (None if document.strip() else "empty"), None
            try:
                ids = None if problem else tokenizer.encode(document)
            except ValueError as error:
                problem = str(error)
            if ids is None:
                bad(f"{name}: {problem}")
            else:
                yield document, ids


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of two values, and lose a text without a word."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a name that comes twice among {[name for name, _ in pairs]}")
    return record


def _binary(document: bytes) -> str | None:
    zero = document.find(b"\0")
    return f"binary: a zero byte at offset {zero}" if zero >= 0 else None


def _gunzip(data: bytes) -> bytes:
    """All members of a gzip file; ValueError with the offset where it breaks or ends too early."""
    out, at = bytearray(), 0
    end = len(data.rstrip(b"\0"))  # what may follow the last member
    while at < end:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if at >= len(data):
                raise ValueError(
                    f"truncated gzip: it ends at offset {len(data)}, after {len(out)} bytes of text"
                )
            piece = data[at : at + _READ]
            try:
                out += member.decompress(piece)
            except zlib.error as error:
                raise ValueError(
                    f"damaged gzip between offsets {at} and {at + len(piece)}, after {len(out)} bytes of text: {error}"
                ) from error
            at += len(piece) - len(member.unused_data)
    return bytes(out)


class TokenDataset:
    """A prepared directory, memory-mapped: the training documents, then the held-out ones."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
            self.documents = np.load(self.path / "documents.npy", allow_pickle=False)
            self.tokens = np.memmap(self.path / "tokens.bin", _DTYPES[self.meta.get("dtype", "uint16")], "r")
            expected = (FORMAT, int(self.meta["tokens"]), int(self.documents[-1]))
            found = (self.meta["format"], len(self.tokens), len(self.tokens))
            self._border = int(self.meta.get("train_tokens", -1))
            str(self.meta["sources"])
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"expected a directory made by `longnet prepare`; got {path}: {error!r}; prepare it again"
            ) from error
        if expected != found or not 0 <= self._border <= len(self.tokens):
            raise ValueError(
                f"{path}: expected format {expected[0]} and {expected[1]} tokens (documents end at {expected[2]}); got "
                f"format {found[0]} and {found[1]} tokens; prepare it again"
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the ids are of, from the files that lie here."""
        tokenizer = load_tokenizer(None if self.meta["tokenizer"] == BYTES.name else self.path)
        if tokenizer.name != self.meta["tokenizer"]:
            raise ValueError(
                f"{self.path}: expected the tokenizer that the text was prepared with, {self.meta['tokenizer']}; got one of "
                f"{tokenizer.name}; prepare it again"
            )
        return tokenizer

    def split(self, split: Split) -> np.ndarray:
        """The tokens of a split, as a view on the file."""
        tokens = self.tokens[: self._border] if split == "train" else self.tokens[self._border :]
        if not len(tokens):
            raise ValueError(
                f"expected at least one whole document in the {split!r} split; got {len(self.documents) - 1} documents in all; "
                "prepare more documents, or the same in more files, or change validation_fraction"
            )
        return tokens


class WindowSampler:
    """Shuffled, non-overlapping windows of `window` tokens; every epoch a fresh order at a fresh phase. Resumes exactly."""

    def __init__(
        self, dataset: TokenDataset, window: int, batch_size: int, seed: int, split: Split = "train"
    ) -> None:
        self.tokens, self.window, self.batch_size, self.seed = dataset.split(split), window, batch_size, seed
        self._identity = {
            "sources": dataset.meta["sources"],
            "window": window,
            "seed": seed,
            "split": split,
            "tokens": len(self.tokens),
        }
        self.per_epoch = (len(self.tokens) - window) // window
        if window < 2 or batch_size < 1 or self.per_epoch < 1:
            raise ValueError(
                f"expected a window >= 2, a batch size >= 1 and more than two windows of text in {split!r}; got window "
                f"{window}, batch size {batch_size}, {len(self.tokens)} tokens; prepare more text or shorten the window"
            )
        self.drawn, self._epoch = 0, -1

    def next_batch(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """(batch_size, window) int64 ids; of these, only `rows` and `columns` are read, for ranks that hold a part."""
        self._begins = [self._begin(i) for i in range(self.drawn, self.drawn + self.batch_size)]
        parts = [
            self.tokens[first : first + self.window][columns].astype(np.int64) for first in self._begins[rows]
        ]
        self.drawn += self.batch_size
        return torch.from_numpy(np.stack(parts))

    def _begin(self, i: int) -> int:
        epoch, position = divmod(i, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._phase, self._order = (
                int(generator.integers(self.window)),
                generator.permutation(self.per_epoch),
            )
            self._epoch = epoch
        return self._phase + int(self._order[position]) * self.window

    def bytes_per_token(self, byte_lengths: np.ndarray) -> float:
        """Mean bytes of what was to be predicted in the batch drawn last, its rows and columns all: (V,) bytes an id."""
        sizes = [byte_lengths[self.tokens[first + 1 : first + self.window]].sum() for first in self._begins]
        return float(sum(sizes)) / (len(sizes) * (self.window - 1))

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        differing = [
            f"{k}: checkpoint {state.get(k)!r}, now {v!r}"
            for k, v in self._identity.items()
            if state.get(k) != v
        ]
        if differing:
            raise ValueError("expected the data state of this run; differing: " + "; ".join(differing))
        self.drawn = int(state["drawn"])
