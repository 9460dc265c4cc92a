"""Text to ids and back: what a tokenizer is to us, and the bytes: byte b is id b + 4, after PAD, BOS, EOS and MASK."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

PAD, BOS, EOS, MASK = range(4)
FIRST_BYTE = 4
VOCAB_SIZE = FIRST_BYTE + 256


def encode(text: str | bytes) -> np.ndarray:
    """uint16 ids of a text's UTF-8 bytes, or of bytes as they are.

    Example:
        >>> encode("Aé").tolist()
        [69, 199, 173]
    """
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    return np.frombuffer(data, np.uint8).astype(np.uint16) + FIRST_BYTE


def decode_bytes(ids: Iterable[int]) -> bytes:
    """The bytes of ids; special ids are dropped."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    if array.size and (array.min() < 0 or array.max() >= VOCAB_SIZE):
        raise ValueError(f"expected ids in [0, {VOCAB_SIZE}); got {array.min()}..{array.max()}")
    return (array[array >= FIRST_BYTE] - FIRST_BYTE).astype(np.uint8).tobytes()


def decode(ids: Iterable[int], errors: str = "replace") -> str:
    """The text of ids. Bytes that are no UTF-8 become U+FFFD, or raise with errors="strict"."""
    return decode_bytes(ids).decode("utf-8", errors)


class StreamDecoder:
    """Turns ids that arrive one by one into text, holding back a character until its last byte is there."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int], final: bool = False) -> str:
        return self._decoder.decode(decode_bytes(ids), final)


class Tokenizer(ABC):
    """Text to ids and back. An id stands for the same bytes wherever it comes: a stream of ids is bytes at once.

    name: of the vocabulary and its rules; tokenizers of one name give the same ids.
    end: the id that ends a document.
    spelling: the bytes of every id, empty for special ids; its length is the size of the vocabulary.
    """

    name: str
    end: int
    spelling: list[bytes]

    @abstractmethod
    def pieces(self, data: bytes | np.ndarray) -> Iterator[np.ndarray]:
        """Ids of UTF-8 bytes, or of a uint8 array of them, a piece after the other: a file of any size may be mapped.

        Raises:
            ValueError: what this tokenizer cannot write; says where.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained(folder)` needs."""

    @cached_property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest that holds every id."""
        return np.uint16 if len(self.spelling) <= 1 << 16 else np.uint32

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: bytes of text that each id stands for; the end of a document counts as one, in every vocabulary."""
        lengths = np.array([len(piece) for piece in self.spelling])
        lengths[self.end] = 1
        return lengths

    @cached_property
    def unwritten(self) -> tuple[int, ...]:
        """Ids that are no text and no end: never to be generated."""
        return tuple(i for i, piece in enumerate(self.spelling) if not piece and i != self.end)

    def encode(self, text: str | bytes | np.ndarray) -> np.ndarray:
        """Ids of a text, which may be bytes or a uint8 array of them, as `dtype`. Raises as `pieces`."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return np.concatenate([np.zeros(0, self.dtype), *self.pieces(data)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special ids are dropped."""
        return b"".join([self.spelling[i] for i in ids])
