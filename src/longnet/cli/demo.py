"""The demonstration: train, read, write on real text in minutes."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch

from longnet import text
from longnet.cli.read import print_report, stream_with_bar
from longnet.cli.train import prepare, train_with_bar
from longnet.generate import generate as generate_ids
from longnet.model import LongNetForCausalLM
from longnet.train import TrainConfig
from longnet.train.data import TokenDataset


def demo(output: Path = Path("demo-output"), steps: int = 300, stream_bytes: int = 131072) -> None:
    """Train on Python's own source, read a text far longer than the training window as a stream, write a continuation.

    Args:
        output: Folder for data, model and plot; made anew.
        steps: Training steps.
        stream_bytes: Length of the text that is read as a stream.
    """
    window = 1024
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    names = ("asyncio", "email", "http", "json", "logging", "unittest", "xml", "argparse.py", "ast.py", "datetime.py",
             "decimal.py", "difflib.py", "inspect.py", "pathlib.py", "pickle.py", "subprocess.py", "tarfile.py",
             "threading.py", "typing.py", "zipfile.py")  # fmt: skip
    sources = [library / name for name in names if (library / name).exists()]
    print("1. Prepare: part of Python's standard library, as bytes")
    prepare(tuple(sources), output / "data")
    print(f"\n2. Train a small LongNet on windows of {window} bytes")
    pattern = {"segment_lengths": [128, 512, 2048, 8192], "dilation_rates": [1, 4, 16, 64]}
    config = TrainConfig(
        data=output / "data", output=output / "run", preset="tiny", model=pattern, sequence_length=window,
        batch_size=4, steps=steps, warmup=min(30, steps), learning_rate=2e-3, save_every=100, device="cpu",
    )  # fmt: skip
    summary = train_with_bar(config)
    model = LongNetForCausalLM.from_pretrained(output / "run" / "model")
    held_out = TokenDataset(output / "data").split("validation")
    tokens = held_out[:stream_bytes]
    print(
        f"\n3. Read {len(tokens)} bytes, {len(tokens) // window} training windows, as one stream; all of it is held out"
    )
    report = stream_with_bar(model, np.asarray(tokens), window)
    print_report(report)
    print("\n4. Continue a text it has never seen")
    prompt = np.asarray(held_out[:2000]).astype(np.int64)
    print(text.decode(prompt[-200:]), end="\x1b[1m" if sys.stdout.isatty() else "")
    decoder = text.StreamDecoder()
    generate_ids(
        model, torch.from_numpy(prompt)[None], max_new_tokens=200, temperature=0.7, seed=0,
        on_token=lambda _, token: print(decoder.feed([token]), end="", flush=True),
    )  # fmt: skip
    print("\x1b[0m" if sys.stdout.isatty() else "")
    print("\nMeasured")
    print(f"  parameters                   {summary.parameters:,}")
    print(
        f"  training                     {summary.step} steps in {summary.seconds:.0f} s, loss {summary.loss:.3f} nats"
    )
    print(f"  stream                       {report.tokens:,} tokens, {report.mean:.3f} bits per byte")
    print(f"  cache at the end             {report.cache_bytes:,} bytes, whatever the length")
    plot = output / "run" / "loss.png"
    print(
        f"  loss plot                    {plot if plot.exists() else 'matplotlib is not installed: none drawn'}"
    )
