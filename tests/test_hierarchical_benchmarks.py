"""The benchmarks of hierarchical attention run, check before they time, and write what they say. No claim about speed."""

import gzip
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

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


def test_the_operation_and_its_peers(script, tmp_path):
    out = script("hierarchical", "--device", "cpu", "--small", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["group"] for row in rows] == [
        "cover",
        "cover",
        "whole",
        "whole",
        "whole",
        "cost",
        "cost",
        "memory",
    ]
    assert [row["who"] for row in rows if "error" in row] == ["nsa"]  # fla is not here, and the row says so
    assert all(row["forward_ms"][1] > 0 for row in rows if "error" not in row)
    assert "of the rate of dense" in out
    assert "times as fast as dense" in out
    assert "a token costs" in out
    assert (tmp_path / "results.md").read_text() in out


@pytest.mark.parametrize(("who", "scale"), [("cover", 1.05), ("opened", 1.05)])
def test_what_is_wrong_is_not_timed(script, monkeypatch, tmp_path, who, scale):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("hierarchical")
    real = module.hierarchical_attention
    calls = []

    def off(*tensors, **options):
        calls.append(1)
        result = real(*tensors, **options)
        return result if len(calls) % 2 == 0 else result._replace(out=result.out * scale)

    monkeypatch.setattr(module, "hierarchical_attention", off)
    options = type("", (), {"device": "cpu", "small": True, "fla": None})
    row = module.measure(module.Case("whole", who, 256, 4, 1, 16), options)
    assert "not timed" in row["error"]
    assert "forward_ms" not in row


def test_every_declared_case_is_one_the_kernels_take(monkeypatch):
    """Only the device is pretended."""
    from types import SimpleNamespace

    from longnet.attention import hierarchical as operation

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases = importlib.import_module("hierarchical_cases")
    monkeypatch.setattr(operation, "has_triton", lambda: True)
    for case in cases.CASES:
        q = SimpleNamespace(
            is_cuda=True, dtype=torch.bfloat16, shape=(1, case.tokens, case.heads, case.width)
        )
        for pattern in (*cases.OPENED.values(), cases.COVER):
            assert operation.unsupported(q, q, pattern, True) is None
    assert {case.tokens for case in cases.CASES if case.group == "cost"} == {2**16, 2**18, 2**20, 2**22}
    assert max(case.tokens for case in cases.CASES if case.group == "memory") == 2**20


def test_the_growth_on_a_text(script, tmp_path):
    from longnet import HierarchicalPattern, LongNetConfig, LongNetForCausalLM

    tree = asdict(HierarchicalPattern(block=16, radix=4, window_blocks=2, top_k=2, beam=4))
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LongNetConfig(attention="hierarchical", hierarchical=tree, num_key_value_heads=1, **size)
    LongNetForCausalLM(config).save_pretrained(tmp_path / "model")
    books = tmp_path / "books.jsonl.gz"
    with gzip.open(books, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": x * 50}) + "\n" for x in ("One. ", "Two, two. "))
    options = ("--model", tmp_path / "model", "--books", books, "--device", "cpu", "--out", tmp_path)
    out = script("hierarchical_text", *options, "--layers", 0, 1, "--tokens", 128, 512)
    rows = json.loads((tmp_path / "text.json").read_text())["rows"]
    assert [(row["tokens"], row["data"]) for row in rows] == [
        *((n, data) for n in (128, 512) for data in ("text, layer 0", "random")),
        (128, "text, layer 1"),
        (512, "text, layer 1"),
    ]
    assert (tmp_path / "text.md").read_text() in out
    assert "'radix': 2" in script("hierarchical_text", *options, "--layers", 0, "--tokens", 128, "--radix", 2)
    with pytest.raises(SystemExit, match="it holds 750"):
        script("hierarchical_text", *options, "--tokens", 1000)


def test_what_is_timed_on_a_text_is_the_layers_own(monkeypatch):
    """The projections that are taken give the layer's output."""
    from longnet import LongNetConfig, LongNetForCausalLM

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("hierarchical_text")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LongNetConfig(attention="hierarchical", **size)
    model, outputs = LongNetForCausalLM(config).eval(), []
    attention = model.model.layers[1].attention
    attention.o_proj.register_forward_pre_hook(lambda layer, inputs: outputs.append(inputs[0]))
    ids = torch.randint(4, 260, (1, 100))
    tensors, rotary = module.projections(model, ids, 1)
    torch.testing.assert_close(attention._attend(*tensors, rotary, None, None).flatten(2), outputs[0])
    model.model(input_ids=ids)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_stream_of_bounded_memory(script, tmp_path):
    options = (
        "--device",
        "cpu",
        "--small",
        "--tokens",
        4000,
        "--every",
        1500,
        "--chunk",
        400,
        "--out",
        tmp_path,
    )
    out = script("hierarchical_stream", *options)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    # Twenty single tokens are timed at every mark, and they count.
    assert [row["tokens"] for row in rows] == [1500, 3020, 4000]
    assert all(row["held_bytes"] == row["formula_bytes"] for row in rows)
    assert "agree at every mark" in out
    assert rows[-1]["allocated_bytes"] < 1.3 * rows[0]["allocated_bytes"]
    assert (tmp_path / "results.md").read_text() in out
    # The formula counts what a pattern says, not what happens to be there.
    module = importlib.import_module("hierarchical_stream")
    config = module.make(module.SMALL_TREE, "cpu").config
    tokens, nodes = 64 + 1500 % 16, 16 + 16 + 5 + 1
    assert 1500 // 16 // 4 // 4 == 5
    expected = 2 * (tokens * 3 * 64 * 4 + nodes * (2 * 64 * 4 + 8))
    assert module.formula(config, 1500, torch.float32) == expected
