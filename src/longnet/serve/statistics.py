"""What the server tells about itself: counts, latencies, memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter, deque
from typing import Any

import torch


class Latency:
    """Percentiles of the last thousand values."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=1000)
        self.count = 0

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self.count += 1

    def report(self) -> dict[str, float | int | None]:
        ordered = sorted(self._last)
        marks = {f"p{p}": _percentile(ordered, p) for p in (50, 90, 99)}
        return {"count": self.count, **marks}


def _percentile(ordered: list[float], percent: int) -> float | None:
    """Nearest rank."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else None


class Statistics:
    """Written by the engine's thread and the server's, read by the server's."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.requests: Counter[str] = Counter()
        self.jobs: Counter[str] = Counter()
        self.tokens_read = self.tokens_written = 0
        self.read_seconds = 0.0
        self.first_token, self.between_tokens, self.whole_job = Latency(), Latency(), Latency()

    def read_rate(self) -> float:
        """Tokens read a second while reading; a guess before anything was."""
        return self.tokens_read / self.read_seconds if self.read_seconds else 10000.0

    def report(self) -> dict[str, Any]:
        return {
            "uptime_seconds": time.monotonic() - self.started,
            "responses": dict(self.requests),
            "jobs": dict(self.jobs),
            "tokens_read": self.tokens_read,
            "tokens_written": self.tokens_written,
            "read_tokens_per_second": self.read_rate() if self.read_seconds else None,
            "seconds": {
                "first_token": self.first_token.report(),
                "between_tokens": self.between_tokens.report(),
                "job": self.whole_job.report(),
            },
            "memory": memory(),
        }


def memory() -> dict[str, int]:
    """Bytes: the process now and at its peak, and what torch holds on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    result = {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    try:
        with open("/proc/self/statm") as file:
            result["resident_bytes"] = int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        pass  # only Linux tells
    if torch.cuda.is_available():
        result["device_bytes"] = torch.cuda.memory_allocated()
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result
