"""What a run tells about itself: metrics.jsonl, held-out bits per byte by position, samples, TensorBoard, the plot, memory."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longnet.generate import generate
from longnet.model import LongNetForCausalLM
from longnet.train.data import TokenDataset
from longnet.train.evaluate import by_position

if TYPE_CHECKING:
    from longnet.train.config import TrainConfig

_SAMPLE_PROMPT = 256
_SAMPLE_TOKENS = 200


class Interrupted(Exception):
    """Stop was asked for in the middle of an evaluation; what was measured so far is dropped."""


class Monitor:
    """Adds to a step's record what is due at this step. Never touches weights or the random state of training."""

    def __init__(self, config: TrainConfig, dataset: TokenDataset) -> None:
        self.config = config
        self.tokenizer = dataset.tokenizer
        self.held_out = dataset.split("validation") if config.eval_every or config.sample_every else None
        if config.eval_every and self.held_out is not None and len(self.held_out) <= config.sequence_length:
            raise ValueError(
                f"eval_every: expected more than {config.sequence_length} held-out tokens, one window; got "
                f"{len(self.held_out)}; prepare more text or set eval_every=0"
            )
        self._make_writer = _summary_writer() if config.tensorboard else None
        self._writer: Any = None

    def observe(
        self, record: dict[str, Any], model: LongNetForCausalLM, autocast: bool, stop: Callable[[], bool]
    ) -> None:
        """Put validation and sample, where due, into the record of the step just taken, and all of it into TensorBoard."""
        step, last = record["step"], record["step"] == self.config.steps
        record["memory_bytes"] = peak_memory(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            if self.config.eval_every and (step % self.config.eval_every == 0 or last) and not stop():
                record |= self._validation(model, stop)
            if self.config.sample_every and (step % self.config.sample_every == 0 or last) and not stop():
                record["sample"] = self._sample(model)
        if self._make_writer is not None:
            if self._writer is None:  # what a killed run wrote of this step and later ones is void
                self._writer = self._make_writer(str(self.config.output / "tensorboard"), purge_step=step)
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, step)
            if "sample" in record:
                self._writer.add_text("sample", record["sample"], step)

    def _validation(self, model: LongNetForCausalLM, stop: Callable[[], bool]) -> dict[str, Any]:
        def on_chunk(tokens: int, cache_bytes: int) -> None:
            if stop():
                raise Interrupted

        assert self.held_out is not None
        config = self.config
        try:
            report = by_position(
                model, self.held_out, window=config.sequence_length, windows=config.eval_windows,
                byte_lengths=self.tokenizer.byte_lengths, batch_size=config.batch_size, on_chunk=on_chunk,
            )  # fmt: skip
        except Interrupted:
            return {}
        return {
            "validation_loss": report.loss,
            "validation_bits_per_byte": report.mean,
            "validation_borders": list(report.borders),
            "validation_by_position": list(report.bits_per_byte),
        }

    def _sample(self, model: LongNetForCausalLM) -> str:
        assert self.held_out is not None
        model.eval()
        never = [*self.tokenizer.unwritten, *range(len(self.tokenizer.spelling), model.config.vocab_size)]
        prompt = torch.from_numpy(np.asarray(self.held_out[:_SAMPLE_PROMPT]).astype(np.int64))[None]
        output = generate(
            model, prompt.to(model.device), max_new_tokens=_SAMPLE_TOKENS, temperature=0.8, top_p=0.95,
            seed=self.config.seed, forbidden_ids=never,
        )  # fmt: skip
        return self.tokenizer.decode_bytes(output.ids[0]).decode("utf-8", "replace")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MetricsFile:
    """metrics.jsonl: a line a record, whole lines only."""

    def __init__(self, path: Path, keep_on_error: bool) -> None:
        self.path, self.keep_on_error = path, keep_on_error
        self._waiting: list[str] = []

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; with `keep_on_error` what cannot be written waits for the next time, else it raises OSError."""
        self._waiting.append(json.dumps(record) + "\n")
        size = self.path.stat().st_size
        try:
            with open(self.path, "a") as stream:
                stream.write("".join(self._waiting))
        except OSError:
            os.truncate(self.path, size)
            if not self.keep_on_error:
                raise
        else:
            self._waiting.clear()

    def truncate(self, step: int) -> None:
        """Keep the records of steps up to `step`: later ones will be taken again."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                break  # a line cut short by a kill; every later step is taken again anyway
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)


def _summary_writer() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard: expected the package tensorboard to be installed; pip install 'longnet-attention[logging]' or leave "
            "tensorboard=False: metrics.jsonl holds the same figures"
        ) from error
    return SummaryWriter


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: tensors on a CUDA device, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot(metrics: Path, picture: Path) -> bool:
    """Draw loss over steps; False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in records], [r["bits_per_byte"] for r in records], label="training")
    held_out = [r for r in records if "validation_bits_per_byte" in r]
    if held_out:
        values = [r["validation_bits_per_byte"] for r in held_out]
        axes.plot([r["step"] for r in held_out], values, "o-", label="held out")
        axes.legend()
    axes.set(xlabel="step", ylabel="bits per byte", title="loss")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return True
