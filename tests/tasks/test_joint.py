"""Entities where most mentions belong to none: how salient one must be is chosen on validation."""

import pytest
import torch

import longnet.tasks.knowledge as room
from longnet.tasks.annotations import Annotation
from longnet.tasks.extraction import ExtractConfig
from longnet.tasks.joint import _new_extractor, choose_salience, judge, prepare
from longnet.tasks.knowledge import KnowledgeExtractor

MODEL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "segment_lengths": [16, 64], "dilation_rates": [1, 4],
}  # fmt: skip
TEXT = "Ann saw Bob. Ann left. Some dog ran. A cat sat. One cow ate."


def annotation():
    """Ann's two mentions are an entity; nobody else is one."""
    spans = [(0, 3, "X"), (8, 11, "X"), (13, 16, "X"), (28, 31, "X"), (39, 42, "X"), (52, 55, "X")]
    return Annotation(spans, {"Ann": [0, 2]})


@pytest.fixture
def extractor_and_judged(tmp_path):
    config = ExtractConfig(train=tmp_path, output=tmp_path / "out", model=MODEL, device="cpu")
    prepared = prepare([TEXT], [annotation()], [TEXT], [annotation()])
    return _new_extractor(config, prepared), prepared.judged


def unsure(extractor):
    """A model that finds every mention a little salient and joins all that it compares."""
    head = extractor.model.knowledge
    with torch.no_grad():
        for layer, bias in ((head.salience, -1.7), (head.link, 2.0)):  # sigmoid(-1.7) = 0.154
            layer.weight.zero_()
            layer.bias.fill_(bias)
    extractor.model.eval()


def test_salience_of_an_unsure_model_is_calibrated(extractor_and_judged, tmp_path):
    extractor, judged = extractor_and_judged
    unsure(extractor)
    with torch.no_grad():
        report = judge(extractor, judged, 1024)
    assert report["b_cubed"] > 0
    assert extractor.salience == 0.15
    extractor.save(tmp_path / "saved")
    assert KnowledgeExtractor.load(tmp_path / "saved", "cpu").salience == 0.15


def test_salience_is_chosen_by_mentions_that_the_model_finds(extractor_and_judged, monkeypatch):
    extractor, judged = extractor_and_judged
    unsure(extractor)
    extractor.threshold = 0.0  # the states of all bytes are kept
    monkeypatch.setattr(room, "decode_tags", lambda *_: annotation().spans)
    report = choose_salience(extractor, judged, 1024)
    assert report["salience"] == 0.15
    # Ann's two mentions in an entity of all six: precision 2 / 6 x 2 / 6, recall 1.
    assert report["b_cubed_end_to_end"] == pytest.approx(2 * (1 / 9) / (1 / 9 + 1))
    monkeypatch.setattr(room, "decode_tags", lambda *_: [])
    assert choose_salience(extractor, judged, 1024) == {"b_cubed_end_to_end": 0.0, "salience": 0.5}
