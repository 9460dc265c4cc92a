"""A file of the tokenizers library from `longnet prepare` to `longnet generate`, and what refuses it."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.cli import main
from longnet.integrations import byte_tokenizer
from longnet.integrations.tokenizer import load_tokenizer
from longnet.train import TrainConfig, train
from longnet.train.data import TokenDataset, WindowSampler, prepare
from tokenizer_files import END, LINES, byte_level

MODEL = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2",
         "segment_lengths=[8,32]", "dilation_rates=[1,4]"]  # fmt: skip
TRAIN = ("--sequence-length", 32, "--batch-size", 2, "--warmup", 2, "--device", "cpu", "--model", *MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, a tokenizer with two special tokens, data of it, and a model trained on them by the commands."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "texts").mkdir()
    for i in range(8):
        (folder / "texts" / f"{i}.txt").write_text("".join(LINES[(i + j) % 3] for j in range(30)) + f"{i}")
    file = byte_level(folder / "tokenizer" / "tokenizer.json", specials=("<pad>", END))
    with pytest.MonkeyPatch.context() as patch:
        for command in (
            ("prepare", folder / "texts", "--output", folder / "data", "--tokenizer", file, "--end-of-text", END),
            ("train", "--data", folder / "data", "--output", folder / "run", "--steps", 8, "--eval-every", 4, "--eval-windows", 2,
             "--sample-every", 4, "--learning-rate", 1e-2, *TRAIN),
        ):  # fmt: skip
            patch.setattr(sys, "argv", ["longnet", *map(str, command)])
            main()
    return folder


def bits(model, ids):
    """Bits of every prediction, in one pass."""
    with torch.no_grad():
        return model.token_losses(torch.from_numpy(ids.astype(np.int64))[None])[
            0
        ].double().numpy() / math.log(2)


def test_the_data_hold_the_documents_and_the_tokenizer(folder):
    dataset = TokenDataset(folder / "data")
    library = AutoTokenizer.from_pretrained(folder / "data")
    end = library.convert_tokens_to_ids(END)
    assert end == 1
    written = set()
    for begin, stop in zip(dataset.documents, dataset.documents[1:], strict=False):
        assert dataset.tokens[stop - 1] == end
        written.add(library.decode(dataset.tokens[begin : stop - 1].tolist()))
    assert written == {path.read_text() for path in (folder / "texts").iterdir()}
    assert dataset.meta["vocab_size"] == len(library) == 340


def test_the_model_has_the_vocabulary_and_carries_the_tokenizer(folder):
    config = LongNetConfig.from_pretrained(folder / "run" / "model")
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id) == (
        340,
        1,
        1,
        None,
    )
    assert load_tokenizer(folder / "run" / "model").name == TokenDataset(folder / "data").meta["tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    assert tokenizer.decode(tokenizer("  Straße").input_ids) == "  Straße"
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["the quick brown", "def add("]
    made = write(prompts, max_new_tokens=6, do_sample=False, batch_size=2)
    for prompt, result in zip(prompts, made, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert result[0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)
        assert result[0]["generated_text"].startswith(prompt)


def test_training_reports_bits_per_byte_of_text(folder):
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    sampler = WindowSampler(TokenDataset(folder / "data"), 32, 2, seed=0)
    library = AutoTokenizer.from_pretrained(folder / "data")
    for record in records:
        tokens = library.convert_ids_to_tokens(sampler.next_batch()[:, 1:].flatten().tolist())
        # In a byte-level vocabulary a character stands for a byte; the end of a document counts as one.
        size = sum(1 if token == END else len(token) for token in tokens)
        assert size > 1.5 * len(tokens)
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2) * len(tokens) / size)
    held_out = [r for r in records if "validation_bits_per_byte" in r]
    assert [r["step"] for r in held_out] == [4, 8]
    assert held_out[-1]["validation_loss"] > 1.5 * math.log(2) * held_out[-1]["validation_bits_per_byte"]
    assert isinstance(held_out[-1]["sample"], str)


def test_eval_counts_bytes(folder, longnet, tmp_path):
    model = LongNetForCausalLM.from_pretrained(folder / "run" / "model")
    tokenizer = load_tokenizer(folder / "run" / "model")
    text = (folder / "texts" / "3.txt").read_bytes() * 3
    (tmp_path / "text.txt").write_bytes(text)
    ids = tokenizer.encode(text)
    total, size = bits(model, ids).sum(), len(text) - len(tokenizer.spelling[ids[0]])
    common = ("eval", "--model", folder / "run" / "model", "--file")
    code, out, _ = longnet(*common, tmp_path / "text.txt", "--chunk", 100)
    assert code == 0
    assert f"{len(ids) - 1} tokens of {size} bytes, mean {total / size:.3f}" in out
    first = bits(model, ids[:257])
    assert re.search(
        rf"0 - +255 +{first.sum() / tokenizer.byte_lengths[ids[1:257]].sum():.3f} +{2 ** first.mean():.2f}\n",
        out,
    )
    # A limit in the middle of a character, and a stream in two parts.
    cut = text.index("ß".encode()) + 1
    _, out, _ = longnet(*common, tmp_path / "text.txt", "--max-bytes", cut, "--cache-out", tmp_path / "cache")
    part = tokenizer.encode(text[: cut - 1])
    assert f"{len(part) - 1} tokens of" in out
    held_out = TokenDataset(folder / "data").split("validation")
    code, out, _ = longnet(*common, folder / "data", "--window", 64, "--windows", 3)
    assert code == 0
    assert re.search(r"3 windows, 192 tokens of \d{3} bytes", out)
    _, out, _ = longnet(*common, folder / "data", "--max-bytes", 300)
    count = int(re.search(r"(\d+) tokens of", out)[1]) + 1
    sizes = np.cumsum(tokenizer.byte_lengths[held_out])
    assert sizes[count - 1] <= 300 < sizes[count]


def test_generate_writes_whole_characters_and_stops_at_texts(folder, longnet, tmp_path):
    common = (
        "generate",
        "--model",
        folder / "run" / "model",
        "--prompt",
        "the quick brown",
        "--max-new-tokens",
        30,
        "--seed",
        1,
    )
    code, out, _ = longnet(*common)
    assert code == 0
    assert longnet(*common, "--output", tmp_path / "out")[0] == 0
    written = (tmp_path / "out").read_bytes()
    assert out.removesuffix("\n") == written.decode("utf-8", "replace")
    for stop in re.findall(rb"[ -~]{2}", written)[:2]:
        assert longnet(*common, "--output", tmp_path / "cut", "--stop", stop.decode(), "\x00")[0] == 0
        assert (tmp_path / "cut").read_bytes() == written[: written.index(stop) + 2]
    code, _, error = longnet(*common, "--stop", "")
    assert code == 2
    assert "--stop" in error


def test_a_stop_text_may_span_tokens_or_end_inside_one(tmp_path):
    from longnet.cli.generate import _Sink

    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps"
    ids = tokenizer.encode(text).tolist()
    assert any(len(tokenizer.spelling[i]) > 2 for i in ids)
    for begin in range(len(text)):
        for size in (1, 2, 7):
            stop, written = text[begin : begin + size], 0
            with _Sink(tmp_path / "out", tokenizer, (stop, "never"), 0) as sink:
                while not sink.write(0, ids[written]):
                    written += 1
            assert stop in tokenizer.decode_bytes(ids[: written + 1]).decode()
            assert stop not in tokenizer.decode_bytes(ids[:written]).decode()
            assert (tmp_path / "out").read_text() == text[: text.index(stop) + len(stop)]
    with _Sink(tmp_path / "out", tokenizer, ("the",), len(ids)) as sink:
        assert not any(sink.write(0, i) for i in ids)  # complete before the least was written
    assert (tmp_path / "out").read_text() == text


def test_another_tokenizer_does_not_continue_a_run(folder, longnet, tmp_path):
    other = byte_level(tmp_path / "other" / "tokenizer.json", specials=("<pad>", END), vocab_size=339)
    prepare([folder / "texts"], tmp_path / "other-data", tokenizer=load_tokenizer(other, END))
    prepare([folder / "texts"], tmp_path / "bytes")
    for data in ("other-data", "bytes"):
        code, _, error = longnet(
            "train",
            "--data",
            tmp_path / data,
            "--output",
            folder / "run",
            "--steps",
            8,
            "--learning-rate",
            1e-2,
            *TRAIN,
        )
        assert code == 2
        assert re.search(
            r"differing: tokenizer: checkpoint '340 ids, sha256 .*', now '(339 ids|bytes)", error
        )
        code, _, error = longnet("eval", "--model", folder / "run" / "model", "--file", tmp_path / data)
        assert code == 2
        assert "expected text prepared with the model's tokenizer, 340 ids" in error
    (tmp_path / "other-data" / "tokenizer.json").write_bytes(
        (folder / "data" / "tokenizer.json").read_bytes()
    )
    with pytest.raises(ValueError, match="the tokenizer that the text was prepared with, 339 ids"):
        assert TokenDataset(tmp_path / "other-data").tokenizer
    (tmp_path / "other-data" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        assert TokenDataset(tmp_path / "other-data").tokenizer


def test_a_vocabulary_may_be_larger_than_the_tokenizer_and_never_smaller(folder, longnet, tmp_path):
    sizes = json.loads("{" + ",".join(f'"{k}":{v}' for k, v in (m.split("=") for m in MODEL)) + "}")
    options = {
        "data": folder / "data",
        "sequence_length": 32,
        "batch_size": 1,
        "steps": 1,
        "sample_every": 1,
        "device": "cpu",
    }
    with pytest.raises(ValueError, match=r"vocab_size of at least 340, .* got 300"):
        train(TrainConfig(output=tmp_path / "small", model=sizes | {"vocab_size": 300}, **options))
    train(TrainConfig(output=tmp_path / "large", model=sizes | {"vocab_size": 2000}, **options))
    model = tmp_path / "large" / "model"
    assert LongNetConfig.from_pretrained(model).vocab_size == 2000
    # Most ids stand for nothing; none of them is written.
    assert (
        longnet(
            "generate", "--model", model, "--prompt", "the", "--top-p", "1", "--temperature", "5", "--seed", 0
        )[0]
        == 0
    )


def test_bad_documents_are_reported_with_their_place(folder, longnet, tmp_path):
    from tokenizer_files import lower_case

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick fox")
    (tmp_path / "texts" / "b.jsonl").write_text('{"text": "the fox"}\n{"text": "the Fox"}\n')
    common = (
        "prepare",
        tmp_path / "texts",
        "--tokenizer",
        lower_case(tmp_path / "t" / "lower.json"),
        "--end-of-text",
        END,
    )
    code, out, error = longnet(*common, "--output", tmp_path / "data")
    assert code == 0
    assert "2 documents" in out
    assert re.search(
        r"b\.jsonl:2 \(byte 20\): expected a tokenizer that keeps the text.* at offset 4 makes b'fox' of b'Fox'",
        error,
    )
    code, _, error = longnet(*common, "--output", tmp_path / "other", "--on-bad", "fail")
    assert code == 2
    assert "b.jsonl:2" in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("prepare", "TEXTS", "--output", "x", "--tokenizer", "nowhere"), "nowhere"),
        (("prepare", "TEXTS", "--output", "x", "--tokenizer", "TEXT"), "tokenizer.json of the tokenizers library"),
        (("prepare", "TEXTS", "--output", "x", "--tokenizer", "TOKENIZER"), "--end-of-text"),
        (("prepare", "TEXTS", "--output", "x", "--end-of-text", "</s>"), "end_of_text"),
        (("train", "--data", "DATA", "--output", "x", "--objective", "mlm", *TRAIN), "objective 'mlm': expected the byte"),
        (("eval", "--model", "MODEL", "--file", "LATIN"), "byte 0xe9 at offset 3"),
        (("eval", "--model", "MODEL", "--file", "nowhere"), "nowhere"),
        (("eval", "--model", "BARE", "--file", "TEXT"), "tokenizer.json for a model of 340 ids"),
        (("eval", "--model", "SWAPPED", "--file", "TEXT"), "at most 260 ids"),
        (("generate", "--model", "MODEL", "--prompt-file", "LATIN"), "byte 0xe9 at offset 3"),
        (("serve", "--model", "BARE", "--port", "0", "--no-auth"), "tokenizer.json for a model of 340 ids"),
        (("serve", "--model", "SWAPPED", "--port", "0", "--no-auth"), "at most 260 ids"),
        (("explain", "--model", "MODEL", "--text", "TEXT"), "expected the byte tokenizer"),
        (("classify", "train", "--train", "LABELLED", "--output", "x", "--pretrained", "MODEL", "--device", "cpu"),
         "pretrained: expected the byte tokenizer"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_said(folder, longnet, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    model = folder / "run" / "model"
    places = {
        "TEXTS": folder / "texts",
        "TEXT": folder / "texts" / "1.txt",
        "DATA": folder / "data",
        "MODEL": model,
    }
    places["TOKENIZER"] = folder / "tokenizer"
    places["LATIN"] = tmp_path / "latin.txt"
    places["LATIN"].write_bytes(b"caf\xe9 au lait")
    places["LABELLED"] = tmp_path / "labelled.jsonl"
    records = [{"text": f"text {i} {'ab'[i % 2]}", "label": "ab"[i % 2]} for i in range(20)]
    places["LABELLED"].write_text("".join(json.dumps(r) + "\n" for r in records))
    for name in ("BARE", "SWAPPED"):
        places[name] = tmp_path / name
        loaded = LongNetForCausalLM.from_pretrained(model)
        if name == "SWAPPED":
            loaded = LongNetForCausalLM(LongNetConfig.preset("tiny", num_hidden_layers=1))
            load_tokenizer(model).save(tmp_path / name)
        loaded.save_pretrained(tmp_path / name)
    code, out, error = longnet(*(places.get(a, a) for a in arguments))
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("longnet: ")]
    assert len(lines) == 1, error
    assert part in lines[0]
    assert "Traceback" not in error + out
    assert not Path("x", "model").exists()


def test_byte_models_do_as_before(folder, longnet, tmp_path):
    """A folder of a byte model holds a tokenizers file, too; it takes any bytes nevertheless."""
    model = LongNetForCausalLM(LongNetConfig.preset("tiny", num_hidden_layers=1))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.bin").write_bytes(bytes(range(256)) * 2)
    outputs = []
    for _ in range(2):
        code, out, _ = longnet(
            "eval", "--model", tmp_path / "model", "--file", tmp_path / "text.bin", "--max-bytes", 500
        )
        assert code == 0
        assert "499 tokens of 499 bytes" in out
        outputs.append(re.search("mean ([0-9.]+)", out)[1])
        byte_tokenizer().save_pretrained(tmp_path / "model")
    assert outputs[0] == outputs[1]
