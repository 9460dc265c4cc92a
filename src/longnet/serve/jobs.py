"""What the engine is asked to do, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longnet.model.cache import LongNetCache


@dataclass(frozen=True)
class Progress:
    """`read` of `total` tokens are read; what is kept of them takes `cache_bytes`."""

    read: int
    total: int
    cache_bytes: int


@dataclass(frozen=True)
class Text:
    """A piece of the continuation. Empty where a token only begins a character, or a stop text may have begun."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of a job: why, how many tokens were written, and what a reading or a call made."""

    reason: str = "stop"
    written: int = 0
    value: Any = None


@dataclass(frozen=True)
class Failed:
    """The job has failed, alone: an HTTP status and what may be told to the client."""

    status: int
    code: str
    message: str


@dataclass(frozen=True)
class Moved:
    """A copy of a session's cache on the device of the model, which may be given instead of the former next time."""

    cache: LongNetCache


Event = Progress | Text | Done | Failed | Moved


class Refused(Exception):
    """The engine takes no work now."""

    def __init__(self, status: int, code: str, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


@dataclass(eq=False, kw_only=True)
class Job:
    """`emit` is called from the engine's thread, with events in order; the last is Done or Failed, unless cancelled."""

    emit: Callable[[Event], None]
    cancelled: bool = False
    created: float = field(default_factory=time.monotonic)

    @property
    def weight(self) -> int:
        """Tokens to read."""
        return 0

    def tell(self, event: Event) -> None:
        """Nothing once it is cancelled, which a receiver that is gone makes it."""
        if self.cancelled:
            return
        try:
            self.emit(event)
        except Exception:
            self.cancelled = True


@dataclass(eq=False, kw_only=True)
class Call(Job):
    """Run `function`, which uses the device, between two steps."""

    function: Callable[[], Any]
    tokens: int = 0

    @property
    def weight(self) -> int:
        return self.tokens


@dataclass(eq=False, kw_only=True)
class Reading(Job):
    """Read ids (n,), at least one, after `prefix`, a cache of one sequence, which stays as it is.

    Done.value: (cache on the device, the same on the CPU), if nothing is to be written.
    """

    ids: np.ndarray
    prefix: LongNetCache | None = None

    @property
    def weight(self) -> int:
        return len(self.ids)


@dataclass(eq=False, kw_only=True)
class Completion(Reading):
    """Read, then write up to `max_tokens` ids."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[bytes] = ()
