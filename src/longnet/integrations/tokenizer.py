"""The byte tokenizer as a Hugging Face tokenizer: ids equal `longnet.text.encode`, offsets count characters."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longnet.text import BOS, EOS, FIRST_BYTE, MASK, PAD

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
    vocabulary = SPECIALS | {_character(byte): byte + FIRST_BYTE for byte in range(256)}
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


def _character(byte: int) -> str:
    """The visible character that stands for a byte in ByteLevel vocabularies."""
    invisible = [*range(33), *range(127, 161), 173]
    return chr(256 + invisible.index(byte)) if byte in invisible else chr(byte)
