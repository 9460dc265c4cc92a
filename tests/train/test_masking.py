"""Masked spans, and the training that uses them."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForMaskedLM

from longnet.text import EOS, MASK
from longnet.train import TrainConfig, train
from longnet.train.data import prepare
from longnet.train.masking import mask_spans

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "segment_lengths": [16, 64], "dilation_rates": [1, 4]}  # fmt: skip


def test_spans_have_the_wanted_share_and_length():
    ids = torch.randint(4, 260, (4, 50_000))
    ids[:, ::100] = EOS
    masked, labels = mask_spans(ids, (1, 2))
    hidden = masked == MASK
    assert torch.equal(torch.where(hidden, labels, masked), ids)
    assert torch.equal(hidden, labels != -100)
    assert (masked[:, ::100] == EOS).all()
    assert 0.18 < hidden.double().mean() < 0.22
    runs = (hidden[:, 1:] & ~hidden[:, :-1]).sum()
    assert 6 < hidden.sum() / runs < 12
    again, other = mask_spans(ids, (1, 2))[0], mask_spans(ids, (1, 3))[0]
    assert torch.equal(masked, again)
    assert not torch.equal(masked, other)


def test_mlm_training_falls_resumes_bit_for_bit_and_loads(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    prepare([tmp_path / "a.txt"], tmp_path / "data")
    config = TrainConfig(
        data=tmp_path / "data", output=tmp_path / "run", model=MODEL, sequence_length=64, batch_size=4, steps=60,
        warmup=2, learning_rate=1e-2, save_every=20, device="cpu", objective="mlm",
    )  # fmt: skip
    train(config)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0] - 1.5

    class Killed(Exception):
        pass

    def die(event):
        if event["step"] == 33:
            raise Killed

    killed = dataclasses.replace(config, output=tmp_path / "killed")
    with pytest.raises(Killed):
        train(killed, die)
    assert train(killed).resumed_from == 20
    again = [
        json.loads(line)["loss"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert again == losses
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.bidirectional
    with pytest.raises(ValueError, match="eval_every and sample_every"):
        train(dataclasses.replace(config, output=tmp_path / "other", eval_every=5))
