"""Training over ranks: equal to one device, resharded bit for bit, and what happens when a rank is wrong, dies or hangs."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ranks
from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.train import TrainConfig, checkpoint, train
from longnet.train.config import check as check_config
from longnet.train.data import TokenDataset, WindowSampler, prepare
from longnet.train.offload import offload_layer_inputs
from longnet.train.parallelize import Parallel, RanksDisagree, check_layout, connect, preflight, shard_block
from longnet.train.trainer import _Run

MODEL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "segment_lengths": [8, 32, 64], "dilation_rates": [1, 4, 8]}  # fmt: skip
TREE = {"block": 4, "radix": 2, "window_blocks": 2, "guard": 0, "top_k": 2, "beam": 2}
HIERARCHICAL = {**MODEL, "attention": "hierarchical", "hierarchical": TREE}
MIXED = {
    **MODEL,
    "attention": ["hierarchical", "dilated"],
    "hierarchical": {**TREE, "block": 5, "retention": [20, 8]},
}
CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    prepare([tmp_path / "text"], tmp_path / "data")
    return TrainConfig(
        data=tmp_path / "data", output=tmp_path / "run", model=MODEL, sequence_length=61, batch_size=12, steps=8,
        warmup=2, learning_rate=1e-2, save_every=2, device="cpu", timeout=30,
    )  # fmt: skip


def losses(path):
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def gradients(data, sequence_parallel, models):
    """The largest error of loss and parameter gradients of fp64 models against one device."""
    connect({}, CPU, timedelta(seconds=30))
    worst = 0.0
    for fields in models:
        one = _random(LongNetConfig(**fields))
        ids = WindowSampler(TokenDataset(data), 61, 4, 0).next_batch()
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        for way in ("whole", "checkpointed", "offloaded"):
            many = _random(one.config).train()
            if way != "whole":
                many.gradient_checkpointing_enable()
            sampler = WindowSampler(TokenDataset(data), 61, 4, 0)
            block = shard_block(one.config)
            parallel = Parallel(sequence_parallel, 61, 4, CPU, timedelta(seconds=30), block)
            parallel.apply(many)
            if way == "offloaded":
                offload_layer_inputs(many)
            with no_new_groups():
                total, _, _ = parallel.agree(parallel.backward(many, sampler, 1, False), False)
            worst = max(worst, abs(total - float(loss)))
            for (name, p), q in zip(many.named_parameters(), one.parameters(), strict=True):
                error = (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max().clamp(min=1)
                assert q.grad.abs().max() > 0, name
                worst = max(worst, float(error))
    return worst


@contextlib.contextmanager
def no_new_groups():
    """A group that is made within a step meets collectives under way, which NCCL does not allow for."""
    make, dist.new_group = dist.new_group, None
    try:
        yield
    finally:
        dist.new_group = make


def test_a_rank_is_bound_to_its_gpu_before_the_process_group_is_made(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr("longnet.train.parallelize.preflight", lambda *args: calls.append("preflight"))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: calls.append((*args, kwargs)))
    device = torch.device("cuda:1")
    connect({}, device, timedelta(seconds=3))
    connect({}, CPU, timedelta(seconds=3))
    first, second, (nccl, with_gpu), third, (gloo, without) = calls
    assert (first, second, third) == ("preflight", device, "preflight")
    assert (nccl, with_gpu["device_id"], gloo, without["device_id"]) == ("nccl", device, "gloo", None)


def _random(config):
    """A model whose pooling, routing and convolution do not stand at their neutral initial values."""
    torch.manual_seed(0)
    model = LongNetForCausalLM(config).double()
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("prior_query", "level_bias", "key_conv"):
                if hasattr(layer.attention, name):
                    getattr(layer.attention, name).normal_(0, 0.5)
            if hasattr(layer.attention, "router_mix"):
                layer.attention.router_mix.requires_grad_().copy_(torch.tensor([0.1, 0.9, 0.5, 0.6]))
    return model


@pytest.mark.parametrize(("world", "sequence_parallel"), [(2, 2), (3, 3), (4, 2), (4, 4), (2, 1)])
def test_loss_and_parameter_gradients_equal_one_device(config, tmp_path, world, sequence_parallel):
    models = [MODEL, HIERARCHICAL, MIXED] if sequence_parallel > 1 else [MODEL]
    answers = ranks.run(gradients, world, tmp_path / "ranks", config.data, sequence_parallel, models)
    assert max(ranks.results(answers)) <= 1e-12


def resume(config, until):
    """Restore, compare every bit with the file, train on to step `until` and stop as after a signal."""
    run = _Run(config)
    path, _ = checkpoint.newest(config.output / "checkpoints")
    differing = []
    if path is not None:
        full = run.parallel.full if run.parallel else (lambda x: x)
        weights = {name: full(p.detach()) for name, p in run.model.named_parameters()}
        states = run.optimizer.state_dict()["state"]
        moments = {f"{i}.{k}": full(x) for i, state in states.items() for k, x in state.items()}
        if run.parallel is None or run.parallel.rank == 0:
            saved, _ = checkpoint.load(path)
            for group, now in (("weights", weights), ("optimizer", moments)):
                assert saved[group].keys() == now.keys()
                differing += [k for k, x in now.items() if not torch.equal(x, saved[group][k])]
    while run.step < until:
        run.log(run.advance())
    run.save()
    run.close()
    return differing


def alone(*args):
    del os.environ["WORLD_SIZE"]
    return resume(*args)


def test_a_run_goes_on_with_4_2_1_and_3_ranks_bit_for_bit(config, tmp_path):
    whole = dataclasses.replace(config, output=tmp_path / "whole")
    ranks.results(ranks.run(alone, 1, tmp_path / "ranks", whole, 8))
    for world, sequence_parallel, until in ((4, 2, 2), (2, 2, 4), (1, 1, 6), (3, 3, 8)):
        now = dataclasses.replace(config, sequence_parallel=sequence_parallel)
        answers = ranks.run(resume if world > 1 else alone, world, tmp_path / "ranks", now, until)
        assert not any(ranks.results(answers))
    assert len(losses(config.output)) == 8
    # The order of additions differs between layouts, and nothing else does: fp32 rounding over 8 steps.
    for a, b in zip(losses(config.output), losses(tmp_path / "whole"), strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)


def test_the_trainer_reads_one_window_with_hierarchical_layers_over_two_ranks(config, tmp_path):
    config = dataclasses.replace(config, model=MIXED, steps=3, batch_size=4)
    train(dataclasses.replace(config, output=tmp_path / "whole"))
    config = dataclasses.replace(config, sequence_parallel=2)
    ranks.results(ranks.run(resume, 2, tmp_path / "ranks", config, 3))
    for a, b in zip(losses(config.output), losses(tmp_path / "whole"), strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)


def test_hierarchical_layers_that_cannot_be_spread_are_refused_before_any_rank_talks(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = dataclasses.replace(config, sequence_parallel=4, model=HIERARCHICAL)
    check_config(config)
    for change, message in (
        ({"sequence_length": 12}, "at least one leaf block of 4 tokens a rank; got 12 over 4 ranks"),
        ({"model": {**HIERARCHICAL, "attention_impl": "reference"}}, "attention_impl: expected None"),
        (
            {"sequence_strategy": "chunked"},
            "expected 0, 0, False, 'whole' or 'auto' and 'causal' with 4 ranks",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(dataclasses.replace(config, **change))


def test_every_rank_names_each_field_that_differs_from_the_checkpoint(config, tmp_path):
    ranks.results(ranks.run(resume, 2, tmp_path / "ranks", config, 2))
    before = sorted(p.name for p in (config.output / "checkpoints").iterdir())
    other = dataclasses.replace(config, model={**MODEL, "hidden_size": 32}, learning_rate=3e-3, seed=4)
    answers = ranks.run(resume, 2, tmp_path / "ranks", other, 4)
    for answer in answers:
        assert answer["error"] == "ValueError"
        for field in ("model", "learning_rate: checkpoint 0.01, now 0.003", "seed: checkpoint 0, now 4"):
            assert field in answer["message"]
    assert answers[0]["message"] == answers[1]["message"]
    assert sorted(p.name for p in (config.output / "checkpoints").iterdir()) == before


def disagreeing(config):
    if os.environ["RANK"] == "1":
        config = dataclasses.replace(config, sequence_length=53, learning_rate=5e-3, batch_size=0)
    try:
        train(config)
    finally:
        assert not dist.is_initialized()


def test_ranks_that_disagree_fail_alike_before_the_first_collective(config, tmp_path):
    answers = ranks.run(disagreeing, 2, tmp_path / "ranks", config)
    assert {a["error"] for a in answers} == {"RanksDisagree"}
    (message,) = {a["message"] for a in answers}
    assert "sequence_length: 61 on rank 0; 53 on rank 1" in message
    assert "learning_rate: 0.01 on rank 0; 0.005 on rank 1" in message
    assert 'problem: "" on rank 0; "batch_size: expected at least 1; got 0" on rank 1' in message


def check(reports, seconds=10.0):
    """The errors of `preflight` on every rank; a report of None never arrives."""
    store, errors = dist.HashStore(), {}

    def rank(i):
        with contextlib.suppress(Exception):
            try:
                preflight(store, i, len(reports), reports[i], timedelta(seconds=seconds))
                errors[i] = None
            except Exception as error:
                errors[i] = error

    threads = [threading.Thread(target=rank, args=(i,)) for i, r in enumerate(reports) if r is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [errors.get(i) for i in range(len(reports))]


def test_rank_0_does_not_take_the_store_away_before_all_have_read_why():
    store, events = dist.HashStore(), []

    class Slow:
        """The store of rank 1, whose answers take a while."""

        set, wait = store.set, store.wait

        def get(self, key):
            time.sleep(0.3)
            events.append("read")
            return store.get(key)

    def rank(i):
        with pytest.raises(RanksDisagree):
            preflight(Slow() if i else store, i, 2, {"learning_rate": i}, timedelta(seconds=10))
        events.append(f"rank {i} left")

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events.index("read") < events.index("rank 0 left")


def test_preflight_lists_versions_dtypes_and_missing_ranks():
    report = {"torch": "2.13", "dtype": "bfloat16", "model": {"heads": 4}}
    assert check([report] * 3) == [None] * 3
    errors = check([report, {**report, "torch": "2.11", "dtype": "float16"}, report])
    assert len({str(e) for e in errors}) == 1
    assert isinstance(errors[0], RanksDisagree)
    assert re.search(
        r'dtype: "bfloat16" on rank 0, 2; "float16" on rank 1.*torch: "2.13" on rank 0, 2', str(errors[0])
    )
    assert "rank 1 of 2" in str(check([report, None], 0.2)[0])


def test_layouts_that_cannot_be_are_refused():
    assert check_layout(8, 4, 100, 6) == 2
    for arguments, message in (
        ((4, 3, 100, 4), "divisor of the 4 ranks"),
        ((4, 2, 100, 3), "multiple of the 2 replicas"),
        ((4, 4, 7, 1), "two tokens a rank"),
    ):
        with pytest.raises(ValueError, match=message):
            check_layout(*arguments)


def faulty(config, fault, at=5):
    """Train; rank 1 commits `fault` in step `at`, before the collectives of that step."""
    original = Parallel.backward
    calls = []

    def backward(self, *args):
        calls.append(1)
        if self.rank == 1 and len(calls) == at:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raise":
                raise RuntimeError("a fault of this rank alone")
            if fault == "sleep":
                time.sleep(300)
        share = original(self, *args)
        return math.nan if fault == "nan" and self.rank == 1 and len(calls) == at else share

    Parallel.backward = backward
    train(config)


def test_one_broken_loss_stops_all_ranks_before_the_optimizer(config, tmp_path):
    answers = ranks.run(faulty, 2, tmp_path / "ranks", config, "nan")
    assert [a["error"] for a in answers] == ["NonFiniteLoss"] * 2
    assert answers[0]["message"] == answers[1]["message"]
    assert "step 5: loss nan (of rank 1)" in answers[0]["message"]
    assert checkpoint.newest(config.output / "checkpoints")[0].name == "step-00000004"
    assert len(losses(config.output)) == 4


@pytest.mark.parametrize("fault", ["kill", "raise", "sleep"])
def test_a_rank_that_dies_or_hangs_takes_the_others_with_it_and_a_restart_goes_on(config, tmp_path, fault):
    config = dataclasses.replace(config, sequence_parallel=3, timeout=4.0 if fault == "sleep" else 20.0)
    answers = ranks.run(faulty, 3, tmp_path / "ranks", config, fault, limit=config.timeout + 10)
    for rank in (0, 2):
        assert answers[rank]["code"] == 1
        assert answers[rank]["seconds"] < config.timeout + 10
    if fault == "kill":
        assert answers[1]["killed"] == -signal.SIGKILL
    assert answers[1].get("hung", False) == (fault == "sleep")
    assert checkpoint.newest(config.output / "checkpoints")[0].name == "step-00000004"
    if fault == "kill":
        ranks.results(ranks.run(resume, 3, tmp_path / "ranks", config, 6))
        assert len(losses(config.output)) == 6


LAUNCHED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from longnet import cli
from longnet.train.parallelize import Parallel
original, calls = Parallel.backward, []
def backward(self, *args):
    calls.append(1)
    at = {"0": 5, "1": 2}.get(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if self.rank == 1 and len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)
Parallel.backward = backward
cli.main()
"""


@pytest.mark.slow
def test_torchrun_restarts_twice_and_resumes_with_the_same_losses(config, tmp_path):
    """The command line under torchrun; two kills, because the second restart is where gloo used to hang for good."""
    steady = dataclasses.replace(config, output=tmp_path / "whole", sequence_parallel=2)
    ranks.results(ranks.run(resume, 2, tmp_path / "ranks", steady, 8))
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    options = {
        "data": config.data,
        "output": config.output,
        "sequence-length": 61,
        "batch-size": 12,
        "steps": 8,
    }
    options |= {"warmup": 2, "learning-rate": 1e-2, "save-every": 2, "device": "cpu", "timeout": 60}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1", str(script), "train"]
    for name, value in {**options, "sequence-parallel": 2}.items():
        command += [f"--{name}", str(value)]
    command.append("--model")
    command += [f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in MODEL.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 8, loss") == 1  # the leader alone prints
    assert losses(config.output) == losses(tmp_path / "whole")
    assert (config.output / "model" / "model.safetensors").exists()
    assert not _alive(script)


def _alive(script):
    """Processes whose command line names the script."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(script).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found
