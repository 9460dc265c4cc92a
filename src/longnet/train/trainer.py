"""The training loop: AdamW, cosine schedule, exact resume. Reports through a callback; prints nothing."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longnet.model import LongNetForCausalLM, LongNetForMaskedLM
from longnet.model.tiles import set_tile
from longnet.plan import Job, best_chunk
from longnet.text import Tokenizer
from longnet.train import checkpoint, parallelize, resume, strategy
from longnet.train.chunked import chunked_backward
from longnet.train.compiled import compile_token_work
from longnet.train.config import TrainConfig, check, identity, model_config, preflight_fields
from longnet.train.data import TokenDataset, WindowSampler
from longnet.train.masking import mask_spans
from longnet.train.monitor import MetricsFile, Monitor, plot
from longnet.train.offload import offload_layer_inputs


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm stopped being a number; raised before the optimizer step."""


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
    run = _Run(config)
    leader = parallelize.is_leader()
    started = time.perf_counter()
    first, loss = run.step, math.nan
    if leader and run.note:
        on_event({"step": run.step, **run.note})
    with _stop_signals() as stop:
        run.signals = stop
        while run.step < config.steps and not run.stopping:
            record = run.advance()
            loss = record["loss"]
            if run.save_error:
                record["save_error"], run.save_error = run.save_error, None
            run.monitor.observe(record, run.model, run.autocast, lambda: bool(stop))  # pyrefly: ignore - looks at no mlm model
            if run.step % config.log_every == 0 or run.step == config.steps or "validation_loss" in record:
                run.log(record)
            if leader:
                on_event(record)
            if run.step % config.save_every == 0 and run.step < config.steps:
                run.save_or_note()
        run.save()
    run.monitor.close()
    finished, picture = run.step >= config.steps, None
    if finished:
        run.export()
        picture = config.output / "loss.png"
        picture = picture if leader and plot(run.metrics.path, picture) else None
    parameters = sum(p.numel() for p in run.model.parameters())
    run.close()
    elapsed = time.perf_counter() - started
    return TrainSummary(run.step, finished, loss, elapsed, parameters, first, tuple(run.skipped), picture)


class _Run:
    """Everything a step changes, with the means to save and restore it."""

    def __init__(self, config: TrainConfig) -> None:
        many = parallelize.world_size() > 1
        if not many:
            check(config)
        self.config = config
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if many and name == "cuda" else name)
        self.autocast = self.device.type == "cuda" if config.bf16 is None else config.bf16
        if many:
            # Checked only after the comparison: a mistake of one rank alone is a disagreement that all ranks report.
            parallelize.connect(preflight_fields(config), self.device, timedelta(seconds=config.timeout))
            check(config)
        dataset = TokenDataset(config.data)
        self.tokenizer = dataset.tokenizer
        self.sampler = WindowSampler(dataset, config.sequence_length, config.batch_size, config.seed)
        leader = parallelize.is_leader()
        self.monitor = Monitor(config if leader else dataclasses.replace(config, tensorboard=False), dataset)
        torch.manual_seed(config.seed)
        self.model = _build(config, self.tokenizer)
        torch.nn.Module.to(self.model, self.device)
        self.parallel: parallelize.Parallel | None = None
        if many:
            shape = (config.sequence_parallel, config.sequence_length, config.batch_size)
            block = parallelize.shard_block(self.model.config)
            self.parallel = parallelize.Parallel(
                *shape, self.device, timedelta(seconds=config.timeout), block
            )
            self.parallel.apply(self.model)
        self.signals: list[int] = []
        self._asked_to_stop = False
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
        config.output.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsFile(
            config.output / "metrics.jsonl", keep_on_error=config.on_save_error == "continue"
        )
        self.note: dict[str, str] = {}
        self.way = self._way(self.restore())
        if self.way["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable()
        chunked, offload = self.way["sequence_strategy"] == "chunked", self.way["offload"]
        if offload and not chunked:
            offload_layer_inputs(self.model)
        set_tile(self.model, self.way["tile_tokens"])
        self.forward: Any = self.model
        # One graph of the whole model would save what the compiler chooses, past the hooks that offload.
        if config.compile and (chunked or offload):
            compile_token_work(self.model)
        elif config.compile:
            self.forward = torch.compile(self.model)

    def _way(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """The options that say how a window is taken: those given, those that a continued run picked, or a fresh pick."""
        auto = self.config.sequence_strategy == "auto"
        if auto and state is not None:
            return state["way"]

        def choose() -> dict[str, Any]:
            look = strategy.picked if auto else strategy.given
            return look(self.config, self.model.config, self.device, self.autocast)

        # The leader's memory decides for all: ranks that differ would wait for each other for ever.
        found = choose() if self.parallel is None else self.parallel.on_leader(choose)
        self.note = found["note"]
        return found["way"]

    def advance(self) -> dict[str, Any]:
        """One optimizer step."""
        config, started = self.config, time.perf_counter()
        self.model.train()
        total, sizes = 0.0, []
        for _ in range(config.accumulation):
            if self.parallel is not None:
                total += self.parallel.backward(self.model, self.sampler, config.accumulation, self.autocast)
            else:
                total += float(self.backward(*self._batch())) / config.accumulation
            sizes.append(self.sampler.bytes_per_token(self.tokenizer.byte_lengths))
        gradient, broken = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip), ""
        if self.parallel is not None:
            # Every rank learns of a broken loss or a signal in the same step, before the optimizer.
            total, self._asked_to_stop, broken = self.parallel.agree(total, bool(self.signals))
            gradient = gradient.full_tensor()  # pyrefly: ignore - a DTensor
            broken = f" (of rank {broken})" if broken else ""
        norm = float(gradient)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {self.step + 1}: loss {total}{broken}, gradient norm {norm}; the weights are those of step {self.step}; "
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
            "bits_per_byte": total / math.log(2) / (sum(sizes) / len(sizes)),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": tokens * self.step,
            "tokens_per_second": tokens / (time.perf_counter() - started),
        }

    def _batch(self) -> tuple[Tensor, Tensor]:
        ids = labels = self.sampler.next_batch()
        if self.config.objective == "mlm":
            # Drawn from the seed and the windows' number: a resumed run masks the same spans.
            ids, labels = mask_spans(ids, (self.config.seed, self.sampler.drawn))
        return ids.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def backward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Add the gradient of the mean loss over a batch, divided by the accumulation; the loss."""
        config = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if self.way["sequence_strategy"] == "chunked":
                targets = torch.cat((labels[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
                job = Job(
                    config=self.model.config, tokens=ids.shape[1], batch=len(ids), autocast=self.autocast
                )
                chunk = self.way["chunk_tokens"] or best_chunk(job, self.way["gradient_checkpointing"])
                return chunked_backward(
                    self.model,
                    ids,
                    targets,
                    chunk,
                    scale=1 / config.accumulation,
                    offload=self.way["offload"],
                )
            loss = self.forward(input_ids=ids, labels=labels).loss
        (loss / config.accumulation).backward()
        return loss.detach()

    def _learning_rate(self) -> float:
        config, step = self.config, self.step + 1
        if step <= config.warmup:
            return config.learning_rate * step / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    @property
    def stopping(self) -> bool:
        """Whether a signal asked this process, or any rank, to stop."""
        return bool(self.signals) if self.parallel is None else self._asked_to_stop

    def log(self, record: dict[str, Any]) -> None:
        if parallelize.is_leader():
            self.metrics.append(record | self.note)
            self.note = {}

    def identity(self) -> dict[str, Any]:
        """What a continuation must share with this run."""
        return identity(self.config) | {"tokenizer": self.tokenizer.name}

    def save(self) -> None:
        states = self.optimizer.state_dict()["state"]
        moments = {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        if self.parallel is not None:
            moments, weights = (
                {name: self.parallel.full(x) for name, x in group.items()} for group in (moments, weights)
            )
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"step": self.step, "data": self.sampler.state_dict(), "config": self.identity()}
        state["way"] = self.way
        groups: checkpoint.Groups = {"weights": weights, "optimizer": moments, "random": random}
        folder = self.config.output / "checkpoints"

        def write() -> str:
            return str(checkpoint.save(folder, self.step, groups, state, self.config.keep))

        write() if self.parallel is None else self.parallel.on_leader(write)

    def export(self) -> None:
        """Write the finished model as a Hugging Face folder."""
        folder, model = self.config.output / "model", self.model
        if self.parallel is not None:
            weights = {name: self.parallel.full(p.detach()) for name, p in self.model.named_parameters()}
            if not parallelize.is_leader():
                return
            model = _build(self.config, self.tokenizer)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
        model.save_pretrained(folder)
        self.tokenizer.save(folder)

    def close(self) -> None:
        if self.parallel is not None:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def save_or_note(self) -> None:
        """Save; a failure stops the run, or is part of the next record."""
        try:
            self.save()
        except checkpoint.CheckpointWriteError as error:
            if self.config.on_save_error == "stop":
                raise
            self.save_error = str(error)

    def _newest(self) -> resume.Found | None:
        found, self.skipped = resume.newest(self.config.output / "checkpoints", self.config.resume)
        if found is not None:
            resume.require_same(found, self.identity(), self.model)
        return found

    def _newest_of_leader(self, parallel: parallelize.Parallel) -> resume.Found | None:
        """As `_newest`: only the leader reads, everybody gets its tensors (sharded) or its error."""
        found: list[Any] = []

        def look() -> dict[str, Any] | None:
            newest = self._newest()
            found.append(None if newest is None else newest.tensors)
            return None if newest is None else newest.state

        state = parallel.on_leader(look)
        if state is None:
            return None
        like = {("weights", name): p for name, p in self.model.named_parameters()}
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = ("exp_avg", "exp_avg_sq")
        like |= {("optimizer", f"{i}.{name}"): p for i, p in enumerate(ordered) for name in moments}
        return resume.Found(None, parallel.distribute(found[0] if found else None, like), state)

    def restore(self) -> dict[str, Any] | None:
        """Continue from the newest intact checkpoint, whose state is returned; drop metrics of steps that will be taken again."""
        found = self._newest() if self.parallel is None else self._newest_of_leader(self.parallel)
        leader = parallelize.is_leader()
        if found is None:
            if leader:
                self.metrics.truncate(0)
            return None
        _, tensors, state = found
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
        if leader:
            self.metrics.truncate(self.step)
        return state


def _build(config: TrainConfig, tokenizer: Tokenizer) -> LongNetForCausalLM | LongNetForMaskedLM:
    kind = LongNetForCausalLM if config.objective == "causal" else LongNetForMaskedLM
    return kind(model_config(config, tokenizer))


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
