"""The command line, and the only place that prints. The configurations are the options; docstrings are the help."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import longnet
from longnet import DilatedPattern, dilated_attention, text
from longnet.generate import generate as generate_ids
from longnet.model import LongNetCache, LongNetForCausalLM
from longnet.train import NonFiniteLoss, TrainConfig, TrainSummary
from longnet.train import train as train_model
from longnet.train.data import TokenDataset
from longnet.train.data import prepare as prepare_data
from longnet.train.evaluate import StreamReport, stream


def prepare(
    inputs: tyro.conf.Positional[tuple[Path, ...]],
    output: Path,
    on_bad: Literal["skip", "fail"] = "skip",
    max_bytes: int | None = None,
) -> None:
    """Turn text files and folders into a token directory for training.

    Args:
        inputs: Files or folders: .txt, .md, .py, .jsonl (field "text"), gzipped or not.
        output: The directory to make.
        on_bad: What to do with empty, binary, undecodable or truncated inputs.
        max_bytes: Stop after this much text.
    """
    report = prepare_data(list(inputs), output, on_bad=on_bad, max_bytes=max_bytes)
    for problem in report.bad:
        print(f"skipped {problem}", file=sys.stderr)
    print(f"{report.documents} documents, {report.tokens} tokens, {len(report.bad)} skipped -> {output}")


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a model; continues by itself from the newest intact checkpoint in the output folder."""
    summary = _train_with_bar(config)
    for reason in summary.skipped:
        print(f"passed over a damaged checkpoint: {reason}", file=sys.stderr)
    state = "finished" if summary.finished else "stopped; run the same command to continue"
    print(f"step {summary.step}, loss {summary.loss:.4f} nats, {summary.seconds:.0f} s: {state}")


def _train_with_bar(config: TrainConfig) -> TrainSummary:
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:

        def show(event: dict) -> None:
            bar.update(event["step"] - bar.n)
            bar.set_postfix_str(
                f"{event['bits_per_byte']:.2f} bits/byte, {event['tokens_per_second']:,.0f} tokens/s"
            )

        return train_model(config, show)


def evaluate(model: Path, file: Path, chunk: int = 4096, max_bytes: int | None = None) -> None:
    """Read a file of any length as a stream and report bits per byte by position, with memory that stays flat.

    Args:
        model: Folder of a trained model.
        file: The text.
        chunk: Tokens read at once.
        max_bytes: Stop after this much of the file.
    """
    _print_report(_stream_with_bar(_load(model), _bytes_of(file, max_bytes), chunk))


def _stream_with_bar(model: LongNetForCausalLM, ids: np.ndarray, chunk: int) -> StreamReport:
    with tqdm(total=len(ids) - 1, unit="token", unit_scale=True, dynamic_ncols=True) as bar:

        def show(tokens: int, cache_bytes: int) -> None:
            bar.update(tokens - bar.n)
            bar.set_postfix_str(f"cache {cache_bytes / 2**20:.2f} MiB")

        return stream(model, ids, chunk=chunk, on_chunk=show)


def _print_report(report: StreamReport) -> None:
    print(f"{'positions':>22}  bits per byte")
    for low, high, bits in zip(report.borders, report.borders[1:], report.bits_per_byte, strict=False):
        print(f"{low:>10} - {high - 1:>9}  {bits:.3f}")
    rate = report.tokens / report.seconds
    print(
        f"{report.tokens} tokens, mean {report.mean:.3f}, {rate:,.0f} tokens/s, cache {report.cache_bytes} bytes"
    )


def generate(
    model: Path,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int | None = None,
    cache_in: Path | None = None,
    cache_out: Path | None = None,
) -> None:
    """Continue a text of any length; the continuation is printed as it is written.

    Args:
        model: Folder of a trained model.
        prompt: The text to continue; or use --prompt-file.
        prompt_file: A file to continue; "-" reads standard input.
        max_new_tokens: Bytes to write.
        temperature: 0 always takes the likeliest byte.
        top_k: Sample among the k likeliest.
        top_p: Sample among the fewest bytes that hold this much probability.
        seed: Makes the result repeatable.
        cache_in: Continue what was read before: a file made by --cache-out.
        cache_out: Save what was read and written, to ask again later without reading again.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("expected either --prompt or --prompt-file; got both or neither")
    network = _load(model)
    if prompt is not None:
        data = prompt.encode("utf-8", "surrogateescape")
    else:
        data = sys.stdin.buffer.read() if str(prompt_file) == "-" else Path(str(prompt_file)).read_bytes()
    ids = torch.from_numpy(text.encode(data).astype(np.int64))[None].to(network.device)
    cache = LongNetCache.load(cache_in, network.config, network.device) if cache_in else None
    decoder = text.StreamDecoder()
    result = generate_ids(
        network,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        cache=cache,
        eos_token_id=text.EOS,
        on_token=lambda _, token: print(decoder.feed([token]), end="", flush=True),
    )
    print(decoder.feed([], final=True))
    if cache_out:
        result.cache.save(cache_out)


def explain(
    tokens: int = 65536,
    heads: int = 12,
    key_heads: int = 12,
    head_width: int = 64,
    window: int = 2048,
    ratio: int = 2,
) -> None:
    """Which attention path this machine takes, and what a geometric pattern costs at this length."""
    pattern = DilatedPattern.geometric(tokens, window, ratio)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q = torch.empty(1, 1, heads, head_width, device=device, dtype=dtype).expand(-1, tokens, -1, -1)
    k = torch.empty(1, 1, key_heads, head_width, device=device, dtype=dtype).expand(-1, tokens, -1, -1)
    print(longnet.explain(q, k, k, pattern))
    pairs = pattern.visible_pairs(tokens, heads)
    dense = heads * tokens * (tokens + 1) // 2
    print(f"branches (segment length, dilation rate): {pattern.branches}")
    print(
        f"keys per query: {pairs / heads / tokens:.0f} on average; dense attention: {dense / heads / tokens:.0f}"
    )
    print(
        f"forward: {pattern.flops(tokens, heads, head_width) / 1e9:.1f} GFLOP, {dense / pairs:.1f} times less than dense"
    )
    entries = pattern.cache_entries(heads, key_heads)
    print(f"streaming cache: {entries} keys per layer, {entries * head_width * 4 / 2**20:.1f} MiB in 16 bits")


def doctor() -> None:
    """What this machine can run, and why not."""
    print(f"longnet {longnet.__version__}, python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"cores: {os.cpu_count()}, torch threads: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(
                f"GPU {i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            )
    else:
        print("GPU: none that torch can use; everything runs on the CPU")
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        q = torch.zeros(1, 256, 4, 64, device=device, dtype=dtype)
        print(f"{device}, {dtype}: {longnet.explain(q, q, q, DilatedPattern.geometric(256, 64))}")
    print(f"disk: {shutil.disk_usage('.').free / 2**30:.0f} GiB free here")


def bench(
    tokens: int = 16384, heads: int = 8, head_width: int = 64, window: int = 2048, repeats: int = 5
) -> None:
    """Time dilated attention against torch's dense attention on this machine: forward, median and spread.

    Args:
        tokens: Sequence length.
        heads: Query and key heads.
        head_width: Width of a head.
        window: Shortest segment; segments and rates double from there.
        repeats: Timed runs after two warm-up runs.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q, k, v = (torch.randn(1, tokens, heads, head_width, device=device, dtype=dtype) for _ in range(3))
    pattern = DilatedPattern.geometric(tokens, window)
    by_head = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    runs = {
        "dilated": lambda: dilated_attention(q, k, v, pattern),
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(
            by_head[0], by_head[1], by_head[2], is_causal=True
        ),
    }
    print(f"{device}, {dtype}, {tokens} tokens, {heads} heads of {head_width}, {pattern.branches}")
    for name, run in runs.items():
        times = sorted([_seconds(run, device) for _ in range(repeats + 2)][2:])
        middle = times[len(times) // 2]
        print(f"{name:>8}: {middle * 1e3:9.2f} ms (from {times[0] * 1e3:.2f} to {times[-1] * 1e3:.2f})")


def _seconds(run, device: str) -> float:
    import time

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
    summary = _train_with_bar(config)
    model = LongNetForCausalLM.from_pretrained(output / "run" / "model")
    held_out = TokenDataset(output / "data").split("validation")
    tokens = held_out[:stream_bytes]
    print(
        f"\n3. Read {len(tokens)} bytes, {len(tokens) // window} training windows, as one stream; all of it is held out"
    )
    report = _stream_with_bar(model, np.asarray(tokens), window)
    _print_report(report)
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


def _load(path: Path) -> LongNetForCausalLM:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with config.json, such as OUTPUT/model of `longnet train`; got {path}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LongNetForCausalLM.from_pretrained(path)
    torch.nn.Module.to(model, device)
    return model


def _bytes_of(file: Path, max_bytes: int | None) -> np.ndarray:
    """uint16 ids of a file, held on disk: a file of any size takes no memory here."""
    source = np.memmap(file, np.uint8, "r")[:max_bytes]
    with tempfile.TemporaryFile() as scratch:
        ids = np.memmap(scratch, np.uint16, "w+", shape=source.shape)
        for first in range(0, len(source), 1 << 24):
            part = source[first : first + (1 << 24)]
            ids[first : first + len(part)] = part.astype(np.uint16) + text.FIRST_BYTE
    return ids


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "explain": explain,
    "doctor": doctor,
    "bench": bench,
    "demo": demo,
}


def main() -> None:
    """Entry point of the command `longnet`. User errors are one line on standard error and exit code 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="longnet", description=longnet.__doc__)
    except (ValueError, OSError, NonFiniteLoss) as error:
        print(f"longnet: {error}", file=sys.stderr)
        sys.exit(2)
