"""The routes: OpenAI's completions and models, sessions, classify, extract, a page, health and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from longnet.serve.completions import Answer
from longnet.serve.config import ServeConfig
from longnet.serve.engine import Engine
from longnet.serve.gate import ApiError, Bodies, Gate
from longnet.serve.jobs import Call, Completion, Done, Event, Moved, Progress, Reading
from longnet.serve.requests import CompletionRequest, completion_request, document_request, task_request
from longnet.serve.responses import EventStream, Inbox, JobResponse, WholeResponse
from longnet.serve.sessions import Session, SessionStore
from longnet.tasks.annotations import Annotation, record_of
from longnet.tasks.documents import Document
from longnet.text import Tokenizer

log = logging.getLogger("longnet.serve")

# The page may load what this server has, and nothing else.
SECURITY = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'self'; style-src 'self' 'unsafe-inline'; base-uri 'none'"),
]  # fmt: skip


class Api:
    """The handlers and what they share.

    Args:
        engine: started elsewhere.
        sessions, tokenizer: None where no causal model is served.
        classifier, extractor: of `longnet.tasks`, or None.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine: Engine,
        sessions: SessionStore | None,
        tokenizer: Tokenizer | None,
        classifier: Any = None,
        extractor: Any = None,
    ) -> None:
        self.config, self.engine, self.sessions, self.tokenizer = config, engine, sessions, tokenizer
        self.classifier, self.extractor = classifier, extractor
        self.bodies = Bodies(config.bytes("max_uploads"), config.body_seconds)
        self.created = int(time.time())

    def app(self, keys: Sequence[str]) -> ASGIApp:
        """The application; without keys, for this machine only."""
        routes = [
            Route("/", self.page), Route("/page.js", self.page), Route("/health", self.health),
            Route("/metrics", self.metrics), Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model), Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/sessions", self.list_sessions), Route("/v1/sessions", self.make_session, methods=["POST"]),
            Route("/v1/sessions/{id}", self.get_session),
            Route("/v1/sessions/{id}", self.delete_session, methods=["DELETE"]),
            Route("/v1/classify", self.classify, methods=["POST"]), Route("/v1/extract", self.extract, methods=["POST"]),
        ]  # fmt: skip
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _bug,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Observed(Gate(app, keys), self.engine)

    # What is there.

    async def page(self, request: Request) -> Response:
        name, kind = (
            ("page.js", "text/javascript") if request.url.path == "/page.js" else ("page.html", "text/html")
        )
        content = resources.files("longnet.serve").joinpath(name).read_text(encoding="utf-8")
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    async def health(self, request: Request) -> Response:
        status = "dead" if self.engine.dead else "draining" if self.engine.drain_until is not None else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        report = self.engine.statistics.report() | {
            "engine": self.engine.report(),
            "upload_bytes": self.bodies.held,
        }
        if self.sessions is not None:
            report["sessions"] = self.sessions.report()
        return JSONResponse(report)

    def _models(self) -> list[dict[str, Any]]:
        tasks = [
            ("completion", self.engine.model),
            ("classify", self.classifier),
            ("extract", self.extractor),
        ]
        return [
            {
                "id": self._name(task), "object": "model", "created": self.created, "owned_by": "longnet", "task": task,
            }
            for task, loaded in tasks
            if loaded is not None
        ]  # fmt: skip

    def _name(self, task: str) -> str:
        return self.config.name if task == "completion" else f"{self.config.name}-{task}"

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._models()})

    async def model(self, request: Request) -> Response:
        found = [model for model in self._models() if model["id"] == request.path_params["id"]]
        if not found:
            raise _no_model(self._models())
        return JSONResponse(found[0])

    def _expect(self, task: str, asked: str | None) -> None:
        """Raises 404 where the task has no model, or another one was asked for."""
        loaded = {model["task"]: model["id"] for model in self._models()}
        if task not in loaded or asked not in (None, loaded[task]):
            raise _no_model(self._models())

    # Completions.

    async def completions(self, request: Request) -> JobResponse:
        self._expect("completion", None)
        assert self.tokenizer is not None
        body = await self.bodies.read(request, self.config.bytes("max_prompt"))
        release = self.bodies.releaser(len(body))
        try:
            asked = completion_request(body, self.config.max_tokens, self.tokenizer)
            self._expect("completion", asked.model)
            ids = await self._ids(request, asked.prompt) if isinstance(asked.prompt, bytes) else asked.prompt
            most = self.config.max_prompt_tokens
            if len(ids) > most:
                message = f"prompt: expected at most {most} tokens; got {len(ids)}"
                raise ApiError(400, "prompt_too_long", message, param="prompt")
            return await self._complete(asked, ids, request.scope["owner"], release)
        except BaseException:
            release()
            raise

    async def _ids(self, request: Request, data: bytes) -> np.ndarray:
        """A text's ids, made beside the event loop. Who goes away stops it within a piece."""
        assert self.tokenizer is not None
        ids = np.empty(len(data), self.tokenizer.dtype)  # every id is a byte at least
        pieces, size = self.tokenizer.pieces(data), 0
        while True:
            try:
                piece = await asyncio.to_thread(next, pieces, None)
            except ValueError as error:
                raise ApiError(400, "invalid_text", self._without_path(str(error))) from None
            if piece is None:
                return ids[:size]
            ids[size : size + len(piece)] = piece
            size += len(piece)
            if await request.is_disconnected():
                raise ClientDisconnect

    def _without_path(self, message: str) -> str:
        """What a tokenizer says of a text names its file; where this server keeps its files is not to be told."""
        assert self.config.model is not None
        return message.replace(
            str(self.config.model / "tokenizer.json"), f"the tokenizer of {self.config.name}"
        )

    async def _complete(
        self, asked: CompletionRequest, ids: np.ndarray, owner: str, finish: Callable[[], None]
    ) -> JobResponse:
        prefix, session, cached = None, None, 0
        if asked.session_id is not None:
            session = self._session(asked.session_id, owner)
            prefix = await self._cache(session)
            ids, cached = np.concatenate((np.array([session.last], ids.dtype), ids)), session.tokens - 1
        inbox = Inbox()
        job = Completion(
            emit=inbox.put, ids=ids, prefix=prefix, max_tokens=asked.max_tokens, temperature=asked.temperature,
            top_p=asked.top_p, seed=asked.seed, stop=asked.stop,
        )  # fmt: skip

        def moved(event: Moved) -> None:
            assert self.sessions is not None
            assert session is not None
            self.sessions.keep(session, event.cache)

        answer = Answer(self.config.name, cached, len(ids), asked.include_usage)
        kind = EventStream if asked.stream else WholeResponse
        on_event = answer.stream if asked.stream else answer.whole
        return kind(self.engine, job, inbox, on_event, on_moved=moved, finish=finish)

    # Sessions.

    def _session(self, name: str, owner: str) -> Session:
        session = self.sessions.get(name, owner) if self.sessions is not None else None
        if session is None:
            raise ApiError(
                404,
                "session_not_found",
                "expected a session of this model and its tokenizer; it may have been deleted, or made room for another",
            )
        return session

    async def _cache(self, session: Session) -> Any:
        assert self.sessions is not None
        try:
            return await self.sessions.cache(session)
        except (ValueError, OSError):
            log.warning("a session's file could not be read; the session is deleted")
            raise ApiError(
                404, "session_not_found", "the session's file is damaged; upload the document again"
            ) from None

    async def list_sessions(self, request: Request) -> Response:
        found = self.sessions.all(request.scope["owner"]) if self.sessions is not None else []
        return JSONResponse({"object": "list", "data": [_session_json(session) for session in found]})

    async def get_session(self, request: Request) -> Response:
        return JSONResponse(_session_json(self._session(request.path_params["id"], request.scope["owner"])))

    async def delete_session(self, request: Request) -> Response:
        session = self._session(request.path_params["id"], request.scope["owner"])
        assert self.sessions is not None
        self.sessions.delete(session)
        return JSONResponse({"id": session.id, "object": "session", "deleted": True})

    async def make_session(self, request: Request) -> JobResponse:
        """Read a document: the body itself, or {"text": ..., "stream": ...} as JSON. `?stream=true` tells how far it is."""
        self._expect("completion", None)
        body = await self.bodies.read(request, self.config.bytes("max_document"))
        release = self.bodies.releaser(len(body))
        try:
            stream = request.query_params.get("stream", "false").lower() in ("true", "1")
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind == "application/json":
                body, stream = document_request(body, stream)
            if not body:
                raise ApiError(400, "invalid_request", "expected a document; got an empty one")
            return self._read(await self._ids(request, body), stream, request.scope["owner"], release)
        except BaseException:
            release()
            raise

    def _read(self, ids: np.ndarray, stream: bool, owner: str, finish: Callable[[], None]) -> JobResponse:
        assert self.tokenizer is not None
        inbox = Inbox()
        # The last id is held back: whatever is asked has at least one to begin with.
        before = ids[:-1] if len(ids) > 1 else np.array([self.tokenizer.end], ids.dtype)
        job = Reading(emit=inbox.put, ids=before)

        async def keep(done: Done) -> dict[str, Any]:
            assert self.sessions is not None
            try:
                session = await self.sessions.add(owner, len(ids), int(ids[-1]), *done.value)
            except OSError:
                log.exception("a session could not be saved")
                raise ApiError(503, "storage", "the session could not be saved", retry_after=60) from None
            return _session_json(session)

        async def streamed(event: Event) -> list[dict[str, Any]]:
            if isinstance(event, Progress):
                return [{"object": "session.progress", **vars(event)}]
            return [await keep(event)] if isinstance(event, Done) else []

        if stream:
            return EventStream(self.engine, job, inbox, streamed, finish=finish)
        whole: Any = lambda event: keep(event) if isinstance(event, Done) else None  # noqa: E731
        return WholeResponse(self.engine, job, inbox, whole, finish=finish)

    # Tasks.

    async def classify(self, request: Request) -> JobResponse:
        return await self._task(request, "classify", self._classified)

    async def extract(self, request: Request) -> JobResponse:
        return await self._task(request, "extract", self._extracted)

    async def _task(
        self, request: Request, task: str, run: Callable[[list[str], int], list[dict[str, Any]]]
    ) -> JobResponse:
        self._expect(task, None)
        body = await self.bodies.read(request, self.config.bytes("max_task"))
        release = self.bodies.releaser(len(body))
        try:
            texts, passages, model = task_request(body, passages=task == "classify")
            self._expect(task, model)
            inbox = Inbox()
            call = Call(emit=inbox.put, function=lambda: run(texts, passages), tokens=len(body))

            def whole(event: Event) -> dict[str, Any] | None:
                if not isinstance(event, Done):
                    return None
                return {"object": "list", "model": self._name(task), "data": event.value}

            return WholeResponse(self.engine, call, inbox, whole, finish=release)
        except BaseException:
            release()
            raise

    def _classified(self, texts: list[str], passages: int) -> list[dict[str, Any]]:
        return [vars(prediction) for prediction in self.classifier.predict(texts, passages=passages)]

    def _extracted(self, texts: list[str], _: int) -> list[dict[str, Any]]:
        """The JSON of `longnet extract predict`, without ids; clusters and relations where the model has learned them."""
        from longnet.tasks.knowledge import KnowledgeExtractor

        kept = ["entities"]
        if isinstance(self.extractor, KnowledgeExtractor):
            found = self.extractor.read(texts)
            kept += ["clusters", "relations"]
        else:
            found = [Annotation(spans) for spans in self.extractor.extract(texts)]
        records = [record_of(Document("", t, ""), a) for t, a in zip(texts, found, strict=True)]
        return [{key: record[key] for key in kept} for record in records]


def _session_json(session: Session) -> dict[str, Any]:
    return {
        "id": session.id, "object": "session", "created": int(session.created), "last_used": int(session.last_used),
        "tokens": session.tokens, "cache_bytes": session.cache_bytes,
    }  # fmt: skip


def _no_model(models: list[dict[str, Any]]) -> ApiError:
    names = ", ".join(model["id"] for model in models)
    return ApiError(
        404, "model_not_found", f"expected one of the models {names}, for its own task", param="model"
    )


class Observed:
    """Counts answers and adds headers that keep browsers careful."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self.app, self.engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def observed(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.engine.statistics.requests[str(message["status"])] += 1
                message["headers"] = [*message.get("headers", ()), *SECURITY]
            with suppress(OSError):  # the client is gone; its work is cancelled by whoever waits for that
                await send(message)

        await self.app(scope, receive, observed)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return ApiError(error.status_code, code, error.detail).response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _bug(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal_error", "the server has made a mistake; it is in its log").response()
