"""Answers that wait for the engine. Who goes away takes the work along."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from longnet.serve.engine import Engine
from longnet.serve.gate import ApiError
from longnet.serve.jobs import Done, Event, Failed, Job, Moved, Refused


class Inbox:
    """Where the engine's thread leaves its events for the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """From any thread. Raises RuntimeError when the loop is gone."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> Event:
        return await self._events.get()


class JobResponse:
    """Submits a job when it is called, and answers when there is something to say.

    Args:
        on_event: what to send for an event (nothing for None), of a stream; the last of a job that is no stream.
        on_moved: what to do with a cache that the engine has moved.
        finish: called at the end, whatever happened.
    """

    media_type: str

    def __init__(
        self,
        engine: Engine,
        job: Job,
        inbox: Inbox,
        on_event: Callable[[Event], Any],
        *,
        on_moved: Callable[[Moved], None] = lambda moved: None,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.job, self.inbox, self.on_event = engine, job, inbox, on_event
        self.on_moved, self.finish = on_moved, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        work = asyncio.create_task(self._submit(scope, receive, send))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.engine.cancel(self.job)
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
            self.finish()

    async def _submit(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.engine.submit(self.job)
        except Refused as refused:
            error = ApiError(refused.status, refused.code, refused.message, retry_after=refused.retry_after)
            await error.response()(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def _next(self) -> Event:
        while isinstance(event := await self.inbox.get(), Moved):
            self.on_moved(event)
        return event


class WholeResponse(JobResponse):
    """One JSON document at the end. on_event is called for all events; what it gives for the last is the document."""

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            event = await self._next()
            if isinstance(event, Failed):
                await _error(event).response()(scope, receive, send)
                return
            answer = self.on_event(event)
            if isinstance(event, Done):
                try:
                    document = await answer if asyncio.iscoroutine(answer) else answer
                except ApiError as error:
                    await error.response()(scope, receive, send)
                    return
                await JSONResponse(document, headers={"Cache-Control": "no-store"})(scope, receive, send)
                return


class EventStream(JobResponse):
    """Server-sent events. on_event gives a list: dicts are sent as data, strings as comments. The last is [DONE].

    The status is 200 only when the first event is there: a job that fails before has an honest status.
    """

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        event = await self._next()
        if isinstance(event, Failed):
            await _error(event).response()(scope, receive, send)
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            ends = isinstance(event, Done | Failed)
            if isinstance(event, Failed):
                items: Any = [_error(event).body()]
            else:
                items = self.on_event(event)
                try:
                    items = await items if asyncio.iscoroutine(items) else items
                except ApiError as error:
                    items = [error.body()]
            text = "".join(_line(item) for item in items) + ("data: [DONE]\n\n" if ends else "")
            if text:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": not ends})
            if ends:
                return
            event = await self._next()


def _line(item: dict[str, Any] | str) -> str:
    return f": {item}\n\n" if isinstance(item, str) else f"data: {json.dumps(item)}\n\n"


def _error(failed: Failed) -> ApiError:
    retry = 10 if failed.status == 503 else None
    return ApiError(failed.status, failed.code, failed.message, retry_after=retry)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
