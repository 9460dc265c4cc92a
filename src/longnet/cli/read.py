"""The command that reads text with a model: eval."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longnet.cli.models import check_place, load_model
from longnet.integrations.tokenizer import BYTES
from longnet.model import LongNetCache, LongNetForCausalLM
from longnet.text import Tokenizer
from longnet.train.data import TokenDataset
from longnet.train.evaluate import PositionReport, StreamReport, by_position, stream


def evaluate(
    model: Path,
    file: Path,
    chunk: int = 4096,
    max_bytes: int | None = None,
    window: int | None = None,
    windows: int = 16,
    batch_size: int = 1,
    cache_in: Path | None = None,
    cache_out: Path | None = None,
    max_seconds: float | None = None,
) -> None:
    """Bits per byte of the text, and perplexity of its tokens, by position in tokens, with memory that stays flat.

    Without --window the file, of any length, is read as one stream. With it, many windows are each read from nothing: then
    every bucket holds the same number of texts, and a bucket below the one before it, by more than the standard errors,
    says that the longer context helps.

    Args:
        model: Folder of a trained model.
        file: The text, or a directory made by `longnet prepare`, whose held-out documents are read.
        chunk: Tokens read at once.
        max_bytes: Stop after this much of the file.
        window: Predictions in a window.
        windows: Windows, spread over the file.
        batch_size: Windows read at once.
        cache_in: Go on with a stream where this cache, made by --cache-out on the same file, stopped.
        cache_out: Save what was read, to go on later or to generate from it.
        max_seconds: Stop after this long; with --cache-out nothing is lost.
    """
    if window is not None and (cache_in or cache_out or max_seconds is not None):
        raise ValueError(
            "expected --cache-in, --cache-out and --max-seconds without --window: windows are read from nothing"
        )
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"--max-bytes: expected at least 1; got {max_bytes}")
    check_place("--cache-out", cache_out)
    if not file.exists():
        raise ValueError(
            f"file: expected a text, or a directory made by `longnet prepare`; got {file}, which does not exist"
        )
    network, tokenizer = load_model(model)
    ids = _prepared(file, tokenizer, max_bytes) if file.is_dir() else _ids_of(file, tokenizer, max_bytes)
    if window is None:
        cache = LongNetCache.load(cache_in, network.config, network.device) if cache_in else None
        done = cache.host_positions[0] if cache else 0
        if len(ids) - done < 2:
            raise ValueError(
                f"file: expected at least two tokens beyond the {done} that --cache-in has read; got {len(ids)} in {file}"
            )
        if cache is None:
            cache = LongNetCache(network.config, 1, network.device, network.dtype)
        print_report(stream_with_bar(network, ids[done:], chunk, cache, max_seconds, tokenizer.byte_lengths))
        if cache_out:
            cache.save(cache_out)
            print(
                f"read {cache.host_positions[0]} of {len(ids)} tokens so far; go on with --cache-in {cache_out}"
            )
        return
    with _bar(min(windows, (len(ids) - 1) // max(1, window)) * window) as show:
        report = by_position(
            network, ids, window=window, windows=windows, byte_lengths=tokenizer.byte_lengths, batch_size=batch_size,
            chunk=chunk, on_chunk=show,
        )  # fmt: skip
    print_report(report)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int], None]]:
    with tqdm(total=total, unit="token", unit_scale=True, dynamic_ncols=True) as bar:

        def show(tokens: int, cache_bytes: int) -> None:
            bar.update(tokens - bar.n)
            bar.set_postfix_str(f"cache {cache_bytes / 2**20:.2f} MiB")

        yield show


def stream_with_bar(
    model: LongNetForCausalLM,
    ids: np.ndarray,
    chunk: int,
    cache: LongNetCache | None = None,
    max_seconds: float | None = None,
    byte_lengths: np.ndarray | None = None,
) -> StreamReport:
    end = time.monotonic() + (math.inf if max_seconds is None else max_seconds)
    with _bar(len(ids) - 1) as show:
        return stream(
            model, ids, byte_lengths=byte_lengths, chunk=chunk, cache=cache, on_chunk=show,
            stop=lambda: time.monotonic() > end,
        )  # fmt: skip


def print_report(report: StreamReport) -> None:
    errors = report.standard_error if isinstance(report, PositionReport) else None
    print(f"{'positions':>22}  bits per byte  perplexity" + ("  standard error" if errors else ""))
    for i, (bits, perplexity) in enumerate(zip(report.bits_per_byte, report.perplexity, strict=True)):
        low, high = report.borders[i : i + 2]
        error = f"  {errors[i]:>14.3f}" if errors else ""
        print(f"{low:>10} - {high - 1:>9}  {bits:>13.3f}  {perplexity:>10.2f}{error}")
    rate = report.tokens / report.seconds
    where = f"{report.windows} windows, " if isinstance(report, PositionReport) else ""
    print(
        f"{where}{report.tokens} tokens of {report.text_bytes} bytes, mean {report.mean:.3f}, {rate:,.0f} tokens/s, "
        f"cache {report.cache_bytes} bytes"
    )


def _prepared(folder: Path, tokenizer: Tokenizer, max_bytes: int | None) -> np.ndarray:
    """Held-out ids of prepared data."""
    dataset = TokenDataset(folder)
    if dataset.tokenizer.name != tokenizer.name:
        raise ValueError(
            f"file: expected text prepared with the model's tokenizer, {tokenizer.name}; got {folder}, of "
            f"{dataset.tokenizer.name}; give the text itself, or prepare it with --tokenizer MODEL"
        )
    ids = dataset.split("validation")
    if max_bytes is None:
        return ids
    left = max_bytes
    for first in range(0, len(ids), 1 << 20):
        sizes = np.cumsum(tokenizer.byte_lengths[ids[first : first + (1 << 20)]])
        if sizes[-1] > left:
            return ids[: first + np.searchsorted(sizes, left, side="right")]
        left -= sizes[-1]
    return ids


def _ids_of(file: Path, tokenizer: Tokenizer, max_bytes: int | None) -> np.ndarray:
    """Ids of a file, held on disk: a file of any size takes no memory here."""
    if not file.stat().st_size:
        raise ValueError(f"file: expected text; got {file}, which is empty")
    source = np.memmap(file, np.uint8, "r")
    if max_bytes is not None and max_bytes < len(source):
        end = max_bytes
        while tokenizer.name != BYTES.name and end > 0 and source[end] & 0xC0 == 0x80:
            end -= 1  # half a character is no text
        source = source[:end]
    with tempfile.TemporaryFile() as scratch:
        for piece in tokenizer.pieces(source):
            scratch.write(piece.tobytes())
        scratch.flush()
        if not scratch.tell():
            raise ValueError(f"--max-bytes: expected at least the first character of {file}; got {max_bytes}")
        return np.memmap(scratch, tokenizer.dtype, "r")
