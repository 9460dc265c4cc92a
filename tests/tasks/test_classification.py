"""Classification as a user runs it, on documents made here; bad input ends in one line and exit code 2."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.tasks.classification import (
    ClassifyConfig,
    DocumentClassifier,
    fit_classifier,
    important_passages,
)
from longnet.tasks.fit import FitConfig, NonFiniteTaskLoss, fit, length_batches
from longnet.tasks.offsets import Offsets

MODEL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "segment_lengths": [16, 64], "dilation_rates": [1, 4]}  # fmt: skip
OPTIONS = ["--model", *[str(x) for pair in MODEL.items() for x in pair]]
KINDS = {"fruit": "apple", "animal": "tiger", "mineral": "stone"}


def make(count, seed=0):
    generator, documents = random.Random(seed), []
    for i in range(count):
        label = list(KINDS)[i % 3]
        words = [generator.choice(["lorem", "ipsum", "dölor"]) for _ in range(generator.randint(3, 30))]
        for _ in range(3):
            words.insert(generator.randrange(len(words)), KINDS[label])
        documents.append({"id": f"d{i}", "text": " ".join(words), "label": label})
    return documents


def write(path, documents):
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, longnet):
    folder = tmp_path_factory.mktemp("classify")
    causal = LongNetForCausalLM(LongNetConfig(**MODEL))
    causal.save_pretrained(folder / "causal")
    data = write(folder / "train.jsonl", make(60))
    code, out, error = longnet(
        "classify", "train", "--train", data, "--output", folder / "model", "--pretrained", folder / "causal",
        "--epochs", 5, "--batch-tokens", 1024, "--learning-rate", "1e-2", "--class-weights", "balanced",
    )  # fmt: skip
    assert code == 0, error
    assert "macro F1" in out
    return folder


def test_a_user_trains_predicts_and_evaluates(trained, longnet, tmp_path):
    data = write(tmp_path / "test.jsonl", make(12, seed=5))
    code, out, error = longnet("classify", "predict", "--model", trained / "model", "--input", data)
    assert code == 0, error
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in lines] == [f"d{i}" for i in range(12)]
    for line, document in zip(lines, make(12, seed=5), strict=True):
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert not line["truncated"]
        for passage in line["passages"]:
            assert document["text"][passage["start"] : passage["end"]] == passage["text"]
    code, out, error = longnet(
        "classify", "eval", "--model", trained / "model", "--input", data, "--report", tmp_path / "r.json",
        "--confusion", tmp_path / "c.png",
    )  # fmt: skip
    assert code == 0, error
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["accuracy"] > 0.6
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(trained, longnet, tmp_path):
    cases = [
        (
            {"text": "a", "label": "fruit", "id": "x"},
            {"text": "b", "id": "y"},
            r"bad.jsonl:2: expected label",
        ),
        (
            {"text": "a", "label": "fruit", "id": "x"},
            {"text": "b", "label": "car"},
            "bad.jsonl:2: expected labels among",
        ),
        (
            {"text": "a", "label": "fruit", "id": "x"},
            {"text": "", "label": "fruit"},
            "bad.jsonl:2: expected a text",
        ),
    ]
    for first, second, message in cases:
        data = write(tmp_path / "bad.jsonl", [first, second])
        arguments = ("classify", "eval", "--model", trained / "model", "--input", data)
        code, _, error = longnet(*arguments)
        assert (code, message in error) == (2, True)
    arguments = ("classify", "predict", "--model", tmp_path, "--input", data)
    code, _, error = longnet(*arguments)
    assert (code, "made by `longnet classify train`" in error) == (2, True)
    arguments = ("classify", "train", "--train", data, "--output", trained / "model")
    code, _, error = longnet(*arguments)
    assert (code, "expected a new or empty folder" in error) == (2, True)


def test_a_document_of_a_megabyte_is_read_whole(trained):
    classifier = DocumentClassifier.load(trained / "model", "cpu")
    assert 15 * classifier.model.piece < 2**20
    text = "lorem ipsum\r\n" * (2**20 // 13)
    (prediction,) = classifier.predict([text], passages=1)
    assert not prediction.truncated
    (passage,) = prediction.passages
    assert text[passage["start"] : passage["end"]] == passage["text"]


def test_a_prediction_does_not_depend_on_the_batch(trained):
    classifier = DocumentClassifier.load(trained / "model", "cpu")
    ids = [classifier.ids(d["text"]) for d in make(9, seed=3)]
    together, alone = classifier.logits(ids), torch.cat([classifier.logits([row]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_truncation_is_said(trained):
    classifier = DocumentClassifier.load(trained / "model", "cpu")
    classifier.max_bytes = 10
    long, short = classifier.predict(["apple apple apple", "apple"])
    assert (long.truncated, short.truncated) == (True, False)
    assert long.passages[0]["end"] == 10


def test_multi_label_learns_both(tmp_path):
    texts = [" ".join(x for x, y in zip(("apple", "tiger"), bits, strict=True) if y) + " lorem" for bits in
             [(i % 2, i // 2 % 2) for i in range(32)]]  # fmt: skip
    gold = [[x for x in ("apple", "tiger") if x in text] for text in texts]
    config = ClassifyConfig(
        train=tmp_path, output=tmp_path, multi_label=True, model=MODEL, epochs=25, patience=25, dropout=0.0,
        learning_rate=1e-2, batch_tokens=128, device="cpu",
    )  # fmt: skip
    _, _, report = fit_classifier(config, ["apple", "tiger"], texts, gold, texts, gold)
    assert report["accuracy"] > 0.9


def test_passages_partition_the_text():
    text = "".join(random.Random(0).choice(["é", "漢", "word ", "\r\n", "\udcff"]) for _ in range(900))
    offsets = Offsets(text)
    weights = np.random.default_rng(0).dirichlet(np.ones(len(offsets)))
    passages = important_passages(offsets, weights, 10**6)
    ordered = sorted(passages, key=lambda p: p["start"])
    assert "".join(p["text"] for p in ordered) == text
    assert sum(p["weight"] for p in passages) == pytest.approx(1)
    for passage in passages:
        first, last = offsets.bytes(passage["start"], passage["end"])
        assert passage["weight"] == pytest.approx(weights[first:last].sum())


def test_batches_hold_every_document_once_within_the_budget():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 900, 200).tolist()
    for order in (None, generator):
        batches = length_batches(lengths, 1000, order)
        assert sorted(i for batch in batches for i in batch) == list(range(200))
        assert all(max(lengths[i] for i in b) * len(b) <= 1000 or len(b) == 1 for b in batches)


def test_fit_keeps_the_best_weights_and_stops_before_nan():
    model = torch.nn.Linear(1, 1)
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    seen = []

    def validate():
        seen.append(model.weight.item())
        return next(scores)

    config = FitConfig(epochs=5, patience=2, device="cpu")
    summary = fit(model, config, lambda g: [0], lambda b: model(torch.ones(1, 1)).sum(), validate)
    assert (summary.best_epoch, summary.epochs, summary.stopped) == (2, 4, "patience")
    assert model.weight.item() == seen[1]
    with pytest.raises(NonFiniteTaskLoss, match="step 1"):
        fit(model, config, lambda g: [0], lambda b: model(torch.ones(1, 1)).sum() * torch.nan, validate)
    assert model.weight.item() == seen[1]


def test_a_folder_without_all_weights_is_refused(trained, tmp_path):
    """transformers fills what is missing with random numbers."""
    shutil.copytree(trained / "model", tmp_path / "model")
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(
        {name: x for name, x in tensors.items() if "norm" not in name}, weights, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="missing_keys"):
        DocumentClassifier.load(tmp_path / "model", "cpu")
