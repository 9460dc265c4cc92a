"""One thread owns the model: chunks of texts that are being read alternate with steps of all texts that are being written.

A text that is being read has a cache of its own; when it is read, the cache is put into a slot of the batch. A step writes
one token in every occupied slot. So a long text delays the others by one chunk at a time, never by its whole length.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet.model.cache import LongNetCache
from longnet.serve.failures import DEAD, judge
from longnet.serve.jobs import Call, Completion, Done, Event, Failed, Job, Moved, Progress, Reading, Refused
from longnet.serve.statistics import Statistics
from longnet.serve.writing import Writing
from longnet.text import Tokenizer

log = logging.getLogger("longnet.serve")

# Texts that are read for themselves at one time; those that will be written are bounded by the slots.
READERS = 2
# Every so many chunks one goes to the text that has been read for longest.
OLDEST = 4


class _Open:
    """A text that is being read: what is read so far."""

    def __init__(self, job: Reading, slot: int | None) -> None:
        self.job, self.slot, self.done = job, slot, 0
        self.cache: Any = None  # made at the first chunk


class Engine:
    """Runs jobs, many at a time. `submit` and `cancel` may be called from any thread.

    Args:
        model: a causal LongNet, or None where only calls are made.
        tokenizer: the model's, or None without one.
        slots: texts written at one time.
        chunk: tokens read at one time, of one text.
        max_waiting: jobs that wait for a place at most.
        max_backlog: tokens that may wait to be read, of all jobs; one job alone is always taken.
        max_wait: seconds that a job may wait for a place.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer | None, *, slots: int = 8, chunk: int = 1024, max_waiting: int = 64,
        max_backlog: int = 1 << 24, max_wait: float = 120.0,
    ) -> None:  # fmt: skip
        self.model, self.chunk = model, chunk
        self.max_waiting, self.max_backlog, self.max_wait = max_waiting, max_backlog, max_wait
        self.statistics = Statistics()
        self.dead: str | None = None
        self.on_death: Callable[[], None] = lambda: None
        self.drain_until: float | None = None
        self._waiting: deque[Job] = deque()
        self._reading: deque[_Open] = deque()
        self._turns = 0
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="longnet-engine", daemon=True)
        with torch.inference_mode():
            self.writing = Writing(model, tokenizer, slots)

    # From other threads.

    def start(self) -> None:
        self._thread.start()

    def warm_up(self) -> None:
        """Read two chunks and write a few tokens: kernels are compiled and graphs captured before the first request.

        Raises:
            ValueError: the model cannot do it.
        """
        events: queue.Queue[Event] = queue.Queue()
        ids = np.full(self.chunk + 1, self.writing.tokenizer.end)
        self.submit(Completion(emit=events.put, ids=ids, max_tokens=3))
        while not isinstance(event := events.get(timeout=600), Done | Failed):
            pass
        if isinstance(event, Failed):
            raise ValueError(f"model: expected one that can read and write; got: {event.message}")
        self.statistics = Statistics()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Refused where the server is full, draining or broken."""
        with self._wake:
            if self.dead is not None:
                raise Refused(503, "engine_dead", "the model has failed; the server is going down", 30)
            if self.drain_until is not None:
                raise Refused(503, "draining", "the server is shutting down", 10)
            backlog = self.backlog()
            if len(self._waiting) >= self.max_waiting or (
                backlog and backlog + job.weight > self.max_backlog
            ):
                raise Refused(
                    429, "overloaded", "too many requests are waiting; try again later", self._delay(backlog)
                )
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job before its next chunk or step; it emits nothing more."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def backlog(self) -> int:
        """Tokens that wait to be read."""
        return sum(job.weight for job in self._waiting) + sum(
            o.job.weight - o.done for o in list(self._reading)
        )

    def drain(self, seconds: float) -> None:
        """Take no more work; what is unfinished after `seconds` fails. Safe in a signal handler: takes no lock."""
        if self.drain_until is None:
            self.drain_until = time.monotonic() + seconds

    def close(self) -> None:
        """Stop now; what is unfinished fails."""
        self.drain_until = 0.0
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)

    def report(self) -> dict[str, Any]:
        cache = 0 if self.model is None else self.writing.slots.cache.nbytes()
        return {
            "waiting": len(self._waiting), "reading": len(self._reading), "writing": len(self.writing.running),
            "free_slots": len(self.writing.free), "backlog_tokens": self.backlog(), "slot_cache_bytes": cache,
        }  # fmt: skip

    def _delay(self, backlog: int) -> int:
        """Seconds until a refused client may find a place: what is to be read, and a job's usual time."""
        usual = self.statistics.whole_job.report()["p50"] or 1.0
        return min(600, max(1, math.ceil(backlog / self.statistics.read_rate() + usual)))

    # The thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
        except (
            BaseException
        ) as error:  # a broken device, or a mistake of ours: nothing can be trusted any more
            log.exception("the engine has died")
            with self._wake:
                self.dead = type(error).__name__
            self._fail_all(DEAD)
            self.on_death()
        else:
            self._fail_all(Failed(503, "draining", "the server is shutting down"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._reading or self.writing.running):
                if self.drain_until is not None:
                    return False
                self._wake.wait(0.2)  # a signal handler cannot notify
        return self.drain_until is None or time.monotonic() < self.drain_until

    def _turn(self) -> None:
        self._drop_cancelled()
        call = self._admit()
        if self._reading:
            opened = self._next()
            if not self._read_chunk(opened):
                self._reading.remove(opened)
        if self.writing.running:
            for job, end in self.writing.step(self.statistics):
                self._end(job, end)
        if call is not None:
            self._call(call)

    def _next(self) -> _Open:
        """The text with least to read, for short ones should not wait for long ones; at times the oldest: none starves."""
        self._turns += 1
        if self._turns % OLDEST == 0:
            return self._reading[0]
        return min(self._reading, key=lambda opened: opened.job.weight - opened.done)

    def _drop_cancelled(self) -> None:
        with self._wake:
            late = time.monotonic() - self.max_wait
            expired = [job for job in self._waiting if job.created < late and not job.cancelled]
            self._waiting = deque(job for job in self._waiting if not job.cancelled and job.created >= late)
        for job in expired:
            self._end(job, Failed(503, "waited_too_long", "no place became free in time; try again later"))
        for opened in [o for o in self._reading if o.job.cancelled]:
            self._reading.remove(opened)
            if opened.slot is not None:
                self.writing.free.append(opened.slot)
            self.statistics.jobs["cancelled"] += 1
        for slot in [slot for slot, running in self.writing.running.items() if running.job.cancelled]:
            self.writing.leave(slot)
            self.statistics.jobs["cancelled"] += 1

    def _admit(self) -> Call | None:
        """Give places to waiting jobs, in order; the first call, if there is one, is the caller's to make."""
        readers = sum(o.slot is None for o in self._reading)
        call: Call | None = None
        with self._wake:
            stay: deque[Job] = deque()
            for job in self._waiting:
                if isinstance(job, Completion) and self.writing.free:
                    self._reading.append(_Open(job, self.writing.free.pop()))
                elif type(job) is Reading and readers < READERS:
                    self._reading.append(_Open(job, None))
                    readers += 1
                elif isinstance(job, Call) and call is None:
                    call = job
                else:
                    stay.append(job)
            self._waiting = stay
        return call

    def _begin(self, job: Reading) -> LongNetCache:
        if job.prefix is None:
            return LongNetCache(self.model.config, 1, self.model.device, self.model.dtype)
        if job.prefix.device == self.model.device:
            return job.prefix.take([0])
        moved = job.prefix.to(self.model.device)
        job.tell(Moved(moved))
        return moved.take([0])

    def _read_chunk(self, opened: _Open) -> bool:
        """Read on; whether there is more to read."""
        job = opened.job
        try:
            if opened.cache is None:
                opened.cache = self._begin(job)
            logits = self._read(opened)
            job.tell(Progress(opened.done, len(job.ids), opened.cache.nbytes()))
            if opened.done < len(job.ids):
                return True
            self._finish_reading(opened, logits)
        except Exception as error:
            failure = judge(error)
            if opened.slot is not None:
                self.writing.free.append(opened.slot)
            self._end(job, failure)
        return False

    def _read(self, opened: _Open) -> Tensor:
        began = time.monotonic()
        part = opened.job.ids[opened.done : opened.done + self.chunk]
        ids = torch.from_numpy(part.astype(np.int64))[None].to(self.model.device)
        output = self.model(input_ids=ids, past_key_values=opened.cache, use_cache=True, logits_to_keep=1)
        if self.model.device.type == "cuda":
            # Without it the host would queue chunks far ahead, and a cancelled text would be read on.
            torch.cuda.current_stream().synchronize()
        opened.done += len(part)
        self.statistics.tokens_read += len(part)
        self.statistics.read_seconds += time.monotonic() - began
        return output.logits[0, -1].float()

    def _finish_reading(self, opened: _Open, logits: Tensor) -> None:
        job, slot = opened.job, opened.slot
        if not isinstance(job, Completion) or slot is None:
            kept = opened.cache.take([0])
            self._end(job, Done(value=(kept, kept if kept.device.type == "cpu" else kept.to("cpu"))))
            return
        self.writing.join(slot, opened.cache, logits, job)

    def _call(self, call: Call) -> None:
        end: Done | Failed
        try:
            end = Done(value=call.function())
        except torch.AcceleratorError:
            self._end(call, DEAD)
            raise
        except Exception as error:
            end = judge(error)
        self._end(call, end)

    # Endings.

    def _end(self, job: Job, end: Done | Failed) -> None:
        if isinstance(end, Done):
            self.statistics.jobs["done"] += 1
            self.statistics.whole_job.add(time.monotonic() - job.created)
        else:
            self.statistics.jobs[end.code] += 1
        job.tell(end)

    def _fail_all(self, failure: Failed) -> None:
        with self._wake:
            writing = [running.job for running in self.writing.running.values()]
            jobs = [*self._waiting, *(o.job for o in self._reading), *writing]
            self._waiting.clear()
        self._reading.clear()
        self.writing.running.clear()
        for job in jobs:
            self._end(job, failure)
