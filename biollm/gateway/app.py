"""One OpenAI-compatible face over a client, for whoever speaks that interface: agents, editors, notebooks.

LiteLLM's proxy costs more than twice the time and memory, keeps no ledger that other processes share, and goes on at
the provider after its caller has left.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from biollm._runtime import apart, ledger
from biollm.errors import BiollmError, UsageError
from biollm.gateway import openai_api as face
from biollm.monitoring import metrics, page
from biollm.monitoring.alerts import firing
from biollm.monitoring.snapshot import Collector
from biollm.routing.candidates import check_names
from biollm.types import Completion, StreamChunk, StreamRestarted

if TYPE_CHECKING:
    from biollm.client import Client, Options
    from biollm.types import Piece

_STREAM = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}
_PAGE = {"cache-control": "no-store", "x-content-type-options": "nosniff", "x-frame-options": "DENY"}
_MAY = "Write start_local: true beside it in gateway_keys.yaml, or ask over the Unix socket."
_log = logging.getLogger(__name__)


def app(client: Client, *, touched: Callable[[int], None] | None = None) -> Starlette:
    """Return the gateway's routes; they admit everybody, and open no socket.

    A middleware may put `scope["biollm.tags"]`, a dict, there: they are stored with the request's usage record; and
    `scope["biollm.start_local"]`, False where the request may start no server on the cluster.

    Args:
        client: Who asks the waterfall; its defaults hold for every request.
        touched: Told how many requests under /v1/ are under way, whenever one starts or ends.
    """
    gateway = _Gateway(client)
    routes = [
        Route("/v1/chat/completions", partial(gateway.answer, chat=True), methods=["POST"]),
        Route("/v1/completions", partial(gateway.answer, chat=False), methods=["POST"]),
        Route("/v1/responses", gateway.responses, methods=["POST"]),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{name:path}", gateway.model),
        Route("/health", gateway.health),
        Route("/ready", gateway.ready),
        Route("/metrics", gateway.metrics),
        Route("/", gateway.page),
        Route("/events", gateway.events),
    ]
    handlers: Any = {HTTPException: _lost, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(_Counted, touched=touched)])


class _Gateway:
    """The routes."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._top: Collector | None = None

    async def answer(self, request: Request, *, chat: bool) -> Response:
        try:
            tags = request.scope.get("biollm.tags", {})
            asked = face.read(await request.body(), request.headers, self._client.config, tags, chat=chat)
            headers = {"x-biollm-policy": self._client.policy(asked.options)}
            if asked.options.get("start_local") and not request.scope.get("biollm.start_local", True):
                return _refused(UsageError("This key may not start servers.", hint=_MAY), 403)
        except BiollmError as error:
            return _refused(error)
        try:
            async with _while_there(request.receive):
                if asked.whole or asked.held:
                    return self._sent(asked, await self._whole(asked), headers, chat=chat)
                return await self._live(asked, headers)
        except BiollmError as error:
            return _refused(error, headers=headers)
        return Response(status_code=499)  # nobody reads it

    async def responses(self, request: Request) -> Response:
        return _refused(UsageError("There is no /v1/responses here.", hint="Use /v1/chat/completions."), 404)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": face.models(self._client.config)})

    async def model(self, request: Request) -> Response:
        name, config = request.path_params["name"], self._client.config
        if (known := next((each for each in face.models(config) if each["id"] == name), None)) is not None:
            return _json(known)
        where = face.address(config, name)
        try:
            check_names(config, where.get("provider"), where["model"])
        except BiollmError as error:
            return _refused(error)
        return _json(face.model(name, [where["provider"]]))

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Say whether a rung could answer now; nothing is sent."""
        found = await apart(self._client.explain)
        first = next((candidate.deployment.id for candidate in found if candidate.status == "ready"), None)
        return _json({"ready": first is not None, "first": first}, 200 if first else 503)

    async def metrics(self, request: Request) -> Response:
        text = await apart(metrics.text, self._client.config, ledger())
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(page.html(await apart(self._picture().snapshot)), headers=_PAGE)

    async def events(self, request: Request) -> Response:
        return _Events(page.events(self._picture().snapshot), {})

    def _picture(self) -> Collector:
        self._top = self._top or Collector.of_process(self._client.config, partial(firing, self._client.config))
        return self._top

    async def _whole(self, asked: face.Asked) -> Completion:
        """Return the whole answer."""
        if isinstance(asked.prompt, str):
            return await self._client.afill_in_middle(asked.prompt, asked.suffix, **asked.options)
        if not asked.held:
            return await self._client.acomplete(asked.prompt, **asked.options)
        async with aclosing(self._client.astream(asked.prompt, **asked.options)) as pieces:
            last = [piece async for piece in pieces if isinstance(piece, StreamChunk)][-1].completion
        assert last  # noqa: S101 # a stream that ends without an error ends with it
        return last

    def _sent(self, asked: face.Asked, done: Completion, headers: Mapping[str, str], *, chat: bool) -> Response:
        """Return the response of a whole answer, as a stream if that was asked for."""
        headers = {
            **headers,
            "x-biollm-deployment": done.deployment,
            "x-biollm-attempts": face.brief(done.attempts),
            "x-biollm-degraded": str(done.degraded).lower(),
        }
        if not asked.stream:
            return _json(face.answer(done, chat=chat), headers=headers)
        line = face.Line(f"{done.provider}/{done.model}", chat=chat)

        async def frames() -> AsyncGenerator[str]:
            if text := line.whole(done):
                yield text
            for frame in line.end(done, usage=asked.usage):
                yield frame

        return _Events(frames(), headers)

    async def _live(self, asked: face.Asked, headers: Mapping[str, str]) -> Response:
        """Return the response of a stream once its first piece is there: until then an error has a status."""
        asked_of: list[str] = []
        options: Options = {**asked.options, "on_send": asked_of.append}
        pieces = self._client.astream(asked.prompt, **options)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        *failed, answering = asked_of
        name = _name(answering)
        headers = {
            **headers,
            "x-biollm-deployment": answering,
            "x-biollm-attempts": ", ".join([*(f"{each}=failed" for each in failed), f"{answering}=ok"]),
            "x-biollm-degraded": str(self._client.config.provider(name.split("/")[0]).type == "embedded").lower(),
        }
        return _Events(_frames(first, pieces, face.Line(name), asked.usage, asked_of), headers)


async def _frames(
    first: Piece, rest: AsyncGenerator[Piece, None], line: face.Line, usage: bool, asked_of: Sequence[str]
) -> AsyncGenerator[str, None]:
    """Yield the events of a stream; an error is the last one, without [DONE]."""
    try:
        async with aclosing(rest):
            piece: Piece | None = first
            again = False
            while piece is not None:
                if isinstance(piece, StreamRestarted):
                    yield line.restarted(piece.attempt)
                    again = True
                elif piece.completion is None:
                    if again:
                        line.name(_name(asked_of[-1]))
                        again = False
                    yield line.text(piece.text)
                else:
                    line.name(f"{piece.completion.provider}/{piece.completion.model}")
                    for frame in line.end(piece.completion, usage=usage):
                        yield frame
                piece = await anext(rest, None)
    except Exception as error:
        if not isinstance(error, BiollmError):
            _log.exception("A stream failed.")
        yield face.event(face.refusal(error)[1])


class _Events(Response):
    """Server-sent events, until their end or until the reader leaves. Starlette's own needs a task group for that."""

    def __init__(self, frames: AsyncGenerator[str, None], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**_STREAM, **headers})
        del self.headers["content-length"]
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._frames) as frames, _while_there(receive):
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})
        await send({"type": "http.response.body"})


@asynccontextmanager
async def _while_there(receive: Receive) -> AsyncGenerator[None]:
    """Give up what is inside when the caller leaves; ASGI servers tell, but cancel nothing."""
    me, gone = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        if me:
            me.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone or (me and me.uncancel()):
            raise
    finally:
        watcher.cancel()


class _Counted:
    """Tells how many requests are under way. Starlette's BaseHTTPMiddleware would copy every stream."""

    def __init__(self, inner: ASGIApp, *, touched: Callable[[int], None] | None) -> None:
        self._inner, self._touched, self._count = inner, touched, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._touched or scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._inner(scope, receive, send)
        self._count += 1
        self._touched(self._count)
        try:
            await self._inner(scope, receive, send)
        except ClientDisconnect:
            pass  # while it sent its request
        finally:
            self._count -= 1
            self._touched(self._count)
        return None


def _name(ident: str) -> str:
    """Return "provider/model" of a deployment's id."""
    provider, _, model = ident.partition("#")[0].partition("/")
    return f"{provider.partition('.')[0]}/{model}"


def _json(data: face.Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(data, separators=(",", ":")), status, headers, "application/json")


def _refused(error: Exception, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    usual, body, more = face.refusal(error)
    return _json(body, status or usual, {**(headers or {}), **more})


async def _lost(request: Request, error: HTTPException) -> Response:
    """Say in OpenAI's shape that there is no such route or method."""
    what = face.problem(f"{error.detail}: {request.method} {request.url.path}", "invalid_request_error", "not_found")
    return _json(what, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """Say that something of ours broke; Starlette raises it again, for the log."""
    return _refused(error)
