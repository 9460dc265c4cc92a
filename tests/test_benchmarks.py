"""The benchmark scripts run, check before they time, and write what they say. No claim about speed."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script of benchmarks/ with arguments and give its output."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


def test_attention_and_its_peers(script, tmp_path):
    out = script("run", "--device", "cpu", "--small", "--impl", "auto", "--peers", "--out", tmp_path)
    rows = {row["who"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["longnet auto"]["forward_tflops"] > 0
    assert rows["flash segments"]["backward_us_per_1000_tokens"] > 0
    assert "error" in rows["cuDNN segments"]  # there is none on a CPU, and the row says so
    assert "longnet auto / flash segments" in out
    assert (tmp_path / "results.md").read_text() in out


def test_what_is_wrong_is_not_timed(script, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run = importlib.import_module("run")
    real = run.dilated_attention

    def off(*tensors, impl=None, **options):
        result = real(*tensors, impl=impl, **options)
        return result if impl == "reference" else result._replace(out=result.out * 1.01)

    monkeypatch.setattr(run, "dilated_attention", off)
    with pytest.raises(SystemExit, match="not timed"):
        run.check(run.SMALL, None, "cpu")


def test_decode(script, tmp_path):
    out = script("decode", "--device", "cpu", "--small", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["pattern"] for row in rows] == ["bounded", "geometric"]
    assert all(row["cache_matches_formula"] for row in rows)
    assert all(row["tokens_read_far"] == 2048 for row in rows)
    assert "NOT EQUAL" not in out


def test_the_stand_in_for_einops(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rearrange = importlib.import_module("peers").rearrange
    x = torch.arange(2 * 12 * 6 * 5).view(2, 12, 6, 5)
    split = x.view(2, 3, 4, 6, 5).flatten(0, 1)
    assert torch.equal(rearrange(x, "b (n g) h d -> (b n) g h d", g=4), split)
    assert torch.equal(rearrange(split, "(b n) g h d -> b (n g) h d", b=2), x)
    diagonal = rearrange(x, "b (l r1) (r2 h) d -> b l h d r1 r2", r1=4, r2=2)
    assert torch.equal(diagonal, x.view(2, 3, 4, 2, 3, 5).permute(0, 1, 4, 5, 2, 3))
    assert torch.equal(rearrange(x[..., 0], "b (l r) h -> b (h l) r 1", r=4)[..., 0],
                       x[..., 0].view(2, 3, 4, 6).permute(0, 3, 1, 2).reshape(2, 18, 4))  # fmt: skip
    with pytest.raises(ValueError, match="cannot split"):
        rearrange(x, "b (n g) h d -> (b n) g h d", g=5)


def key(row):
    return row["who"], row["streams"], row["context"]


def test_serving(script, tmp_path):
    script("serve", "--device", "cpu", "--small", "--output", tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    rows = {key(row): row for row in report["rows"]}
    assert len(rows) == 8
    assert all(row["written_tokens"] == 8 * row["streams"] for row in rows.values()), rows
    kept = {context: rows["longnet", 3, context]["kept_bytes_per_stream"] for context in (100, 400)}
    assert kept[100] == kept[400]  # the same, whatever was read
    sessions = [rows["longnet", 1, context]["session_bytes"] for context in (100, 400)]
    assert 0 < sessions[0] <= sessions[1] <= kept[400]
    assert rows["dense", 3, 400]["kept_bytes_per_stream"] > 3 * rows["dense", 3, 100]["kept_bytes_per_stream"]
    parameters = [report["environment"][f"{who}_parameters"] for who in ("longnet", "dense")]
    assert abs(parameters[0] / parameters[1] - 1) < 0.01
    # A row that is missing is measured, the others stay.
    gone = report["rows"].pop(2)
    (tmp_path / "results.json").write_text(json.dumps(report))
    script("serve", "--device", "cpu", "--small", "--output", tmp_path)
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(again) == 8
    assert sum(row in report["rows"] for row in again) == 7
    assert [row["seconds"] for row in again if key(row) == key(gone)] != [gone["seconds"]]
    script("serve", "--device", "cpu", "--small", "--budget-seconds", "0", "--output", tmp_path / "none")
    assert "more than was left" in (tmp_path / "none" / "results.md").read_text()


def test_a_billion_in_small(script, tmp_path):
    """Read in two runs that join, and trained on in chunks after the gradients were checked."""
    (tmp_path / "source.py").write_text("for i in range(100):\n    print(i)\n" * 300)
    common = ["--tokens", 9001, "--device", "cpu", "--layers", 1, "--width", 64, "--root", tmp_path]
    common += ["--out", tmp_path / "out", "--text", tmp_path / "ids", "--chunk", 2048]
    script("billion", "read", *common, "--max-seconds", 0, "--state", tmp_path / "state")
    half = json.loads((tmp_path / "out/read-1x64-9001.json").read_text())
    assert half["read"] == 2048
    script("billion", "read", *common, "--state", tmp_path / "state")
    whole = json.loads((tmp_path / "out/read-1x64-9001.json").read_text())
    assert whole["read"] == 9000
    assert whole["distinct_bytes"] == 9001
    assert [borders[0] for borders, _ in whole["bits"]] == [0, 2048]
    out = script("billion", "train", *common, "--steps", 3)
    trained = json.loads((tmp_path / "out/train-1x64-9001.json").read_text())
    assert "relative gradient errors" in out
    assert "9 of 9 chunks" in out
    losses = [step["loss"] for step in trained["steps"]]
    assert losses[-1] < losses[0]
    assert trained["estimates"][0]["seconds"] > 0


def test_a_training_step_that_would_take_too_long_is_halved_and_compiled_work_checked(
    script, monkeypatch, tmp_path
):
    (tmp_path / "source.py").write_text("for i in range(100):\n    print(i)\n" * 300)
    common = [
        "--tokens",
        4096,
        "--device",
        "cpu",
        "--layers",
        1,
        "--width",
        64,
        "--root",
        tmp_path,
        "--chunk",
        512,
    ]
    common += [
        "--out",
        tmp_path / "out",
        "--text",
        tmp_path / "ids",
        "--steps",
        2,
        "--fresh",
        "--compile",
        "--shrink",
    ]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("billion_train")
    estimate, compiled = module.estimate, []

    def slow(model, ids, options, name):
        compiled.append("_feed_forward" in vars(model.model.layers[0]))
        seconds = {"eager": 1500.0, "compiled": 100.0}[name]
        return estimate(model, ids, options, name) | {"seconds": seconds}

    monkeypatch.setattr(module, "estimate", slow)

    def wrong(model):
        layer = model.model.layers[0]
        real = layer._feed_forward
        layer._feed_forward = lambda hidden: 2 * real(hidden)

    monkeypatch.setattr(module, "compile_token_work", wrong)
    out = script("billion", "train", *common)
    result = json.loads((tmp_path / "out/train-1x64-4096.json").read_text())
    assert compiled == [False, True]
    assert result["estimates"][1]["to_eager_gradients"] > 1e-4  # what stood for compiled work was wrong
    assert (result["way"], result["trained"]) == ("eager", 1024)
    assert "too long" in out
    assert [step["first_token"] for step in result["steps"]] == [0, 1024]


@pytest.mark.parametrize(("left", "expected"), [(200, [30]), (96, [16]), (80.5, []), (50, [30])])
def test_the_compiler_gets_the_time_that_steps_leave(monkeypatch, left, expected):
    """Two steps of 40 s: what is left beyond them, at most what --compile says, all of that where they do not fit."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module, given = importlib.import_module("billion_train"), []

    def limit(seconds):
        given.append(seconds)
        raise TimeoutError

    model = SimpleNamespace(model=SimpleNamespace(layers=[]))
    monkeypatch.setattr(module, "estimate", lambda *_: {"name": "eager", "seconds": 40.0, "gradients": None})
    monkeypatch.setattr(module, "compile_token_work", lambda model: None)
    monkeypatch.setattr(module, "at_most", limit)
    monkeypatch.setattr(module, "SHARE", 1.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: 0.0)
    options = SimpleNamespace(compile=30, steps=2)
    assert module.choose(model, None, options, {}, left)["name"] == "eager"
    assert given == expected


def test_layer_checkpointing_in_small(script, monkeypatch, tmp_path):
    """Steps at every length with a falling loss, gradients compared, and the longest that fits searched for."""
    (tmp_path / "source.py").write_text("for i in range(100):\n    print(i)\n" * 300)
    common = ["--device", "cpu", "--layers", 2, "--width", 64, "--root", tmp_path, "--out", tmp_path / "out"]
    common += [
        "--tokens",
        256,
        700,
        "--text",
        tmp_path / "ids",
        "--chunk",
        300,
        "--tile",
        100,
        "--largest",
        2500,
    ]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    billion = importlib.import_module("billion_checkpoint")
    real = billion.steps_at

    def limited(options, ids, tokens, *rest):
        if tokens > 900:
            raise torch.OutOfMemoryError("too long. And more")
        return real(options, ids, tokens, *rest)

    monkeypatch.setattr(billion, "steps_at", limited)
    out = script("billion", "checkpoint", *common, "--steps", 3, "--compare", 900)
    result = json.loads((tmp_path / "out/checkpoint-2x64-700.json").read_text())
    rows = {row["tokens"]: row for row in result["rows"]}
    assert list(rows) == [256, 700, 1400, 1024, 768]
    assert [tokens for tokens, row in rows.items() if row.get("error") == "too long"] == [1400, 1024]
    losses = [step["loss"] for step in rows[700]["steps"]]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    found, most = (result["compare"][name] for name in ("chunked_to_checkpointed", "at_most"))
    assert 0 < found["all"] <= most["all"] < 0.2
    assert found["all"] < found["worst"] <= most["worst"]
    assert result["compare"]["checkpointed_twice"]["all"] < 1e-5
    assert (tmp_path / "out/checkpoint-2x64-700.md").read_text() in out
    offloaded = [
        "--tokens",
        700,
        "--largest",
        700,
        "--steps",
        3,
        "--offload",
        "--out",
        tmp_path / "offloaded",
    ]
    assert "their inputs in host memory" in script("billion", "checkpoint", *common, *offloaded)
    (row,) = json.loads((tmp_path / "offloaded/checkpoint-2x64-700-offload.json").read_text())["rows"]
    assert [step["loss"] for step in row["steps"]] == losses
    with pytest.raises(SystemExit, match="one length for train"):
        script("billion", "train", *common)


def test_lengths_are_searched_for_between_what_fits_and_what_does_not(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    next_length = importlib.import_module("billion_checkpoint").next_length

    def search(limit, start, largest):
        rows = [{"tokens": start} | ({} if start <= limit else {"error": ""})]
        while (tokens := next_length(rows, largest, 64)) is not None:
            rows.append({"tokens": tokens} | ({} if tokens <= limit else {"error": ""}))
        return max((row["tokens"] for row in rows if "error" not in row), default=None)

    for limit in (6400, 9999, 51200):
        assert limit * 0.94 <= search(limit, 6400, 10**6) <= limit
    assert search(10**6, 6400, 20000) == 20000  # all fit
    assert search(10, 6400, 20000) is None  # not even the first
