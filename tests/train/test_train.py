"""Training as a user relies on it: losses fall, a stopped run continues bit for bit, damage is noticed."""

import dataclasses
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time

import pytest
import torch

import ranks
from longnet import text
from longnet.train import NonFiniteLoss, TrainConfig, checkpoint, train
from longnet.train.data import TokenDataset, WindowSampler, prepare
from longnet.train.trainer import _Run

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "segment_lengths": [8, 32], "dilation_rates": [1, 4]}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    prepare([tmp_path / "a.txt"], tmp_path / "data")
    return TrainConfig(
        data=tmp_path / "data", output=tmp_path / "run", model=MODEL, sequence_length=64, batch_size=2, steps=12,
        warmup=2, learning_rate=1e-2, save_every=2, device="cpu",
    )  # fmt: skip


def losses(path):
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_loss_falls_and_a_killed_run_continues_bit_for_bit(config, tmp_path):
    summary = train(config)
    whole = losses(tmp_path / "run")
    assert summary.finished
    assert whole[-1] < whole[0] - 1
    (tmp_path / "run").rename(tmp_path / "whole")

    class Killed(Exception):
        pass

    for kill_at in (1, 3, 4, 9):

        def die(event, kill_at=kill_at):
            if event["step"] == kill_at:
                raise Killed

        with pytest.raises(Killed):
            train(config, die)
    assert train(config).resumed_from == 8
    assert losses(tmp_path / "run") == whole


def test_a_signal_saves_and_returns(config):
    summary = train(config, lambda e: os.kill(os.getpid(), signal.SIGTERM) if e["step"] == 5 else None)
    assert (summary.step, summary.finished) == (5, False)
    assert checkpoint.newest(config.output / "checkpoints")[0].name == "step-00000005"


def test_a_loss_that_is_no_number_stops_before_the_optimizer(config):
    class Stop(Exception):
        pass

    def stop(event):
        if event["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(config, stop)
    run = _Run(config)
    assert run.step == 4
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0] = torch.nan
        run.model.model.embed_tokens.weight.fill_(torch.nan)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(NonFiniteLoss, match="step 5"):
        run.advance()
    for old, new in zip(before, run.model.parameters(), strict=True):
        assert torch.equal(old.view(torch.int32), new.detach().view(torch.int32))
    assert checkpoint.newest(config.output / "checkpoints")[0].name == "step-00000004"


def forked(function):
    """The process id of a copy of this process that calls `function` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def kill_thirty_times(config, root):
    """(kills inside a save, checkpoints that were reached)."""
    del os.environ["WORLD_SIZE"]
    started = time.perf_counter()
    assert os.waitpid(forked(lambda: train(dataclasses.replace(config, output=root / "whole"))), 0)[1] == 0
    whole = time.perf_counter() - started
    folder = config.output / "checkpoints"
    generator, inside, reached = random.Random(0), 0, set()
    for kill in range(30):
        pid, stale = forked(lambda: train(config)), set(folder.glob("tmp.*"))
        if kill % 2:
            while not set(folder.glob("tmp.*")) - stale and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.003))
        else:
            # Together at most three quarters of the run, so that it does not end first where the machine becomes faster.
            time.sleep(generator.uniform(0, whole / 20))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the run ended before it was killed"
        inside += bool(set(folder.glob("tmp.*")) - stale)
        reached |= {p.name for p in folder.glob("step-*")}
    assert os.waitpid(forked(lambda: train(config)), 0)[1] == 0
    return inside, len(reached)


def test_a_run_killed_thirty_times_ends_as_if_it_never_was(config, tmp_path):
    """Every other kill falls uniformly in wall time, the rest just after a save began; nobody repairs anything in between."""
    config = dataclasses.replace(config, output=tmp_path / "killed", steps=120)
    answers = ranks.run(kill_thirty_times, 1, tmp_path / "ranks", config, tmp_path, limit=280)
    ((inside, reached),) = ranks.results(answers)
    print(f"30 kills, {inside} of them inside a save, checkpoints reached: {reached}")
    assert inside >= 5
    assert reached >= 5
    records = []
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        machine = ("tokens_per_second", "memory_bytes")
        records.append([{k: v for k, v in line.items() if k not in machine} for line in lines])
    assert len(records[0]) == 120
    assert records[0] == records[1]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_run_stopped_by_any_signal_twice_continues_bit_for_bit(config, tmp_path, number):
    train(dataclasses.replace(config, output=tmp_path / "whole"))

    def twice(event):
        if event["step"] == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    assert train(config, twice).step == 5
    assert train(config).resumed_from == 5
    assert losses(config.output) == losses(tmp_path / "whole")


def test_another_configuration_is_refused(config):
    train(dataclasses.replace(config, steps=2))
    with pytest.raises(ValueError, match="batch_size: checkpoint 2, now 3"):
        train(dataclasses.replace(config, batch_size=3, steps=2))


def test_every_flipped_bit_is_noticed_and_the_older_checkpoint_is_found(tmp_path):
    tensors = {"weights": {"w": torch.randn(20)}}
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, tensors, {"step": step})
    generator = random.Random(0)
    for _ in range(300):
        file = generator.choice(sorted(path.iterdir()))
        data = file.read_bytes()
        place = generator.randrange(len(data))
        file.write_bytes(
            data[:place] + bytes([data[place] ^ (1 << generator.randrange(8))]) + data[place + 1 :]
        )
        with pytest.raises(checkpoint.CheckpointCorrupt) as error:
            checkpoint.load(path)
        message = str(error.value)
        assert message.startswith(str(file))
        assert "expected" in message
        assert file.name == "manifest.json" or hashlib.sha256(data).hexdigest() in message
        file.write_bytes(data)
    file.write_bytes(data[:-1])
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    assert len(skipped) == 1


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"w": {"w": torch.randn(2)}}, {})
    file = path / "manifest.json"
    data = file.read_bytes()
    for bit in range(len(data) * 8):
        file.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :])
        with pytest.raises(checkpoint.CheckpointCorrupt):
            checkpoint.verify(path)


def test_a_shard_of_another_step_is_refused(tmp_path):
    first = checkpoint.save(tmp_path, 1, {"w": {"w": torch.zeros(2)}}, {})
    second = checkpoint.save(tmp_path, 2, {"w": {"w": torch.ones(2)}}, {})
    (second / "w.safetensors").write_bytes((first / "w.safetensors").read_bytes())
    with pytest.raises(checkpoint.CheckpointCorrupt, match=r"w\.safetensors"):
        checkpoint.load(second)


def save_step(root, step, keep=2):
    return checkpoint.save(root, step, {"w": {"w": torch.full((2,), float(step))}}, {"step": step}, keep)


def test_pruning_never_takes_the_checkpoint_just_written(tmp_path):
    for step in (800, 1000):
        save_step(tmp_path, step)
    path = save_step(tmp_path, 200)
    assert checkpoint.load(path)[1] == {"step": 200}


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    damaged = save_step(tmp_path, 4)
    (damaged / "state.json").write_text("{}")
    save_step(tmp_path, 2, keep=1)
    assert checkpoint.newest(tmp_path)[0].name == "step-00000002"


@pytest.mark.parametrize("failing", [1, 2])
def test_saving_a_step_again_never_leaves_it_missing(tmp_path, monkeypatch, failing):
    save_step(tmp_path, 3, keep=1)
    rename, calls = os.rename, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise KeyboardInterrupt
        rename(*arguments)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_step(tmp_path, 3, keep=1)
    monkeypatch.undo()
    path, _ = checkpoint.newest(tmp_path)
    assert path is not None
    assert checkpoint.load(path)[1] == {"step": 3}
    save_step(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_partial(tmp_path):
    save_step(tmp_path, 1)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        with pytest.raises(checkpoint.CheckpointWriteError, match=r"step-00000002 \(40000 bytes"):
            checkpoint.save(tmp_path, 2, {"w": {"w": torch.zeros(10000)}}, {})

    assert os.waitpid(forked(save), 0)[1] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    save_step(tmp_path, 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(checkpoint.CheckpointWriteError, match=r"file.*step-00000001.*bytes of tensors"):
        save_step(tmp_path / "file", 1)
    assert (tmp_path / "file").read_text() == "no folder"


def test_only_damaged_checkpoints_stop_a_run_rather_than_restart_it(config):
    import shutil

    train(dataclasses.replace(config, steps=4))
    metrics = (config.output / "metrics.jsonl").read_text()
    for path in (config.output / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="only damaged"):
        train(dataclasses.replace(config, steps=4))
    assert (config.output / "metrics.jsonl").read_text() == metrics
    shutil.rmtree(config.output)


def test_a_fresh_run_in_a_used_folder_is_refused(config):
    train(dataclasses.replace(config, steps=2))
    with pytest.raises(ValueError, match="resume"):
        train(dataclasses.replace(config, steps=2, resume="never"))


def test_resume_refuses_other_text_of_the_same_length(config, tmp_path):
    import shutil

    train(config, lambda e: os.kill(os.getpid(), signal.SIGTERM) if e["step"] == 3 else None)
    (tmp_path / "a.txt").write_text("the quick brown cat jumps over the lazy dog. " * 200)
    shutil.rmtree(config.data)
    prepare([tmp_path / "a.txt"], config.data)
    with pytest.raises(ValueError, match="sources"):
        train(config)


@pytest.mark.parametrize("meta", ["[]", '{"format": 1}', '{"format": 1, "tokens": 0}'])
def test_a_damaged_data_folder_is_refused(config, meta):
    (config.data / "meta.json").write_text(meta)
    with pytest.raises(ValueError, match="prepare"):
        TokenDataset(config.data)


def test_an_empty_held_out_split_is_refused(config):
    with pytest.raises(ValueError, match="document"):
        TokenDataset(config.data).split("validation")


def test_an_epoch_shows_every_window_once_and_resumes(config):
    dataset = TokenDataset(config.data)
    sampler = WindowSampler(dataset, 64, 1, seed=3)
    first = [sampler.next_batch() for _ in range(sampler.per_epoch)]
    tokens, phase = dataset.split("train"), sampler._phase
    expected = [
        tuple(tokens[phase + i * 64 : phase + (i + 1) * 64].tolist()) for i in range(sampler.per_epoch)
    ]
    assert sorted(tuple(b[0].tolist()) for b in first) == sorted(expected)
    state, following = sampler.state_dict(), sampler.next_batch()
    again = WindowSampler(dataset, 64, 1, seed=3)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert torch.equal(again.next_batch(), following)
    with pytest.raises(ValueError, match="seed"):
        WindowSampler(dataset, 64, 1, seed=4).load_state_dict(state)


def test_bad_input_is_reported_with_file_and_offset(tmp_path):
    files = {"a.txt": b"good", "b.txt": b"", "c.txt": b"ab\0c", "d.txt": b"abc\xff", "e.gz": b"\x1f\x8b\x08trunc",
             "f.jsonl": b'{"text": "fine"}\n{"no": 1}\n'}  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    report = prepare([tmp_path], tmp_path / "out")
    assert (report.documents, len(report.bad)) == (2, 5)
    joined = "\n".join(report.bad)
    for part in ("b.txt: empty", "offset 2", "0xff at offset 3", "e.gz: unreadable", "f.jsonl:2"):
        assert part in joined
    with pytest.raises(ValueError, match="empty"):
        prepare([tmp_path], tmp_path / "again", on_bad="fail")
    assert not (tmp_path / "again").exists()


def test_text_round_trips_even_where_it_is_no_text():
    assert text.decode(text.encode("naïve ∑")) == "naïve ∑"
    assert text.decode_bytes(text.encode(bytes(range(256)))) == bytes(range(256))
    decoder = text.StreamDecoder()
    assert "".join(decoder.feed([i]) for i in text.encode("é∑").tolist()) == "é∑"
