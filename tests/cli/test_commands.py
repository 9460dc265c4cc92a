"""Every command, as a user types it: what it prints, where it refuses, and with which exit code."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

tyro = pytest.importorskip("tyro")

from longnet import LongNetConfig  # noqa: E402
from longnet.cli import COMMANDS, main  # noqa: E402
from longnet.cli.recipe import expand, registry  # noqa: E402
from longnet.train import TrainConfig  # noqa: E402

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))
MODEL = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2",
         "segment_lengths=[8,32]", "dilation_rates=[1,4]"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, longnet):
    """A prepared folder and a trained model, made by the commands."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "texts").mkdir()
    for i in range(6):
        (folder / "texts" / f"{i}.txt").write_text(f"the quick brown fox {i} jumps over the lazy dog. " * 40)
    with gzip.open(folder / "texts" / "more.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "a document in a line. " * 50}) + "\n")
    (folder / "texts" / "picture.png").write_bytes(b"\x89PNG")
    (folder / "texts" / "broken.txt").write_bytes(b"caf\xe9 au lait")

    def run(*arguments):
        code, out, error = longnet(*arguments)
        assert code == 0, error
        return SimpleNamespace(stdout=out, stderr=error)

    prepared = run("prepare", folder / "texts", "--output", folder / "data")
    made = run(
        "train", "--data", folder / "data", "--output", folder / "run", "--sequence-length", 64, "--batch-size", 2,
        "--steps", 6, "--warmup", 2, "--eval-every", 3, "--eval-windows", 2, "--device", "cpu", "--model", *MODEL,
    )  # fmt: skip
    return folder, prepared, made


def test_prepare_and_train_say_what_they_did(trained):
    folder, prepared, made = trained
    assert "7 documents" in prepared.stdout
    assert "broken.txt: not utf-8: byte 0xe9 at offset 3" in prepared.stderr
    assert "1 .png" in prepared.stderr
    assert "step 6" in made.stdout
    assert "finished" in made.stdout
    assert "held out" in made.stderr + made.stdout
    written = json.loads((folder / "run" / "model" / "config.json").read_text())
    assert written["segment_lengths"] == [8, 32]
    assert (folder / "run" / "loss.png").stat().st_size > 1000


def test_a_terminated_run_exits_0_at_once_and_continues(trained, longnet, tmp_path):
    """C6: twice SIGTERM in the middle of training; a checkpoint, exit code 0, and the same command goes on."""
    folder, *_ = trained
    arguments = (
        "train", "--data", folder / "data", "--output", tmp_path / "run", "--sequence-length", 64, "--batch-size", 2,
        "--steps", 400, "--save-every", 1000, "--device", "cpu", "--model", *MODEL,
    )  # fmt: skip
    command = [sys.executable, "-m", "longnet", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, started = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while process.poll() is None and time.monotonic() - started < 100:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    out, error = process.communicate(timeout=25)
    assert process.returncode == 0, error
    assert time.monotonic() - asked < 25
    assert "run the same command to continue" in out
    code, out, _ = longnet(*arguments)
    assert code == 0
    assert "step 400" in out
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 401))


def test_eval_reads_a_stream_and_windows(trained, longnet):
    folder, *_ = trained
    model, file = folder / "run" / "model", folder / "texts" / "1.txt"
    code, out, _ = longnet("eval", "--model", model, "--file", file, "--chunk", 100, "--max-bytes", 900)
    assert code == 0
    assert "899 tokens" in out
    assert re.search(r"256 - +511 +\d+\.\d{3} +\d+\.\d\d", out)
    code, out, _ = longnet(
        "eval", "--model", model, "--file", folder / "data", "--window", 300, "--windows", 3
    )
    assert code == 0
    assert re.search(r"\d windows, ", out)
    assert "standard error" in out


def test_generate_from_a_prompt_a_file_and_standard_input(trained, longnet, tmp_path, monkeypatch):
    folder, *_ = trained
    model = folder / "run" / "model"
    common = ("generate", "--model", model, "--max-new-tokens", 12, "--temperature", 0)
    (tmp_path / "prompt.txt").write_text("the quick")
    outputs = [
        longnet(*common, "--prompt", "the quick"),
        longnet(*common, "--prompt-file", tmp_path / "prompt.txt"),
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the quick")))
    outputs.append(longnet(*common, "--prompt-file", "-"))
    assert outputs[0][0] == 0
    assert outputs[0] == outputs[1] == outputs[2]
    written = outputs[0][1]
    assert len(written) > 4
    code, out, _ = longnet(*common, "--prompt", "the quick", "--stop", written[1:3], "xyz")
    assert out.rstrip("\n") == written[: written.index(written[1:3]) + 2]
    penalised = longnet(
        *common, "--prompt", "the quick", "--repetition-penalty", "1e9", "--repetition-window", 400
    )
    assert penalised[0] == 0
    fresh = penalised[1].removesuffix("\n").replace("\ufffd", "")  # bytes that are no UTF-8 look alike
    assert len(set(fresh)) == len(fresh)  # no byte twice, and none of the prompt
    assert not set(fresh) & set("the quick")
    code, *_ = longnet(*common, "--prompt", "the quick", "--cache-out", tmp_path / "cache")
    assert code == 0
    from longnet import LongNetCache, LongNetConfig

    read = LongNetCache.load(tmp_path / "cache", LongNetConfig.from_pretrained(model)).get_seq_length()
    assert read == len("the quick" + written.removesuffix("\n"))  # what was written last, too
    code, out, _ = longnet(*common, "--prompt", " brown", "--cache-in", tmp_path / "cache")
    assert code == 0
    assert out.strip()
    code, out, _ = longnet(
        "generate",
        "--model",
        model,
        "--max-new-tokens",
        0,
        "--prompt",
        "the qu",
        "--cache-out",
        tmp_path / "read",
    )
    assert (code, out.strip()) == (0, "")
    for _ in range(2):  # read once, ask many times: the file stays as it was
        assert longnet(*common, "--prompt", "ick", "--cache-in", tmp_path / "read")[1] == written


def test_generate_to_a_length_into_a_file_with_bars(trained, longnet, tmp_path):
    folder, *_ = trained
    (tmp_path / "prompt.txt").write_text("the quick brown fox. " * 100)
    arguments = (
        "generate", "--model", folder / "run" / "model", "--prompt-file", tmp_path / "prompt.txt",
        "--output", tmp_path / "out", "--chunk", 500,
        "--target-length", 300, "--no-repeat-ngram", 4, "--seed", 3, "--progress", "always",
    )  # fmt: skip
    code, out, error = longnet(*arguments)
    assert (code, out) == (0, ""), error
    for part in ("read: 100%", "2.10k/2.10k", "write: 100%"):
        assert part in error
    written = (tmp_path / "out").read_bytes()
    assert len(written) == 300
    assert len({written[i : i + 4] for i in range(297)}) == 297
    (tmp_path / "out").write_bytes(b"precious")
    assert longnet(*arguments, "--top-p", "7")[0] == 2
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_the_commands_about_this_machine(longnet, tmp_path):
    code, out, _ = longnet("doctor")
    assert code == 0
    assert "torch" in out
    assert "cpu, torch.float32: dilated_attention takes impl=" in out
    code, out, _ = longnet("explain", "--tokens", 8192)
    assert code == 0
    assert "streaming cache" in out
    for kind in ("dilated", "hierarchical"):
        picture = tmp_path / f"{kind}.png"
        code, out, _ = longnet(
            "explain", "--tokens", 700, "--window", 64, "--attention", kind, "--plot", picture
        )
        assert code == 0
        assert str(picture) in out
        assert picture.stat().st_size > 5000
    code, out, _ = longnet(
        "bench", "--tokens", 256, "--heads", 2, "--head-width", 16, "--window", 64, "--repeats", 2
    )
    assert code == 0
    assert re.search(r"dilated: +\d+\.\d+ ms", out)


@pytest.mark.slow
def test_demo_with_tiny_settings(longnet, tmp_path):
    code, out, _ = longnet("demo", "--output", tmp_path / "demo", "--steps", 3, "--stream-bytes", 3000)
    assert code == 0
    for part in ("parameters", "bits per byte", "cache at the end", "loss plot"):
        assert part in out


NESTED = {"classify": ("train", "predict", "eval"), "extract": ("train", "predict", "eval")}
LEAVES = [f"{name} {sub}" for name, subs in NESTED.items() for sub in subs]


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name not in NESTED), *LEAVES])
def test_help_explains_every_option(longnet, command):
    code, out, _ = longnet(*command.split(), "--help")
    assert code == 0
    options = re.findall(r"│ (--[\w-]+)[^│]*│\n", out)
    bare = [line for line in out.splitlines() if re.match(r"│ --[\w-]+( \S+)? +\((default|required)", line)]
    assert f"longnet {command}" in out
    assert not bare, bare
    assert options or "subcommands" in out or command == "doctor"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("prepare", "nowhere", "--output", "x"), "nowhere"),
        (("prepare", "FILE", "--output", "x", "--encoding", "klingon"), "klingon"),
        (("prepare", "FILE", "--output", "x", "--validation-fraction", "2"), "validation_fraction"),
        (("train", "--data", "nowhere", "--output", "x"), "longnet prepare"),
        (("train", "--data", "nowhere", "--output", "x", "--steps", "0"), "steps"),
        (("train", "--data", "nowhere", "--output", "x", "--resume", "perhaps"), "longnet prepare"),
        (("train", "--config", "nowhere.toml"), "nowhere.toml"),
        (("train", "--config", "FILE"), "TOML"),
        (("train", "--config"), "TOML"),
        (("eval", "--model", ".", "--file", "FILE"), "config.json"),
        (("eval", "--model", "MODEL", "--file", "EMPTY"), "empty"),
        (("eval", "--model", "MODEL", "--file", "FILE", "--window", "0"), "window"),
        (("eval", "--model", "MODEL", "--file", "FILE", "--window", "100000"), "window"),
        (("generate", "--model", "MODEL"), "--prompt"),
        (("generate", "--model", "MODEL", "--prompt", ""), "input_ids"),
        (("generate", "--model", "MODEL", "--prompt", "x", "--no-repeat-ngram", "0"), "no_repeat_ngram"),
        (("generate", "--model", "MODEL", "--prompt", "x", "--min-new-tokens", "400"), "min_new_tokens"),
        (("generate", "--model", "MODEL", "--prompt", "x", "--min-new-tokens", "3", "--target-length", "9"), "target"),
        (("generate", "--model", "MODEL", "--prompt", "x", "--top-p", "7"), "top_p"),
        (("generate", "--model", "MODEL", "--prompt", "x", "--cache-in", "FILE"), "snapshot"),
        (("generate", "--model", "MODEL", "--prompt-file", "nowhere"), "nowhere"),
        (("explain", "--tokens", "0"), "max_length"),
        (("explain", "--key-heads", "5"), "--key-heads"),
        (("explain", "--attention", "hierarchical", "--block", "0"), "block"),
        (("bench", "--window", "0"), "window"),
        (("bench", "--repeats", "0"), "--repeats"),
        (("prepare", "FILE", "--output", "x", "--encoding", "hex"), "hex"),
        (("prepare", "FILE", "--output", "x", "--max-bytes", "0"), "max_bytes"),
        (("prepare", "nowhere", "--output", "x/y"), "nowhere"),
        (("eval", "--model", "MODEL", "--file", "FILE", "--max-bytes", "-5"), "--max-bytes"),
        (("eval", "--model", "MODEL", "--file", "FILE", "--max-bytes", "1"), "two tokens"),
        (("eval", "--model", "MODEL", "--file", "FILE", "--cache-out", "x/cache"), "--cache-out"),
        (("generate", "--model", "MODEL", "--prompt", "x", "--cache-out", "x/cache"), "--cache-out"),
        (("generate", "--model", "MODEL", "--prompt", "x", "--output", "x/text"), "--output"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(trained, longnet, tmp_path, monkeypatch, arguments, part):
    folder, *_ = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    places = {
        "FILE": folder / "texts" / "1.txt",
        "MODEL": folder / "run" / "model",
        "EMPTY": tmp_path / "empty.txt",
    }
    code, out, error = longnet(*(places.get(a, a) for a in arguments))
    assert code == 2
    lines = [line for line in error.splitlines() if line.startswith("longnet: ")]
    assert len(lines) == 1, error
    assert part in lines[0]
    assert "Traceback" not in error
    assert not out  # before any work
    assert not (tmp_path / "x").exists()


def test_a_reader_that_leaves_early_is_no_error(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as left:
        monkeypatch.setattr(sys, "stdout", left)
        monkeypatch.setattr(sys, "argv", ["longnet", "doctor"])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 141  # what a shell reports of a program that SIGPIPE ended
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("train", "--stepz", "3"), ("nothing",), ("prepare",), ("eval", "--chunk", "many")]
)
def test_unknown_options_are_exit_code_2(longnet, arguments):
    assert longnet(*arguments)[0] == 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_valid_configuration(recipe):
    options = expand(["--config", str(recipe), "--steps", "7", "--no-tensorboard"])
    config = tyro.cli(TrainConfig, args=options, registry=registry)
    values = tomllib.loads(recipe.read_text())
    assert config.steps == 7
    assert str(config.data) == values["data"]
    for name in values.keys() - {"steps", "data", "output"}:
        assert getattr(config, name) == values[name], name
    model = LongNetConfig.preset(config.preset, **config.model)
    # Positions of a segment far beyond the training window would never be trained.
    assert max(model.segment_lengths) <= 8 * config.sequence_length


def test_the_recipes_readme_names_every_recipe():
    assert len(RECIPES) >= 3
    text = (RECIPES[0].parent / "README.md").read_text()
    assert all(f"({recipe.name})" in text for recipe in RECIPES)


def test_pictures_show_who_sees_whom():
    from longnet import DilatedPattern, HierarchicalPattern
    from longnet.cli.explain import SHOWN, dilated_picture, tree_picture

    tokens = SHOWN + 100
    tree = tree_picture(HierarchicalPattern(block=4, radix=3, window_blocks=2, top_k=0), tokens)
    assert tree.shape == (SHOWN, SHOWN)
    assert (tree[np.tril_indices(SHOWN)] >= 1).all()  # every earlier token is seen, by itself or in a summary
    assert (tree[np.triu_indices(SHOWN, 1)] == 0).all()
    assert tree[-1, -1] == 1
    assert tree[-1, 0] > 4
    dilated = dilated_picture(DilatedPattern((8, 64), (1, 8)), 64, 1)
    assert dilated[63].sum() == 8  # the last token is at no offset of the coarse branch
    assert dilated[56].sum() == 1 + 8
