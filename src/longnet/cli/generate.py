"""The command that writes text with a model: generate."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from tqdm import tqdm

from longnet.cli.models import check_place, load_model
from longnet.generate import GenerationOutput
from longnet.generate import generate as generate_ids
from longnet.model import LongNetCache, LongNetForCausalLM
from longnet.text import Tokenizer


def generate(
    model: Path,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    output: Path | None = None,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    target_length: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    repetition_penalty: float = 1.0,
    repetition_window: int = 256,
    no_repeat_ngram: int | None = None,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    cache_in: Path | None = None,
    cache_out: Path | None = None,
    chunk: int = 8192,
    progress: Literal["auto", "always", "never"] = "auto",
) -> None:
    """Continue a text of any length; the continuation is printed as it is written.

    A text that is read once may be asked many times: `--max-new-tokens 0 --cache-out FILE` reads it, `--cache-in FILE` goes
    on from there with another prompt, and leaves FILE as it is.

    Args:
        model: Folder of a trained model.
        prompt: The text to continue; or use --prompt-file.
        prompt_file: A file to continue; "-" reads standard input.
        output: Write the continuation to this file, exactly its bytes, and not to standard output.
        max_new_tokens: Tokens to write at most; those of a model that was trained without --tokenizer are bytes.
        min_new_tokens: Tokens to write at least: the model may not end the text, nor --stop, before.
        target_length: Write exactly this many tokens; instead of the two before.
        temperature: 0 always takes the likeliest token.
        top_k: Sample among the k likeliest.
        top_p: Sample among the fewest tokens that hold this much probability.
        repetition_penalty: Above 1 weakens the tokens among the last --repetition-window; 1 switches it off.
        repetition_window: How far back the penalty looks.
        no_repeat_ngram: Never write the same n tokens twice; 20 or more bytes leave words and phrases alone.
        seed: Makes the result repeatable.
        stop: Texts that end the continuation; it includes them.
        cache_in: Continue what was read before: a file made by --cache-out.
        cache_out: Save what was read and written, to ask again later without reading again.
        chunk: Tokens of the prompt read at once.
        progress: Bars on standard error; auto: where it is a terminal and the text goes elsewhere.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("expected either --prompt or --prompt-file; got both or neither")
    if target_length is not None:
        if min_new_tokens:
            raise ValueError("expected --target-length or --min-new-tokens; got both")
        max_new_tokens = min_new_tokens = target_length
    check_place("--output", output)
    check_place("--cache-out", cache_out)
    network, tokenizer = load_model(model)
    ids = tokenizer.encode(_bytes_of(prompt, prompt_file))
    cache = LongNetCache.load(cache_in, network.config, network.device) if cache_in else None
    elsewhere = output is not None or not sys.stdout.isatty()
    shown = progress == "always" or (progress == "auto" and sys.stderr.isatty() and elsewhere)
    with (
        _Sink(output, tokenizer, stop, min_new_tokens) as sink,
        _Bars(shown, len(ids), max_new_tokens) as bars,
    ):
        result = generate_ids(
            network,
            torch.from_numpy(ids)[None],
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            chunk_size=chunk,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            repetition_window=repetition_window,
            no_repeat_ngram=no_repeat_ngram,
            seed=seed,
            cache=cache,
            forbidden_ids=(*tokenizer.unwritten, *range(len(tokenizer.spelling), network.config.vocab_size)),
            eos_token_id=tokenizer.end,
            on_token=sink.write,
            on_prefill=bars.read,
            on_progress=bars.written,
        )
        sink.finish()
    if cache_out:
        _read_last(network, tokenizer, result)
        result.cache.save(cache_out)


def _bytes_of(prompt: str | None, prompt_file: Path | None) -> bytes | np.ndarray:
    """The prompt; a file is mapped, not read, unless it is a pipe."""
    if prompt_file is None:
        return (prompt or "").encode("utf-8", "surrogateescape")
    if str(prompt_file) == "-":
        return sys.stdin.buffer.read()
    mapped = prompt_file.is_file() and prompt_file.stat().st_size
    return np.memmap(prompt_file, np.uint8, "r") if mapped else prompt_file.read_bytes()


@torch.inference_mode()
def _read_last(network: LongNetForCausalLM, tokenizer: Tokenizer, result: GenerationOutput) -> None:
    """The cache has read everything but the last new id; a text to go on with includes it, an end of text does not."""
    if result.ids[0] and result.ids[0][-1] != tokenizer.end:
        last = torch.tensor([result.ids[0][-1:]], device=network.device)
        network(input_ids=last, past_key_values=result.cache, use_cache=True, logits_to_keep=1)


class _Sink:
    """Standard output, as text, or a file, byte for byte; a file is opened only when there is something to write.

    After `least` tokens it looks for a text that ends everything, which a token may begin, hold or go beyond.
    """

    def __init__(self, path: Path | None, tokenizer: Tokenizer, stop: tuple[str, ...], least: int) -> None:
        self._path, self._tokenizer, self._left = path, tokenizer, least
        self._stops = [text.encode("utf-8", "surrogateescape") for text in stop]
        if b"" in self._stops:
            raise ValueError("--stop: expected texts; got an empty one; leave it out")
        self._tail = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._file: BinaryIO | None = None

    def write(self, _: int, token: int) -> bool:
        """Write a token; whether a stop text is complete, beyond which nothing of the token is written."""
        data = self._tokenizer.decode_bytes([token])
        self._left -= 1
        end = self._stop_in(data) if self._left <= 0 else None
        data = data[:end]
        self._tail = (self._tail + data)[-max(map(len, self._stops), default=1) :]
        if self._path is None:
            print(self._decoder.decode(data), end="", flush=True)
            return end is not None
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(data)
        return end is not None

    def _stop_in(self, data: bytes) -> int | None:
        """Where in `data`, which follows the tail, the first stop text ends."""
        before, text = len(self._tail), self._tail + data
        found = [(text.find(stop, max(0, before - len(stop) + 1)), len(stop)) for stop in self._stops]
        return min((at + size - before for at, size in found if at >= 0), default=None)

    def finish(self) -> None:
        if self._path is None:
            print(self._decoder.decode(b"", final=True))
        elif self._file is None:
            self._path.write_bytes(b"")

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class _Bars:
    """One bar while the prompt is read, one while text is written; nothing if not asked for."""

    def __init__(self, shown: bool, to_read: int, to_write: int) -> None:
        make: dict[str, Any] = {
            "unit": "token",
            "unit_scale": True,
            "dynamic_ncols": True,
            "disable": not shown,
            "file": sys.stderr,
        }
        self._bars = [tqdm(total=to_read, desc="read", **make), tqdm(total=to_write, desc="write", **make)]

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars:
            bar.close()

    def read(self, done: int, total: int) -> None:
        self._bars[0].update(done - self._bars[0].n)

    def written(self, done: int, total: int) -> None:
        self._bars[1].update(done - self._bars[1].n)
