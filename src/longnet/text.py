"""Text to ids and back: byte b is id b + 4, after PAD, BOS, EOS and MASK. Nothing to download, nothing unknown."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

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
