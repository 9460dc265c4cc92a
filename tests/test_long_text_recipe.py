"""The comparison on real text: windows stay within their text, the descent can be undone, and a stopped comparison goes on."""

import gzip
import importlib
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch


@pytest.fixture
def long_text(recipes):
    return importlib.import_module("long_text")


def write(path, texts):
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))


@pytest.fixture
def data(tmp_path):
    """Every text is made of one letter, so a window that crosses a border shows."""
    write(tmp_path / "train.jsonl.gz", ["a" * 150, "short", "b" * 101, "c" * 400])
    write(tmp_path / "validation.jsonl.gz", ["xy" * 700, "yz" * 600])
    return tmp_path


def test_windows_never_cross_and_reach_every_place(long_text, data):
    books = long_text.Books(data / "train.jsonl.gz", 100, "cpu")
    windows = books.sample(2000, np.random.default_rng(0))
    assert windows.shape == (2000, 101)
    assert (windows == windows[:, :1]).all()
    counts = {chr(x - 4): n for x, n in zip(*np.unique(windows[:, 0], return_counts=True), strict=True)}
    # 50, 1 and 300 places for a window of 101 bytes
    assert counts.keys() == {"a", "b", "c"}
    assert counts["a"] / counts["c"] == pytest.approx(50 / 300, rel=0.2)
    assert books.starts.tolist() == [50, 1, 300]


def test_validation_windows_do_not_overlap(long_text, data):
    books = long_text.Books(data / "validation.jsonl.gz", 100, "cpu")
    books.ids = torch.arange(len(books.ids), dtype=torch.int16)
    begins = books.spread(1000)[:, 0].sort().values
    assert len(begins) == 14 + 12 - 2  # the last hundred of each text lacks the byte after it
    assert (begins.diff() >= 100).all()
    assert len(books.spread(5)) == 5


def test_a_text_shorter_than_the_window(long_text, data):
    with pytest.raises(ValueError, match="shorter --length"):
        long_text.Books(data / "train.jsonl.gz", 1000, "cpu")


def test_buckets(long_text):
    assert long_text.buckets(1000) == [0, 256, 512, 1000]
    assert long_text.buckets(100) == [0, 100]


@pytest.fixture
def setting(long_text):
    tree = replace(long_text.TREE, block=16, window_blocks=2, radix=4, top_k=2, beam=4)
    return long_text.Setting(128, 2, 3e-3, 3, long_text.REDUCED, tree, "cpu")


def test_bits_are_those_of_the_loss(long_text, setting, data):
    books = long_text.Books(data / "validation.jsonl.gz", 128, "cpu")
    run = long_text.Run(setting.variants()["hierarchical"], 0, setting, books)
    windows = books.spread(3)
    bits = np.array(long_text.bits(run.model, windows, setting))
    with torch.no_grad():
        loss = run.model(input_ids=windows, labels=windows).loss.item()
    assert bits.mean() == pytest.approx(loss / math.log(2), rel=1e-5)


def test_going_back_before_the_descent(long_text, setting, data):
    """After `restore` the same steps give the same weights as if there had been no descent."""
    books = long_text.Books(data / "train.jsonl.gz", 128, "cpu")
    runs = [long_text.Run(setting.variants()["local"], 0, setting, books) for _ in range(2)]
    for run in runs:
        run.steps_of(2)
    kept = runs[0].state()
    rates = []
    steps_of = runs[0].steps_of
    runs[0].steps_of = lambda count, rate: (rates.append(rate()), steps_of(count, rate))
    runs[0].descend(lambda: (8 + len(rates)) / 10)
    assert rates == pytest.approx([1.0, 0.5])
    del runs[0].steps_of
    assert runs[0].bytes == 4 * 256
    runs[0].restore(kept)
    for run in runs:
        run.steps_of(2)
    assert runs[0].bytes == runs[1].bytes == 4 * 256
    pairs = zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("mixed", "expected"), [(True, [1.0, 0.75]), (False, [1.0, 1.0])])
def test_the_router_mix_falls_with_the_rate(long_text, setting, data, mixed, expected):
    books = long_text.Books(data / "train.jsonl.gz", 128, "cpu")
    run = long_text.Run(setting.variants()["hierarchical"], 0, setting, books)
    found = []
    steps_of = run.steps_of
    run.steps_of = lambda *arguments: (
        found.append(run.model.model.layers[1].attention.router_mix.tolist()),
        steps_of(*arguments),
    )
    run.descend(lambda: (8 + len(found)) / 10, mixed)
    assert found == [pytest.approx([x] * 2) for x in expected]


def reduced(data, out, windows):
    """Arguments of a small comparison."""
    sizes = ["--reduced", "--length", 128, "--windows", windows]
    return ["long_text", "--data", data, "--out", out, *sizes]


def test_a_comparison_that_was_stopped_goes_on(long_text, data, monkeypatch, capsys, tmp_path):
    write(data / "train.jsonl.gz", ["once upon a time there was a long text. " * 60])
    base = reduced(data, tmp_path / "out", 4)

    def call(*more):
        monkeypatch.setattr(sys, "argv", [str(x) for x in (*base, "--device", "cpu", *more)])
        long_text.main()
        return capsys.readouterr().out, json.loads((tmp_path / "out" / "long_text.json").read_text())

    monkeypatch.setattr(long_text, "speeds", lambda names, *rest: dict.fromkeys(names, 3000.0))
    _, first = call("--models", "dense", "--budget-minutes", 0.03)
    out, second = call("--models", "dense", "local", "--budget-minutes", 0.5)
    assert second["equal"] == first["equal"]
    assert second["rows"][0] == first["rows"][0]
    assert [row["model"] for row in second["rows"]] == ["dense", "local"]
    dense, local = second["rows"]
    assert dense["parameters"] == local["parameters"]
    for row in second["rows"]:
        assert 0 <= row["equal_bytes"]["bytes"] - second["equal"]["bytes"] < 6 * 2048
        assert row["equal_seconds"]["seconds"] >= second["equal"]["seconds"]
    assert "| dense | 100.0 % |" in out
    assert (tmp_path / "out" / "long_text.png").stat().st_size > 1000
    assert "left out" in call("--models", "dilated", "--budget-minutes", 0.001)[0]
    out, third = call("--models", "hierarchical", "--budget-minutes", 0.5)
    assert third["rows"][2]["mix_kept"]["seconds"] >= third["equal"]["seconds"]
    assert all("mix_kept" not in row for row in third["rows"][:2])
    assert out.count("| hierarchical | ") == 2
    assert out.count("| hierarchical, mix 1 | ") == 1
    with pytest.raises(ValueError, match="same setting"):
        call("--models", "dense", "--learning-rate", 1e-4)
    with pytest.raises(ValueError, match="expected some of dense"):
        call("--models", "dence")


def test_what_is_equal_may_be_given(long_text, data, monkeypatch, tmp_path):
    """Nothing is measured then: processes on several devices can share one choice."""
    write(data / "train.jsonl.gz", ["once upon a time there was a long text. " * 60])
    arguments = reduced(data, tmp_path / "out", 2)
    arguments += ["--device", "cpu", "--models", "local", "--equal", 0.2, 6144]
    monkeypatch.setattr(sys, "argv", [str(x) for x in arguments])
    long_text.main()
    found = json.loads((tmp_path / "out" / "long_text.json").read_text())
    assert found["equal"] == {"seconds": 0.2, "bytes": 6144}
    assert found["speeds"] == {}
    assert (
        found["rows"][0]["equal_bytes"]["bytes"] == 10240
    )  # looks at the clock every five steps of 2048 bytes
