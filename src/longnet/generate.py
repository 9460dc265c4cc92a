"""Generation: prefill in chunks, then one token a step. Knows ids, not text; memory is bounded by the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from longnet.model.cache import LongNetCache
from longnet.model.graph import GraphedStep, unsupported
from longnet.model.transformer import LongNetForCausalLM


@dataclass
class GenerationOutput:
    """What `generate` made.

    ids: new ids of every sequence, the end id or stop sequence included.
    cache: it has read everything but each sequence's last new id. To continue, pass it with that id as `input_ids`.
    finish_reasons: per sequence "eos", "stop", "length", or "exhausted": no_repeat_ngram left no id to write.
    """

    ids: list[list[int]]
    cache: LongNetCache
    finish_reasons: list[str]


@dataclass
class _Sampler:
    """logits (B, V) -> ids (B,), without a host synchronisation."""

    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    recent: Tensor | None  # (B, window) ring of the last ids; an id of V marks an empty place
    generator: torch.Generator | None
    step: int = 0
    never: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.never is not None:
            logits = logits.index_fill(1, self.never, -torch.inf)
        if self.recent is not None:
            vocabulary = logits.shape[1]
            seen = torch.zeros(len(logits), vocabulary + 1, dtype=torch.bool, device=logits.device)
            seen = seen.scatter_(1, self.recent.clamp(max=vocabulary), True)[:, :vocabulary]
            penalty = self.repetition_penalty
            weakened = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(seen, weakened, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = self._truncate(logits / self.temperature)
        # Argmax of logits + Gumbel noise is a draw from the softmax; unlike multinomial it never waits for the host.
        uniform = torch.rand(logits.shape, generator=self.generator, device=logits.device)
        tiny = torch.finfo(uniform.dtype).tiny
        noise = -torch.log((-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny))
        return (logits + noise).argmax(-1)

    def _truncate(self, logits: Tensor) -> Tensor:
        if self.top_k is not None and self.top_k < logits.shape[1]:
            weakest = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < weakest, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = logits.sort(-1, descending=True)
            mass = torch.softmax(ordered, -1)
            # An id stays if the ids before it do not yet reach top_p; so the first always stays.
            cut = mass.cumsum(-1) - mass >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), -torch.inf)
        return logits

    def remember(self, ids: Tensor) -> None:
        if self.recent is not None:
            self.recent[:, self.step % self.recent.shape[1]] = ids
            self.step += 1


class RepeatedNGrams:
    """The ids that would repeat an n-gram of what one sequence has written: O(n) a token, however long the text.

    Example:
        >>> repeats = RepeatedNGrams(3)
        >>> for token in (1, 2, 3, 1, 2):
        ...     repeats.add(token)
        >>> repeats.forbidden()
        {3}
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._last: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], set[int]] = {}

    def add(self, token: int) -> None:
        if len(self._last) == self.size - 1:
            self._followers.setdefault(self._last, set()).add(token)
        self._last = (*self._last, token)[-(self.size - 1) :] if self.size > 1 else ()

    def forbidden(self) -> set[int]:
        """Empty until an n-gram could be complete."""
        return self._followers.get(self._last, set())


@dataclass
class _Progress:
    """Host-side bookkeeping: O(1) per step and sequence."""

    ends: frozenset[int]
    stops: list[list[int]]
    ids: list[list[int]]
    reasons: list[str | None]
    least: int = 0
    never: frozenset[int] = frozenset()
    repeats: list[RepeatedNGrams] = field(default_factory=list)

    def forbidden(self, b: int) -> set[int]:
        """Ids that sequence b may not write next."""
        repeated = self.repeats[b].forbidden() if self.repeats else set()
        return repeated | self.ends if len(self.ids[b]) < self.least else repeated

    def add(self, b: int, token: int) -> None:
        self.ids[b].append(token)
        if self.repeats:
            self.repeats[b].add(token)
        if len(self.ids[b]) >= self.least and token in self.ends:
            self.reasons[b] = "eos"
        elif any(self.ids[b][-len(stop) :] == stop for stop in self.stops):
            self.stop(b)

    def stop(self, b: int) -> None:
        """End sequence b, unless it has ended or is too short."""
        if self.reasons[b] is None and len(self.ids[b]) >= self.least:
            self.reasons[b] = "stop"


@torch.inference_mode()
def generate(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    lengths: Sequence[int] | Tensor | None = None,
    chunk_size: int = 8192,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    repetition_window: int = 256,
    no_repeat_ngram: int | None = None,
    forbidden_ids: Sequence[int] = (),
    eos_token_id: int | Sequence[int] | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    seed: int | None = None,
    cache: LongNetCache | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> GenerationOutput:
    """Read `input_ids` in chunks, then write up to `max_new_tokens` ids for every sequence.

    Args:
        model: called as model(input_ids, past_key_values, use_cache=True, logits_to_keep=1, lengths) -> .logits (B, 1, V).
        input_ids: (B, N) ids, padded on the right where `lengths` (B,) says so; every sequence has at least one. Any integer
            dtype, and may stay in host memory: only a chunk of them is on the model's device at a time.
        max_new_tokens, min_new_tokens: before the least, no end id is drawn and no stop sequence ends anything; equal, they
            are the length of what is written.
        chunk_size: tokens read at once: bounds the memory of prefill.
        temperature: 0 takes the likeliest id; else the softmax temperature.
        top_k, top_p: sample among the k likeliest, or the fewest that hold mass p.
        repetition_penalty: > 1 weakens ids among the last `repetition_window`.
        no_repeat_ngram: n: no n ids that a sequence has written follow each other in it again; the prompt does not count.
        forbidden_ids: never written.
        eos_token_id: id or ids that end a sequence; `stop_sequences`: id lists that do.
        seed: makes sampling repeatable on one device.
        cache: continue what this cache has read.
        on_token: called with (sequence, id) for every new id, as soon as it is known; True ends that sequence like a stop
            sequence.
        on_prefill: called with (tokens read, tokens to read) after every chunk.
        on_progress: called with (ids written by the longest sequence, max_new_tokens) after every step.

    Raises:
        ValueError: arguments out of range. FloatingPointError: the model gave NaN or +inf logits.

    Example:
        >>> from longnet import LongNetConfig, LongNetForCausalLM
        >>> model = LongNetForCausalLM(LongNetConfig.preset("tiny", num_hidden_layers=1))
        >>> first = generate(model, torch.tensor([[70, 71, 72]]), max_new_tokens=5, seed=0)
        >>> more = generate(model, torch.tensor([first.ids[0][-1:]]), max_new_tokens=5, cache=first.cache)
        >>> more.cache.host_positions
        (12,)
    """
    _check(input_ids, max_new_tokens, chunk_size, temperature, top_k, top_p)
    if repetition_penalty <= 0 or repetition_window < 1:
        raise ValueError(
            "expected repetition_penalty > 0 and repetition_window >= 1; got"
            f" {repetition_penalty} and {repetition_window}; 1.0 switches the penalty off"
        )
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"min_new_tokens: expected 0 .. {max_new_tokens}, which is max_new_tokens; got {min_new_tokens}"
        )
    if no_repeat_ngram is not None and no_repeat_ngram < 1:
        raise ValueError(
            f"no_repeat_ngram: expected an integer >= 1; got {no_repeat_ngram}; None allows repeats"
        )
    host = _host_lengths(input_ids, lengths)
    stops = [list(stop) for stop in stop_sequences]
    if any(not stop for stop in stops):
        raise ValueError("stop_sequences: expected lists of at least one id; got an empty one; leave it out")
    cache = _cache(model, cache, len(host))
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    for name, ids in (("eos_token_id", ends), ("forbidden_ids", forbidden_ids)):
        if any(not isinstance(i, Integral) or i < 0 for i in ids):
            raise ValueError(f"{name}: expected ids >= 0; got {list(ids)}")
    repeats = [] if no_repeat_ngram is None else [RepeatedNGrams(no_repeat_ngram) for _ in host]
    progress = _Progress(
        frozenset(ends),
        stops,
        [[] for _ in host],
        [None] * len(host),
        min_new_tokens,
        repeats=repeats,
    )
    logits = _prefill(model, input_ids, host, cache, chunk_size, on_prefill)
    progress.never = frozenset(i for i in forbidden_ids if i < logits.shape[1])
    generator = None
    if seed is not None:
        generator = torch.Generator(device=logits.device).manual_seed(seed)
    recent = None
    if repetition_penalty != 1:
        recent = _recent(input_ids, host, repetition_window, logits)
    sampler = _Sampler(temperature, top_k, top_p, repetition_penalty, recent, generator)
    if progress.never:
        sampler.never = torch.tensor(list(progress.never), device=logits.device)
    _decode(model, logits, cache, sampler, progress, max_new_tokens, on_token, on_progress)
    return GenerationOutput(progress.ids, cache, [reason or "length" for reason in progress.reasons])


def _prefill(
    model: Any,
    input_ids: Tensor,
    lengths: list[int],
    cache: LongNetCache,
    chunk_size: int,
    on_prefill: Callable[[int, int], None] | None,
) -> Tensor:
    """Read all ids; logits (B, V) after each sequence's last one."""
    last: Tensor | None = None
    longest = max(lengths)
    for begin in range(0, longest, chunk_size):
        chunk = input_ids[:, begin : min(begin + chunk_size, longest)].to(cache.device, torch.int64)
        n = chunk.shape[1]
        part = [min(max(length - begin, 0), n) for length in lengths]
        logits = _step(model, chunk, cache, None if min(part) == n else part)
        if last is None:
            last = logits  # every sequence has a first id
        else:
            reads = torch.tensor([m > 0 for m in part], device=logits.device)
            last = torch.where(reads[:, None], logits, last)
        if on_prefill is not None:
            on_prefill(begin + n, longest)
    assert last is not None
    return last


def _step(model: Any, ids: Tensor, cache: LongNetCache, lengths: list[int] | None) -> Tensor:
    """Logits (B, V) in fp32 at each sequence's last valid token of `ids`."""
    valid = None if lengths is None else torch.tensor(lengths, device=ids.device)
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, lengths=valid)
    return output.logits[:, -1].float()


def _decode(
    model: Any,
    logits: Tensor,
    cache: LongNetCache,
    sampler: _Sampler,
    progress: _Progress,
    max_new_tokens: int,
    on_token: Callable[[int, int], bool | None] | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    captured = GraphedStep(model, cache) if _can_capture(model, cache) else None
    for step in range(max_new_tokens):
        ids = sampler(_forbid(logits, progress))
        broken = torch.isnan(logits).any(-1) | (logits == torch.inf).any(-1)
        # One transfer per step carries the ids and the health of the logits.
        tokens, faults = torch.stack((ids, broken.long())).tolist()
        active = [reason is None for reason in progress.reasons]
        for b, token in enumerate(tokens):
            if not active[b]:
                continue
            if faults[b]:
                raise FloatingPointError(
                    f"expected finite logits; got NaN or +inf for sequence {b} at new token {step}; "
                    "check the weights and the dtype of the model"
                )
            progress.add(b, token)
            if on_token is not None and on_token(b, token):
                progress.stop(b)
        if on_progress is not None:
            on_progress(max(map(len, progress.ids)), max_new_tokens)
        if step + 1 == max_new_tokens or None not in progress.reasons:
            return
        sampler.remember(ids)
        going = [int(reason is None) for reason in progress.reasons]
        if captured is not None and all(going):
            logits = captured(ids[:, None]).float()
        else:
            logits = _step(model, ids[:, None], cache, None if all(going) else going)


def _forbid(logits: Tensor, progress: _Progress) -> Tensor:
    """logits (B, V) with -inf where an id may not come next; a sequence with no id left ends here."""
    places: list[tuple[int, int]] = []
    for b, reason in enumerate(progress.reasons):
        if reason is not None:
            continue
        forbidden = progress.forbidden(b)
        if len(forbidden | progress.never) >= logits.shape[1]:
            progress.reasons[b] = "exhausted"
        places += [(b, token) for token in forbidden if token < logits.shape[1]]
    if not places:
        return logits
    rows, columns = torch.tensor(places, device=logits.device).T
    return logits.index_put((rows, columns), logits.new_tensor(-torch.inf))


def _can_capture(model: Any, cache: LongNetCache) -> bool:
    """Whether steps may run as a CUDA graph: one of our models, on a GPU, without hierarchical layers."""
    return isinstance(model, LongNetForCausalLM) and unsupported(model, cache) is None


def _recent(input_ids: Tensor, lengths: list[int], window: int, logits: Tensor) -> Tensor:
    """(B, window): the last ids of every prompt, the oldest first; V where there are none. `logits` (B, V) are their next."""
    recent = torch.full((len(lengths), window), logits.shape[1], device=logits.device)
    for b, n in enumerate(lengths):
        tail = input_ids[b, max(0, n - window) : n]
        recent[b, window - len(tail) :] = tail
    return recent


def _cache(model: Any, cache: LongNetCache | None, batch: int) -> LongNetCache:
    if cache is None:
        parameter = next(model.parameters())
        return LongNetCache(model.config, batch, parameter.device, parameter.dtype)
    if cache.batch_size != batch:
        raise ValueError(
            f"cache: expected one of {batch} sequences like input_ids; got {cache.batch_size}; "
            "use cache.batch_select_indices or batch_repeat_interleave"
        )
    return cache


def _host_lengths(input_ids: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
    batch, n = input_ids.shape
    if lengths is None:
        return [n] * batch
    host = [int(x) for x in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    if len(host) != batch or min(host) < 1 or max(host) > n:
        raise ValueError(f"lengths: expected {batch} integers in [1, {n}]; got {host}; one per sequence")
    return host


def _check(
    input_ids: Tensor,
    max_new_tokens: int,
    chunk_size: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if input_ids.dim() != 2 or min(input_ids.shape) < 1 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids: expected integers (B, N), at least 1 x 1; got {input_ids.dtype} of shape"
            f" {tuple(input_ids.shape)}; begin an empty text with the model's first special id"
        )
    if max_new_tokens < 0 or chunk_size < 1:
        raise ValueError(
            f"expected max_new_tokens >= 0 and chunk_size >= 1; got {max_new_tokens} and {chunk_size}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number >= 0; got {temperature}; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected an integer >= 1; got {top_k}; None keeps all ids")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1]; got {top_p}; None keeps all ids")
