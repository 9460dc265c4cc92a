"""The texts that are being written: a token of each at a time, told as text once it is whole characters and no stop text."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from longnet.model.cache import LongNetCache
from longnet.serve.failures import BROKEN, judge
from longnet.serve.jobs import Completion, Done, Failed, Text
from longnet.serve.slots import Slots
from longnet.serve.statistics import Statistics
from longnet.text import Tokenizer


class Running:
    """A text that is being written."""

    def __init__(self, job: Completion, spelling: Sequence[bytes]) -> None:
        self.job, self.writer = job, Writer(spelling, job.stop)
        self.written, self.last = 0, time.monotonic()


class Writing:
    """Up to `count` texts, each in a slot of the batch; none without a model."""

    def __init__(self, model: Any, tokenizer: Tokenizer | None, count: int) -> None:
        self.running: dict[int, Running] = {}
        self.free = list(range(count))
        if model is not None and tokenizer is not None:
            self.model, self.tokenizer = model, tokenizer
            self.slots = Slots(model, tokenizer, count)

    def join(self, slot: int, cache: LongNetCache, logits: Tensor, job: Completion) -> None:
        """A text that has read its prompt, into a slot taken from `free`."""
        self.slots.put(slot, cache, logits, job)
        self.running[slot] = Running(job, self.tokenizer.spelling)

    def leave(self, slot: int) -> Completion:
        running = self.running.pop(slot)
        self.slots.clear(slot)
        self.free.append(slot)
        return running.job

    def step(self, statistics: Statistics) -> Iterator[tuple[Completion, Done | Failed]]:
        """One token of every text, which the model then reads.

        Gives the jobs that end, one by one: when the device breaks later in the step, all that are not yet told are still here.
        """
        tokens, faults = self.slots.draw()
        for slot, running in list(self.running.items()):
            end = BROKEN if faults[slot] else self._add(running, tokens[slot], statistics)
            if end is not None:
                yield self.leave(slot), end
        if self.running:
            yield from self._read()

    def _add(self, running: Running, token: int, statistics: Statistics) -> Done | None:
        """Tell what a token adds; the end, if it is there."""
        job, now = running.job, time.monotonic()
        latency = statistics.between_tokens if running.written else statistics.first_token
        latency.add(now - (running.last if running.written else job.created))
        running.written, running.last = running.written + 1, now
        statistics.tokens_written += 1
        stopped = token == self.tokenizer.end
        piece = "" if stopped else running.writer.add(token)
        stopped = stopped or running.writer.stopped
        ended = stopped or running.written == job.max_tokens
        if ended:
            piece += running.writer.finish()
        if piece:
            job.tell(Text(piece))
        return Done("stop" if stopped else "length", running.written) if ended else None

    def _read(self) -> Iterator[tuple[Completion, Failed]]:
        """The model reads what was written. Where the batch fails, each alone tells whose fault it was; others go on."""
        before = self.slots.cache.host_positions
        try:
            self.slots.read(self.running)
            return
        except Exception as error:
            failure = judge(error)
        # Where some layers may have read the token and some not, no state can be trusted.
        torn = (
            self.slots.cache.host_positions != before or "hierarchical" in self.model.config.attention_kinds()
        )
        for slot in list(self.running):
            if torn or not self._read_alone(slot):
                yield self.leave(slot), failure

    def _read_alone(self, slot: int) -> bool:
        try:
            self.slots.read_alone(slot)
        except Exception as error:
            judge(error)
            return False
        return True


class Writer:
    """Ids to text, up to the first stop text: holds back what may be its beginning, and unfinished characters.

    A stop text may begin and end within tokens. Of several, the one counts that is complete first.

    Args:
        spelling: the bytes of every id.

    Example:
        >>> writer = Writer([b"to th", b"e", b" EN", b"D", b"Ds"], [b"END"])
        >>> [writer.add(token) for token in (0, 1, 2, 2, 4, 1)], writer.stopped
        (['to th', 'e', ' ', 'EN ', '', ''], True)
    """

    def __init__(self, spelling: Sequence[bytes], stops: Sequence[bytes]) -> None:
        self.spelling, self.stops, self.stopped = spelling, stops, False
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        if self.stopped:
            return ""
        self._held += self.spelling[token]
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)[1]], True
            return self.finish()
        ready = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
        piece, self._held = self._held[:ready], self._held[ready:]
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, b""
        return self._decoder.decode(held, final=True)


def _overlap(data: bytes, stop: bytes) -> int:
    """Length of the longest end of `data` that is a beginning of `stop`, and not all of it."""
    return next((n for n in range(min(len(data), len(stop) - 1), 0, -1) if data.endswith(stop[:n])), 0)
