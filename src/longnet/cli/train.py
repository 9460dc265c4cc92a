"""The commands that make a model: prepare, train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from longnet.integrations.tokenizer import load_tokenizer
from longnet.train import TrainConfig, TrainSummary
from longnet.train import train as train_model
from longnet.train.data import SUFFIXES
from longnet.train.data import prepare as prepare_data
from longnet.train.parallelize import is_leader


def prepare(
    inputs: tyro.conf.Positional[tuple[Path, ...]],
    output: Path,
    tokenizer: Path | None = None,
    end_of_text: str | None = None,
    on_bad: Literal["skip", "fail"] = "skip",
    suffixes: tuple[str, ...] = SUFFIXES,
    encoding: str = "utf-8",
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
) -> None:
    """Turn text files and folders into a token directory for training. Documents are held out by a hash of their bytes.

    Args:
        inputs: Files or folders; folders are read recursively. A .jsonl file holds a document a line, in the field "text".
        output: The directory to make.
        tokenizer: A tokenizer.json of the tokenizers library, or a folder with one; without it, ids are bytes. `longnet train`
            takes it from OUTPUT, and puts it next to the model.
        end_of_text: Which of the tokenizer's special tokens ends a document; by default the eos_token of
            tokenizer_config.json beside it, or the only special token there is.
        on_bad: What to do with empty, binary, undecodable or truncated inputs.
        suffixes: Which files of a folder are read; the others are counted.
        encoding: Of the inputs; they are stored as UTF-8.
        validation_fraction: Share of the documents that training never sees.
        max_bytes: Stop after this much text.
    """
    report = prepare_data(
        list(inputs), output, tokenizer=load_tokenizer(tokenizer, end_of_text), on_bad=on_bad, suffixes=suffixes,
        encoding=encoding, validation_fraction=validation_fraction, max_bytes=max_bytes,
    )  # fmt: skip
    for problem in report.bad:
        print(f"skipped {problem}", file=sys.stderr)
    if report.unlisted:
        counts = ", ".join(
            f"{n} {suffix}" for suffix, n in sorted(report.unlisted.items(), key=lambda x: -x[1])
        )
        print(f"not read, suffix not in {' '.join(suffixes)}: {counts}", file=sys.stderr)
    print(
        f"{report.documents} documents ({report.validation_documents} held out), {report.tokens} tokens of "
        f"{report.text_bytes} bytes, {len(report.bad)} skipped -> {output}"
    )


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a model; continues by itself from the newest intact checkpoint in the output folder.

    --config FILE.toml reads these options from a file, with the model's fields under [model]; what is given here wins.
    """
    summary = train_with_bar(config)
    if not is_leader():
        return
    for reason in summary.skipped:
        print(f"passed over a damaged checkpoint: {reason}", file=sys.stderr)
    state = "finished" if summary.finished else "stopped; run the same command to continue"
    if summary.finished and summary.plot is None:
        print(
            "no loss plot: matplotlib is not installed; pip install 'longnet-attention[plots]'",
            file=sys.stderr,
        )
    print(f"step {summary.step}, loss {summary.loss:.4f} nats, {summary.seconds:.0f} s: {state}")


def train_with_bar(config: TrainConfig) -> TrainSummary:
    silent = not is_leader()
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True, mininterval=0.5, disable=silent) as bar:

        def show(event: dict) -> None:
            bar.update(event["step"] - bar.n)
            if "validation_bits_per_byte" in event:
                bar.write(f"step {event['step']}: held out {event['validation_bits_per_byte']:.3f} bits/byte")
            if "save_error" in event:
                bar.write(event["save_error"], file=sys.stderr)
            if "sample" in event:
                bar.write(f"step {event['step']}: {event['sample']!r}")
            bar.set_postfix_str(
                f"{event['bits_per_byte']:.2f} bits/byte, {event['tokens_per_second']:,.0f} tokens/s"
            )

        return train_model(config, show)
