"""No file that can be loaded may run code: a static scan of the package, and bombs in every loadable place."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from longnet import LongNetCache, LongNetConfig, LongNetForCausalLM
from longnet.train import TrainConfig, checkpoint, train
from longnet.train.data import TokenDataset, prepare

SOURCES = sorted((Path(__file__).resolve().parents[1] / "src").rglob("*.py"))
MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "segment_lengths": [8, 32], "dilation_rates": [1, 4]}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}


def dangers(source: str) -> list[str]:
    """Line and construct of everything that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(node.lineno, name) for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        name = ast.unparse(node.func)
        bad = name in FORBIDDEN_NAMES
        bad |= name in (
            "torch.load",
            "torch.jit.load",
            "yaml.load",
            "yaml.unsafe_load",
            "yaml.full_load",
            "os.system",
        )
        bad |= (
            name.endswith(("np.load", "numpy.load", "np.fromfile"))
            and options.get("allow_pickle") is not False
        )
        bad |= any(options.get(o) is True for o in ("allow_pickle", "trust_remote_code", "shell"))
        bad |= "weights_only" in options and options["weights_only"] is not True
        found += [(node.lineno, name)] if bad else []
    return [f"line {line}: {name}" for line, name in found]


def test_the_scan_sees_what_it_should():
    for bad in ("import pickle", "from pickle import loads", "eval('1')", "torch.load(f)", "yaml.load(f)", "np.load(f)",
                "f(shell=True)", "A.load(p, trust_remote_code=True)", "torch.load(f, weights_only=False)"):  # fmt: skip
        assert dangers(bad), bad
    assert not dangers("model.eval()\nnp.load(f, allow_pickle=False)\ntorch.compile(m)\nre.compile('x')")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parents[1])))
def test_the_package_loads_nothing_that_runs(source):
    assert not dangers(source.read_text())


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def bomb(tmp_path):
    """(pickle bytes, zip of torch.save, npy with an object): what an attacker would leave. Checks itself once, and afterwards
    that nothing went off."""
    marker = tmp_path / "went-off"
    payload = pickle.dumps(Bomb(marker))
    pickle.loads(payload)
    assert marker.exists()
    marker.rmdir()
    zipped, array = io.BytesIO(), io.BytesIO()
    torch.save({"model": Bomb(marker)}, zipped)
    np.save(array, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    yield payload, zipped.getvalue(), array.getvalue()
    assert not marker.exists()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    prepare([folder / "a.txt"], folder / "data")
    config = TrainConfig(
        data=folder / "data", output=folder / "run", model=MODEL, sequence_length=64, batch_size=2, steps=2,
        warmup=1, device="cpu",
    )  # fmt: skip
    train(config)
    return folder, config


def reseal(path: Path, files: dict[str, str] | None = None) -> None:
    """A manifest as an attacker would write it: every hash right."""
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, digest in (files or {}).items():
        manifest["files"][name] = {"size": 1, "sha256": digest}
    (path / "manifest.json").write_text(checkpoint._sealed(manifest))


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
@pytest.mark.parametrize("sealed", [False, True])
def test_bombs_in_checkpoints(run_folder, bomb, tmp_path, name, sealed):
    folder, config = run_folder
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    for payload in bomb:
        (path / name).write_bytes(payload)
        if sealed:
            reseal(path)
        with pytest.raises(checkpoint.CheckpointCorrupt, match=name):
            checkpoint.load(path)
        with pytest.raises(ValueError, match="expected"):
            train(TrainConfig(**{**vars(config), "output": tmp_path / "run"}))


def test_bombs_as_manifests(run_folder, bomb, tmp_path):
    path = shutil.copytree(
        run_folder[0] / "run" / "checkpoints" / "step-00000002", tmp_path / "step-00000002"
    )
    for payload in bomb:
        (path / "manifest.json").write_bytes(payload)
        with pytest.raises(checkpoint.CheckpointCorrupt, match=r"manifest\.json"):
            checkpoint.load(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", ".", "", "sub/file"])
def test_a_manifest_cannot_name_files_elsewhere(run_folder, tmp_path, name):
    path = shutil.copytree(
        run_folder[0] / "run" / "checkpoints" / "step-00000002", tmp_path / "step-00000002"
    )
    (tmp_path / "secret").write_text("x")
    (path / "sub").mkdir()
    (path / "sub" / "file").write_text("x")
    reseal(path, {name: hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(checkpoint.CheckpointCorrupt, match="expected"):
        checkpoint.load(path)


def test_a_sealed_checkpoint_of_other_tensors_is_refused_whole(run_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, config = run_folder
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    weights = load_file(path / "weights.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, path / "weights.safetensors")
    reseal(path)
    with pytest.raises(checkpoint.CheckpointCorrupt, match=r"model\.norm\.weight"):
        train(TrainConfig(**{**vars(config), "output": tmp_path / "run"}))


@pytest.mark.parametrize("name", ["documents.npy", "meta.json"])
def test_bombs_in_prepared_data(run_folder, bomb, tmp_path, name):
    shutil.copytree(run_folder[0] / "data", tmp_path / "data")
    for payload in bomb:
        (tmp_path / "data" / name).write_bytes(payload)
        with pytest.raises(ValueError, match="longnet prepare"):
            TokenDataset(tmp_path / "data")


def test_bombs_as_snapshots_of_a_cache(bomb, tmp_path):
    config = LongNetConfig(**MODEL)
    for payload in bomb:
        (tmp_path / "cache").write_bytes(payload)
        with pytest.raises(ValueError, match="expected a cache snapshot"):
            LongNetCache.load(tmp_path / "cache", config)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "generation_config.json"]
)
def test_bombs_in_a_model_folder(run_folder, bomb, tmp_path, name):
    from safetensors import SafetensorError

    from longnet.cli.models import load_model

    shutil.copytree(run_folder[0] / "run" / "model", tmp_path / "model")
    if name == "pytorch_model.bin":
        (tmp_path / "model" / "model.safetensors").unlink()
    for payload in bomb:
        (tmp_path / "model" / name).write_bytes(payload)
        for load in (LongNetForCausalLM.from_pretrained, load_model):
            try:
                load(tmp_path / "model")
            except (OSError, ValueError, SafetensorError, pickle.UnpicklingError, RuntimeError):
                continue
            assert name == "generation_config.json"  # transformers reports it and goes on without
