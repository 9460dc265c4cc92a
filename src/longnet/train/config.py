"""What `longnet train` does: its options, their checks, and what of them a continuation may change."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from longnet.integrations.tokenizer import BYTES, require_bytes
from longnet.model import LongNetConfig
from longnet.text import Tokenizer
from longnet.train import parallelize
from longnet.train.data import TokenDataset

# May differ between a run and its continuation: they do not change what a step computes.
_FREE_FIELDS = ("data", "output", "save_every", "keep", "log_every", "resume")
_FREE_FIELDS += ("on_save_error", "eval_every", "eval_windows", "sample_every", "tensorboard")
_FREE_FIELDS += ("sequence_parallel", "timeout", "offload")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `longnet train` does."""

    data: Path
    """Directory made by `longnet prepare`; the model takes its tokenizer, and so the size of its vocabulary, from there."""
    output: Path
    """Where checkpoints, metrics.jsonl, loss.png and the final model go."""
    objective: Literal["causal", "mlm"] = "causal"
    """causal: predict the next token; mlm: fill in masked spans of bytes with a bidirectional model, to fine-tune on a task."""
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
    """torch.compile the model; under chunked or with offload what its layers do to every token alone, which all of them share."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""
    tile_tokens: int | None = None
    """Tokens of a tile: norms, SwiGLU and projections of a layer are computed tile by tile and once more in the backward pass,
    with equal gradients. With gradient_checkpointing, for windows of a million tokens and more. None: all tokens at once."""
    sequence_strategy: Literal["whole", "chunked", "auto"] = "whole"
    """whole: a window at once. chunked: exact gradients a chunk at a time, for windows whose activations do not fit. auto: the
    fastest that fits into the memory that is free when a run begins, recomputed layers included; a continuation keeps it."""
    chunk_tokens: int | None = None
    """Tokens of a chunk; None takes the size that needs the least memory."""
    offload: bool = False
    """What waits for the backward pass does so in host memory: the inputs of layers, with gradient_checkpointing; under chunked
    what later chunks can still see. Under auto it may."""
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
    sequence_parallel: int = 1
    """Ranks that share one window, under torchrun; the other ranks divide the batch. Fewer or more may continue a run."""
    timeout: float = 600
    """Seconds that a rank waits for another, a checkpoint being written included, before it gives up."""


def identity(config: TrainConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return json.loads(json.dumps({k: v for k, v in fields.items() if k not in _FREE_FIELDS}))


def model_config(config: TrainConfig, tokenizer: Tokenizer) -> LongNetConfig:
    """The model that is trained: its vocabulary is the tokenizer's, or larger where `model` says so."""
    fields = dict(config.model)
    if config.objective == "mlm":
        require_bytes(tokenizer, "objective 'mlm'")
        fields["bidirectional"] = True
    if tokenizer.name != BYTES.name:
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
        fields = {"vocab_size": len(tokenizer.spelling)} | ends | fields
    made = preset_config(config.preset, fields)
    if made.vocab_size < len(tokenizer.spelling):
        raise ValueError(
            f"model: expected vocab_size of at least {len(tokenizer.spelling)}, the ids of {config.data}; got {made.vocab_size}; "
            "leave it out"
        )
    return made


def preset_config(preset: str, fields: dict[str, Any]) -> LongNetConfig:
    """A preset with some fields replaced; ValueError for fields that do not exist."""
    known = LongNetConfig.preset(preset).to_dict()
    unknown = [name for name in fields if name not in known]
    if unknown:  # a configuration keeps unknown fields without a word
        raise ValueError(f"model: expected fields of LongNetConfig; got {unknown}; its help lists them")
    return LongNetConfig.preset(preset, **fields)


def preflight_fields(config: TrainConfig) -> dict[str, Any]:
    """What all ranks must agree on before they talk: everything that changes a step, and the text itself."""
    sources, tokenizer, model, problem = "", "", {}, ""
    try:
        check(config)
        meta = TokenDataset(config.data).meta
        sources, tokenizer = meta["sources"], meta["tokenizer"]
        model = LongNetConfig.preset(config.preset, **config.model).to_dict()
    except ValueError as error:
        problem = str(error)
    free = {"sequence_parallel": config.sequence_parallel, "save_every": config.save_every}
    names = ("accumulation", "log_every", "resume", "on_save_error")
    free |= {name: getattr(config, name) for name in names}
    fields = {
        **identity(config),
        **free,
        "data": sources,
        "tokenizer": tokenizer,
        "problem": problem,
        "model": json.loads(json.dumps(model, default=str)),
    }
    fields["dtype"] = "bfloat16" if config.bf16 else str(config.bf16)
    fields.pop("device", None)
    return fields


def check(config: TrainConfig) -> None:
    world = parallelize.world_size()
    if config.sequence_parallel < 1 or not config.timeout > 0:
        raise ValueError(
            f"expected sequence_parallel >= 1 and timeout > 0; got {config.sequence_parallel}, {config.timeout}"
        )
    alone = (
        config.eval_every,
        config.sample_every,
        config.compile,
        config.sequence_strategy == "chunked",
        config.objective,
    )
    if world > 1 and alone != (0, 0, False, False, "causal"):
        raise ValueError(
            "eval_every, sample_every, compile, sequence_strategy, objective: expected 0, 0, False, 'whole' or 'auto' and "
            f"'causal' with {world} ranks; got {alone[:3]}, {config.sequence_strategy!r}, {config.objective!r}; evaluate "
            "checkpoints with `longnet eval`"
        )
    model = preset_config(config.preset, config.model)
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
    for name in ("chunk_tokens", "tile_tokens"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name}: expected None or at least 1; got {getattr(config, name)}")
    _check_strategy(config, model)
    for name in ("learning_rate", "clip"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: expected a positive number; got {getattr(config, name)}")
    if config.sequence_parallel > 1 and model.attention_impl not in (None, "strided"):
        raise ValueError(
            "attention_impl: expected None with sequence_parallel, whose layers attend by library operations; got "
            f"{model.attention_impl!r}"
        )
    shape = (config.sequence_parallel, config.sequence_length, config.batch_size)
    parallelize.check_layout(world, *shape, parallelize.shard_block(model))


def _check_strategy(config: TrainConfig, model: LongNetConfig) -> None:
    hierarchical = "hierarchical" in model.attention_kinds()
    if config.sequence_strategy == "chunked":
        kept_whole = hierarchical and model.hierarchical_pattern().retention is None
        if kept_whole or config.objective != "causal":
            raise ValueError(
                "sequence_strategy: expected 'whole' for masked spans and for hierarchical layers without a retention; got "
                "'chunked'"
            )
    if config.offload and config.sequence_strategy == "whole" and not config.gradient_checkpointing:
        raise ValueError(
            "offload: expected gradient_checkpointing, or sequence_strategy 'chunked' or 'auto', for of a whole window only the "
            "inputs of recomputed layers can wait in host memory; got neither; add --gradient-checkpointing"
        )
    if config.offload and config.sequence_strategy == "chunked" and hierarchical:
        raise ValueError(
            "offload: expected dilated attention in every layer under sequence_strategy 'chunked'; got "
            f"{sorted(set(model.attention_kinds()))}; leave offload out"
        )
    if config.sequence_strategy == "auto":
        if hierarchical or config.objective != "causal":
            raise ValueError(
                "sequence_strategy: expected 'whole' or 'chunked' for masked spans and hierarchical layers, whose memory no "
                "formula tells; got 'auto'"
            )
        given = (config.gradient_checkpointing, config.tile_tokens, config.chunk_tokens)
        if given != (False, None, None):
            raise ValueError(
                "gradient_checkpointing, tile_tokens, chunk_tokens: expected False, None and None where sequence_strategy "
                f"'auto' picks them; got {given}; leave them out or name the strategy"
            )
