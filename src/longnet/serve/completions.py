"""A completion as OpenAI's objects."""

from __future__ import annotations

import secrets
import time
from typing import Any

from longnet.serve.jobs import Done, Event, Progress, Text


class Answer:
    """What the events of a completion become.

    Args:
        model: its name towards clients.
        cached: tokens of a session, which are not read again.
        read: tokens that are.
        include_usage: at the end of a stream.
    """

    def __init__(self, model: str, cached: int, read: int, include_usage: bool) -> None:
        self._cached, self._prompt, self._include_usage = cached, cached + read, include_usage
        self._parts: list[str] = []
        self._base = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": model,
        }  # fmt: skip

    def _chunk(self, content: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": content, "logprobs": None, "finish_reason": reason}
        return {**self._base, "choices": [choice]}

    def _usage(self, written: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt, "completion_tokens": written, "total_tokens": self._prompt + written,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }  # fmt: skip

    def stream(self, event: Event) -> list[Any]:
        """What an event adds to a stream."""
        if isinstance(event, Progress):
            return [f"read {event.read} of {event.total}"]
        if isinstance(event, Text):
            return [self._chunk(event.text, None)]
        assert isinstance(event, Done)
        last = [self._chunk("", event.reason)]
        if self._include_usage:
            last.append({**self._base, "choices": [], "usage": self._usage(event.written)})
        return last

    def whole(self, event: Event) -> dict[str, Any] | None:
        """The whole answer, at the last event."""
        if isinstance(event, Text):
            self._parts.append(event.text)
        if not isinstance(event, Done):
            return None
        return {**self._chunk("".join(self._parts), event.reason), "usage": self._usage(event.written)}
