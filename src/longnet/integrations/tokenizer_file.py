"""A file of the tokenizers library as a `longnet.text.Tokenizer`: long texts, byte for byte, nothing put around them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from longnet.text import Tokenizer

# Bytes that are encoded at once, and those on either side of a cut that must be tokenized alike together and apart.
PIECE, AROUND = 1 << 18, 1024
# Places for a cut that are tried before a piece is made longer; pieces that the library encodes in parallel.
_TRIALS, _TOGETHER = 256, 8


def character_of(byte: int) -> str:
    """The visible character that stands for a byte in ByteLevel vocabularies."""
    invisible = [*range(33), *range(127, 161), 173]
    return chr(256 + invisible.index(byte)) if byte in invisible else chr(byte)


_BYTE_OF = {character_of(byte): byte for byte in range(256)}


class FileTokenizer(Tokenizer):
    """Ids as the file's tokenizer gives them, of what is written and nothing else.

    Left out is what belongs to single texts and would break a stream: special tokens and spaces put around a text, cutting,
    padding. Special tokens that occur in a text are text. A text whose ids do not spell exactly its bytes is refused:
    normalization, lower case and unknown tokens lose something, and bits per byte would count what is not there.

    Long texts are encoded in pieces, cut beside white space where `AROUND` bytes on either side give the same ids together
    as apart; where there is no such place, the piece grows. So the ids are those of the whole text for every tokenizer
    whose choice depends on no more than `AROUND` bytes around, as with all that split at white space first.

    Args:
        file: named in messages; tokenizer_config.json is looked for beside it.
        state: `read_state(file)`.
        end_of_text: as in `longnet.integrations.tokenizer.load_tokenizer`.
    """

    def __init__(self, file: Path, state: dict[str, Any], end_of_text: str | None = None) -> None:
        self._file = file
        try:
            self._backend = Backend.from_str(json.dumps(_continuous(state)))
        except Exception as error:  # the library raises nothing more special
            raise _no_tokenizer(file, error) from error
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        self._end_token = _end_of_text(file, special, end_of_text)
        self.end = special[self._end_token]
        spell = _speller(file, state.get("decoder"))
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.spelling = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            self.spelling[i] = b"" if token in special else spell(token)
        digest = _digest(json.loads(self._backend.to_str()), vocabulary, self.end)
        self.name = f"{len(self.spelling)} ids, sha256 {digest}"

    def pieces(self, data: bytes | np.ndarray) -> Iterator[np.ndarray]:
        borders = itertools.pairwise(self._borders(data))
        while spans := list(itertools.islice(borders, _TOGETHER)):
            parts = [bytes(data[begin:end]) for begin, end in spans]
            texts = [self._decoded(part, begin) for part, (begin, _) in zip(parts, spans, strict=True)]
            for ids, part, (begin, _) in zip(self._ids(*texts), parts, spans, strict=True):
                self._check(ids, part, begin)
                yield np.array(ids, self.dtype)

    def save(self, folder: Path) -> None:
        PreTrainedTokenizerFast(
            tokenizer_object=self._backend,
            eos_token=self._end_token,
            pad_token=self._end_token,
            split_special_tokens=True,
            clean_up_tokenization_spaces=False,
            model_max_length=10**12,
            padding_side="left",
        ).save_pretrained(folder)

    def _ids(self, *texts: str) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decoded(self, data: bytes, offset: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"expected UTF-8, which {self._file} needs; got byte {data[error.start]:#04x} at offset {offset + error.start} "
                f"({error.reason})"
            ) from error

    def _check(self, ids: list[int], data: bytes, offset: int) -> None:
        """Raises ValueError where ids do not spell their text."""
        written = self.decode_bytes(ids)
        if written != data:
            pairs = itertools.zip_longest(written, data)
            at = next(i for i, (a, b) in enumerate(pairs) if a != b)
            raise ValueError(
                f"expected a tokenizer that keeps the text, byte for byte; got {self._file}, which at offset {offset + at} makes "
                f"{written[at : at + 20]!r} of {data[at : at + 20]!r}; its normalizer or unknown tokens change it; a "
                'byte-level one keeps every text with "normalizer": null in its file'
            )

    def _borders(self, data: bytes | np.ndarray) -> Iterator[int]:
        border = 0
        yield border
        while border < len(data):
            border = self._cut(data, border)
            yield border

    def _cut(self, data: bytes | np.ndarray, begin: int) -> int:
        """Where the piece from `begin` on may end: `PIECE` bytes on at most, if there is a good place, or later."""
        size = PIECE
        while begin + size < len(data):
            window = np.frombuffer(bytes(data[begin : begin + size]), np.uint8)
            white = (window == 32) | ((window >= 9) & (window <= 13))
            borders = begin + 1 + np.flatnonzero(white[1:] != white[:-1])
            for border in borders[: -_TRIALS - 1 : -1].tolist():
                # Halves of a character at the far ends are dropped from all three alike.
                left = bytes(data[max(begin, border - AROUND) : border]).decode(errors="ignore")
                right = bytes(data[border : border + AROUND]).decode(errors="ignore")
                together, first, second = self._ids(left + right, left, right)
                if together == first + second:
                    return border
            size *= 2
        return len(data)


def read_state(file: Path) -> dict[str, Any]:
    """A tokenizer.json as it stands."""
    if not file.is_file():
        raise ValueError(
            f"tokenizer: expected a file of the tokenizers library, or a folder with tokenizer.json; got {file}, which does not "
            "exist"
        )
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state["model"], dict):
            raise TypeError(f"model is {type(state['model']).__name__}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _no_tokenizer(file, error) from error
    return state


def _no_tokenizer(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"tokenizer: expected a tokenizer.json of the tokenizers library; got {file}: {error!r}; "
        "`tokenizer.save(path)` of that library writes one"
    )


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The members of a component, which may be a sequence, and of the sequences in it."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [
        x
        for members in part.values()
        if isinstance(members, list)
        for member in members
        for x in _parts(member)
    ]


def _continuous(state: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without what it does to the beginning and the end of a text."""
    kinds = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    changed: dict[str, Any] = {"truncation": None, "padding": None, "post_processor": None}
    for kind, members in kinds.items():
        parts = []
        for part in _parts(state.get(kind)):
            if part["type"] in ("Prepend", "Strip"):
                continue
            if part["type"] == "ByteLevel":
                part = part | {"add_prefix_space": False}
            if part["type"] == "Metaspace":
                part = {k: v for k, v in part.items() if k != "add_prefix_space"} | {
                    "prepend_scheme": "never"
                }
            parts.append(part)
        whole = {"type": "Sequence", members: parts} if len(parts) > 1 else None
        changed[kind] = whole or (parts[0] if parts else None)
    return state | changed


def _speller(file: Path, decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """From a token to the bytes it stands for."""
    parts = _parts(decoder)
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _spell_byte_level
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    spaces += [
        part["pattern"].get("String")
        for part in parts
        if part["type"] == "Replace" and part["content"] == " "
    ]
    if len(spaces) != 1 or not spaces[0]:
        raise ValueError(
            "tokenizer: expected one whose tokens hold all of a text, with the decoder ByteLevel, Metaspace, or ByteFallback "
            f"and a replaced space; got {file} with {sorted(kinds) or 'no decoder'}; train a byte-level one"
        )

    def spell(token: str) -> bytes:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token) if "ByteFallback" in kinds else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        return token.replace(spaces[0], " ").encode()

    return spell


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()  # an added token, which stands as it is


def _end_of_text(file: Path, special: dict[str, int], named: str | None) -> str:
    """The special token that ends a document."""
    config = file.with_name("tokenizer_config.json")
    if named is None and config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            named = named["content"] if isinstance(named, dict) else named
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"tokenizer: expected JSON with eos_token; got {config}: {error!r}") from error
    if named is None and len(special) == 1:
        return next(iter(special))
    if named not in special:
        first = sorted(special, key=special.__getitem__)[:20]
        found = f"the special tokens {first}" if first else "no special tokens"
        raise ValueError(
            f"end_of_text: expected a special token of {file} that ends a document; got {named!r} and {found}; name one of them "
            "with --end-of-text, or add one to the tokenizer"
        )
    return named


def _digest(state: dict[str, Any], vocabulary: dict[str, int], end: int) -> str:
    """Of what decides about ids, from the library's own form of a file: older files leave fields out that it fills in."""
    model = {k: v for k, v in state["model"].items() if k != "vocab"}
    scores = state["model"]["vocab"] if isinstance(state["model"]["vocab"], list) else None
    merges = model.pop("merges", None)
    rules = _without_defaults([model, state["normalizer"], state["pre_tokenizer"]])
    facts = [sorted(vocabulary.items()), scores, merges, rules, end]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _without_defaults(value: Any) -> Any:
    """Fields that are null or false say nothing: a later version of the library may add some."""
    if isinstance(value, dict):
        return {k: _without_defaults(v) for k, v in value.items() if v is not None and v is not False}
    return [_without_defaults(v) for v in value] if isinstance(value, list) else value
