"""`longnet extract` as a user runs it: relations and graphs learned, whatever the text; faults named with file and line."""

import json

import networkx
import pytest

from people import documents, write

MODEL = ["--model", "hidden_size", "32", "intermediate_size", "64", "num_hidden_layers", "1", "num_attention_heads",
         "2", "segment_lengths", "[32, 128]", "dilation_rates", "[1, 4]"]  # fmt: skip


def fails(longnet, *arguments):
    """What a user reads on standard error."""
    code, _, error = longnet(*arguments)
    assert code == 2
    return error


def prints(longnet, *arguments):
    """What a user reads on standard output."""
    code, out, error = longnet(*arguments)
    assert code == 0, error
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, longnet):
    folder = tmp_path_factory.mktemp("extract")
    data = write(folder / "train.jsonl", documents(48, 0))
    out = prints(longnet, "extract", "train", "--train", data, "--output", folder / "model", *MODEL, "--epochs", 15,
                 "--patience", 15, "--batch-tokens", 1024, "--learning-rate", "1e-2")  # fmt: skip
    assert "relation F1" in out
    return folder


def test_relations_graph_and_scores(trained, longnet, tmp_path):
    gold = documents(10, 1)
    data = write(tmp_path / "b.jsonl", gold)
    prints(longnet, "extract", "predict", "--model", trained / "model", "--input", data, "--output", tmp_path / "out.jsonl",
                   "--graph", tmp_path / "out.graphml", "--merge-names")  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    right = wanted = 0
    for record, document in zip(records, gold, strict=True):
        assert record["id"] == document["id"]
        for mention in [*record["entities"], *(m for own in record["clusters"].values() for m in own)]:
            assert document["text"][mention["start"] : mention["end"]] == mention["text"]
        wanted += len(document["relations"])
        right += sum(r in document["relations"] for r in record["relations"])
        assert all({r["head"], r["tail"]} <= set(record["clusters"]) for r in record["relations"])
    assert right > 0.6 * wanted
    graph = networkx.read_graphml(tmp_path / "out.graphml", force_multigraph=True)
    assert "PER/anna weiss" in graph
    assert graph.number_of_edges() >= 4
    command = ["extract", "eval", "--model", trained / "model", "--input", data]
    printed = prints(longnet, *command, "--known", trained / "train.jsonl")
    lines = {line[:26].strip(): line for line in printed.splitlines()}
    assert {"LOC", "PER", "muc", "b cubed", "clusters", "relations", "relations of gold entities"} <= set(
        lines
    )
    assert float(lines["relations of gold entities"].split("  F1 ")[1].split()[0]) > 0.6
    assert "Ign F1" in lines["relations"]
    assert "10 documents, strict span F1" in printed


def test_a_megabyte_with_odd_characters(trained, longnet, tmp_path):
    sentence = "Anna Weiß lives in 漢口.\r\n\x00 Weiß is here. \U0001d11e "
    part = sentence + "is here. lives in \r\n" * 2000
    data = (part * (2**20 // len(part.encode()) + 1)).encode() + b"\xff"
    assert len(data) > 15 * 65536  # pieces that the reader takes
    (tmp_path / "long.txt").write_bytes(data)
    prints(longnet, "extract", "predict", "--model", trained / "model", "--input", tmp_path / "long.txt", "--output",
                   tmp_path / "out.jsonl", "--on-invalid", "keep", "--graph", tmp_path / "g.jsonld")  # fmt: skip
    text = data.decode("utf-8", "surrogateescape")
    record = json.loads((tmp_path / "out.jsonl").read_text("utf-8"))
    assert len(record["entities"]) > 10
    assert all(text[e["start"] : e["end"]] == e["text"] for e in record["entities"])
    assert max(e["end"] for e in record["entities"]) > 0.9 * len(text)
    assert len(json.loads((tmp_path / "g.jsonld").read_text())["@graph"]) == len(record["clusters"])


def test_convert_makes_what_train_reads(longnet, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_bytes(b"import os\r\nclass A:\r\n    def f(self): return self.f()\r\n")
    prints(
        longnet,
        "extract",
        "convert",
        "--format",
        "python",
        "--input",
        tmp_path / "src",
        "--output",
        tmp_path / "a.jsonl",
    )
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert record["text"].startswith("# module a\nimport os\r\n")
    assert {"head": "A", "tail": "A.f", "label": "defines"} in record["relations"]


def test_faults_are_named_before_training(longnet, tmp_path):
    good = documents(3, 0)

    def complain(change, *options):
        bad = json.loads(json.dumps(good[1]))
        change(bad)
        path = write(tmp_path / "bad.jsonl", [good[0], bad, good[2]])
        return fails(
            longnet,
            "extract",
            "train",
            "--train",
            path,
            "--output",
            tmp_path / "m",
            *MODEL,
            *options,
        )

    assert "bad.jsonl:2: expected relations between clusters" in complain(
        lambda d: d["relations"][0].update(head="Nobody")
    )
    assert "bad.jsonl:2: expected every id once; got 'd0'" in complain(lambda d: d.update(id="d0"))
    assert "bad.jsonl:2: cluster" in complain(lambda d: d["entities"].pop(0))
    assert "bad.jsonl:2: expected relations as a list, beside clusters" in complain(
        lambda d: d.pop("clusters")
    )
    assert "bad.jsonl:2: expected entities" in complain(lambda d: d["entities"][0].pop("label"))
    shifted = complain(lambda d: d.update(text=d["text"].replace("\r\n", "\n")))
    assert "bad.jsonl:2: {'start'" in shifted
    assert "at these offsets" in shifted
    assert not (tmp_path / "m").exists()


def test_labels_that_training_has_not_seen_count_as_missed(trained, longnet, tmp_path):
    odd = documents(2, 3)
    for document in odd:
        start = document["text"].index("lives")
        document["entities"].append({"start": start, "end": start + 5, "label": "VERB"})
        document["clusters"]["verb"] = [{"start": start, "end": start + 5}]
        document["relations"].append(
            {"head": "verb", "tail": next(iter(document["clusters"])), "label": "unheard"}
        )
    path = write(tmp_path / "odd.jsonl", odd)
    printed = prints(longnet, "extract", "eval", "--model", trained / "model", "--input", path)
    assert "VERB  precision 0.000  recall 0.000  F1 0.000  of 2" in printed


def test_faults_of_predict(trained, longnet, tmp_path):
    model, text = trained / "model", tmp_path / "a.txt"
    text.write_bytes(b"Anna Wei\xff lives in Oslo.")
    command = ["extract", "predict", "--model", model, "--input", text]
    assert "a.txt:1: expected UTF-8; got byte 0xff" in fails(longnet, *command)
    assert "ending in .graphml" in fails(longnet, *command, "--graph", tmp_path / "g.gml")
    error = fails(longnet, "extract", "predict", "--model", tmp_path, "--input", text)
    assert "expected a folder made by `longnet extract train`" in error
    text.write_bytes(b" \r\n")
    assert "expected a text; got an empty one" in fails(longnet, *command)
    error = fails(longnet, "extract", "convert", "--format", "python", "--input", text, "--output", "x.json")
    assert "ending in .jsonl" in error


def test_a_model_of_entities_alone_makes_no_graph(longnet, tmp_path):
    records = [{k: d[k] for k in ("id", "text", "entities")} for d in documents(4, 0)]
    data = write(tmp_path / "a.jsonl", records)
    train = [
        "extract",
        "train",
        "--train",
        data,
        "--output",
        tmp_path / "m",
        *MODEL,
        "--epochs",
        1,
    ]
    prints(longnet, *train)
    error = fails(longnet, "extract", "predict", "--model", tmp_path / "m", "--input", data, "--graph",
                  tmp_path / "g.graphml")  # fmt: skip
    assert "trained on documents with clusters" in error
