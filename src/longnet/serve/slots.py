"""The texts that are being written, as one batch: every slot has a sequence of the cache, logits, and settings to draw by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from longnet.model.cache import LongNetCache
from longnet.model.graph import GraphedStep, unsupported
from longnet.serve.jobs import Completion
from longnet.serve.sampling import sample
from longnet.text import Tokenizer

# An idle place of a captured batch advances with the others; it is sent back now and then.
IDLE_TOKENS = 1024


class Slots:
    """`count` places. A step draws one id in each, then the model reads them, as a CUDA graph where that can be."""

    def __init__(self, model: Any, tokenizer: Tokenizer, count: int) -> None:
        self.model, self.device = model, model.device
        self.cache = LongNetCache(model.config, count, model.device, model.dtype)
        self.cache.reserve_all()  # what does not fit should fail now, and a captured step stays valid
        self._captured = GraphedStep(model, self.cache) if unsupported(model, self.cache) is None else None
        self._logits = torch.zeros(count, model.config.vocab_size, device=self.device)
        self._temperature, self._top_p = torch.zeros(2, count, device=self.device)
        self._seeds, self._steps = torch.zeros(2, count, dtype=torch.int64, device=self.device)
        self._sorted: set[int] = set()  # slots whose top_p asks for an order, the dearest part of a draw
        self._ids = torch.zeros(count, dtype=torch.int64, device=self.device)
        beyond = range(len(tokenizer.spelling), model.config.vocab_size)
        self._never = torch.tensor([*tokenizer.unwritten, *beyond], dtype=torch.int64, device=self.device)

    def put(self, slot: int, cache: LongNetCache, logits: Tensor, job: Completion) -> None:
        """A text joins that has read its prompt: logits (V,) are those of its first id."""
        self.cache.put(slot, cache)
        self._logits[slot] = logits
        self._temperature[slot], self._top_p[slot] = job.temperature, job.top_p
        self._seeds[slot], self._steps[slot] = job.seed, 0
        if job.temperature > 0 and job.top_p < 1:
            self._sorted.add(slot)

    def clear(self, slot: int) -> None:
        """A text leaves; nothing of it stays."""
        self.cache.clear(slot)
        self._sorted.discard(slot)

    def draw(self) -> tuple[list[int], list[int]]:
        """(the next id, whether there was none to draw) of every slot, those of empty ones without meaning."""
        logits = self._logits.index_fill(1, self._never, -torch.inf)
        top_p = self._top_p if self._sorted else None
        self._ids = sample(logits, self._temperature, top_p, self._seeds, self._steps)
        self._steps += 1
        # NaN, +inf, or nothing left: the largest logit tells. One transfer carries ids and health.
        broken = ~logits.amax(-1).isfinite()
        ids, faults = torch.stack((self._ids, broken.long())).tolist()
        return ids, faults

    def read(self, occupied: Collection[int]) -> None:
        """The model reads what was drawn."""
        if self._captured is None:
            reads = torch.tensor([slot in occupied for slot in range(len(self._ids))], device=self.device)
            self._logits = self._forward(self._ids, self.cache, reads.long())
            return
        for slot, position in enumerate(self.cache.host_positions):
            if slot not in occupied and position >= IDLE_TOKENS:
                self.cache.clear(slot)
        self._logits = self._captured(self._ids[:, None]).float()

    def read_alone(self, slot: int) -> None:
        """The same for one slot: where the batch has failed, this tells whose fault it was."""
        alone = self.cache.take([slot])
        logits = self._forward(self._ids[slot : slot + 1], alone)
        self.cache.put(slot, alone)
        self._logits[slot] = logits[0]

    def _forward(self, ids: Tensor, cache: LongNetCache, reads: Tensor | None = None) -> Tensor:
        output = self.model(
            input_ids=ids[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1, lengths=reads
        )
        return output.logits[:, -1].float()
