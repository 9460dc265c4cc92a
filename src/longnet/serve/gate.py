"""Who may come in, and with how much: keys, origins and bodies, before any handler runs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from longnet.serve.config import is_loopback

# Whatever is not listed here needs a key, also what does not exist. The page holds nothing; health says only "ok".
OPEN = {("GET", "/"), ("HEAD", "/"), ("GET", "/page.js"), ("GET", "/health"), ("HEAD", "/health")}


class ApiError(Exception):
    """An answer that is not 2xx, in OpenAI's form."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Cache-Control": "no-store"}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return Response(json.dumps(self.body()), self.status, headers, "application/json")


class Gate:
    """Lets in who has a key: `Authorization: Bearer KEY`. Sets scope["owner"], a hash of the key.

    Without keys (on a loopback address only) it lets in whoever names this machine as the host and comes from no other
    page: else any web site could reach the server through the user's browser.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self._digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # no websockets here
        headers = dict(scope["headers"])
        if not self._digests:
            if reason := _foreign(headers):
                return await ApiError(403, "forbidden_origin", reason).response()(scope, receive, send)
            scope["owner"] = "local"
        elif (scope["method"], scope["path"]) not in OPEN:
            scope["owner"] = self._owner(headers.get(b"authorization", b""))
            if scope["owner"] is None:
                error = ApiError(
                    401, "invalid_api_key", "expected a valid API key: Authorization: Bearer KEY"
                )
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _owner(self, header: bytes) -> str | None:
        scheme, _, key = header.partition(b" ")
        mine, found = _digest(key), None
        for digest in self._digests:  # all of them, always: the time tells nothing
            if hmac.compare_digest(mine, digest):
                found = digest
        return found.hex()[:32] if found is not None and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _foreign(headers: dict[bytes, bytes]) -> str | None:
    """Why a request to a server without keys is not from this machine's user, or None."""
    host = headers.get(b"host", b"").decode("latin-1")
    if not is_loopback(urlsplit(f"//{host}").hostname or ""):
        return "without keys, this server answers only to localhost"
    origin = headers.get(b"origin")
    if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
        return "without keys, this server answers no pages of other sites"
    return None


class Bodies:
    """Reads bodies: no more than `total` bytes of all requests are held at one time."""

    def __init__(self, total: int, seconds: float) -> None:
        self.total, self.seconds, self.held = total, seconds, 0

    async def read(self, request: Request, limit: int) -> bytes:
        """The whole body. The caller gives its length back with `releaser`.

        Raises:
            ApiError: 413 beyond `limit` bytes, as soon as that is known; 429 beyond `total`; 408 where it takes too long.
        """
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                async for part in request.stream():
                    size += len(part)
                    self.held += len(part)
                    if size > limit:
                        raise _too_large(limit)
                    if self.held > self.total:
                        raise ApiError(
                            429,
                            "overloaded",
                            "too many bytes are being uploaded; try again later",
                            retry_after=10,
                        )
                    parts.append(part)
        except TimeoutError:
            self.held -= size
            raise ApiError(408, "timeout", f"expected the body within {self.seconds:g} seconds") from None
        except (ApiError, ClientDisconnect):
            self.held -= size
            raise
        return b"".join(parts)

    def releaser(self, size: int) -> Callable[[], None]:
        """Gives `size` bytes back, at its first call only."""
        pending = [size]

        def release() -> None:
            self.held -= pending.pop() if pending else 0

        return release


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"expected a body of at most {limit} bytes; got more")
