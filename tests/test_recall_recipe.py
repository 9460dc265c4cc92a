"""The recall experiment: its texts can be answered, its models are comparable, and a stopped grid goes on."""

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import longnet
from longnet.attention import hierarchical

LENGTHS = (128, 256, 1024)


pytestmark = pytest.mark.usefixtures("recipes")


def load(name):
    return importlib.import_module(name)


def solve_pairs(ids, place):
    """The value that follows the key anywhere before."""
    tasks, key = load("recall_tasks"), int(ids[place])
    found = [i for i in range(place) if ids[i] == key and tasks.VALUES <= ids[i + 1] < tasks.KEYS]
    return int(ids[found[0] + 1])


def solve_passkey(ids, place):
    tasks = load("recall_tasks")
    begin = max(i for i in range(place + 1) if ids[i] >= tasks.KEYS)
    first = int((ids == ids[begin]).nonzero()[0])
    return int(ids[first + 1 + place - begin])


def solve_copy(ids, place):
    tasks = load("recall_tasks")
    ask = int((ids == tasks.ASK).nonzero()[0])
    mark = int((ids == tasks.MARK).nonzero()[0])
    items = [int(x) for x in ids[mark + 1 : ask] if x >= tasks.VALUES]
    assert len(items) == len(set(items)) == tasks.ITEMS
    return items[place - ask]


SOLVERS = {"recall": solve_pairs, "haystack": solve_pairs, "passkey": solve_passkey, "copy": solve_copy}


@pytest.mark.parametrize("task", SOLVERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_rule_that_reads_only_the_past_answers_every_question(task, length):
    batch = load("recall_tasks").TASKS[task](2, length, torch.Generator().manual_seed(length))
    assert batch.ids.shape == (2, length)
    assert batch.places.shape == batch.answers.shape
    for ids, places, answers in zip(*batch, strict=True):
        assert len(set(places.tolist())) == len(places)
        got = [SOLVERS[task](ids[: place + 1] if task != "copy" else ids, place) for place in places.tolist()]
        assert got == answers.tolist()


def test_the_needles_of_a_haystack_grow_and_those_of_recall_do_not():
    tasks = load("recall_tasks")
    for task, pairs in (("recall", (8, 32, 32)), ("haystack", (8, 64, 256))):
        for length, expected in zip((128, 1024, 4096), pairs, strict=True):
            ids = tasks.TASKS[task](1, length, torch.Generator().manual_seed(0)).ids[0, : length // 2]
            assert int((ids >= tasks.KEYS).sum()) == expected


def test_all_models_have_the_same_parameters_and_begin_alike():
    recall, variants = load("recall"), load("variants")
    first = None
    for variant in recall.variants().values():
        model = variants.build(variant, 0, **recall.SIZE)
        weights = {n: p for n, p in model.state_dict().items() if not n.endswith("level_bias")}
        first = first or weights
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[n], first[n]) for n in weights)
        assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()


def seen_from_the_end(name, length=256):
    """Which first-layer inputs the last token's attention depends on: (length,) bool."""
    recall, variants = load("recall"), load("variants")
    from longnet.model.layers import rotary_angles

    model = variants.build(recall.variants()[name], 0, **recall.SIZE)
    layer = model.model.layers[0].attention
    torch.nn.init.zeros_(layer.key_conv)  # it reaches three tokens farther
    hidden = torch.randn(
        1, length, recall.SIZE["hidden_size"], generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    rotary = rotary_angles(torch.arange(length)[None], 64, 10_000.0)
    layer(hidden, rotary)[0, -1].sum().backward()
    return hidden.grad[0].abs().amax(1) > 0


def test_what_each_variant_sees():
    window = torch.arange(256) >= 256 - 32
    assert torch.equal(seen_from_the_end("local"), window)
    assert seen_from_the_end("dense").all()
    assert seen_from_the_end("dense, no angles").all()
    assert seen_from_the_end("summaries").all()
    assert seen_from_the_end("opened-4").all()
    dilated = seen_from_the_end("dilated")
    assert dilated[-64:].all()
    assert 0 < dilated[:-64].sum() < 192


def test_only_angles_tell_a_dense_model_where_a_key_lies():
    """The layer's norms and convolution are in use, and `turned` is what differs."""
    recall, variants = load("recall"), load("variants")
    models = [
        variants.build(recall.variants()[name], 3, **recall.SIZE) for name in ("dense", "dense, no angles")
    ]
    ids = torch.randint(4, 60, (1, 40), generator=torch.Generator().manual_seed(2))
    swapped = ids[:, [*range(10, 20), *range(10), *range(20, 40)]]
    for model, same in zip(models, (False, True), strict=True):
        layer = model.model.layers[0].attention
        from longnet.model.layers import rotary_angles

        torch.nn.init.zeros_(layer.key_conv)
        rotary = rotary_angles(torch.arange(40)[None], 64, 10_000.0)
        embedded = [model.model.embed_tokens(x) for x in (ids, swapped)]
        a, b = (layer(x, rotary)[0, -1] for x in embedded)
        assert torch.allclose(a, b, atol=1e-6) == same
        with torch.no_grad():
            layer.key_conv.fill_(0.3)
        assert not torch.allclose(layer(embedded[0], rotary)[0, -1], a, atol=1e-4)


def test_dense_models_attend_as_one_segment_of_everything_does():
    """They are computed by another kernel, forward and backward."""
    recall, variants = load("recall"), load("variants")
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(2, 50, heads, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    pattern = recall.variants()["dense"].dilated
    results = []
    for out in (variants.dense_attention(q, k, v), longnet.dilated_attention(q, k, v, pattern).out):
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert recall.variants()["dense"].path("cpu", 4, 64, 256) == "torch's attention"
    assert recall.variants()["dilated"].path("cpu", 4, 64, 256) == "strided"


def test_the_kernels_take_every_tree_on_a_gpu(monkeypatch):
    """Only the device is pretended: the rules about patterns and dtypes are the operation's own."""
    recall = load("recall")
    monkeypatch.setattr(hierarchical, "has_triton", lambda: True)
    width = recall.SIZE["hidden_size"] // recall.SIZE["num_attention_heads"]
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 1024, 4, width))
    for variant in recall.variants().values():
        assert hierarchical.unsupported(q, q, variant.tree, True) is None
    assert recall.variants()["opened-4"].keys_share(2048, 4) < 0.10
    assert recall.variants()["opened-8"].keys_share(2048, 4) < 0.13
    assert recall.variants()["opened-4"].path("cpu", 4, width, 64).startswith("torch: it needs a CUDA")


OPTIONS = [
    "--length",
    128,
    "--doublings",
    1,
    "--steps",
    2,
    "--tokens",
    256,
    "--texts",
    2,
    "--device",
    "cpu",
    "--workers",
    0,
]


@pytest.fixture
def recipe(monkeypatch, capsys):
    def run(out, *more):
        arguments = ["recall", "--task", "recall", "--out", out, *OPTIONS, *more]
        monkeypatch.setattr(sys, "argv", [str(x) for x in arguments])
        load("recall").main()
        return capsys.readouterr().out

    return run


def test_a_grid_that_was_stopped_goes_on(recipe, tmp_path):
    some = ("--models", "dense", "opened-4", "--seeds", 0)
    assert "2 runs were left out" in recipe(tmp_path, *some, "--budget-seconds", -1)
    recipe(tmp_path, "--models", "dense", "--seeds", 0)
    first = json.loads((tmp_path / "recall.json").read_text())["rows"]
    out = recipe(tmp_path, *some)
    rows = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert rows[:1] == first  # not run again
    assert [row["model"] for row in rows] == ["dense", "opened-4"]
    assert list(rows[1]["accuracy"]) == ["128", "256"]
    assert list(rows[1]["opened_after_training"]) == ["1", "2", "4", "8", "16"]
    assert rows[1]["opened_after_training"]["4"] == rows[1]["accuracy"]
    assert rows[1]["accuracy"]["128"]["asked"] == 2 * 16
    mixes = rows[1]["mix_after_training"]
    assert list(mixes) == ["1.0", "0.5", "0.0"]
    assert mixes["0.5"] == rows[1]["accuracy"]["128"]
    assert f"{mixes['1.0']['accuracy']:.3f} with mix 1.0" in out
    assert (tmp_path / "recall.md").read_text() in out
    assert (tmp_path / "recall.png").stat().st_size > 1000


def test_tables_of_finished_files_without_the_experiment(recipe, tmp_path, monkeypatch, capsys):
    """The report alone, over several models and seeds in any order, keeps the order of the models."""
    for seed, name in ((1, "opened-4"), (1, "dense"), (0, "dense"), (0, "opened-4")):
        recipe(tmp_path, "--models", name, "--seeds", seed)
    before = (tmp_path / "recall.md").read_text()
    (tmp_path / "recall.md").unlink()
    reports = load("recall_report")
    assert reports.report(tmp_path / "recall.json") == before == (tmp_path / "recall.md").read_text()
    lines = before.splitlines()
    assert lines[0].startswith("Recall: 2 steps of 256 tokens, texts of up to 128; CPU")
    assert [line.split(" | ")[:3] for line in lines[4:6]] == [
        ["| dense", "100.0 %", "2"],
        ["| opened-4", "76.6 %", "2"],
    ]
    assert (tmp_path / "recall.png").stat().st_size < 150_000


def test_a_report_draws_models_whose_names_say_more_than_how_many_blocks_they_open(tmp_path):
    """They are in the table and in the left picture; the right one, by opened blocks, leaves them out."""
    row = {"seed": 0, "keys_share": 0.1, "accuracy": {"128": {"accuracy": 0.5}}}
    rows = [row | {"model": name} for name in load("recall").variants()]
    where = {"machine": "CPU", "torch": "2"}
    setting = {"task": "recall", "length": 128, "steps": 2, "tokens": 256, "taps": 0.5, "grow": True}
    path = tmp_path / "recall.json"
    path.write_text(json.dumps({"setting": setting, "environment": where, "rows": rows}))
    text = load("recall_report").report(path)
    assert "texts of up to 128, short ones first; CPU, torch 2; taps at first 0.5." in text
    assert all(f"| {row['model']} | 10.0 % | 1 | 0.500 |" in text for row in rows)
    assert path.with_suffix(".png").exists()


def test_one_run_that_fails_leaves_the_others(recipe, tmp_path, monkeypatch):
    """Its error is raised at the end, after what succeeded was written."""
    recall = load("recall")
    monkeypatch.setattr(recall, "run", fail_for_local)
    monkeypatch.setattr(
        recall, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers)
    )
    with pytest.raises(ExceptionGroup, match="1 runs failed") as caught:
        recipe(tmp_path, "--models", "local", "dense", "--seeds", 0, "--workers", 2)
    assert [str(error) for error in caught.value.exceptions] == ["lost"]
    rows = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense"]


def fail_for_local(name, seed, setting, deadline):
    if name == "local":
        raise ValueError("lost")
    return {"model": name, "seed": seed, "keys_share": 1.0, "accuracy": {128: {"accuracy": 0.5}}}


def test_results_of_another_setting_are_not_mixed_in(recipe, tmp_path):
    recipe(tmp_path, "--models", "local", "--seeds", 0)
    with pytest.raises(ValueError, match="same setting"):
        recipe(tmp_path, "--models", "local", "--seeds", 0, "--learning-rate", 1e-3)


def test_short_texts_come_first_where_asked_and_every_length_in_the_end():
    recall = load("recall")
    fields = {"task": "passkey", "length": 2048, "doublings": 0, "steps": 800, "tokens": 2048}
    setting = recall.Setting(**fields, learning_rate=5e-3, texts=2, device="cpu", path=None, grow=True)
    lengths = recall.lengths_of_steps(setting, 0)
    known = [set(lengths[i : i + 100]) for i in range(0, 800, 100)]
    every = (128, 256, 512, 1024, 2048)
    assert known == [set(every[: min(5, n)]) for n in range(1, 9)]
    assert lengths == recall.lengths_of_steps(setting, 0) != recall.lengths_of_steps(setting, 1)
    mixed = recall.lengths_of_steps(replace(setting, grow=False), 0)
    assert {256, 512, 1024, 2048} == set(mixed[:100])


@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20, 21, 30, 40])
def test_any_number_of_steps(steps, monkeypatch):
    recall = load("recall")
    fields = {"task": "copy", "length": 128, "doublings": 0, "steps": steps, "tokens": 128}
    setting = recall.Setting(**fields, learning_rate=1e-3, texts=1, device="cpu", path=None)
    monkeypatch.setattr(recall, "accuracy", lambda *_: {"accuracy": 0.0})
    monkeypatch.setattr(recall, "answers", lambda model, batch: model(batch.answers.float()[..., None]))
    model = torch.nn.Linear(1, recall.VOCABULARY)
    model.model = torch.nn.Module()
    model.model.layers = []
    assert recall.train(model, "local", 0, setting, float("inf")) is not None


def test_taps_begin_with_the_spread_that_is_asked_for():
    recall, variants = load("recall"), load("variants")
    taps = [
        variants.build(recall.variants()["local"], 0, taps, **recall.SIZE).model.layers[0].attention.key_conv
        for taps in (0.5, 1.0)
    ]
    assert torch.equal(2 * taps[0], taps[1])
    assert taps[1].std().item() == pytest.approx(1.0, abs=0.15)


def test_lengths_that_cannot_be(recipe, tmp_path):
    with pytest.raises(ValueError, match="power of two"):
        recipe(tmp_path, "--length", 100)


def test_the_router_mix_stays_one_for_three_quarters_and_ends_at_a_half_unless_it_is_learned():
    recall, variants = load("recall"), load("variants")
    for name, learned in (("opened-8", False), ("opened-8, mix learned", True)):
        model = variants.build(recall.variants()[name], 0, **recall.SIZE)
        mixes = []
        for done in (0.0, 0.75, 0.875, 1.0):
            recall.set_mix(model, done)
            mixes.append(model.model.layers[1].attention.router_mix.tolist())
        assert mixes == [[x] * 4 for x in ((1, 1, 1, 1) if learned else (1, 1, 0.75, 0.5))]


def test_only_a_learned_router_mix_follows_its_gradient():
    recall = load("recall")
    fields = {"task": "recall", "length": 512, "doublings": 0, "steps": 4, "tokens": 512}
    setting = recall.Setting(**fields, learning_rate=5e-3, texts=2, device="cpu", path=None)
    fixed, learned = (
        recall.run(name, 0, setting, float("inf")) for name in ("opened-8", "opened-8, mix learned")
    )
    assert fixed["router_mix"] == [[recall.MIX] * 4] * 2
    assert all(mix not in (1, recall.MIX) for layer in learned["router_mix"] for mix in layer)


def test_runs_are_repeatable():
    recall = load("recall")
    fields = {"task": "recall", "length": 128, "doublings": 0, "steps": 8, "tokens": 512}
    setting = recall.Setting(**fields, learning_rate=5e-3, texts=2, device="cpu", path=None)
    results = [recall.run("local", 0, setting, float("inf")) for _ in range(2)]
    assert results[0]["curve"] == results[1]["curve"]
    assert results[0]["accuracy"] == results[1]["accuracy"]
