"""OpenAI's and Anthropic's APIs over a client, for agents, editors and notebooks.

LiteLLM's proxy takes more than twice the time and memory, keeps no ledger that other processes share, and goes on at
the provider after its caller has disconnected.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from biollm._runtime import apart, ledger
from biollm.client.ensemble import count_of
from biollm.client.options import make_request
from biollm.errors import BiollmError, UsageError
from biollm.gateway import dialects, messages_api, openai_api
from biollm.gateway.dialects import Dialect, Events
from biollm.gateway.openai_api import Delivery
from biollm.gateway.request_id import RequestId
from biollm.monitoring import metrics, page, usage
from biollm.monitoring.alerts import firing
from biollm.monitoring.snapshot import Collector
from biollm.routing.candidates import address, check_names
from biollm.types import Completion, Json, StreamChunk, StreamRestarted

if TYPE_CHECKING:
    from biollm.client import Client, Options
    from biollm.types import Piece

_PAGE = {"cache-control": "no-store", "x-content-type-options": "nosniff", "x-frame-options": "DENY"}
_MAY = "Add start_local: true to the key in gateway_keys.yaml, or use the Unix socket."
_log = logging.getLogger(__name__)


def app(
    client: Client, *, touched: Callable[[int], None] | None = None, draining: Callable[[], bool] = lambda: False
) -> ASGIApp:
    """Return the gateway's routes, without authentication or sockets.

    A middleware may set `scope["biollm.tags"]`, a dict that is stored with the request's usage record, and
    `scope["biollm.start_local"]`, False where the request may start no server on the cluster.

    Args:
        client: Answers the requests; its defaults hold for each.
        touched: Called with the number of requests in flight under /v1/ whenever one starts or ends.
        draining: Whether the gateway is to end soon.
    """
    gateway = _Gateway(client, draining)
    routes = [
        Route("/v1/chat/completions", gateway.answer, methods=["POST"]),
        Route("/v1/completions", partial(gateway.answer, chat=False), methods=["POST"]),
        Route("/v1/messages", gateway.answer, methods=["POST"]),
        Route("/v1/messages/count_tokens", gateway.count_tokens, methods=["POST"]),
        Route("/v1/responses", gateway.answer, methods=["POST"]),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{name:path}", gateway.model),
        Route("/health", gateway.health),
        Route("/ready", gateway.ready),
        Route("/metrics", gateway.metrics),
        Route("/usage", gateway.usage),
        Route("/", gateway.page),
        Route("/events", gateway.events),
    ]
    handlers: Any = {HTTPException: _not_found, Exception: _failed}
    return RequestId(
        Starlette(
            routes=routes,
            exception_handlers=handlers,
            middleware=[Middleware(_Counted, touched=touched, draining=draining)],
        )
    )


class _Gateway:
    """The routes."""

    def __init__(self, client: Client, draining: Callable[[], bool]) -> None:
        self._client, self._draining = client, draining

    async def answer(self, request: Request, *, chat: bool = True) -> Response:
        dialect = Dialect(request.scope["path"])
        try:
            dialect = Dialect(request.scope["path"], openai_api.parsed(await request.body()))
            tags = request.scope.get("biollm.tags", {})
            asked = openai_api.read(dialect.request(), request.headers, self._client.config, tags, chat=chat)
            cached = asked.ensemble is None and self._client.caches(asked.options)
            headers = {
                "x-biollm-policy": self._client.policy(asked.options),
                "x-biollm-cache": "miss" if cached else "off",
            }
            if asked.options.get("start_local") and not request.scope.get("biollm.start_local", True):
                return _refused(dialect, UsageError("This key may not start servers.", hint=_MAY), 403)
            if (
                asked.ensemble
                and (further := request.scope.get("biollm.further"))
                and (refusal := await further(count_of(asked.ensemble["members"]) - 1))
            ):
                return refusal
        except BiollmError as error:
            return _refused(dialect, error)
        try:
            async with _while_connected(request.receive):
                if asked.delivery is Delivery.LIVE:
                    return await self._live(asked, headers, dialect)
                return _whole(asked, await self._complete(asked), headers, dialect, chat=chat)
        except BiollmError as error:
            return _refused(dialect, error, headers=headers)
        return Response(status_code=499)  # the caller has disconnected

    async def count_tokens(self, request: Request) -> Response:
        """Return about how many tokens a request has, rather too many than too few; nothing is sent."""
        dialect = Dialect(request.scope["path"])
        try:
            dialect = Dialect(request.scope["path"], openai_api.parsed(await request.body()))
            asked = openai_api.read(dialect.request(), request.headers, self._client.config, {}, chat=True)
            requirements = make_request(asked.prompt, {}, asked.options, self._client.policy).requirements
        except BiollmError as error:
            return _refused(dialect, error)
        return _json({"input_tokens": requirements.prompt_most})

    async def models(self, request: Request) -> Response:
        listed, query = await self._models(), request.query_params
        limit = int(given) if (given := query.get("limit", "")).isdecimal() else len(listed)
        if "anthropic-version" in request.headers:
            return _json(messages_api.models(listed, limit, query.get("after_id")))
        return _json({"object": "list", "data": listed[:limit]})

    async def model(self, request: Request) -> Response:
        name, config = request.path_params["name"], self._client.config
        known = {each["id"]: each for each in await self._models()}
        if name in known:
            found = known[name]
            return _json(messages_api.model(found) if "anthropic-version" in request.headers else found)
        where = address(config, name)
        try:
            check_names(config, where.get("provider"), where["model"])
        except BiollmError as error:
            return _refused(Dialect(request.scope["path"]), error)
        return _json({**known[where["model"]], "id": name, "owned_by": where["provider"]})

    async def _models(self) -> list[Json]:
        return openai_api.models(self._client.config, await apart(self._client.explain))

    async def health(self, request: Request) -> Response:
        """Return whether this gateway should be sent requests, whatever its providers do: what a balancer asks."""
        return _json({"status": "draining"}, 503) if self._draining() else _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Return whether a deployment could answer now; nothing is sent."""
        if self._draining():
            return await self.health(request)
        found = await apart(self._client.explain)
        first = next((candidate.deployment.id for candidate in found if candidate.status == "ready"), None)
        return _json({"ready": first is not None, "first": first}, 200 if first else 503)

    async def metrics(self, request: Request) -> Response:
        text = await apart(metrics.text, self._client.config, ledger(self._client.config))
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    async def usage(self, request: Request) -> Response:
        """Return what the request's key has used, and its limits."""
        if (key := request.scope.get("biollm.key")) is None:
            hint = "`biollm usage` shows the usage of all keys."
            return _refused(Dialect(""), UsageError("/usage is for requests with a key.", hint=hint))
        now, config = time.time(), self._client.config
        try:
            since, claims = usage.moment(request.query_params.get("since", "7d"), now), (key.requests, key.usage)
            return _json(await apart(usage.of_key, config, ledger(config), key.name, claims, since, now))
        except UsageError as error:
            return _refused(Dialect(""), error)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(page.html(await apart(self._top.snapshot)), headers=_PAGE)

    async def events(self, request: Request) -> Response:
        return _Events(page.events(self._top.snapshot), {}, Dialect("").ping)

    @cached_property
    def _top(self) -> Collector:
        return Collector.of_process(self._client.config, partial(firing, self._client.config))

    async def _complete(self, asked: openai_api.Asked) -> Completion:
        if isinstance(asked.prompt, str):
            return await self._client.afill_in_middle(asked.prompt, asked.suffix, **asked.options)
        if asked.ensemble is not None:
            return await self._client.aensemble(asked.prompt, **asked.ensemble, **asked.options)
        if asked.delivery is Delivery.WHOLE:
            return await self._client.acomplete(asked.prompt, **asked.options)
        return await _end(self._client.astream(asked.prompt, **asked.options))

    async def _live(self, asked: openai_api.Asked, headers: Mapping[str, str], dialect: Dialect) -> Response:
        """Return the response of a stream once its first piece is there: until then an error has a status."""
        sent_to: list[str] = []
        options: Options = {**asked.options, "on_send": sent_to.append}
        pieces = self._client.astream(asked.prompt, **options)
        first = asyncio.ensure_future(anext(pieces))
        try:
            await asyncio.wait({first}, timeout=self._client.config.routing.headers_after)
            if first.done():
                first.result()
        except BaseException:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)  # a generator that runs cannot be closed
            await pieces.aclose()
            raise
        if first.done() and not sent_to:  # a stored answer
            return _whole(asked, await _end(pieces), headers, dialect, chat=True)
        name = ""
        if first.done():
            *failed, answering = sent_to
            name = _name(answering)
            headers = {
                **headers,
                "x-biollm-deployment": answering,
                "x-biollm-attempts": ", ".join([*(f"{each}=failed" for each in failed), f"{answering}=ok"]),
                "x-biollm-degraded": str(self._client.config.provider(name.split("/")[0]).type == "embedded").lower(),
            }
        chunks = openai_api.Chunks(name)
        frames = _frames(first, pieces, chunks, dialect.events(), usage=asked.usage, sent_to=sent_to)
        return _Events(frames, headers, dialect.ping)


async def _end(pieces: AsyncGenerator[Piece, None]) -> Completion:
    """Return the answer that a stream ends with; no piece is kept: one takes 1 kB for a word."""
    completion: Completion | None = None
    async with aclosing(pieces):
        async for piece in pieces:
            completion = piece.completion if isinstance(piece, StreamChunk) else None
    assert completion  # noqa: S101 # a stream that ends without an error ends with it
    return completion


def _whole(
    asked: openai_api.Asked, done: Completion, headers: Mapping[str, str], dialect: Dialect, *, chat: bool
) -> Response:
    """Return the response of a whole answer, in the form of a stream where one was asked for."""
    headers = {
        **headers,
        "x-biollm-deployment": done.deployment,
        "x-biollm-attempts": openai_api.brief(done.attempts),
        "x-biollm-degraded": str(done.degraded).lower(),
        **({"x-biollm-cache": "hit"} if done.cached else {}),
    }
    if not asked.stream:
        return _json(dialect.answer(openai_api.answer(done, chat=chat)), headers=headers)
    chunks, events = openai_api.Chunks(f"{done.provider}/{done.model}", chat=chat), dialect.events()
    frames = [*map(events.feed, [*chunks.whole(done), *chunks.end(done, usage=asked.usage)]), events.end()]
    return _event_text("".join(chain.from_iterable(frames)), headers)


async def _frames(
    first: asyncio.Future[Piece],
    rest: AsyncGenerator[Piece, None],
    chunks: openai_api.Chunks,
    events: Events,
    *,
    usage: bool,
    sent_to: Sequence[str],
) -> AsyncGenerator[str, None]:
    """Yield the events of a stream; an error is the last one, without the usual end."""
    try:
        async with aclosing(rest):
            piece: Piece | None = await first
            asked = len(sent_to)
            if sent_to:  # else it is a stored answer that was waited for
                chunks.name(_name(sent_to[-1]))
            while piece is not None:
                if isinstance(piece, StreamRestarted):
                    yield "".join(events.feed(chunks.restarted(piece.attempt)))
                elif piece.completion is None:
                    if len(sent_to) != asked:
                        asked = len(sent_to)
                        chunks.name(_name(sent_to[-1]))
                    yield "".join(events.feed(chunks.piece(piece.chunk)))
                else:
                    chunks.name(f"{piece.completion.provider}/{piece.completion.model}")
                    for chunk in chunks.end(piece.completion, usage=usage):
                        yield "".join(events.feed(chunk))
                    yield "".join(events.end())
                piece = await anext(rest, None)
    except Exception as error:
        if not isinstance(error, BiollmError):
            _log.exception("A stream failed.")
        yield "".join(dialects.failure(events, error))
    finally:
        first.cancel()


class _Events(StreamingResponse):
    """Server-sent events, until their end or until the reader disconnects; a `ping` wherever nothing comes for long."""

    media_type = "text/event-stream"
    HEADERS: ClassVar = {"cache-control": "no-store", "x-accel-buffering": "no"}
    KEEP_ALIVE_S = 10.0  # a proxy or a tunnel cuts a connection that is idle for a minute or two

    def __init__(self, frames: AsyncGenerator[str, None], headers: Mapping[str, str], ping: str) -> None:
        super().__init__(frames, headers={**self.HEADERS, **headers})
        self._ping = ping.encode()

    async def stream_response(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()

        async def noted(message: Message) -> None:
            nonlocal last
            last = loop.time()
            await send(message)

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(max(0.01, last + self.KEEP_ALIVE_S - loop.time()))
                if loop.time() - last >= self.KEEP_ALIVE_S:
                    await noted({"type": "http.response.body", "body": self._ping, "more_body": True})

        async with aclosing(cast("AsyncGenerator[str, None]", self.body_iterator)):  # the request ends now, not at GC
            keeping = asyncio.create_task(keep_alive())
            try:
                await super().stream_response(noted)
            finally:
                keeping.cancel()


@asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncGenerator[None]:
    """Cancel what is inside when the caller disconnects; ASGI servers report that, but cancel nothing."""
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
    """Reports the number of requests in flight. Starlette's BaseHTTPMiddleware would copy every stream.

    While the gateway drains, each connection is closed after its answer.
    """

    def __init__(self, inner: ASGIApp, *, touched: Callable[[int], None] | None, draining: Callable[[], bool]) -> None:
        self._inner, self._touched, self._draining, self._count = inner, touched, draining, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._touched or scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._inner(scope, receive, send)

        def closing(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start" and self._draining():
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            return send(message)

        self._count += 1
        self._touched(self._count)
        try:
            await self._inner(scope, receive, closing)
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


def _json(data: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(data, separators=(",", ":")), status, headers, "application/json")


def _event_text(text: str, headers: Mapping[str, str]) -> Response:
    """Return server-sent events that are all there."""
    return Response(text, 200, {**_Events.HEADERS, **headers}, _Events.media_type)


def _refused(
    dialect: Dialect, error: Exception, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    status, body, more = dialect.refusal(error, status)
    headers = {**(headers or {}), **more}
    return _event_text(body, headers) if isinstance(body, str) else _json(body, status, headers)


async def _not_found(request: Request, error: HTTPException) -> Response:
    path: str = request.url.path
    message = f"{error.detail}: {request.method} {path}"
    for right, base in ((f"/v1{path}", "ends in /v1"), (path.removeprefix("/v1"), "does not end in /v1")):
        if right != path and right in {getattr(route, "path", "") for route in request.app.routes}:
            message += f". The path is {right}: the base URL of this client {base}."
    body = openai_api.problem(message, "invalid_request_error", "not_found")
    return _json(Dialect(request.url.path).problem(error.status_code, body), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """Answer after an unexpected error; Starlette raises it again, for the log."""
    return _refused(Dialect(request.url.path), error)
