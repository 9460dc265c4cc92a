"""Entities: tags and spans there and back, offsets exact in any text, the commands as a user runs them."""

import json
import random

from longnet.tasks.extraction import decode_tags, encode_tags
from longnet.tasks.offsets import Offsets

MODEL = ["--model", "hidden_size", "32", "intermediate_size", "64", "num_hidden_layers", "1", "num_attention_heads",
         "2", "segment_lengths", "[16, 64]", "dilation_rates", "[1, 4]"]  # fmt: skip


def round_trip(text, spans):
    offsets, labels = Offsets(text), sorted({s[2] for s in spans})
    return decode_tags(offsets, encode_tags(offsets, spans, labels), labels, 1000)


def test_nested_spans_come_back():
    text = "é\r\nthe trader of the old Cölony 漢字 \udcff!"
    a, b = text.index("the trader"), text.index("Cölony")
    end = b + len("Cölony")
    spans = [(0, 1, "X"), (a, end, "PER"), (b, end, "PER"), (a, a + 10, "ORG"), (b - 8, end, "GPE"), (b, end, "GPE"),
             (end + 1, end + 3, "X"), (len(text) - 2, len(text) - 1, "X")]  # fmt: skip
    assert round_trip(text, spans) == sorted(spans)


def test_strictly_inside_one_of_its_own_label_is_the_known_limit():
    spans = [(0, 10, "A"), (2, 5, "A")]
    assert round_trip("abcdefghij", spans) == [(0, 5, "A"), (2, 5, "A"), (2, 10, "A")]
    assert round_trip("abcdefghij", [(0, 10, "A"), (2, 5, "B")]) == [(0, 10, "A"), (2, 5, "B")]


def test_flat_spans_always_come_back():
    generator = random.Random(0)
    for _ in range(50):
        text = "".join(generator.choice("aé漢𝄞\n ") for _ in range(60))
        cuts = sorted(generator.sample(range(61), 10))
        spans = [(s, e, generator.choice("XY")) for s, e in zip(cuts[::2], cuts[1::2], strict=True)]
        assert round_trip(text, spans) == sorted(spans)


def documents(count, seed):
    generator, result = random.Random(seed), []
    for i in range(count):
        text, entities = "", []
        for _ in range(generator.randint(5, 40)):
            word, label = generator.choice(
                [("Ähmed", "PER"), ("Paris", "GPE"), ("and", None), ("went\r\n", None)]
            )
            if label:
                entities.append(
                    {"start": len(text), "end": len(text) + len(word), "label": label, "text": word}
                )
            text += word + " "
        result.append({"id": f"d{i}", "text": text, "entities": entities})
    return result


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_user_trains_predicts_and_evaluates(longnet, tmp_path):
    data, other = write(tmp_path / "a.jsonl", documents(48, 0)), write(tmp_path / "b.jsonl", documents(8, 1))
    code, _, error = longnet(
        "extract", "train", "--train", data, "--output", tmp_path / "m", *MODEL, "--epochs", 8, "--batch-tokens", 1024,
        "--learning-rate", "1e-2",
    )  # fmt: skip
    assert code == 0, error
    code, out, error = longnet("extract", "predict", "--model", tmp_path / "m", "--input", other)
    assert code == 0, error
    right = 0
    for line, document in zip(out.splitlines(), documents(8, 1), strict=True):
        record = json.loads(line)
        assert record["id"] == document["id"]
        assert all(document["text"][e["start"] : e["end"]] == e["text"] for e in record["entities"])
        right += sum(e in document["entities"] for e in record["entities"])
    assert right > 0.8 * sum(len(d["entities"]) for d in documents(8, 1))
    code, out, error = longnet("extract", "eval", "--model", tmp_path / "m", "--input", other)
    assert code == 0, error
    assert float(out.split()[-1]) > 0.8

    good = {"text": "ab Paris", "entities": [], "id": "g"}
    for bad, message in [
        ({"text": "x"}, "bad.jsonl:2: expected entities"),
        ({"text": "x", "entities": 3}, "bad.jsonl:2: expected a list of entities"),
        (
            {"text": "x", "entities": [{"start": 0, "end": 2, "label": "A"}]},
            "bad.jsonl:2: expected entities {start",
        ),
        (
            {"text": "éx", "entities": [{"start": 0, "end": 2, "label": "A", "text": "é"}]},
            "count characters, not bytes",
        ),
    ]:
        path = write(tmp_path / "bad.jsonl", [good, bad])
        code, _, error = longnet("extract", "eval", "--model", tmp_path / "m", "--input", path)
        assert (code, message in error) == (2, True)
