"""Tiny tokenizers of the tokenizers library, trained on a few lines."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = (
    "the quick brown fox jumps over the lazy dog. ",
    "def add(first, second):\n    return first + second\n\n",
    "Ein Fußgänger überquert die Straße; 1234 Bäume, naïve cafés.\n",
)
END = "<|endoftext|>"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(path, *, vocab_size=340, specials=(END,), **options):
    """Byte-level BPE, as GPT-2's, with whatever surrounds a single text: a prefix space, a template, cutting, padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, **options)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return _saved(tokenizer, path)


def sentence_piece(path, model="bpe", *, prepend=True):
    """ "▁" for spaces and a token for every byte, as Llama's (a normalizer) or T5's (a pre-tokenizer, `model="unigram"`)."""
    if model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=150, special_tokens=["<unk>", END], show_progress=False, max_token_length=8
        )
        parts = [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *parts] if prepend else parts)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab |= {token: len(vocab) + i for i, token in enumerate(BYTE_TOKENS)}
    else:
        vocab += [[token, -30.0] for token in BYTE_TOKENS]
    state["model"] |= (
        {"byte_fallback": True, "unk_token": "<unk>"} if model == "bpe" else {"byte_fallback": True}
    )
    return _saved(Tokenizer.from_str(json.dumps(state)), path)


def lower_case(path):
    """Loses capitals, and whatever it has not seen."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=[END, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return _saved(tokenizer, path)


def word_piece(path):
    """Forgets where spaces were."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=100, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return _saved(tokenizer, path)


def wide(path):
    """Bytes whose ids do not fit into 16 bits; some ids below belong to no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: 70_000 + i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"][END] = 5
    entry = {
        "id": 5,
        "content": END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    state["added_tokens"] = [entry]
    return _saved(Tokenizer.from_str(json.dumps(state)), path)


def _saved(tokenizer, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path
