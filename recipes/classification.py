"""What the classification recipes share: the runs that are compared, their time, the table.

Compared on the same documents: the LongNet that reads whole documents (from masked-span pre-training on the same training
texts, and from scratch), the same LongNet that sees only the first 4,096 or 512 bytes, and TF-IDF + logistic regression.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from longnet.model import LongNetConfig, LongNetForMaskedLM
from longnet.tasks.classification import ClassifyConfig, fit_classifier
from longnet.tasks.fit import pick_device
from longnet.tasks.metrics import classification_report
from longnet.text import encode
from longnet.train.masking import mask_spans
from results import record

# (bytes read, starts from pre-training, share of the time)
RUNS = {
    "LongNet, whole documents": (None, True, 3.0),
    "LongNet, whole, no pre-training": (None, False, 3.0),
    "LongNet, first 4,096 bytes": (4096, True, 1.5),
    "LongNet, first 512 bytes": (512, True, 0.75),
}
TFIDF = "TF-IDF + logistic regression"
PATTERN = {"segment_lengths": [512, 4096, 32768], "dilation_rates": [1, 8, 64]}
PRETRAINING_SHARE = 0.25


@dataclass(frozen=True)
class Split:
    """Texts and their single labels."""

    texts: list[str]
    labels: list[str]


def read_lines(path: Path) -> list[dict]:
    """The records of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def parser(description: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument(
        "--data", type=Path, required=True, help="folder with train, validation and test .jsonl.gz"
    )
    p.add_argument("--budget-minutes", type=float, default=8.0, help="all runs together")
    p.add_argument("--device", default="auto")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--reduced", action="store_true", help="a model and a corpus for two cores")
    p.add_argument("--baselines-only", action="store_true", help="only TF-IDF (needs scikit-learn; no GPU)")
    p.add_argument(
        "--output", type=Path, required=True, help="results are added to this JSON file; a .md is beside it"
    )
    return p


def compare(task: str, splits: dict[str, Split], args: argparse.Namespace) -> None:
    """Run what `args` asks for on `splits` and write the figures."""
    labels = sorted(set(splits["train"].labels))
    # A label that training has never seen cannot be learned: such documents are counted, not hidden.
    for name in ("validation", "test"):
        known = [label in labels for label in splits[name].labels]
        if not all(known):
            print(
                f"{task}: {known.count(False)} {name} documents have a label without training documents; left out"
            )
            kept = [
                (t, y) for t, y, k in zip(splits[name].texts, splits[name].labels, known, strict=True) if k
            ]
            splits[name] = Split([t for t, _ in kept], [y for _, y in kept])
    if args.baselines_only:
        record(args.output, task, TFIDF, tfidf(splits, labels))
    else:
        neural(task, splits, labels, args)


def score(gold: list[str], predicted: list[str], texts: list[str], labels: list[str]) -> dict[str, float]:
    """Accuracy and macro F1 of all documents, and accuracy of those longer than 4,096 bytes."""
    report = classification_report([[g] for g in gold], [[p] for p in predicted], labels)
    long = [g == p for g, p, t in zip(gold, predicted, texts, strict=True) if len(t.encode()) > 4096]
    return {
        "accuracy": report["accuracy"],
        "macro_f1": report["macro_f1"],
        "accuracy_long": sum(long) / max(1, len(long)),
    }


def tfidf(splits: dict[str, Split], labels: list[str]) -> dict[str, float]:
    """Word 1- and 2-grams; C and balanced class weights chosen on validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    started = time.perf_counter()
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, max_features=100_000)
    x = {name: (vectorizer.fit_transform if name == "train" else vectorizer.transform)(splits[name].texts)
         for name in ("train", "validation", "test")}  # fmt: skip
    best, chosen = -1.0, None
    for c in (1.0, 10.0, 100.0):
        for weight in (None, "balanced"):
            model = LogisticRegression(C=c, class_weight=weight, max_iter=300)
            model.fit(x["train"], splits["train"].labels)
            predicted = model.predict(x["validation"]).tolist()
            figures = score(splits["validation"].labels, predicted, splits["validation"].texts, labels)
            if figures["macro_f1"] + 1e-3 * figures["accuracy"] > best:
                best, chosen = figures["macro_f1"] + 1e-3 * figures["accuracy"], model
    assert chosen is not None
    figures = score(splits["test"].labels, chosen.predict(x["test"]).tolist(), splits["test"].texts, labels)
    # Deterministic: one run is all seeds.
    return {**figures, "seconds": time.perf_counter() - started}


def neural(task: str, splits: dict[str, Split], labels: list[str], args: argparse.Namespace) -> None:
    model = {
        **PATTERN,
        **({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128} if args.reduced else {}),
    }
    preset = "tiny" if args.reduced else "mini"
    texts = splits["train"].texts
    shares = sum(share for _, _, share in RUNS.values()) * len(args.seeds)
    unit = args.budget_minutes * (1 - PRETRAINING_SHARE) / shares
    with tempfile.TemporaryDirectory() as folder:
        pretrained = Path(folder) / "mlm"
        minutes = args.budget_minutes * PRETRAINING_SHARE
        figures = pretrain(texts, preset, model, minutes, args, pretrained)
        record(args.output, task, "masked-span pre-training", figures)
        for seed in args.seeds:
            for name, (most, from_mlm, share) in RUNS.items():
                config = ClassifyConfig(
                    train=args.data, output=args.output, preset=preset, model=model, seed=seed, max_bytes=most,
                    pretrained=pretrained if from_mlm else None, class_weights="balanced", epochs=200, patience=200,
                    max_minutes=unit * share, device=args.device, learning_rate=6e-4 if from_mlm else 1e-3,
                    batch_tokens=16384 if args.reduced else 131072 if most is None else 32768,
                )  # fmt: skip
                gold = {key: [[y] for y in split.labels] for key, split in splits.items()}
                validation = splits["validation"]
                classifier, summary, report = fit_classifier(
                    config, labels, texts, gold["train"], validation.texts, gold["validation"]
                )
                test = splits["test"]
                logits = classifier.logits([classifier.ids(t) for t in test.texts])
                predicted = [labels[i] for i in logits.argmax(-1).tolist()]
                figures = score(test.labels, predicted, test.texts, labels)
                extra = {
                    "validation_macro_f1": report["macro_f1"],
                    "seconds": summary.seconds,
                    "epochs": summary.epochs,
                }
                record(args.output, task, name, {**figures, **extra, "seed": seed})


def pretrain(
    texts: list[str], preset: str, model: dict, minutes: float, args: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Masked spans on windows of the training texts; saves to `folder`. Returns bits per masked byte at start and end."""
    torch.manual_seed(0)
    device, generator = pick_device(args.device), np.random.default_rng(0)
    network = LongNetForMaskedLM(LongNetConfig.preset(preset, **model, bidirectional=True))
    torch.nn.Module.to(network, device)
    stream = np.concatenate([encode(text) for text in texts]).astype(np.int64)
    window, batch = (2048, 4) if args.reduced else (8192, 16)
    window = min(window, len(stream) - 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    started, step, losses = time.perf_counter(), 0, []
    while (progress := (time.perf_counter() - started) / (60 * minutes)) < 1:
        first = generator.integers(0, len(stream) - window, batch)
        ids, labels = mask_spans(
            torch.from_numpy(np.stack([stream[f : f + window] for f in first])), (0, step)
        )
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50) * (1 - progress) ** 0.5
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = network(input_ids=ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss.detach())
    bits = (torch.stack(losses).float() / np.log(2)).tolist()
    network.save_pretrained(folder)
    last = statistics.fmean(bits[-20:])
    print(f"pre-training: {step} steps, bits per masked byte {bits[0]:.3f} -> {last:.3f}", flush=True)
    return {"steps": step, "bits_first": bits[0], "bits_last": last, "seconds": time.perf_counter() - started}
