"""The byte tokenizer as a Hugging Face tokenizer, and the choice between it and a file of the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longnet import text
from longnet.integrations.tokenizer_file import FileTokenizer, character_of, read_state
from longnet.text import BOS, EOS, FIRST_BYTE, MASK, PAD, VOCAB_SIZE

SPECIALS = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<mask>": MASK}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte b of the UTF-8 text is id b + 4. Nothing is added, nothing is cut, no text is a special token.

    Saved next to a model it is plain `tokenizer.json`: `AutoTokenizer` loads it with or without longnet. The offsets of all
    bytes of a character are that character's. A lone surrogate is no Unicode text and is refused (`longnet.text.encode`, for
    files, takes any bytes).

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("Aé").input_ids
        [69, 199, 173]
        >>> tokenizer("Aé", return_offsets_mapping=True)["offset_mapping"]
        [(0, 1), (1, 2), (1, 2)]
    """
    vocabulary = SPECIALS | {character_of(byte): byte + FIRST_BYTE for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name.strip('<>')}_token": name for name in SPECIALS},
        split_special_tokens=True,  # "<eos>" in a document is five characters
        clean_up_tokenization_spaces=False,
        model_max_length=10**12,
        padding_side="left",  # generation continues at the right edge; heads take padding on either side
    )


class ByteTokenizer(text.Tokenizer):
    """`longnet.text`'s bytes: takes whatever bytes there are."""

    name, end = "bytes", EOS
    spelling = [b""] * FIRST_BYTE + [bytes([byte]) for byte in range(256)]

    def pieces(self, data: bytes | np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(0, len(data), 1 << 24):
            yield text.encode(bytes(data[begin : begin + (1 << 24)]))

    def save(self, folder: Path) -> None:
        byte_tokenizer().save_pretrained(folder)


BYTES = ByteTokenizer()


def load_tokenizer(path: Path | None, end_of_text: str | None = None) -> text.Tokenizer:
    """The one place that chooses: None is bytes; else a tokenizer.json, or a folder that holds one.

    Args:
        end_of_text: the special token that ends a document. None: the `eos_token` of tokenizer_config.json beside the file,
            or the only special token there is.

    Raises:
        ValueError: no such file, no tokenizer in it, one that loses text, or no end of a text.

    Example:
        >>> load_tokenizer(None).encode("Aé").tolist()
        [69, 199, 173]
    """
    if path is None:
        if end_of_text is not None:
            raise ValueError(
                f"end_of_text: expected None without a tokenizer file; got {end_of_text!r}; bytes have one"
            )
        return BYTES
    file = path / "tokenizer.json" if path.is_dir() else path
    state = read_state(file)
    vocabulary = SPECIALS | {character_of(byte): byte + FIRST_BYTE for byte in range(256)}
    if state["model"].get("vocab") == vocabulary and not state["model"].get("merges"):
        return BYTES  # saved by `byte_tokenizer`
    return FileTokenizer(file, state, end_of_text)


def tokenizer_of_model(folder: Path, vocab_size: int) -> text.Tokenizer:
    """The tokenizer in a saved model's folder; bytes where there is none and the model has their ids.

    Raises:
        ValueError: as `load_tokenizer`; no tokenizer for this model; more ids than the model has.
    """
    file = folder / "tokenizer.json"
    if not file.exists() and vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"model: expected {file} for a model of {vocab_size} ids, or one of {VOCAB_SIZE}, which are bytes; got no such file; "
            "copy it from where the model was trained"
        )
    tokenizer = load_tokenizer(file if file.exists() else None)
    if len(tokenizer.spelling) > vocab_size:
        raise ValueError(
            f"model: expected a tokenizer of at most {vocab_size} ids, as the model in {folder} has; got "
            f"{len(tokenizer.spelling)} in {file}; put the tokenizer there that the model was trained with"
        )
    return tokenizer


def require_bytes(tokenizer: text.Tokenizer, what: str) -> None:
    """Raises ValueError where something is made for bytes alone."""
    if tokenizer.name != BYTES.name:
        raise ValueError(
            f"{what}: expected the byte tokenizer, nothing else is supported here; got one of {tokenizer.name}; use data "
            "that was prepared, or a model that was trained, without --tokenizer"
        )
