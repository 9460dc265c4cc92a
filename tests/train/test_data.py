"""From files to windows: what is read, what is reported, what is held out, and in which order it comes."""

import gzip
import hashlib
import json

import numpy as np
import pytest
import torch

from longnet import text
from longnet.train.data import TokenDataset, WindowSampler, prepare


def documents(folder, split):
    tokens = np.asarray(TokenDataset(folder).split(split))
    ends = np.flatnonzero(tokens == text.EOS)
    return {text.decode(part) for part in np.split(tokens, ends + 1) if len(part)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"document {i} " * (5 + i % 7))
    return tmp_path


def test_held_out_documents_stay_held_out_when_text_is_added(folder):
    first = prepare([folder / "texts"], folder / "first", validation_fraction=0.2)
    held_out = documents(folder / "first", "validation")
    assert first.validation_documents == len(held_out)
    assert 4 <= len(held_out) <= 22
    train = documents(folder / "first", "train")
    assert len(train | held_out) == 60
    assert not train & held_out
    for i in range(60, 90):
        (folder / "texts" / f"a{i}.txt").write_text(f"document {i} " * 6)
    (folder / "texts" / "copy.txt").write_text(min(held_out))
    prepare([folder / "texts"], folder / "second", validation_fraction=0.2)
    assert held_out <= documents(folder / "second", "validation")
    assert not documents(folder / "second", "validation") & documents(folder / "second", "train")


def alone(file, output):
    prepare([file], output, validation_fraction=0.9)
    return documents(output, "train")


def test_a_few_documents_give_one_held_out_and_one_gives_none(folder):
    files = sorted((folder / "texts").iterdir())
    assert prepare(files[:2], folder / "two", validation_fraction=1e-9).validation_documents == 1
    assert prepare(files[:1], folder / "one").validation_documents == 0
    for i, file in enumerate(files[:10]):
        assert len(alone(file, folder / f"single{i}")) == 1
    assert prepare(files[:9], folder / "none", validation_fraction=0).validation_documents == 0
    with pytest.raises(ValueError, match="validation_fraction"):
        prepare(files, folder / "all", validation_fraction=1.0)


def test_offsets_are_the_documents_borders(folder):
    prepare([folder / "texts"], folder / "data")
    dataset = TokenDataset(folder / "data")
    assert (dataset.tokens[dataset.documents[1:] - 1] == text.EOS).all()
    assert dataset.meta["train_tokens"] in dataset.documents
    assert hashlib.sha256(dataset.tokens.tobytes()).hexdigest() == dataset.meta["sources"]
    assert sorted(p.name for p in (folder / "data").iterdir()) == ["documents.npy", "meta.json", "tokens.bin"]


def test_other_suffixes_are_counted(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.rst", "c.rst", "d.PNG", "Makefile"):
        (tmp_path / "texts" / name).write_text("some text")
    report = prepare([tmp_path / "texts"], tmp_path / "data")
    assert (report.documents, report.unlisted) == (1, {".rst": 2, ".PNG": 1, "none": 1})
    assert prepare([tmp_path / "texts"], tmp_path / "more", suffixes=(".rst",)).documents == 2
    with pytest.raises(ValueError, match="rst"):
        prepare([tmp_path / "texts"], tmp_path / "nothing", suffixes=(".doc",))
    # A file that is named is read whatever its suffix.
    assert prepare([tmp_path / "texts" / "Makefile"], tmp_path / "named").documents == 1


def test_gzip_is_read_whole_or_reported_with_its_offset(tmp_path):
    body = bytes(range(32, 127)) * 5000
    whole = gzip.compress(body)
    (tmp_path / "members.txt.gz").write_bytes(whole + gzip.compress(b" and more") + b"\0" * 100)
    report = prepare([tmp_path], tmp_path / "data")
    assert report.bad == []
    assert documents(tmp_path / "data", "train") == {(body + b" and more").decode()}
    half = len(whole) // 2
    damaged = bytearray(whole)
    damaged[-6] ^= 255  # of the check sum
    cases = {
        "short": (whole[:half], f"truncated gzip: it ends at offset {half}"),
        "damaged": (bytes(damaged), "damaged gzip between offsets 0 and"),
        "tail": (whole + b"junk", f"damaged gzip between offsets {len(whole)} and {len(whole) + 4}"),
        "empty": (gzip.compress(b""), "empty"),
    }
    for name, (data, message) in cases.items():
        file = tmp_path / f"{name}.gz"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            prepare([file], tmp_path / "bad", on_bad="fail")
        assert str(file) in str(error.value)
        assert not (tmp_path / "bad").exists()


def test_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    report = prepare([tmp_path / "a.txt"], tmp_path / "latin", encoding="latin-1")
    assert report.bad == []
    assert documents(tmp_path / "latin", "train") == {"café"}
    (tmp_path / "b.txt").write_bytes("naïve".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt: not utf-8: byte 0xe9 at offset 3"):
        prepare([tmp_path / "a.txt"], tmp_path / "x", on_bad="fail")
    with pytest.raises(ValueError, match=r"b\.txt: binary: a zero byte"):
        prepare([tmp_path / "b.txt"], tmp_path / "x", on_bad="fail")
    prepare([tmp_path / "b.txt"], tmp_path / "wide", encoding="utf-16")
    assert documents(tmp_path / "wide", "train") == {"naïve"}


def test_bad_lines_are_named_with_line_and_offset(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b"",
        b'{"text": "a\\u0000"}',
        b"[]",
        b'{"text": "ok"}',
        b'{"text": "one", "text": "two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    report = prepare([tmp_path], tmp_path / "data")
    assert report.documents == 2
    places = [message.split(": ")[0].removeprefix(str(tmp_path)) for message in report.bad]
    offsets = np.cumsum([0] + [len(line) + 1 for line in lines])
    assert places == [f"/a.jsonl:{i + 1} (byte {offsets[i]})" for i in (1, 2, 4, 5, 7)]
    assert "offset 10" in report.bad[1]


@pytest.mark.parametrize("window", [2, 7, 64, 500])
def test_the_order_is_the_same_wherever_it_was_interrupted(folder, window):
    """D1: no window skipped or repeated, across epochs and whatever the batch size after the interruption."""
    prepare([folder / "texts"], folder / "data")
    dataset = TokenDataset(folder / "data")
    sampler = WindowSampler(dataset, window, 1, seed=5)
    count = min(40, 2 * sampler.per_epoch + 3)
    whole = torch.cat([sampler.next_batch() for _ in range(count)])
    rng = np.random.default_rng(window)
    for _ in range(10):
        rows, state = [], None
        while sum(map(len, rows)) < count:
            again = WindowSampler(dataset, window, int(rng.integers(1, 6)), seed=5)
            if state is not None:
                again.load_state_dict(json.loads(json.dumps(state)))
            rows += [again.next_batch() for _ in range(int(rng.integers(1, 4)))]
            state = again.state_dict()
        assert torch.equal(torch.cat(rows)[:count], whole)


def test_bytes_of_a_batch_are_counted_whole_whatever_part_is_read(folder):
    prepare([folder / "texts"], folder / "data")
    dataset, lengths = TokenDataset(folder / "data"), np.arange(260)
    whole, part = (WindowSampler(dataset, 64, 3, seed=0) for _ in range(2))
    for _ in range(2 * whole.per_epoch // 3):
        batch = whole.next_batch()
        assert torch.equal(part.next_batch(slice(1, 2), slice(5, 9)), batch[1:2, 5:9])
        expected = batch[:, 1:].double().mean().item()
        assert whole.bytes_per_token(lengths) == part.bytes_per_token(lengths) == pytest.approx(expected)


def test_a_dtype_that_is_no_id_is_refused(folder):
    prepare([folder / "texts"], folder / "data")
    path = folder / "data" / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("O", "float64"):
        path.write_text(json.dumps(meta | {"dtype": name}))
        with pytest.raises(ValueError, match="longnet prepare"):
            TokenDataset(folder / "data")


def test_another_seed_is_another_order(folder):
    prepare([folder / "texts"], folder / "data")
    dataset = TokenDataset(folder / "data")
    orders = [WindowSampler(dataset, 64, 8, seed=s).next_batch() for s in (0, 1)]
    assert not torch.equal(*orders)
    with pytest.raises(ValueError, match="window"):
        WindowSampler(dataset, 10**6, 1, seed=0)


def test_a_preparation_that_fails_leaves_nothing(folder, monkeypatch):
    import longnet.train.data as data

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "_write_split", full)
    with pytest.raises(OSError, match="No space"):
        prepare([folder / "texts"], folder / "data")
    assert [p.name for p in folder.iterdir()] == ["texts"]
