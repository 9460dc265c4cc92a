"""Bodies of requests: JSON to checked values. What is wrong is said briefly, all at once, whatever was sent."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longnet.serve.gate import ApiError
from longnet.text import Tokenizer

SHOWN_ERRORS, SHOWN_CHARACTERS = 10, 100
MAX_STOPS, MAX_STOP_BYTES = 4, 256
MAX_TEXTS = 64

# OpenAI's own fields that may stand in a request as long as they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object; NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "invalid_json", "expected JSON; got too deep a nesting") from None
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"expected JSON in UTF-8; got {_short(str(error))}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", f"expected a JSON object; got {type(value).__name__}")
    return value


class Fields:
    """Takes fields out of a JSON object and collects what is wrong with them."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data, self.wrongs = dict(data), 0
        self._messages: list[str] = []
        self._first: str | None = None

    def wrong(self, name: str, expected: str, got: Any) -> None:
        self.wrongs += 1
        self._first = self._first or name[:SHOWN_CHARACTERS]
        if len(self._messages) < SHOWN_ERRORS:
            self._messages.append(f"{_short(name)}: expected {expected}; got {_short(got)}")

    def take(self, name: str, default: Any, expected: str, valid: Callable[[Any], bool]) -> Any:
        """The field's value; the default where it is missing, null or wrong."""
        value = self._data.pop(name, None)
        if value is None:
            return default
        if not valid(value):
            self.wrong(name, expected, value)
            return default
        return value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        return self.take(
            name, default, f"an integer from {low} to {high}", lambda x: type(x) is int and low <= x <= high
        )

    def number(self, name: str, default: float, expected: str, low: float, high: float) -> float:
        def valid(x: Any) -> bool:
            return type(x) in (int, float) and abs(x) < 1e300 and math.isfinite(x) and low <= x <= high

        return float(self.take(name, default, expected, valid))

    def flag(self, name: str) -> bool:
        return self.take(name, False, "true or false", lambda x: isinstance(x, bool))

    def string(self, name: str, default: Any = None) -> Any:
        return self.take(name, default, "a string", lambda x: isinstance(x, str))

    def finish(self) -> None:
        """Raises ApiError 400 if anything was wrong, or is left."""
        for name, value in self._data.items():
            self.wrong(name, "no such field", value)
        if self.wrongs:
            more = self.wrongs - len(self._messages)
            message = "; ".join(self._messages) + (f"; and {more} more" if more else "")
            raise ApiError(400, "invalid_request", message, param=self._first)


def _short(value: Any) -> str:
    """At most 100 characters of a value, without formatting all of a large one."""
    if isinstance(value, str):
        cut = value[:SHOWN_CHARACTERS]
    elif isinstance(value, list | dict):
        return f"{type(value).__name__} of {len(value)}"
    elif type(value) is int:
        cut = str(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"
    else:
        cut = str(value)
    return cut.encode("ascii", "backslashreplace").decode()[:SHOWN_CHARACTERS]


@dataclass(frozen=True)
class CompletionRequest:
    """A checked body of /v1/completions.

    prompt: UTF-8 bytes that are no ids yet, or ids.
    """

    model: str | None
    prompt: bytes | np.ndarray
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[bytes, ...]
    seed: int
    stream: bool
    include_usage: bool
    session_id: str | None


def completion_request(body: bytes, max_tokens: int, tokenizer: Tokenizer) -> CompletionRequest:
    """Raises ApiError 400 for a wrong body, 404 is the caller's."""
    fields = Fields(parse_json(body))
    model = fields.string("model")
    session = fields.string("session_id")
    prompt = _prompt(fields, session is not None, tokenizer)
    request = CompletionRequest(
        model=model,
        prompt=prompt,
        max_tokens=fields.integer("max_tokens", 16, 1, max_tokens),
        temperature=fields.number("temperature", 1.0, "a number from 0 to 2", 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, "a number above 0, at most 1", 1e-9, 1.0),
        stop=_stops(fields),
        seed=fields.integer("seed", secrets.randbits(62), -(2**63), 2**63 - 1),
        stream=fields.flag("stream"),
        include_usage=_include_usage(fields),
        session_id=session,
    )
    for name, values in _NEUTRAL.items():
        fields.take(
            name, None, f"{json.dumps(values[0]) if values else 'null'}, nothing else is supported",
            lambda x, values=values: any(type(x) in (type(v), float) and x == v for v in values),
        )  # fmt: skip
    fields.string("user")
    fields.finish()
    return request


def _prompt(fields: Fields, continues: bool, tokenizer: Tokenizer) -> bytes | np.ndarray:
    """UTF-8 bytes, or ids. An empty text begins after the end of another one; in a session it is nothing to add."""
    value = fields.take("prompt", "", "a string, or a list of token ids", lambda x: isinstance(x, str | list))
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError:
            fields.wrong("prompt", "Unicode text", "a lone surrogate")
            return b""
        return data if data or continues else np.array([tokenizer.end], tokenizer.dtype)
    size = len(tokenizer.spelling)
    if any(type(x) is not int or not 0 <= x < size for x in value):
        several = bool(value) and all(isinstance(x, str | list) for x in value)
        fields.wrong(
            "prompt",
            "one prompt a request" if several else f"token ids from 0 to {size - 1}",
            f"{len(value)} of them" if several else "others",
        )
        return b""
    return np.array(value if value or continues else [tokenizer.end], tokenizer.dtype)


def _stops(fields: Fields) -> tuple[bytes, ...]:
    expected = f"up to {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes"

    def valid(value: Any) -> bool:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MAX_STOPS:
            return False
        return all(
            isinstance(s, str) and 0 < len(s.encode("utf-8", "replace")) <= MAX_STOP_BYTES for s in stops
        )

    value = fields.take("stop", [], expected, valid)
    return tuple(s.encode("utf-8", "replace") for s in ([value] if isinstance(value, str) else value))


def _include_usage(fields: Fields) -> bool:
    options = fields.take("stream_options", {}, "an object", lambda x: isinstance(x, dict))
    wrong = [name for name in options if name not in ("include_usage", "include_obfuscation")]
    if wrong or not isinstance(options.get("include_usage", False), bool):
        fields.wrong("stream_options", '{"include_usage": true or false}', options)
        return False
    return options.get("include_usage", False)


def document_request(body: bytes, stream: bool) -> tuple[bytes, bool]:
    """(the document, whether to tell how far it is read) of a session's JSON; `stream` where it does not say."""
    fields = parse_json(body)
    content, stream = fields.get("text"), fields.get("stream", stream)
    if not isinstance(content, str) or not isinstance(stream, bool) or set(fields) - {"text", "stream"}:
        raise ApiError(
            400, "invalid_request", 'expected {"text": a string, "stream": true or false}; got other fields'
        )
    if not _is_unicode(content):
        raise ApiError(400, "invalid_request", "text: expected Unicode; got a lone surrogate", param="text")
    return content.encode("utf-8"), stream


def task_request(body: bytes, *, passages: bool) -> tuple[list[str], int, str | None]:
    """(texts, passages, model) of /v1/classify and /v1/extract."""
    fields = Fields(parse_json(body))

    def valid(value: Any) -> bool:
        texts = [value] if isinstance(value, str) else value
        return (
            isinstance(texts, list)
            and 0 < len(texts) <= MAX_TEXTS
            and all(isinstance(t, str) and t.strip() and _is_unicode(t) for t in texts)
        )

    value = fields.take("input", None, f"a text that is not empty, or a list of up to {MAX_TEXTS}", valid)
    if value is None and not fields.wrongs:
        fields.wrong("input", "a text or a list of texts", None)
    count = fields.integer("passages", 3, 0, 100) if passages else 0
    model = fields.string("model")
    fields.finish()
    return [value] if isinstance(value, str) else value, count, model


def _is_unicode(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
