"""Files of the tokenizers library: the ids are the library's own, spell the text, and do not depend on how it is cut."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from longnet import text
from longnet.integrations import byte_tokenizer, tokenizer_file
from longnet.integrations.tokenizer import BYTES, load_tokenizer, require_bytes, tokenizer_of_model
from tokenizer_files import END, LINES, byte_level, lower_case, sentence_piece, wide, word_piece

SAMPLE = "the fox  Aé€😀\r\n\t  def x(y):  \u200d e\u0301 end "
CODES = "<|endoftext|> <0x41>"
MAKERS = {
    "byte_level": byte_level,
    "llama": sentence_piece,
    "unigram": lambda path: sentence_piece(path, "unigram"),
    "wide": wide,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: make(folder / name / "tokenizer.json") for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def loaded(files):
    return {name: load_tokenizer(file, END) for name, file in files.items()}


def test_ids_are_those_of_the_library(files, loaded):
    # The oracle: the library on the same file, told by its own means to put nothing around a text.
    library = Tokenizer.from_file(str(files["byte_level"]))
    library.no_truncation()
    library.no_padding()
    library.pre_tokenizer.add_prefix_space = False
    words = "the quick brown fox said: naïve Straße 1234\n\n    return"
    tokenizer = loaded["byte_level"]
    assert tokenizer.encode(words).tolist() == library.encode(words, add_special_tokens=False).ids
    assert len(tokenizer.encode(words)) < len(words) / 1.5
    assert tokenizer.end == library.token_to_id(END)
    assert len(tokenizer.spelling) == library.get_vocab_size()


@pytest.mark.parametrize("name", MAKERS)
def test_ids_spell_the_text_and_special_tokens_in_it_are_text(loaded, name):
    tokenizer, sample = loaded[name], SAMPLE
    if name == "unigram":  # it knows no merges: a piece of the vocabulary that stands in a text is that piece
        for code in CODES.split():
            with pytest.raises(ValueError, match="at offset 2"):
                tokenizer.encode("a " + code)
    else:
        sample += CODES
    ids = tokenizer.encode(sample)
    assert tokenizer.decode_bytes(ids) == sample.encode()
    assert tokenizer.end not in ids
    assert tokenizer.byte_lengths[ids].sum() == len(sample.encode())
    assert tokenizer.byte_lengths[tokenizer.end] == 1
    assert not {*ids.tolist(), tokenizer.end} & {*tokenizer.unwritten}
    assert tokenizer.encode("").tolist() == []


@given(st.text())
def test_any_text_comes_back(loaded, value):
    for name in ("byte_level", "unigram"):
        value = value.replace("▁", "")  # stands for a space in one of them
        assert loaded[name].decode_bytes(loaded[name].encode(value)) == value.encode()


def test_a_wide_vocabulary_has_wide_ids(loaded):
    tokenizer = loaded["wide"]
    assert (tokenizer.dtype, tokenizer.encode("é").dtype, len(tokenizer.spelling)) == (
        np.uint32,
        np.uint32,
        70_256,
    )
    assert len(tokenizer.unwritten) == 69_999
    assert loaded["byte_level"].encode("é").dtype == np.uint16


def mixed_text():
    rng = random.Random(0)
    parts = [
        *LINES,
        " ",
        "  \n",
        "\n\n",
        "\t",
        "x" * 50,
        "一二三。",
        "\n一二",
        "...",
        "'s",
        "\r\n\r\n",
        "12345678",
        " (",
        "é",
    ]
    return "".join(rng.choice(parts) for _ in range(400))


@pytest.mark.parametrize("name", ["byte_level", "llama", "unigram"])
@pytest.mark.parametrize("piece", [100, 171, 999])
def test_pieces_of_a_long_text_are_the_whole(loaded, monkeypatch, name, piece):
    data, tokenizer = mixed_text().encode(), loaded[name]
    whole = tokenizer.encode(data)
    monkeypatch.setattr(tokenizer_file, "PIECE", piece)
    monkeypatch.setattr(tokenizer_file, "AROUND", 64)
    pieces = list(tokenizer.pieces(np.frombuffer(data, np.uint8)))
    assert len(pieces) > len(data) / piece / 4
    assert np.concatenate(pieces).tolist() == whole.tolist()


def test_where_nothing_can_be_cut_the_piece_grows(tmp_path, monkeypatch):
    plain = load_tokenizer(byte_level(tmp_path / "a" / "tokenizer.json"))
    # Without splitting at spaces, tokens reach across them: "dog. def" and the like.
    across = load_tokenizer(byte_level(tmp_path / "b" / "tokenizer.json", use_regex=False, vocab_size=420))
    assert any(b"y d" in piece or b"e l" in piece for piece in across.spelling)
    data = LINES[0].encode() * 60
    whole = across.encode(data).tolist()
    monkeypatch.setattr(tokenizer_file, "PIECE", 100)
    monkeypatch.setattr(tokenizer_file, "AROUND", 64)
    assert len(list(plain.pieces(b"x" * 1000))) == 1
    assert len(list(plain.pieces(b"x" * 1000 + b" y" * 500))) > 3
    assert across.encode(data).tolist() == whole


def test_saved_for_transformers_and_found_again(loaded, tmp_path):
    for name in ("byte_level", "llama"):
        tokenizer = loaded[name]
        tokenizer.save(tmp_path / name)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs(SAMPLE + CODES).input_ids == tokenizer.encode(SAMPLE + CODES).tolist()
        assert theirs.decode(theirs(SAMPLE + CODES).input_ids) == SAMPLE + CODES
        assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.end
        theirs.save_pretrained(tmp_path / "again")
        for folder in (tmp_path / name, tmp_path / "again"):
            assert load_tokenizer(folder).name == tokenizer.name  # the end is in tokenizer_config.json
            assert load_tokenizer(folder).spelling == tokenizer.spelling


def test_another_tokenizer_has_another_name(loaded, tmp_path):
    specials = (END, "<|other|>")
    made = {
        "specials": load_tokenizer(byte_level(tmp_path / "1.json", specials=specials), END).name,
        "end": load_tokenizer(tmp_path / "1.json", "<|other|>").name,
        "rules": load_tokenizer(byte_level(tmp_path / "2.json", use_regex=False)).name,
        "size": load_tokenizer(byte_level(tmp_path / "3.json", vocab_size=341)).name,
    }
    assert len({*made.values(), BYTES.name, *(t.name for t in loaded.values())}) == 4 + 1 + len(loaded)
    state = json.loads((tmp_path / "2.json").read_text())
    state["pre_tokenizer"]["use_regex"] = True
    (tmp_path / "4.json").write_text(json.dumps(state))
    assert load_tokenizer(tmp_path / "4.json").name != made["rules"]
    state["model"]["merges"][:2] = reversed(state["model"]["merges"][:2])
    (tmp_path / "5.json").write_text(json.dumps(state))
    assert load_tokenizer(tmp_path / "5.json").name != load_tokenizer(tmp_path / "4.json").name


def test_an_old_file_has_the_name_of_its_copy(tmp_path):
    """Older versions of the library wrote merges as words and left out fields that newer ones fill in."""
    file = byte_level(tmp_path / "new.json")
    state = json.loads(file.read_text())
    del state["pre_tokenizer"]["use_regex"], state["model"]["ignore_merges"]
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    (tmp_path / "old.json").write_text(json.dumps(state))
    old = load_tokenizer(tmp_path / "old.json")
    old.save(tmp_path / "copy")
    assert old.name == load_tokenizer(file).name == load_tokenizer(tmp_path / "copy").name


def test_the_byte_tokenizer_is_recognised(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is load_tokenizer(None) is BYTES
    assert BYTES.encode(b"\xff\x00").tolist() == text.encode(b"\xff\x00").tolist()
    assert BYTES.decode_bytes([text.BOS, *BYTES.encode("é"), text.EOS]) == "é".encode()
    assert BYTES.unwritten == (text.PAD, text.BOS, text.MASK)
    assert BYTES.byte_lengths.tolist() == [0, 0, 1, 0] + [1] * 256


def test_which_token_ends_a_text(tmp_path):
    file = byte_level(tmp_path / "tokenizer.json", specials=("<s>", "</s>"))
    with pytest.raises(ValueError, match=r"None and the special tokens \['<s>', '</s>'\].*--end-of-text"):
        load_tokenizer(file)
    assert load_tokenizer(file, "</s>").end == 1
    for entry in ("</s>", {"content": "</s>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": entry}))
        assert load_tokenizer(tmp_path).end == 1
    assert load_tokenizer(tmp_path, "<s>").end == 0
    for wrong in ("the", "<nothing>"):  # a word of the vocabulary would end documents by being written
        with pytest.raises(ValueError, match=f"got '{wrong}' and the special tokens"):
            load_tokenizer(file, wrong)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config"):
        load_tokenizer(file)
    state = json.loads(file.read_text()) | {"added_tokens": [], "post_processor": None}
    (tmp_path / "none.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no special tokens"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="end_of_text"):
        load_tokenizer(None, "</s>")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"{", b'{"model": 3}', b"\xff", b"[" * 100_000, b'{"model": {"type": "BPE"}}',
                b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "decoder": {}}']
)  # fmt: skip
def test_what_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json .*got .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=r"tokenizer\.json, which does not exist"):
            load_tokenizer(path)


def test_tokenizers_that_lose_text_are_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match=r"WordPiece.*byte-level"):
        load_tokenizer(word_piece(tmp_path / "words.json"), "[SEP]")
    lossy = load_tokenizer(lower_case(tmp_path / "lower.json"), END)
    assert lossy.decode_bytes(lossy.encode("the fox")) == b"the fox"
    with pytest.raises(ValueError, match=r"lower\.json, which at offset 4 makes b'fox' of b'Fox'"):
        lossy.encode("the Fox")
    with pytest.raises(ValueError, match="at offset 4 makes b'' of"):
        lossy.encode("the ∑")
    with pytest.raises(ValueError, match=r"at offset 1 makes b' b' of b'.*b'"):
        loaded["llama"].encode("a▁b")
    with pytest.raises(ValueError, match="byte 0xff at offset 3"):
        loaded["byte_level"].encode(b"abc\xff")


def test_the_offset_counts_from_the_beginning_of_the_text(loaded, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "PIECE", 100)
    data = LINES[0].encode() * 20
    with pytest.raises(ValueError, match=f"byte 0xff at offset {len(data)}"):
        loaded["byte_level"].encode(data + b"\xff")


def test_the_tokenizer_of_a_model(files, tmp_path):
    with pytest.raises(ValueError, match="model of 300 ids"):
        tokenizer_of_model(tmp_path, 300)
    assert tokenizer_of_model(tmp_path, 260) is BYTES
    folder = files["byte_level"].parent
    assert len(tokenizer_of_model(folder, 400).spelling) == 340
    with pytest.raises(ValueError, match=r"at most 339 ids, .* got 340"):
        tokenizer_of_model(folder, 339)
    with pytest.raises(ValueError, match="this: expected the byte tokenizer"):
        require_bytes(tokenizer_of_model(folder, 400), "this")
