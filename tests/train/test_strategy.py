"""`--sequence-strategy auto`: what is picked for the memory that is free, that it is used, said, recorded and kept."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from longnet.model import LongNetConfig
from longnet.plan import Job, Machine, strategies
from longnet.train import TrainConfig, strategy, train, trainer
from longnet.train.data import prepare
from longnet.train.offload import offload_layer_inputs

MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "segment_lengths": [32, 256], "dilation_rates": [1, 8]}  # fmt: skip

TREE = {**MODEL, "attention": "hierarchical",
        "hierarchical": {"block": 4, "radix": 3, "window_blocks": 2, "top_k": 2, "beam": 3, "retention": [24, 12]}}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    prepare([tmp_path / "a.txt"], tmp_path / "data", validation_fraction=0)
    return TrainConfig(
        data=tmp_path / "data", output=tmp_path / "run", model=MODEL, sequence_length=256, batch_size=2, steps=2,
        warmup=1, save_every=1, device="cpu", sequence_strategy="auto",
    )  # fmt: skip


def memory_for(config, name):
    """Bytes that suffice for a strategy and for none that needs more."""
    job = Job(
        config=LongNetConfig.preset(config.preset, **config.model), tokens=config.sequence_length, batch=config.batch_size,
        autocast=False, fused_norms=False,
    )  # fmt: skip
    return next(s.total for s in strategies(job, Machine(memory=2**40)) if s.name == name) / 0.89


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["whole", "chunked", "chunked and checkpointed"])
def test_what_fits_is_picked_used_said_and_recorded(config, name, monkeypatch):
    monkeypatch.setattr(strategy, "free_memory", lambda device: memory_for(config, name))
    taken, events = [], []
    chunked_backward = trainer.chunked_backward

    def watched(model, ids, targets, chunk, **options):
        taken.append(chunk)
        return chunked_backward(model, ids, targets, chunk, **options)

    monkeypatch.setattr(trainer, "chunked_backward", watched)
    train(config, events.append)
    said = events[0]
    assert (said["step"], said["strategy"]) == (0, name)
    assert "the fastest that fits" in said["strategy_reason"]
    assert [e["step"] for e in events[1:]] == [1, 2]
    assert bool(taken) == name.startswith("chunked")
    assert all(chunk < 256 for chunk in taken)
    first, *others = records(config.output)
    assert (first["strategy"], first["strategy_reason"]) == (name, said["strategy_reason"])
    assert not any("strategy" in record for record in others)
    # The gradients are exact, so the losses are those of whole windows.
    plain = dataclasses.replace(config, output=config.output / "plain", sequence_strategy="whole")
    train(plain)
    losses = [[r["loss"] for r in records(folder)] for folder in (config.output, plain.output)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_continuation_keeps_what_was_picked_whatever_is_free_then(config, monkeypatch):
    monkeypatch.setattr(strategy, "free_memory", lambda device: memory_for(config, "chunked"))
    whole = dataclasses.replace(config, output=config.output / "uninterrupted")
    train(whole)

    def stop(event):
        if event["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train(config, stop)
    monkeypatch.setattr(strategy, "free_memory", lambda device: 2**40)
    assert train(config).resumed_from == 1
    assert [r["loss"] for r in records(config.output)] == [r["loss"] for r in records(whole.output)]


def test_offloaded_rows_change_no_bit_of_a_run(config):
    here, there = (
        dataclasses.replace(
            config,
            output=config.output / name,
            sequence_strategy="chunked",
            chunk_tokens=48,
            offload=name == "there",
        )
        for name in ("here", "there")
    )
    train(here)
    train(there)
    assert [r["loss"] for r in records(here.output)] == [r["loss"] for r in records(there.output)]


@pytest.mark.parametrize(
    "options", [{}, {"objective": "mlm"}, {"model": TREE}, {"tile_tokens": 40, "accumulation": 2}]
)
def test_offloaded_layer_inputs_change_no_bit_of_a_run(config, options, monkeypatch):
    taken = []
    monkeypatch.setattr(
        trainer, "offload_layer_inputs", lambda model: taken.append(model) or offload_layer_inputs(model)
    )
    here = dataclasses.replace(
        config,
        output=config.output / "here",
        sequence_strategy="whole",
        gradient_checkpointing=True,
        **options,
    )
    there = dataclasses.replace(here, output=config.output / "there", offload=True)
    train(here)
    assert not taken
    train(there)
    assert len(taken) == 1
    assert [r["loss"] for r in records(here.output)] == [r["loss"] for r in records(there.output)]


def test_offloaded_layer_inputs_of_a_compiled_run(config, monkeypatch):
    """What layers do to every token is compiled, not the model, whose one graph would keep what it likes."""
    real, compiled = torch.compile, []

    def one_graph(function, **options):
        compiled.append(function)
        return real(function, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", one_graph)
    plain = dataclasses.replace(config, output=config.output / "plain", sequence_strategy="whole")
    train(plain)
    train(
        dataclasses.replace(
            plain, output=config.output, gradient_checkpointing=True, offload=True, compile=True
        )
    )
    assert [f.__name__ for f in compiled] == ["_call_impl", "_feed_forward", "_project"] * 2
    losses = [[r["loss"] for r in records(folder)] for folder in (config.output, plain.output)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_would_not_fit_into_host_memory_is_refused(config, monkeypatch):
    monkeypatch.setattr(strategy, "free_memory", lambda device: 2**20 if device.type == "cpu" else 2**40)
    model, cuda = LongNetConfig.preset(config.preset, **config.model), torch.device("cuda")

    def look(**options):
        return strategy.given(dataclasses.replace(config, **options), model, cuda, True)["way"]

    # Two layers of 64 in fp32 and 2 sequences: 1 KiB a token, of which 922 are fewer than 0.9 MiB.
    whole = {"sequence_strategy": "whole", "gradient_checkpointing": True}
    assert look(**whole, offload=True, sequence_length=921)["offload"]
    assert not look(**whole, sequence_length=10**6)["offload"]
    with pytest.raises(
        ValueError, match=r"at least 0\.0 GiB of host memory .* got 0\.0 that may be filled; shorten"
    ):
        look(**whole, offload=True, sequence_length=922)
    chunked = {"sequence_strategy": "chunked", "chunk_tokens": 100, "offload": True}
    assert look(**chunked)["chunk_tokens"] == 100
    with pytest.raises(ValueError, match="GiB of host memory"):
        look(**chunked, sequence_length=10**5)


def test_nothing_fits(config, monkeypatch):
    monkeypatch.setattr(strategy, "free_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"fit into 0\.0 GiB; whole needs .*shorten the sequence"):
        train(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": 64}, "leave them out"),
        ({"gradient_checkpointing": True}, "leave them out"),
        ({"offload": True, "sequence_strategy": "whole"}, "add --gradient-checkpointing"),
        ({"offload": True, "sequence_strategy": "chunked", "model": TREE}, "offload: expected dilated"),
        ({"objective": "mlm"}, "no formula tells"),
        ({"model": {**MODEL, "attention": "hierarchical"}}, "no formula tells"),
    ],
)
def test_refusals(config, options, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, **options))


def test_free_memory_is_that_of_this_machine_and_shared_by_the_ranks(monkeypatch):
    free = strategy.free_memory(torch.device("cpu"))
    assert 2**20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert strategy.free_memory(torch.device("cpu")) < free / 2
