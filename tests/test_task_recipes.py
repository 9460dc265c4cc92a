"""The task recipes: a comparison that was stopped goes on, its tables say what the runs say, and no test text is trained on."""

import gzip
import importlib
import json
import multiprocessing
import runpy
import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.usefixtures("recipes")


def load(name):
    return importlib.import_module(name)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def run(seed, score, long, **more):
    slices = {"512": {"documents": 4, "f1": long[0]}, "4096": {"documents": 2, "f1": long[1]}}
    return {"seed": seed, "f1": score, "longer_than": slices, "documents": 4, "machine": "M", **more}


def test_tables_say_what_the_runs_say(tmp_path):
    results = load("results")
    output = tmp_path / "new" / "r.json"
    for seed, whole, cut in ((0, 0.6, 0.5), (1, 0.8, 0.9)):
        results.record(output, "T", results.WHOLE, run(seed, whole, (whole, whole), bytes=None))
        results.record(output, "T", "LongNet, first 4,096 bytes", run(seed, cut, (cut, cut), bytes=4096))
    assert results.finished(output, "T", results.WHOLE, 1)
    assert not results.finished(output, "T", results.WHOLE, 2)
    text = results.report(results.load(output))
    assert f"| {results.WHOLE} | 70.0 ± 14.1 | 2 |" in text
    assert "| F1 | > 4,096 bytes (2 documents) |" in text  # all are longer than 512
    assert (
        "first 4,096 bytes, on documents longer than that: +0.0 ± 14.1; whole is better in 1 of 2 seeds"
        in text
    )
    results.record(output, "T", results.WHOLE, run(1, 0.6, (0.6, 0.6), bytes=None))
    assert f"| {results.WHOLE} | 60.0 ± 0.0 | 2 |" in results.report(results.load(output))


def test_tables_show_how_many_steps_the_time_of_each_seed_was(tmp_path):
    results = load("results")
    output = tmp_path / "r.json"
    results.record(output, "T", "counting", run(None, 0.2, (0.2, 0.2)))
    for seed, steps in ((2, 195), (0, 35)):
        results.record(output, "T", results.WHOLE, run(seed, 0.5, (0.5, 0.5), bytes=None, steps=steps))
    text = results.report(results.load(output))
    assert "| model | F1 | steps, seed by seed | seeds |\n|---|---|---|---|\n" in text
    assert "| counting | 20.0 |  | 1 |" in text
    assert f"| {results.WHOLE} | 50.0 ± 0.0 | 35, 195 | 2 |" in text


def _record_many(output, seed):
    for row in range(25):
        load("results").record(output, "T", f"row {row}", run(seed, 0.5, (0.5, 0.5)))


def test_processes_side_by_side_lose_no_run_of_the_file_they_share(tmp_path):
    output, context = tmp_path / "r.json", multiprocessing.get_context("fork")
    processes = [context.Process(target=_record_many, args=(output, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = load("results").load(output)["T"]
    assert len(rows) == 25
    assert all(sorted(r["seed"] for r in runs) == [0, 1, 2, 3] for runs in rows.values())


def test_slices_hold_the_documents_longer_than_their_border():
    texts = ["x" * 512, "é" * 300, "x" * 5000]
    found = load("results").by_length(texts, lambda own: {"first": own[0]})
    assert found == {"512": {"documents": 2, "first": 1}, "4096": {"documents": 1, "first": 2}}


def test_a_comparison_that_was_stopped_goes_on(tmp_path):
    runs = load("runs")
    args = SimpleNamespace(
        output=tmp_path / "r.json", rows=["whole", "512", "scratch"], seeds=[0, 1], minutes=2.0,
        pretrained=None, device="cpu",
    )  # fmt: skip
    calls, lives = [], [2, 99]

    def train(row, seed, minutes):
        if lives[0] == 0:
            raise KeyboardInterrupt
        lives[0] -= 1
        calls.append((row.name, seed, minutes))
        return run(seed, 0.5, (0.5, 0.5))

    with pytest.raises(KeyboardInterrupt):
        runs.run_rows("T", 4, args, train)
    del lives[0]
    runs.run_rows("T", 4, args, train)
    whole, short = runs.ROWS["whole"].name, runs.ROWS["512"].name
    # Nothing is pre-trained, so that "no pre-training" would be the same model again.
    assert calls == [(whole, 0, 2.0), (short, 0, 0.5), (whole, 1, 2.0), (short, 1, 0.5)]


def test_excerpts_of_the_parts_do_not_overlap():
    books = load("classify_books")
    text = "".join(f"{i:06d} " for i in range(40_000))
    novels = [{"id": "a", "text": text}]
    seen = {}
    for part in books.PARTS:
        split = books.excerpts(novels, part, (1_000, 16_000))
        begins = [text.index(excerpt) for excerpt in split.texts]
        seen[part] = (
            min(begins),
            max(b + len(t) for b, t in zip(begins, split.texts, strict=True)),
            split.texts,
        )
    assert seen["train"][1] <= seen["validation"][0] < seen["validation"][1] <= seen["test"][0]
    assert 0.7 * len(text) <= sum(map(len, seen["train"][2])) <= 0.7 * len(text) + 16_000
    assert len(seen["test"][2]) == 6  # one novel only: twice as many


def test_pre_training_reads_nothing_that_is_tested(tmp_path):
    sets = {"peps": ("p", "q", "r"), "books": ("n", "m", "q"), "names": ("m", "n", "s")}
    for folder, (train, validation, test) in sets.items():
        for part, name in (("train", train), ("validation", validation), ("test", test)):
            write(tmp_path / folder / f"{part}.jsonl.gz", [{"id": name, "text": f"{folder}{name}" * 10}])
    found = list(load("pretrain").texts([tmp_path / "peps", tmp_path / "names"], tmp_path / "books", False))
    assert found == ["pepsp" * 10]  # n and m are in the validation or test split of the other set


def test_a_novel_is_read_up_to_where_its_validation_excerpts_begin(tmp_path):
    for part in ("train", "validation", "test"):
        write(tmp_path / f"{part}.jsonl.gz", [{"id": part, "text": "x" * 70 + "y" * 30}])
    assert list(load("pretrain").texts([], tmp_path, False)) == ["x" * 70]


def test_peps_end_to_end(recipes, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    words = {"Process": "rules and votes. ", "Standards Track": "syntax and types. "}
    for part in ("train", "validation", "test"):
        records = [
            {"id": f"{part}{i}{kind}", "text": text * (40 * i + 2), "type": kind, "status": "Final"}
            for i in range(3)
            for kind, text in words.items()
        ]
        write(tmp_path / f"{part}.jsonl.gz", records)
    output = tmp_path / "r.json"
    options = ["--data", tmp_path, "--output", output, "--reduced", "--minutes", 0.02, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(x) for x in ("classify_peps.py", *options, "--rows", "512", "--seeds", 3)])  # fmt: skip
    runpy.run_path(str(recipes / "classify_peps.py"), run_name="__main__")
    rows = json.loads(output.read_text())["PEP type"]
    assert rows["TF-IDF + logistic regression"][0]["accuracy"] == 1.0
    assert rows["most frequent label"][0]["accuracy"] == 0.5
    (trained,) = rows["LongNet, first 512 bytes"]
    assert (trained["seed"], trained["bytes"], trained["pretrained"]) == (3, 512, False)
    assert trained["longer_than"]["512"]["documents"] == 4
    runpy.run_path(str(recipes / "classify_peps.py"), run_name="__main__")
    assert "0 trainings to do" in capsys.readouterr().out
