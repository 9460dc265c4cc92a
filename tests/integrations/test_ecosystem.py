"""LongNet where people use models: Trainer, pipelines, PEFT, accelerate, lm-evaluation-harness. Tiny models, no network."""

import json
import math

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
)
from longnet.integrations import byte_tokenizer
from longnet.text import encode

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PATTERN = {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}
TOKENIZER = byte_tokenizer()


def config(**options):
    torch.manual_seed(0)
    return LongNetConfig(**{**SIZES, **PATTERN, **options})


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate")


def arguments(folder, **options):
    fields = {
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    fields |= {"per_device_train_batch_size": 4, "max_grad_norm": 1.0, "lr_scheduler_type": "constant"}
    return TrainingArguments(str(folder), **{**fields, **options})


def documents(n=16):
    return [{"input_ids": encode("abcdefgh" * 5)[i % 8 : 30 + i % 8].tolist()} for i in range(n)]


def test_trainer_learns_saves_and_resumes(tmp_path, accelerate):
    rows = [{**row, "labels": row["input_ids"]} for row in documents()]
    options = {"max_steps": 8, "save_steps": 4, "gradient_checkpointing": True}

    def train(folder, **more):
        trainer = Trainer(LongNetForCausalLM(config()), arguments(folder, **options), train_dataset=rows)
        trainer.train(**more)
        return trainer

    whole = train(tmp_path / "whole")
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    resumed = train(tmp_path / "whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, whole.model.get_parameter(name)), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    assert torch.equal(saved.lm_head.weight, whole.model.lm_head.weight)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="transformers 5.4's Trainer under accelerate 1.15 divides accumulated gradients once more, for any model",
)
def test_trainer_counts_items_of_the_whole_batch(tmp_path, accelerate):
    """Accumulated gradients of unequal documents equal those of one large batch."""
    rows = [
        {"input_ids": r["input_ids"][: 5 + 3 * i], "labels": r["input_ids"][: 5 + 3 * i]}
        for i, r in enumerate(documents(4))
    ]
    # Padding on the right: the Trainer counts labels[:, 1:], as if no row began with padding.
    tokenizer, weights = byte_tokenizer(), []
    tokenizer.padding_side = "right"
    for batch, accumulation in ((4, 1), (1, 4)):
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
        }
        model = LongNetForCausalLM(config())
        args = arguments(tmp_path / str(batch), **options, optim="sgd", max_grad_norm=0.0, save_strategy="no")
        collate = DataCollatorForTokenClassification(tokenizer)
        Trainer(model, args, train_dataset=rows, data_collator=collate).train()
        weights.append(model.model.layers[0].attention.qkv_proj.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-7, rtol=1e-5)


def save(model, path):
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def test_text_generation_pipeline(tmp_path):
    model = LongNetForCausalLM(config()).eval()
    write = pipeline("text-generation", save(model, tmp_path))
    prompts = ["abc é", "a longer prompt, so that the other is padded"]
    batched = write(prompts, max_new_tokens=6, do_sample=False, batch_size=2, return_tensors=True)
    for prompt, result in zip(prompts, batched, strict=True):
        ids = result[0]["generated_token_ids"]
        ids = ids[len(ids) - 6 :]
        alone = model.generate(torch.tensor([encode(prompt).tolist()]), max_new_tokens=6, do_sample=False)
        assert list(ids) == alone[0, -6:].tolist()


def test_text_classification_trained_and_piped(tmp_path, accelerate):
    model = LongNetForSequenceClassification(
        config(num_labels=2, id2label={0: "low", 1: "high"}, bidirectional=True)
    )
    texts = [("aab" * (5 + i) if i % 2 else "yzz" * (9 - i % 7), i % 2) for i in range(16)]
    rows = [{"input_ids": encode(t).tolist(), "labels": y} for t, y in texts]
    args = arguments(tmp_path / "run", max_steps=15, save_strategy="no")
    Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(TOKENIZER)).train()
    classify = pipeline("text-classification", save(model.eval(), tmp_path / "model"))
    results = classify([t for t, _ in texts], batch_size=4)
    assert [r["label"] for r in results] == [("low", "high")[y] for _, y in texts]
    alone = [classify(t)[0]["score"] for t, _ in texts]
    assert alone == pytest.approx([r["score"] for r in results], abs=1e-5)


def test_token_classification_offsets_are_characters(tmp_path, accelerate):
    labels = {0: "O", 1: "B-X", 2: "I-X"}
    model = LongNetForTokenClassification(config(num_labels=3, id2label=labels, bidirectional=True))
    text = "so €é😀: x €é😀 and €é"

    def mark(text):
        """Labels of every byte: each run of characters beyond ASCII is an entity."""
        ids, previous = [], False
        for character in text:
            inside = not character.isascii()
            first = 0 if not inside else 2 if previous else 1
            ids += [first] + [2] * (len(character.encode()) - 1)
            previous = inside
        return ids

    rows = [{"input_ids": encode(text[i:]).tolist(), "labels": mark(text[i:])} for i in range(8)]
    args = arguments(tmp_path / "run", max_steps=30, save_strategy="no")
    Trainer(
        model, args, train_dataset=rows, data_collator=DataCollatorForTokenClassification(TOKENIZER)
    ).train()
    tag = pipeline("token-classification", save(model.eval(), tmp_path / "model"))
    found = {(e["start"], e["end"]) for e in tag(text) if e["entity"] != "O"}
    assert found == {(i, i + 1) for i, character in enumerate(text) if not character.isascii()}
    spans = tag(text, aggregation_strategy="simple")
    assert [(e["start"], e["end"]) for e in spans] == [(3, 6), (10, 13), (18, 20)]
    assert [text[e["start"] : e["end"]] for e in spans] == ["€é😀", "€é😀", "€é"]


def test_peft_lora(tmp_path):
    peft = pytest.importorskip("peft")
    base = LongNetForCausalLM(config())
    before = {name: p.clone() for name, p in base.named_parameters()}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["qkv_proj", "o_proj"], lora_alpha=16)
    model = peft.get_peft_model(base, lora)
    ids = torch.tensor([row["input_ids"] for row in documents(4)])
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-2), []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, p in base.named_parameters():
        if "lora" not in name:
            assert torch.equal(p, before[name.replace("base_layer.", "")]), name
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(LongNetForCausalLM(config()), tmp_path).eval()
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    torch.testing.assert_close(
        loaded.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5
    )
    out = model.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 3


def test_accelerate(tmp_path, accelerate):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = LongNetForCausalLM(config())
    loader = torch.utils.data.DataLoader([torch.tensor(r["input_ids"]) for r in documents()], batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2), loader)
    losses = []
    for _ in range(4):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    accelerator.save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_lm_evaluation_harness(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    model = LongNetForCausalLM(config()).eval()
    folder = save(model, tmp_path / "model")
    texts = ["abcabc é and more", "the second document"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    task = f"""task: tiny_bytes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    (tmp_path / "tiny.yaml").write_text(task)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    given = {
        "pretrained": folder,
        "dtype": "float32",
        "max_length": 64,
        "prefix_token_id": TOKENIZER.bos_token_id,
    }
    result = lm_eval.simple_evaluate(
        model="hf", model_args=given, tasks=["tiny_bytes"], task_manager=manager, device="cpu", batch_size=1
    )
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[TOKENIZER.bos_token_id, *encode(text).tolist()]])
        total += model.token_losses(ids).sum().item()
        count += len(text.encode())
    expected = total / count / math.log(2)
    assert result["results"]["tiny_bytes"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
