"""Masked-span pre-training that all task recipes may start from: one model, the training texts of all sets.

    python recipes/pretrain.py --data PEPS LITBANK SCIREX --books BOOKS --minutes 3 --output runs/mlm

Nothing that a task is tested on is read: only training splits; no text whose id is in the validation or test split of any given
set (LitBank's excerpts are from the novels); of novels the part that `classify_books.py` trains on. With --stdlib the training
files of `extract_relations.py --task ast`. A folder that exists is left as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from classification import read_lines
from classify_books import PARTS
from extract_relations import load
from runs import FULL, REDUCED, machine

from longnet.model import LongNetConfig, LongNetForMaskedLM
from longnet.tasks.fit import autocast, pick_device
from longnet.text import encode
from longnet.train.masking import mask_spans

LEARNING_RATE, WARMUP = 1.5e-3, 50


def texts(folders: list[Path], books: Path | None, stdlib: bool) -> Iterator[str]:
    every = [*folders, *([books] if books else [])]
    held_out = {
        record["id"]
        for folder in every
        for part in ("validation", "test")
        for record in read_lines(folder / f"{part}.jsonl.gz")
    }
    for folder in every:
        for record in read_lines(folder / "train.jsonl.gz"):
            if record["id"] not in held_out:
                share = PARTS["train"][1] if folder == books else 1.0
                yield record["text"][: int(share * len(record["text"]))]
    if stdlib:
        yield from load("ast", None)["train"].texts


def pretrain(stream: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Masked spans in windows of the texts; saves the model. Returns bits per masked byte at start and end."""
    torch.manual_seed(0)
    device, generator = pick_device(args.device), np.random.default_rng(0)
    preset, fields = ("tiny", REDUCED) if args.reduced else ("mini", FULL)
    network = LongNetForMaskedLM(LongNetConfig.preset(preset, **fields, bidirectional=True))
    torch.nn.Module.to(network, device)
    window, batch = (2048, 4) if args.reduced else (16384, 8)
    window = min(window, len(stream) - 1)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    started, step, losses = None, 0, []

    def drawn(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = generator.integers(0, len(stream) - window, batch)
        rows = np.stack([stream[f : f + window] for f in first])
        return mask_spans(torch.from_numpy(rows).long(), (0, step))

    def progress() -> float:
        return 0.0 if started is None else (time.perf_counter() - started) / (60 * args.minutes)

    with ThreadPoolExecutor(1) as pool:  # masks the next windows while the device works
        upcoming = pool.submit(drawn, 0)
        while (done := progress()) < 1:
            ids, labels = upcoming.result()
            upcoming = pool.submit(drawn, step + 1)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (1 - done) ** 0.5
            with autocast(device):
                loss = network(input_ids=ids.to(device), labels=labels.to(device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(loss.detach())
            if step % 20 == 0 or step < 3:
                bits = losses[-1].item() / np.log(2)
                print(f"step {step}, {step * batch * window / 1e6:.1f} MB, {bits:.3f} bits", flush=True)
            # The first step compiles; time counts from the second on.
            started = started or time.perf_counter()
    bits = (torch.stack(losses).float() / np.log(2)).tolist()
    network.save_pretrained(args.output)
    return {
        "steps": step,
        "megabytes": step * batch * window / 1e6,
        "bits_first": bits[0],
        "bits_last": statistics.fmean(bits[-20:]),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, nargs="*", default=[], help="folders with train, validation, test .jsonl.gz")  # fmt: skip
    p.add_argument("--books", type=Path, help="the folder of novels")
    p.add_argument("--stdlib", action="store_true", help="Python's standard library, too")
    p.add_argument("--minutes", type=float, default=3.0)
    p.add_argument("--device", default="auto")
    p.add_argument("--reduced", action="store_true", help="the small model of the reduced recipes")
    p.add_argument("--output", type=Path, required=True, help="model folder for --pretrained")
    args = p.parse_args()
    if (args.output / "config.json").exists():
        print(f"{args.output} exists; nothing to do")
        return
    stream = np.concatenate([encode(text) for text in texts(args.data, args.books, args.stdlib)])
    print(f"{len(stream) / 1e6:.1f} MB of text", flush=True)
    figures = {**pretrain(stream, args), "machine": machine(pick_device(args.device))}
    (args.output / "pretraining.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
