"""Reading: every fault is named with file and line; offsets are exact whatever the text."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.tasks.documents import read_documents
from longnet.tasks.offsets import Offsets

CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.integers(0xDC80, 0xDCFF).map(chr)


@given(st.lists(CHARACTERS | st.sampled_from("\r\né漢𝄞")).map("".join))
def test_offsets_are_exact(text):
    offsets = Offsets(text)
    owner = [i for i, c in enumerate(text) for _ in c.encode("utf-8", "surrogateescape")]
    assert len(offsets) == len(owner)
    for byte, character in enumerate(owner):
        assert offsets.characters(byte, byte + 1) == (character, character + 1)
    for i in range(len(text)):
        start, end = offsets.bytes(i, i + 1)
        assert owner[start:end] == [i] * (end - start)
        assert offsets.characters(start, end) == (i, i + 1)


def test_other_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match=r"U\+D800 at character 2"):
        Offsets("ab\ud800")


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"}\r\n\n{"text": \n', r"x\.jsonl:3: expected a JSON object"),
        (b'{"text": "a"}\n[1]\n', r"x\.jsonl:2: expected a JSON object; got list"),
        (b'{"body": "a"}\n', r"x\.jsonl:1: expected a string 'text'; got fields body"),
        (b'{"text": "a"}\n{"text": " \\n"}', r"x\.jsonl:2: expected a text; got an empty one"),
        (
            b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}',
            r"x\.jsonl:2: .* got '1', which .*x\.jsonl:1 has",
        ),
        (b'{"text": "a"}\n{"text": "\xff"}', r"x\.jsonl:2: expected UTF-8; got byte 0xff at offset 10"),
        (b'{"text": "\\ud800"}', r"x\.jsonl:1: .*lone surrogate U\+D800"),
        (b"\n\n", "at least one document"),
    ],
)
def test_bad_json_lines(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read_documents(write(tmp_path / "x.jsonl", data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"body,label\na,b\n", r"x\.csv:1: expected a column 'text'; got columns body, label"),
        (b'text,label\n"two\nlines",a\nc\n', r"x\.csv:4: expected 2 columns"),
        (b"text,label\na,\n", r"x\.csv:2: expected label; got only the fields"),
        (b'text,label\n"a\n', r"x\.csv:2: expected CSV"),
        (b"text,label\na,b\n\xffc,d\n", r"x\.csv:3: expected UTF-8"),
    ],
)
def test_bad_csv(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read_documents(write(tmp_path / "x.csv", data), required=("label",))


def test_line_ends_are_kept_and_invalid_bytes_are_a_choice(tmp_path):
    (tmp_path / "folder" / "b").mkdir(parents=True)
    write(tmp_path / "folder" / "b" / "1.txt", b"one\r\ntwo\nthree\r\xff")
    with pytest.raises(ValueError, match=r"1\.txt:3: expected UTF-8; got byte 0xff at offset 15"):
        read_documents(tmp_path / "folder")
    (kept,) = read_documents(tmp_path / "folder", on_invalid="keep")
    assert (kept.id, kept.text, kept.fields) == ("b/1.txt", "one\r\ntwo\nthree\r\udcff", {"label": "b"})
    assert Offsets(kept.text).ids[-1] == 0xFF + 4
    (replaced,) = read_documents(tmp_path / "folder", on_invalid="replace")
    assert replaced.text.endswith("\r\ufffd")
    rows = write(tmp_path / "x.csv", b'id,text\r\n7,"a\r\nb"\r\n8,c\n')
    assert [(d.id, d.text) for d in read_documents(rows)] == [("7", "a\r\nb"), ("8", "c")]
    lines = tmp_path / "x.jsonl.gz"
    lines.write_bytes(gzip.compress(json.dumps({"text": "é\r\n", "n": 1}).encode()))
    (document,) = read_documents(lines)
    assert (document.text, document.fields, document.source) == ("é\r\n", {"n": 1}, f"{lines}:1")
