"""Between the bytes a model reads and the characters a user counts: exact for every Python string."""

from __future__ import annotations

import numpy as np

from longnet.text import encode


class Offsets:
    """A text's ids and the map between its bytes and its characters.

    A lone surrogate of U+DC80..U+DCFF stands for one undecodable byte (Python's "surrogateescape") and is read as that
    byte. Nothing is normalised: "\\r\\n" is two characters.

    Example:
        >>> Offsets("aé!").characters(1, 3)
        (1, 2)
    """

    def __init__(self, text: str) -> None:
        try:
            self.ids = encode(text)
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise ValueError(
                f"expected text; got the lone surrogate {code} at character {error.start}; only U+DC80 to U+DCFF, which"
                " stand for undecodable bytes, can be read"
            ) from None
        self.text = text
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        width = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        width[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
        # Byte at which every character begins, and the end of the text.
        self.starts = np.concatenate(([0], np.cumsum(width)))

    def __len__(self) -> int:
        return len(self.ids)

    def characters(self, start: int, end: int) -> tuple[int, int]:
        """Characters that bytes [start, end) touch, as [first, after the last)."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        return first, int(np.searchsorted(self.starts, end, "left"))

    def bytes(self, start: int, end: int) -> tuple[int, int]:
        """Bytes of the characters [start, end)."""
        return int(self.starts[start]), int(self.starts[end])
