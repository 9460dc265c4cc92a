"""`benchmarks/billion.py train`: exact-gradient steps chunk by chunk, checked, estimated and then taken."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from billion_setup import PEAK, build, low_residual, memory
from longnet import LongNetForCausalLM
from longnet.train.chunked import chunked_backward
from longnet.train.compiled import compile_token_work

# Seconds between two lines of progress.
EVERY = 10
# Of the time that is left a step may be planned to take so much.
SHARE = 0.96


def as_tensor(ids: np.ndarray) -> torch.Tensor:
    """(1, N), 16 bits a token: int64 would be 8 GB for a billion. Copied: a file opened for reading cannot be a tensor."""
    return torch.from_numpy(np.array(ids).view(np.int16))[None]


def step_gradients(
    model: LongNetForCausalLM,
    tokens: torch.Tensor,
    device: str,
    chunk: int | None,
    low: bool = True,
    show: Callable | None = None,
) -> torch.Tensor:
    """Add the gradients of the mean loss on tokens (1, N + 1) to .grad, whole or in chunks; the loss."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.autocast(device, torch.bfloat16, enabled=low):
        if chunk:
            return chunked_backward(model, inputs, targets, chunk, on_chunk=show)
        loss = model.token_losses(inputs.to(device).long(), targets=targets.to(device).long()).mean()
    loss.backward()
    return loss.detach()


Gradients = dict[str, torch.Tensor]


def gradients(
    model: LongNetForCausalLM, ids: np.ndarray, device: str, chunk: int | None, low: bool = True
) -> Gradients:
    """All gradients of the mean loss on `ids` (fp32, on the host); whole, or in chunks."""
    model.zero_grad(set_to_none=True)
    step_gradients(model, as_tensor(ids), device, chunk, low)
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(found: Gradients, wanted: Gradients) -> dict:
    """Relative to the norm of what is wanted: of all gradients together, of the middle parameter and of the farthest off."""
    whole = [torch.cat([x.flatten() for x in group.values()]) for group in (found, wanted)]
    each = {name: ((found[name] - x).norm() / x.norm()).item() for name, x in wanted.items()}
    worst = max(each, key=lambda name: each[name])
    together = ((whole[0] - whole[1]).norm() / whole[1].norm()).item()
    return {"all": together, "median": float(np.median([*each.values()])), "worst": each[worst], "of": worst}


def check(model: LongNetForCausalLM, ids: np.ndarray, device: str) -> dict:
    """Relative errors of all gradients on the first 65,536 tokens, against one backward pass over all of them in fp32.

    Raises SystemExit if those of the chunked pass exceed twice those of one pass in the same precision.
    """
    part, low = ids[:65537], device == "cuda"
    exact = gradients(model, part, device, None, False)
    errors = {}
    for name, chunk in (("whole", None), ("chunks_of_8192", 8192), ("chunks_of_10000", 10000)):
        errors[name] = distance(gradients(model, part, device, chunk, low), exact)["all"]
    print("relative gradient errors:", errors, flush=True)
    if max(errors.values()) > 2 * errors["whole"] + 1e-5:
        raise SystemExit(f"chunked gradients are off: {errors}; not timed")
    return errors


class Progress:
    """Seconds of a chunk forward and backward, as they are measured; a line every few seconds with the time that is left."""

    def __init__(self, device: str, name: str, forward: float = 0.0, backward: float = 0.0) -> None:
        self.device, self.name = device, name
        self.times: list[list[float]] = [[], []]
        self.before = forward, backward  # what an estimate said
        self.began = self.last = self.shown = time.perf_counter()

    def seconds(self, backward: bool) -> float:
        """The median of the last hundred, the first of which holds compilation."""
        times = self.times[backward][1:][-100:]
        return float(np.median(times)) if times else self.before[backward]

    def __call__(self, done: int, todo: int) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()  # the host runs ahead
        now, forwards = time.perf_counter(), todo // 2
        self.times[done > forwards].append(now - self.last)
        self.last = now
        if now - self.shown > EVERY or done == todo:
            self.shown = now
            left = max(0, forwards - done) * self.seconds(False)
            left += min(todo - done, todo - forwards) * self.seconds(True)
            peak = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0
            print(
                f"{self.name}: {done} of {todo} chunks, {now - self.began:.0f} s, {left:.0f} s to go, peak {peak:.1f} GiB",
                flush=True,
            )


def estimate(model: LongNetForCausalLM, ids: np.ndarray, options: argparse.Namespace, name: str) -> dict:
    """Seconds of a chunk either way and of a whole step, from four chunks; and their gradients."""
    tokens = as_tensor(ids[: 4 * options.chunk + 1])
    model.zero_grad(set_to_none=True)
    for _ in range(2):  # the first compiles
        progress = Progress(options.device, name)
        model.zero_grad(set_to_none=True)
        step_gradients(model, tokens, options.device, options.chunk, options.device == "cuda", progress)
    chunks = -(-options.tokens // options.chunk)
    forward, backward = progress.seconds(False), progress.seconds(True)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    seconds = (chunks - 1) * forward + chunks * backward
    print(
        f"{name}: {forward:.3f} s a chunk forward, {backward:.3f} backward: {seconds:.0f} s for {options.tokens:,} tokens",
        flush=True,
    )
    return {"name": name, "forward": forward, "backward": backward, "seconds": seconds, "gradients": flat}


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds, as soon as Python has its turn."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def choose(
    model: LongNetForCausalLM, ids: np.ndarray, options: argparse.Namespace, facts: dict, deadline: float
) -> dict:
    """The faster of eager and compiled token-wise work, by estimates; the model is left as it needs it."""
    eager = estimate(model, ids, options, "eager")
    facts["estimates"], best, wanted = [eager], eager, eager.pop("gradients")
    spare = (deadline - time.perf_counter()) * SHARE - eager["seconds"] * options.steps
    # Where the steps fit as they are the compiler gets what they leave: should it fail, they fit still.
    seconds = math.floor(min(options.compile, spare) if spare >= 0 else options.compile)
    if seconds < 1:
        return eager
    before = [(layer, layer.attention_norm._compiled_call_impl) for layer in model.model.layers]
    compile_token_work(model)
    try:
        with at_most(seconds):
            compiled = estimate(model, ids, options, "compiled")
        difference = ((compiled.pop("gradients") - wanted).norm() / wanted.norm()).item()
        compiled["to_eager_gradients"] = difference
        print("relative difference of compiled gradients:", difference, flush=True)
        facts["estimates"].append(compiled)
        # Two roundings of one gradient differ by at most the sum of their errors.
        equal = difference <= 2 * facts["gradient_errors"]["whole"] + 1e-5
        best = compiled if equal and compiled["seconds"] < eager["seconds"] else eager
    except Exception as error:  # a compiler that fails must not end a run that can go on without it
        facts["compile_error"] = f"{type(error).__name__}: {error}"[:2000]
        print("not compiled:", facts["compile_error"], flush=True)
    if best is eager:
        for layer, call in before:
            layer.attention_norm._compiled_call_impl = call
            for owner, method in ((layer, "_feed_forward"), (layer.attention, "_project")):
                vars(owner).pop(method, None)
    return best


def train(
    options: argparse.Namespace, ids: np.ndarray, facts: dict, began: float, write: Callable[[dict], None]
) -> None:
    """Steps of AdamW by `chunked_backward`, all within --max-seconds from `began`: loss, seconds and memory of each."""
    model = build(options, options.tokens).train()
    if options.residual == "bf16":
        low_residual(model, options.device)
    facts["gradient_errors"] = check(model, ids, options.device)
    deadline = began + options.max_seconds
    way = choose(model, ids, options, facts, deadline)
    while options.shrink and way["seconds"] > SHARE * (deadline - time.perf_counter()):
        options.tokens, way["seconds"] = options.tokens // 2, way["seconds"] / 2
        print(
            f"too long for --max-seconds: {options.tokens:,} tokens, about {way['seconds']:.0f} s", flush=True
        )
    if options.device == "cuda":
        torch.cuda.empty_cache()
        memory(options.device)
    facts |= {"parameters": model.num_parameters(), "trained": options.tokens, "chunk": options.chunk, "way": way["name"],
              "residual": options.residual, "preparing_seconds": time.perf_counter() - began}  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    windows, steps = (len(ids) - 1) // options.tokens if options.fresh else 1, []
    for step in range(options.steps):
        if step and time.perf_counter() + steps[-1]["seconds"] > deadline:
            break
        first = step % windows * options.tokens
        tokens = as_tensor(ids[first : first + options.tokens + 1])
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, (step + 1) / max(1, options.warmup))
        steps.append(
            {"first_token": first} | one_step(model, optimizer, tokens, options, way, f"step {step}")
        )
        print(steps[-1], flush=True)
        best = min(s["seconds"] for s in steps)
        flops = model.config.flops_per_token(options.tokens) * options.tokens
        write(
            facts | {"steps": steps, "tokens_per_second": options.tokens / best, "mfu": flops / best / PEAK}
        )


def one_step(
    model: LongNetForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    options: argparse.Namespace,
    way: dict,
    name: str,
) -> dict:
    began = time.perf_counter()
    show = Progress(options.device, name, way["forward"], way["backward"])
    optimizer.zero_grad(set_to_none=True)
    loss = step_gradients(model, tokens, options.device, options.chunk, options.device == "cuda", show)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    return {"loss": loss.item(), "gradient_norm": norm.item(), "seconds": time.perf_counter() - began,
            "chunk_forward_seconds": show.seconds(False), "chunk_backward_seconds": show.seconds(True),
            "peak_gib": memory(options.device)}  # fmt: skip
