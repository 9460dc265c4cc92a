"""From files to a memory-mapped stream of tokens with document borders, and from there to shuffled windows."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longnet.text import EOS, VOCAB_SIZE, encode

FORMAT = 1
Split = Literal["train", "validation"]


@dataclass
class PreparationReport:
    """What `prepare` read and what it could not."""

    documents: int = 0
    tokens: int = 0
    bad: list[str] = field(default_factory=list)


def prepare(
    inputs: list[Path],
    output: Path,
    *,
    on_bad: Literal["skip", "fail"] = "skip",
    suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".gz", ".jsonl"),
    max_bytes: int | None = None,
) -> PreparationReport:
    """Turn files and folders into a token directory: tokens.bin (uint16), documents.npy (start offsets), meta.json.

    A document is a file, or a line's "text" in a .jsonl file; both may be gzipped. It ends with EOS. Folders are read
    recursively in sorted order. Empty, binary, undecodable, unreadable or truncated inputs are counted and reported with
    file and offset; `on_bad="fail"` raises on the first. The directory appears whole or not at all.

    Raises:
        ValueError: no readable document, an existing output, or bad input under "fail".
    """
    if output.exists():
        raise ValueError(
            f"output: expected a path that does not exist; got {output}; remove it or choose another"
        )
    report = PreparationReport()
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    offsets, digest = [0], hashlib.sha256()
    try:
        with open(temporary / "tokens.bin", "wb") as stream:
            for _, document in _documents(_files(inputs, suffixes), report, on_bad):
                ids = np.append(encode(document), np.uint16(EOS))
                stream.write(ids.tobytes())
                digest.update(ids.tobytes())
                offsets.append(offsets[-1] + len(ids))
                if max_bytes is not None and offsets[-1] >= max_bytes:
                    break
            stream.flush()
            os.fsync(stream.fileno())
        report.documents, report.tokens = len(offsets) - 1, offsets[-1]
        if not report.documents:
            raise ValueError(
                f"expected at least one readable document in {[str(p) for p in inputs]}; bad: {report.bad}"
            )
        np.save(temporary / "documents.npy", np.array(offsets, np.int64))
        meta = {
            "format": FORMAT,
            "vocab_size": VOCAB_SIZE,
            "tokens": report.tokens,
            "sources": digest.hexdigest(),
        }
        (temporary / "meta.json").write_text(json.dumps(meta))
        for path in (temporary / "documents.npy", temporary / "meta.json", temporary):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _files(inputs: list[Path], suffixes: tuple[str, ...]) -> Iterator[Path]:
    for path in inputs:
        if not path.exists():
            raise ValueError(f"expected an existing file or folder; got {path}")
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in suffixes)
        else:
            yield path


def _documents(files: Iterator[Path], report: PreparationReport, on_bad: str) -> Iterator[tuple[str, bytes]]:
    def bad(message: str) -> None:
        if on_bad == "fail":
            raise ValueError(message)
        report.bad.append(message)

    for path in files:
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            bad(f"{path}: unreadable: {error}")
            continue
        lines = path.name.removesuffix(".gz").endswith(".jsonl")
        for number, part in enumerate(data.splitlines() if lines else [data], 1):
            if lines and not part.strip():
                continue
            name = f"{path}:{number}" if lines else str(path)
            try:
                document = json.loads(part)["text"].encode() if lines else part
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                bad(f'{name}: expected a JSON object with "text": {error!r}')
                continue
            problem = _problem(document)
            if problem:
                bad(f"{name}: {problem}")
            else:
                yield name, document


def _problem(document: bytes) -> str | None:
    if not document.strip():
        return "empty"
    if (zero := document.find(b"\0")) >= 0:
        return f"binary: a zero byte at offset {zero}"
    try:
        document.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {document[error.start]:#04x} at offset {error.start}"
    return None


class TokenDataset:
    """A prepared directory, memory-mapped. The last `validation_fraction` of the tokens, at a document border, is held out."""

    def __init__(self, path: Path | str, validation_fraction: float = 0.05) -> None:
        self.path = Path(path)
        try:
            self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
            self.documents = np.load(self.path / "documents.npy", allow_pickle=False)
            self.tokens = np.memmap(self.path / "tokens.bin", np.uint16, "r")
            expected = (FORMAT, int(self.meta["tokens"]), int(self.documents[-1]))
            found = (self.meta["format"], len(self.tokens), len(self.tokens))
            str(self.meta["sources"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"expected a directory made by `longnet prepare`; got {path}: {error!r}; prepare it again"
            ) from error
        if expected != found:
            raise ValueError(
                f"{path}: expected format {expected[0]} and {expected[1]} tokens (documents end at {expected[2]}); got "
                f"format {found[0]} and {found[1]} tokens; prepare it again"
            )
        border = int(np.searchsorted(self.documents, len(self.tokens) * (1 - validation_fraction)))
        self._border = int(self.documents[min(border, len(self.documents) - 1)])

    def split(self, split: Split) -> np.ndarray:
        """The tokens of a split, as a view on the file."""
        tokens = self.tokens[: self._border] if split == "train" else self.tokens[self._border :]
        if not len(tokens):
            raise ValueError(
                f"expected at least one whole document in the {split!r} split; got {len(self.documents) - 1} documents in all, "
                "the last of them too long; prepare more documents or change validation_fraction"
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

    def next_batch(self) -> Tensor:
        """(batch_size, window) int64 ids."""
        rows = []
        for i in range(self.drawn, self.drawn + self.batch_size):
            epoch, position = divmod(i, self.per_epoch)
            if epoch != self._epoch:
                generator = np.random.default_rng((self.seed, epoch))
                self._phase, self._order = (
                    int(generator.integers(self.window)),
                    generator.permutation(self.per_epoch),
                )
                self._epoch = epoch
            first = self._phase + int(self._order[position]) * self.window
            rows.append(self.tokens[first : first + self.window].astype(np.int64))
        self.drawn += self.batch_size
        return torch.from_numpy(np.stack(rows))

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
