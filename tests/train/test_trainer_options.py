"""The trainer's options: validation, samples, TensorBoard, precision, resuming from elsewhere, a full disk, other signals."""

import builtins
import dataclasses
import json
import os
import signal
import sys

import pytest
import torch

from longnet.train import TrainConfig, checkpoint, train
from longnet.train.data import TokenDataset, prepare

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "segment_lengths": [8, 32], "dilation_rates": [1, 4]}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    for name, animal in (("a", "fox"), ("b", "cat"), ("c", "dog")):
        (tmp_path / f"{name}.txt").write_text(f"the quick brown {animal} jumps over the lazy dog. " * 60)
    prepare([tmp_path / f"{name}.txt" for name in "abc"], tmp_path / "data")
    return TrainConfig(
        data=tmp_path / "data", output=tmp_path / "run", model=MODEL, sequence_length=64, batch_size=2, steps=8,
        warmup=2, learning_rate=1e-2, save_every=2, device="cpu",
    )  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_at(step, number=signal.SIGTERM, times=1):
    def stop(event):
        if event["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return stop


def test_validation_and_samples_do_not_disturb_training(config, tmp_path):
    train(dataclasses.replace(config, output=tmp_path / "plain"))
    watched = dataclasses.replace(config, eval_every=3, eval_windows=4, sample_every=4)
    train(watched)
    plain, seen = records(tmp_path / "plain"), records(tmp_path / "run")
    assert [r["loss"] for r in plain] == [r["loss"] for r in seen]
    due = [r for r in seen if "validation_bits_per_byte" in r]
    assert [r["step"] for r in due] == [3, 6, 8]
    assert due[-1]["validation_bits_per_byte"] < due[0]["validation_bits_per_byte"] < 8.5
    assert due[0]["validation_borders"] == [0, 64]
    assert [r["step"] for r in seen if r.get("sample")] == [4, 8]
    assert all(r["memory_bytes"] > 10**7 for r in seen)


def test_a_stop_during_an_evaluation_is_obeyed_at_once(config, tmp_path, monkeypatch):
    import longnet.train.monitor as monitor

    read, real = [], monitor.by_position

    def kicked(*arguments, on_chunk, **options):
        os.kill(os.getpid(), signal.SIGTERM)

        def counted(tokens, size):
            read.append(tokens)
            on_chunk(tokens, size)

        return real(*arguments, on_chunk=counted, **options)

    monkeypatch.setattr(monitor, "by_position", kicked)
    summary = train(dataclasses.replace(config, eval_every=3, eval_windows=8))
    assert (summary.step, summary.finished, len(read)) == (3, False, 1)
    monkeypatch.undo()
    train(config)
    train(dataclasses.replace(config, output=tmp_path / "whole"))
    assert [r["loss"] for r in records(config.output)] == [r["loss"] for r in records(tmp_path / "whole")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_a_save_waits_for_it(config, tmp_path, monkeypatch, number):
    real = checkpoint._write

    def kicked(*arguments):
        if arguments[1] == 4:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "_write", kicked)
    assert train(config).step == 4
    monkeypatch.undo()
    assert train(config).resumed_from == 4
    train(dataclasses.replace(config, output=tmp_path / "whole"))
    assert [r["loss"] for r in records(config.output)] == [r["loss"] for r in records(tmp_path / "whole")]


def test_resume_from_another_folder_or_one_checkpoint(config, tmp_path):
    whole = train(config)
    assert whole.finished
    first = tmp_path / "first"
    train(dataclasses.replace(config, output=first), stop_at(5))
    other = dataclasses.replace(config, output=tmp_path / "other", resume=str(first))
    assert train(other).resumed_from == 5
    expected = [r["loss"] for r in records(config.output)]
    assert [r["loss"] for r in records(tmp_path / "other")] == expected[5:]
    one = first / "checkpoints" / "step-00000004"
    third = dataclasses.replace(config, output=tmp_path / "third", resume=str(one))
    assert train(third, stop_at(6)).resumed_from == 4
    # The same command again continues the new run rather than starting from the other one.
    assert train(third).resumed_from == 6
    assert [r["loss"] for r in records(tmp_path / "third")] == expected[4:]
    with pytest.raises(ValueError, match="no intact checkpoint"):
        train(dataclasses.replace(config, output=tmp_path / "fourth", resume=str(tmp_path)))


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(config, tmp_path):
    train(dataclasses.replace(config, output=tmp_path / "whole"))
    train(config, stop_at(6))
    file = config.output / "checkpoints" / "step-00000006" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    summary = train(config)
    assert summary.resumed_from == 4
    assert len(summary.skipped) == 1
    assert str(file) in summary.skipped[0]
    assert summary.skipped[0].count("sha256") == 1
    assert [r["loss"] for r in records(config.output)] == [r["loss"] for r in records(tmp_path / "whole")]


def test_another_configuration_is_refused_with_every_difference(config):
    train(config, stop_at(2))
    weights = checkpoint.load(config.output / "checkpoints" / "step-00000002")[0]["weights"]
    other = {**MODEL, "hidden_size": 64, "dilation_rates": [1, 8]}
    changed = dataclasses.replace(config, model=other, seed=5, learning_rate=0.5, save_every=3)
    with pytest.raises(ValueError, match=r"differing: model: .*learning_rate: .*seed: "):
        train(changed)
    again = checkpoint.load(config.output / "checkpoints" / "step-00000002")[0]["weights"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_tensorboard_gets_the_same_figures(config):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(dataclasses.replace(config, tensorboard=True, eval_every=4, eval_windows=2, sample_every=8))
    events = event_accumulator.EventAccumulator(str(config.output / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in records(config.output)]
    assert [e.step for e in events.Scalars("validation_loss")] == [4, 8]


def without(monkeypatch, package):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.split(".")[0] == package or name.startswith(f"torch.utils.{package}"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith(f"torch.utils.{package}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)


def test_missing_packages_are_named(config, monkeypatch):
    without(monkeypatch, "tensorboard")
    with pytest.raises(ValueError, match="pip install"):
        train(dataclasses.replace(config, tensorboard=True, steps=2))
    assert not (config.output / "checkpoints").exists()
    without(monkeypatch, "matplotlib")
    assert train(dataclasses.replace(config, steps=2)).plot is None


def test_bf16_autocast_trains_and_resumes_bit_for_bit(config, tmp_path):
    config = dataclasses.replace(config, bf16=True, eval_every=4, eval_windows=2)
    train(dataclasses.replace(config, output=tmp_path / "plain", bf16=None))
    train(dataclasses.replace(config, output=tmp_path / "whole"))
    train(config, stop_at(3))
    assert train(config).resumed_from == 3
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("plain", "whole", "run")]
    assert losses[1] == losses[2] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    groups, _ = checkpoint.load(config.output / "checkpoints" / "step-00000008")
    assert {t.dtype for t in groups["weights"].values()} == {torch.float32}


def test_options_that_save_memory_or_time_do_not_change_the_run(config, tmp_path, monkeypatch):
    train(dataclasses.replace(config, output=tmp_path / "plain"))
    real, compiled = torch.compile, []

    def one_graph(function, **options):
        compiled.append(function)
        return real(function, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", one_graph)
    same = {
        "checkpointed": {"gradient_checkpointing": True},
        "tiled": {"gradient_checkpointing": True, "tile_tokens": 7},
        "compiled": {"compile": True},
        "chunked and compiled": {"compile": True, "sequence_strategy": "chunked", "chunk_tokens": 24},
        "split": {"batch_size": 1, "accumulation": 2},
    }
    expected = [r["loss"] for r in records(tmp_path / "plain")]
    for name, options in same.items():
        compiled.clear()
        train(dataclasses.replace(config, output=tmp_path / name, **options))
        assert bool(compiled) == ("compile" in options)
        assert [r["loss"] for r in records(tmp_path / name)] == pytest.approx(expected, rel=1e-4), name


def test_betas_reach_the_optimizer_and_belong_to_the_run(config):
    train(dataclasses.replace(config, betas=(0.8, 0.9)), stop_at(2))
    with pytest.raises(ValueError, match="betas"):
        train(config)


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written_obeys_the_policy(config, monkeypatch, policy):
    real = checkpoint._write

    def full(folder, step, *arguments):
        if step == 4:
            raise OSError(28, "No space left on device")
        real(folder, step, *arguments)

    monkeypatch.setattr(checkpoint, "_write", full)
    config = dataclasses.replace(config, on_save_error=policy)
    if policy == "stop":
        with pytest.raises(
            checkpoint.CheckpointWriteError, match=r"step-00000004 \(\d+ bytes.*No space left"
        ):
            train(config)
        assert checkpoint.newest(config.output / "checkpoints")[0].name == "step-00000002"
        return
    assert train(config).finished
    noted = [r["step"] for r in records(config.output) if "No space left" in r.get("save_error", "")]
    assert noted == [5]
    assert sorted(p.name for p in (config.output / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000008",
    ]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_records_that_cannot_be_written_obey_the_policy(config, tmp_path, monkeypatch, policy):
    from longnet.train import monitor

    calls = []

    def full(path, mode="r"):
        calls.append(path)
        stream = open(path, mode)  # noqa: SIM115 - handed on, as open does
        if len(calls) in (3, 4):
            stream.write('{"step": 3, "lo')
            stream.close()
            raise OSError(28, "No space left on device")
        return stream

    monkeypatch.setattr(monitor, "open", full, raising=False)
    config = dataclasses.replace(config, on_save_error=policy)
    if policy == "stop":
        with pytest.raises(OSError, match="No space"):
            train(config)
        assert [r["step"] for r in records(config.output)] == [1, 2]
        return
    assert train(config).finished
    assert len(calls) > 4
    assert [r["step"] for r in records(config.output)] == list(range(1, 9))


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointWriteError, match=str(tmp_path / "file")):
        checkpoint.save(tmp_path / "file" / "below", 1, {"w": {"w": torch.zeros(2)}}, {})
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 0}, "steps"), ({"betas": (0.9, 1.0)}, "betas"), ({"eval_every": -1}, "eval_every"),
        ({"eval_windows": 0}, "eval_windows"), ({"warmup": -1}, "warmup"), ({"learning_rate": float("nan")}, "learning_rate"),
        ({"eval_every": 1, "sequence_length": 2701}, "held-out"), ({"preset": "huge"}, "preset"),
        ({"model": {"hiden_size": 32}}, "hiden_size"), ({"device": "abacus"}, "device"), ({"device": "cuda:77"}, "device"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_written(config, change, name):
    with pytest.raises(ValueError, match=name):
        train(dataclasses.replace(config, **change))
    assert not (config.output / "checkpoints").exists()


def test_held_out_text_is_needed_only_where_it_is_used(config, tmp_path):
    prepare([tmp_path / "a.txt"], tmp_path / "one")
    one = dataclasses.replace(config, data=tmp_path / "one", steps=2)
    assert train(one).finished
    with pytest.raises(ValueError, match="validation"):
        train(dataclasses.replace(one, eval_every=1, output=tmp_path / "again"))
    assert len(TokenDataset(tmp_path / "one").split("train")) == TokenDataset(tmp_path / "one").meta["tokens"]


@pytest.mark.parametrize("chunk", [24, None])
def test_chunked_steps_are_the_whole_steps(config, tmp_path, chunk):
    train(dataclasses.replace(config, output=tmp_path / "whole", accumulation=2))
    options = {"sequence_strategy": "chunked", "chunk_tokens": chunk, "accumulation": 2}
    train(dataclasses.replace(config, output=tmp_path / "chunked", **options))
    for whole, chunked in zip(records(tmp_path / "whole"), records(tmp_path / "chunked"), strict=True):
        assert chunked["loss"] == pytest.approx(whole["loss"], rel=2e-4)
        assert chunked["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=2e-3)


def test_chunked_steps_of_hierarchical_layers(config, tmp_path):
    tree = {"block": 8, "radix": 2, "window_blocks": 2, "top_k": 2, "beam": 2, "retention": [16, 8]}
    model = MODEL | {"attention": "hierarchical", "hierarchical": tree}
    train(dataclasses.replace(config, model=model, output=tmp_path / "whole"))
    options = {"sequence_strategy": "chunked", "chunk_tokens": 24}
    train(dataclasses.replace(config, model=model, output=tmp_path / "chunked", **options))
    for whole, chunked in zip(records(tmp_path / "whole"), records(tmp_path / "chunked"), strict=True):
        assert chunked["loss"] == pytest.approx(whole["loss"], rel=2e-4)
        assert chunked["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=2e-3)


def test_chunked_steps_refuse_hierarchical_layers_that_keep_everything(config):
    model = MODEL | {"attention": "hierarchical"}
    with pytest.raises(ValueError, match="without a retention"):
        train(dataclasses.replace(config, model=model, sequence_strategy="chunked"))
