"""`longnet explain --model --text`: the listing names what the query opened, the picture is written, bad input is refused."""

import re
import sys

import pytest
import torch

pytest.importorskip("tyro")

from longnet import LongNetConfig, LongNetForCausalLM, text
from longnet.cli import main
from longnet.cli.explain_text import query_maps

TREE = {"block": 8, "radix": 2, "window_blocks": 2, "top_k": 3, "beam": 4}
WORDS = "".join(f"word {i:03d}, " for i in range(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attention=["dilated", "hierarchical"], hierarchical=TREE, segment_lengths=[64], dilation_rates=[1], initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("explained")
    LongNetForCausalLM(config).save_pretrained(folder / "model")
    (folder / "words.txt").write_text(WORDS)
    return folder


@pytest.fixture
def explain(monkeypatch, capsys, folder):
    def run(*arguments):
        command = [
            "longnet",
            "explain",
            "--model",
            folder / "model",
            "--text",
            folder / "words.txt",
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", [str(x) for x in command])
        try:
            main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return run


def test_the_listing_says_what_was_opened(explain, folder, tmp_path):
    code, said = explain("--position", 333, "--layer", 1, "--head", 2, "--plot", tmp_path / "map.png")
    assert code == 0, said.err
    model = LongNetForCausalLM.from_pretrained(folder / "model")
    ids = torch.from_numpy(text.encode(WORDS[:334]).astype("int64"))
    found = query_maps(model, ids, 1)[2]
    expected = {(item.begin, item.weight) for item in found.items if item.kind == "opened"}
    lines = re.findall(r"block at bytes (\d+) to (\d+): score \S+, weight (\S+)  '(.*)'", said.out)
    assert len(lines) == len(expected) == 3
    for begin, end, weight, shown in lines:
        assert WORDS[int(begin) : int(end)] == shown
        assert any(int(begin) == b and float(weight) == pytest.approx(w, abs=1e-4) for b, w in expected)
    shares = [float(x) for x in re.findall(r": ([\d.]+)% of the weight", said.out)]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_the_map_gives_the_layers_output(folder):
    """Weights of tokens times values are what the layer computes."""
    model = LongNetForCausalLM.from_pretrained(folder / "model")
    ids = torch.from_numpy(text.encode(WORDS[:200]).astype("int64"))
    attention, seen = model.model.layers[1].attention, []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        maps = query_maps(model, ids, 1)
        hidden, output = seen[0]
        v = attention._project(hidden)[2][0].repeat_interleave(2, 1)  # (N, H, D)
        heads = torch.stack([m.tokens @ v[:, h] for h, m in enumerate(maps)])
        torch.testing.assert_close(attention.o_proj(heads.flatten()), output[0, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", 0), r"expected a hierarchical layer, one of \[1\]; got 0"),
        (("--layer", 1, "--head", 4), r"expected 0 .. 3; got 4"),
        (("--layer", 1, "--position", 100000), "expected a byte of the text"),
    ],
)
def test_what_is_not_there(explain, arguments, message):
    code, said = explain(*arguments)
    assert code == 2
    assert re.search(message, said.err)


def test_a_model_without_a_text(monkeypatch, capsys, folder):
    monkeypatch.setattr(sys, "argv", ["longnet", "explain", "--model", str(folder / "model")])
    with pytest.raises(SystemExit):
        main()
    assert "--model and --text together" in capsys.readouterr().err
