"""Fine-tuning: one loop for all tasks. Keeps the weights that did best on validation; prints nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from longnet.integrations.tokenizer import require_bytes, tokenizer_of_model
from longnet.model import LongNetConfig

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a task's model is trained."""

    preset: str = "tiny"
    """Model size when training from scratch."""
    model: dict[str, str] = field(default_factory=dict)
    """Overrides of configuration fields, values in JSON: --model segment_lengths "[256, 4096]" num_hidden_layers 2."""
    pretrained: Path | None = None
    """Start from this model folder: OUTPUT/model of `longnet train`, either objective."""
    epochs: int = 10
    """Passes over the training documents, at most."""
    max_minutes: float | None = None
    """Wall-clock limit; the learning rate has come down by then."""
    batch_tokens: int = 32768
    """Tokens of a batch, padding included; a longer document is a batch of its own."""
    learning_rate: float = 1e-3
    """Peak; linear warm-up over a twentieth of the training, then cosine to 0."""
    weight_decay: float = 0.05
    """On matrices."""
    clip: float = 1.0
    """Largest gradient norm."""
    dropout: float = 0.1
    """Before the last layer."""
    patience: int = 3
    """Stop after so many epochs without a better validation score."""
    bf16: bool = True
    """bfloat16 autocast on CUDA."""
    seed: int = 0
    """Of new weights, dropout and order."""
    device: str = "auto"
    """auto: CUDA where there is one, else CPU."""


@dataclass(frozen=True)
class FitSummary:
    """How a training ended: score is the validation score of the weights that were kept."""

    steps: int
    epochs: int
    best_epoch: int
    score: float
    seconds: float
    stopped: str


class NonFiniteTaskLoss(ValueError):
    """The loss stopped being a number; raised before the optimizer step it would have spoiled."""


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """bfloat16 on CUDA, if wanted; nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and device.type == "cuda")


def build_model(cls: type[M], config: FitConfig, **fields: Any) -> M:
    """A bidirectional model of class `cls`, fresh or with the layers of `config.pretrained`."""
    torch.manual_seed(config.seed)
    overrides = {
        **{k: _value(k, v) for k, v in config.model.items()},
        **fields,
        "bidirectional": True,
        "classifier_dropout": config.dropout,
    }
    if config.pretrained is None:
        model: Any = cls(LongNetConfig.preset(config.preset, **overrides))
    elif not (config.pretrained / "config.json").is_file():
        raise ValueError(
            f"pretrained: expected a model folder with config.json, such as OUTPUT/model of `longnet train`; got"
            f" {config.pretrained}"
        )
    else:
        # What the saved configuration has no field for, such as a head's dropout, is handed back, not set.
        wanted: dict[str, Any] = {"return_unused_kwargs": True, **overrides}
        loaded: Any = LongNetConfig.from_pretrained(config.pretrained, **wanted)
        base, heads = loaded
        for name, value in heads.items():
            setattr(base, name, value)
        require_bytes(tokenizer_of_model(config.pretrained, base.vocab_size), "pretrained")
        options = {"config": base, "dtype": torch.float32, "use_safetensors": True}  # never a pickle
        model = cls.from_pretrained(config.pretrained, **options)  # pyrefly: ignore
    nn.Module.to(model, pick_device(config.device))
    return model


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name in ("head_offsets", "attention_impl"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError(f"model: {name}: expected a value in JSON; got {value!r}") from None


def length_batches(
    lengths: Sequence[int], batch_tokens: int, generator: np.random.Generator | None = None
) -> list[list[int]]:
    """Indices of documents in batches of similar length: longest x count <= batch_tokens, or one document.

    With a generator, lengths are jittered by 10 % before sorting and the batches are shuffled; every document is in
    exactly one batch either way.
    """
    keys = np.asarray(lengths, float)
    if generator is not None:
        keys = keys * generator.uniform(0.9, 1.1, len(keys))
    batches: list[list[int]] = [[]]
    longest = 0
    for i in np.argsort(keys, kind="stable").tolist():
        longest = max(longest, lengths[i])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    if generator is not None:
        generator.shuffle(batches)
    return [batch for batch in batches if batch]


def pad(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(ids (B, N) int64 padded on the right with 0, lengths (B,) or None where no row is padded)."""
    sizes = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(sizes)), np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    lengths = None if min(sizes) == max(sizes) else torch.tensor(sizes, device=device)
    return on_device(ids, device), lengths


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Does not wait for what the device has to do: a document's head needs dozens of small tensors."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def fit(
    model: nn.Module,
    config: FitConfig,
    batches: Callable[[np.random.Generator], Sequence[Any]],
    loss_of: Callable[[Any], Tensor],
    validate: Callable[[], float],
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> FitSummary:
    """AdamW until the epochs, the minutes or the patience are used up; then the best weights are put back.

    Args:
        batches: an epoch's batches, shuffled by the generator it is given.
        loss_of: the mean loss of a batch.
        validate: higher is better; called in evaluation mode after every epoch.

    Raises:
        NonFiniteTaskLoss: before the optimizer step that it would have spoiled.
    """
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
    )
    generator, started = np.random.default_rng(config.seed), time.perf_counter()
    best, best_state, best_epoch, step, epoch = -math.inf, None, 0, 0, 0
    stopped = "epochs"
    limit = math.inf if config.max_minutes is None else 60 * config.max_minutes
    total = config.epochs * max(1, len(batches(np.random.default_rng(config.seed))))
    for epoch in range(1, config.epochs + 1):
        model.train()
        for batch in batches(generator):
            progress = max(step / total, (time.perf_counter() - started) / limit)
            if progress >= 1:
                break
            with autocast(device, config.bf16):
                loss = loss_of(batch)
            _update(model, optimizer, config, loss, progress, step)
            step += 1
        model.eval()
        with torch.no_grad(), autocast(device, config.bf16):
            score = validate()
        seconds = time.perf_counter() - started
        on_event({"epoch": epoch, "step": step, "score": score, "seconds": seconds})
        if score > best or best_state is None:
            best, best_epoch = score, epoch
            best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if seconds >= limit:
            stopped = "minutes"
            break
        if epoch - best_epoch >= config.patience:
            stopped = "patience"
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return FitSummary(step, epoch, best_epoch, best, time.perf_counter() - started, stopped)


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    loss: Tensor,
    progress: float,
    step: int,
) -> None:
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if not bool(torch.isfinite(loss.detach()) & torch.isfinite(norm)):
        raise NonFiniteTaskLoss(
            f"step {step + 1}: expected a finite loss and gradient; got {float(loss.detach())} and {float(norm)}; lower the"
            " learning rate"
        )
    warm = min(1.0, (progress + 1e-3) / 0.05)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
