"""The training loop: AdamW, cosine schedule, exact resume. Reports through a callback; prints nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from longnet.integrations.tokenizer import byte_tokenizer
from longnet.model import LongNetConfig, LongNetForCausalLM, LongNetForMaskedLM
from longnet.train import checkpoint
from longnet.train.chunked import choose_chunk, chunked_backward
from longnet.train.data import TokenDataset, WindowSampler
from longnet.train.masking import mask_spans
from longnet.train.monitor import Monitor, plot

# May differ between a run and its continuation: they do not change what a step computes.
_FREE_FIELDS = ("data", "output", "save_every", "keep", "log_every", "resume")
_FREE_FIELDS += ("on_save_error", "eval_every", "eval_windows", "sample_every", "tensorboard")


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm stopped being a number; raised before the optimizer step."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `longnet train` does."""

    data: Path
    """Directory made by `longnet prepare`."""
    output: Path
    """Where checkpoints, metrics.jsonl, loss.png and the final model go."""
    objective: Literal["causal", "mlm"] = "causal"
    """causal: predict the next byte; mlm: fill in masked spans with a bidirectional model, to fine-tune it on a task."""
    preset: str = "tiny"
    """Model size: tiny, mini, small, base, large, xl."""
    model: dict[str, Any] = field(default_factory=dict)
    """Overrides of the preset's fields, such as num_hidden_layers=2 segment_lengths=[256,4096] dilation_rates=[1,16]."""
    sequence_length: int = 2048
    """Tokens in a training window."""
    batch_size: int = 4
    """Windows in one forward pass."""
    accumulation: int = 1
    """Forward passes in one optimizer step."""
    steps: int = 1000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup: int = 50
    """Steps of linear warm-up; a cosine to a tenth of the peak follows."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running means of the gradient and of its square."""
    weight_decay: float = 0.1
    """On matrices only; not on norms and embeddings."""
    clip: float = 1.0
    """Largest gradient norm."""
    bf16: bool | None = None
    """bfloat16 autocast; weights, their gradients and AdamW stay float32. None: on CUDA, not on the CPU."""
    compile: bool = False
    """torch.compile the model."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""
    sequence_strategy: Literal["whole", "chunked"] = "whole"
    """whole: a window at once. chunked: exact gradients a chunk at a time, for windows whose activations do not fit."""
    chunk_tokens: int | None = None
    """Tokens of a chunk; None takes the size that needs the least memory."""
    seed: int = 0
    """Of initial weights and data order."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint or a record cannot be written, say on a full disk; the last checkpoint must be written."""
    log_every: int = 1
    """Steps between records in metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on held-out text, by position; 0: none."""
    eval_windows: int = 16
    """Windows of an evaluation."""
    sample_every: int = 0
    """Steps between samples that continue held-out text; 0: none."""
    tensorboard: bool = False
    """Also write everything to OUTPUT/tensorboard."""
    resume: str = "auto"
    """auto: continue from the newest intact checkpoint in the output folder; never: refuse a folder that has one; a path, of
    another run's output folder or of one checkpoint: start there if the output folder has none."""
    device: str = "auto"
    """auto: CUDA where there is one, else CPU."""


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended."""

    step: int
    finished: bool
    loss: float
    seconds: float
    parameters: int
    resumed_from: int
    skipped: tuple[str, ...]
    plot: Path | None = None


def train(
    config: TrainConfig, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> TrainSummary:
    """Train until `steps`, or until SIGTERM, SIGINT or SIGUSR1, which save at the next step boundary and return.

    A killed run continues from its newest intact checkpoint with the same losses, bit for bit on one device.

    Raises:
        ValueError: bad configuration or data, or a checkpoint of a different configuration (each field is named).
        CheckpointWriteError: a checkpoint could not be written; earlier ones are intact.
        NonFiniteLoss: before the optimizer step that it would have spoiled; checkpoints stay as they were.
    """
    _check(config)
    run = _Run(config)
    started = time.perf_counter()
    first, loss = run.step, math.nan
    with _stop_signals() as stop:
        while run.step < config.steps and not stop:
            record = run.advance()
            loss = record["loss"]
            if run.save_error:
                record["save_error"], run.save_error = run.save_error, None
            run.monitor.observe(record, run.model, run.autocast, lambda: bool(stop))
            if run.step % config.log_every == 0 or run.step == config.steps or "validation_loss" in record:
                run.log(record)
            on_event(record)
            if run.step % config.save_every == 0 and run.step < config.steps:
                run.save_or_note()
        run.save()
    run.monitor.close()
    finished, picture = run.step >= config.steps, None
    if finished:
        run.model.save_pretrained(config.output / "model")
        byte_tokenizer().save_pretrained(config.output / "model")
        picture = config.output / "loss.png"
        picture = picture if plot(run.metrics, picture) else None
    parameters = sum(p.numel() for p in run.model.parameters())
    elapsed = time.perf_counter() - started
    return TrainSummary(run.step, finished, loss, elapsed, parameters, first, tuple(run.skipped), picture)


class _Run:
    """Everything a step changes, with the means to save and restore it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        self.autocast = self.device.type == "cuda" if config.bf16 is None else config.bf16
        dataset = TokenDataset(config.data)
        self.sampler = WindowSampler(dataset, config.sequence_length, config.batch_size, config.seed)
        self.monitor = Monitor(config, dataset)
        torch.manual_seed(config.seed)
        self.model = _build(config)
        torch.nn.Module.to(self.model, self.device)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.forward = torch.compile(self.model) if config.compile else self.model
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        matrices = [p for p in self.model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
        others = [p for p in self.model.parameters() if p.dim() < 2 or id(p) in embeddings]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.step, self.skipped = 0, []
        self.save_error: str | None = None
        self.unlogged: list[str] = []
        config.output.mkdir(parents=True, exist_ok=True)
        self.metrics = config.output / "metrics.jsonl"
        self.restore()

    def advance(self) -> dict[str, Any]:
        """One optimizer step."""
        config, started = self.config, time.perf_counter()
        self.model.train()
        total = 0.0
        for _ in range(config.accumulation):
            ids = labels = self.sampler.next_batch()
            if config.objective == "mlm":
                # Drawn from the seed and the windows' number: a resumed run masks the same spans.
                ids, labels = mask_spans(ids, (config.seed, self.sampler.drawn))
            ids, labels = (x.to(self.device, non_blocking=True) for x in (ids, labels))
            total += float(self.backward(ids, labels)) / config.accumulation
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {self.step + 1}: loss {total}, gradient norm {norm}; the weights are those of step {self.step}; "
                "lower the learning rate or look at the data of this step"
            )
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = config.sequence_length * config.batch_size * config.accumulation
        return {
            "step": self.step,
            "loss": total,
            "bits_per_byte": total / math.log(2),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": tokens * self.step,
            "tokens_per_second": tokens / (time.perf_counter() - started),
        }

    def backward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Add the gradient of the mean loss over a batch, divided by the accumulation; the loss."""
        config = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if config.sequence_strategy == "chunked":
                targets = torch.cat((labels[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
                chunk = config.chunk_tokens or choose_chunk(self.model.config, ids.shape[1])
                return chunked_backward(self.model, ids, targets, chunk, scale=1 / config.accumulation)
            loss = self.forward(input_ids=ids, labels=labels).loss
        (loss / config.accumulation).backward()
        return loss.detach()

    def _learning_rate(self) -> float:
        config, step = self.config, self.step + 1
        if step <= config.warmup:
            return config.learning_rate * step / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def log(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl whole lines; under on_save_error="continue" what cannot be written waits for the next time."""
        self.unlogged.append(json.dumps(record) + "\n")
        size = self.metrics.stat().st_size
        try:
            with open(self.metrics, "a") as stream:
                stream.write("".join(self.unlogged))
        except OSError:
            os.truncate(self.metrics, size)
            if self.config.on_save_error == "stop":
                raise
        else:
            self.unlogged.clear()

    def save(self) -> None:
        states = self.optimizer.state_dict()["state"]
        moments = {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"step": self.step, "data": self.sampler.state_dict(), "config": _identity(self.config)}
        groups: checkpoint.Groups = {"weights": weights, "optimizer": moments, "random": random}
        checkpoint.save(self.config.output / "checkpoints", self.step, groups, state, self.config.keep)

    def save_or_note(self) -> None:
        """Save; a failure stops the run, or is part of the next record."""
        try:
            self.save()
        except checkpoint.CheckpointWriteError as error:
            if self.config.on_save_error == "stop":
                raise
            self.save_error = str(error)

    def restore(self) -> None:
        """Continue from the newest intact checkpoint; drop metrics of steps that will be taken again."""
        folder = self.config.output / "checkpoints"
        path, self.skipped = checkpoint.newest(folder)
        if path is not None and self.config.resume == "never":
            raise ValueError(
                f'resume="never": expected an output folder without checkpoints; got {path}; use another folder'
            )
        if path is None and self.skipped:
            raise ValueError(
                f"expected an intact checkpoint in {folder}; got only damaged ones: {'; '.join(self.skipped)}"
            )
        if path is None and self.config.resume not in ("auto", "never"):
            path = self._elsewhere(Path(self.config.resume))
        if path is None:
            self.metrics.write_text("")
            return
        tensors, state = checkpoint.load(path)
        now = _identity(self.config)
        differing = [
            f"{k}: checkpoint {state['config'].get(k)!r}, now {now[k]!r}"
            for k in now
            if state["config"].get(k) != now[k]
        ]
        if differing:
            raise ValueError(
                f"{path} belongs to another configuration; differing: {'; '.join(differing)}; use another output folder"
            )
        wanted = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        found = {name: tuple(t.shape) for name, t in tensors.get("weights", {}).items()}
        if wanted != found or not {"optimizer", "random"} <= tensors.keys():
            names = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
            raise checkpoint.CheckpointCorrupt(
                f"{path}: expected weights, optimizer and random state of this model; got groups {sorted(tensors)}, differing "
                f"weights {names[:5]}"
            )
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors["weights"][name])
        layout = self.optimizer.state_dict()
        layout["state"] = {}
        for key, value in tensors["optimizer"].items():
            index, name = key.split(".", 1)
            layout["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(layout)
        self.sampler.load_state_dict(state["data"])
        torch.set_rng_state(tensors["random"]["cpu"])
        if "cuda" in tensors["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random"]["cuda"], self.device)
        self.step = int(state["step"])
        _truncate_metrics(self.metrics, self.step)

    def _elsewhere(self, source: Path) -> Path:
        """The checkpoint that `resume` names: one, or the newest intact one of another run."""
        if (source / "manifest.json").exists():
            return source
        path, skipped = checkpoint.newest(source / "checkpoints")
        if path is None:
            raise ValueError(
                f'resume: expected "auto", "never", the output folder of a run or one of its checkpoints; got {source}, '
                f"which has no intact checkpoint {'; '.join(skipped)}"
            )
        self.skipped += skipped
        return path


def _truncate_metrics(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break  # a line cut short by a kill; every later step is taken again anyway
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _identity(config: TrainConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return json.loads(json.dumps({k: v for k, v in fields.items() if k not in _FREE_FIELDS}))


def _build(config: TrainConfig) -> LongNetForCausalLM | LongNetForMaskedLM:
    if config.objective == "causal":
        return LongNetForCausalLM(LongNetConfig.preset(config.preset, **config.model))
    return LongNetForMaskedLM(LongNetConfig.preset(config.preset, **{**config.model, "bidirectional": True}))


def _check(config: TrainConfig) -> None:
    known = LongNetConfig.preset(config.preset).to_dict()
    unknown = [name for name in config.model if name not in known]
    if unknown:  # a configuration keeps unknown fields without a word
        raise ValueError(f"model: expected fields of LongNetConfig; got {unknown}; its help lists them")
    try:
        device = torch.device("cpu" if config.device == "auto" else config.device)
    except RuntimeError as error:
        raise ValueError(f'device: expected "auto", "cpu" or "cuda"; got {config.device!r}') from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"device: expected one of the {count} CUDA devices that torch sees, or cpu; got {config.device!r}; `longnet doctor` "
            "says what is there"
        )
    if config.objective == "mlm" and (config.eval_every or config.sample_every):
        raise ValueError(
            "eval_every and sample_every: expected 0 with objective 'mlm', which predicts no next byte; got"
            f" {config.eval_every} and {config.sample_every}"
        )
    for name in (
        "sequence_length",
        "batch_size",
        "accumulation",
        "steps",
        "save_every",
        "keep",
        "log_every",
        "eval_windows",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1; got {getattr(config, name)}")
    for name in ("warmup", "weight_decay", "eval_every", "sample_every"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name}: expected at least 0; got {getattr(config, name)}")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"betas: expected two numbers in [0, 1); got {config.betas}")
    if config.chunk_tokens is not None and config.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected None or at least 1; got {config.chunk_tokens}")
    kinds = LongNetConfig.preset(config.preset, **config.model).attention_kinds()
    if config.sequence_strategy == "chunked" and ("hierarchical" in kinds or config.objective != "causal"):
        raise ValueError(
            "sequence_strategy: expected 'whole' for hierarchical layers and for masked spans; got 'chunked'"
        )
    for name in ("learning_rate", "clip"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: expected a positive number; got {getattr(config, name)}")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that stops being empty when the process is asked to stop. Further signals change nothing."""
    received: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {}
    try:
        for number in signals:
            before[number] = signal.signal(number, lambda n, frame: received.append(n))
    except ValueError:
        pass  # not the main thread: its owner decides about signals
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
