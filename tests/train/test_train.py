"""Training as a user relies on it: losses fall, a stopped run continues bit for bit, damage is noticed."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

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
    run = _Run(config)
    with torch.no_grad():
        next(run.model.parameters()).fill_(torch.nan)
    before = [p.clone() for p in run.model.parameters()]
    with pytest.raises(NonFiniteLoss, match="step 1"):
        run.advance()
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(before, run.model.parameters(), strict=True)
    )


def test_another_configuration_is_refused(config):
    import dataclasses

    train(dataclasses.replace(config, steps=2))
    with pytest.raises(ValueError, match="batch_size: checkpoint 2, now 3"):
        train(dataclasses.replace(config, batch_size=3, steps=2))


def test_every_flipped_bit_is_noticed_and_the_older_checkpoint_is_found(tmp_path):
    tensors = {"weights": {"w": torch.randn(20)}}
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, tensors, {"step": step})
    generator = random.Random(0)
    for _ in range(300):
        file = generator.choice([p for p in sorted(path.iterdir()) if p.name != "manifest.json"])
        data = file.read_bytes()
        place = generator.randrange(len(data))
        file.write_bytes(
            data[:place] + bytes([data[place] ^ (1 << generator.randrange(8))]) + data[place + 1 :]
        )
        with pytest.raises(checkpoint.CheckpointCorrupt, match=file.name):
            checkpoint.load(path)
        file.write_bytes(data)
    file.write_bytes(data[:-1])
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    assert len(skipped) == 1


def test_an_epoch_shows_every_window_once_and_resumes(config):
    dataset = TokenDataset(config.data)
    sampler = WindowSampler(dataset, 64, 1, seed=3)
    first = [sampler.next_batch() for _ in range(sampler.per_epoch)]
    assert len({tuple(b[0].tolist()) for b in first}) <= sampler.per_epoch
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


def test_commands_work_together_and_refuse_clearly(config, tmp_path):
    train(config)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "longnet", *arguments], capture_output=True, text=True, timeout=200
        )

    model = str(tmp_path / "run" / "model")
    result = run(
        "eval", "--model", model, "--file", str(tmp_path / "a.txt"), "--chunk", "100", "--max-bytes", "900"
    )
    assert "899 tokens" in result.stdout, result.stderr
    result = run(
        "generate", "--model", model, "--prompt", "the quick", "--max-new-tokens", "5", "--seed", "1"
    )
    assert result.returncode == 0, result.stderr
    result = run("generate", "--model", str(tmp_path), "--prompt", "x")
    assert result.returncode == 2
    assert "config.json" in result.stderr
