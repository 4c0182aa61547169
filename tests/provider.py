"""A chat-completions provider on loopback that behaves, or misbehaves, as told.

    with Loopback() as net:
        server = net.serve(HTTP_429, text="fine")  # the first request is refused, every later one answered
        httpx.post(server.url + "/chat/completions", json=...)
        server.requests[0].headers["authorization"]

One thread and one event loop carry any number of servers; whatever hangs is let go when the block ends.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from behaviours import HTTP_500, OK, Behaviour

from biollm.slurm.endpoints import PROOF, START, proof

Json = dict[str, Any]
T = TypeVar("T")
DRIP_SECONDS = 0.02


@dataclass(frozen=True)
class Request:
    """What a client sent. Header names are lower case; `body` is its JSON, {} where there was none."""

    method: str
    path: str
    headers: dict[str, str]
    body: Json
    at: float = field(default_factory=time.monotonic)


Choice = Behaviour | Callable[[Request], Behaviour]


@dataclass(eq=False)
class Server:
    """One provider. `script` is used up request by request, then `behaviour` holds; both may be changed.

    With a `start_id` it is a server that stands in a record: it proves its start, and names it on each answer.
    """

    text: str
    models: tuple[str, ...]
    script: list[Behaviour]
    behaviour: Choice
    answer: Callable[[Json], Json] | None  # request body -> assistant message, instead of `text`
    greets: bool = True  # False resets every connection before a request is read
    metrics: str = ""  # what /metrics says
    url: str = ""
    start_id: str = ""
    key: str = ""
    proofs: int = 0
    requests: list[Request] = field(default_factory=list[Request])
    connections: int = 0
    listener: asyncio.Server | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    @property
    def completions(self) -> list[Request]:
        """Return the requests that asked for a completion."""
        return [request for request in self.requests if request.path.endswith("/chat/completions")]

    async def start(self, tls: Certificates | None) -> None:
        """Listen on a free port."""
        context = tls.context() if tls else None
        self.listener = await asyncio.start_server(self.handle, "127.0.0.1", 0, ssl=context, limit=1 << 24)
        port = self.listener.sockets[0].getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1"

    async def stop(self) -> None:
        """Close the port and every connection."""
        assert self.listener
        self.listener.close()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        self.connections += 1
        try:
            keep = self.greets or _reset(writer)
            while keep and (request := await _read(reader, writer)) is not None:
                if self.start_id and request.path.startswith("/health?nonce="):
                    self.proofs += 1
                    writer.write(self._proof(request.path.partition("=")[2]))
                    await writer.drain()
                    continue
                self.requests.append(request)
                how = self.script.pop(0) if self.script else self.behaviour
                how = how if isinstance(how, Behaviour) else how(request)
                keep = await self._reply(request, how, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            pass  # the client went away, or the test is over
        finally:
            self.tasks.discard(task)
            writer.close()

    def _named(self) -> list[str]:
        """Return the header that names the start."""
        return [f"{START}: {self.start_id}"] if self.start_id else []

    def _proof(self, nonce: str) -> bytes:
        lines = ["HTTP/1.1 200 Said", "Content-Length: 0", f"{PROOF}: {proof(self.key, nonce, self.start_id)}"]
        return ("\r\n".join([*lines, *self._named()]) + "\r\n\r\n").encode()

    async def _reply(
        self, request: Request, how: Behaviour, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; True keeps the connection."""
        streamed = bool(request.body.get("stream")) and how.body is None
        if how.fail is not None and not streamed:
            how = HTTP_500
        if how.drip:
            await _drip(writer, streamed, self._named())
        for at, piece in enumerate(self._pieces(request, how, streamed)):
            if how.hang == at and await _leaves(reader, how.pause):
                return False
            if how.reset is not None and int(how.reset) == at:
                writer.write(piece[: int(len(piece) * (how.reset - at))])
                await writer.drain()
                _reset(writer)
                return False
            if how.every and at > 2:  # the headers, the role and the first content come at once
                await asyncio.sleep(how.every)
            writer.write(piece[: len(piece) // 2] if how.tear == at else piece)
            await writer.drain()
            if how.tear == at:
                return False
        return how.cut is None and how.length is None and request.method != "CONNECT"

    def _pieces(self, request: Request, how: Behaviour, streamed: bool) -> list[bytes]:
        """Return the answer's headers and pieces, as the wire carries them."""
        if streamed:
            parts = [b"data: " + event + b"\n\n" for event in self._events(request, how)]
        else:
            body = self._body(request, how)
            third = len(body) // 3 + 1
            parts = [body[at : at + third] for at in range(0, len(body), third)]
        size = sum(map(len, parts))
        parts = parts if how.cut is None else parts[: how.cut - 1]
        if how.length is not None:
            framing = f"Content-Length: {int(size * how.length)}"
        elif streamed:
            framing = "Transfer-Encoding: chunked"
            parts = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
        else:
            framing = "Connection: close" if how.cut is not None else f"Content-Length: {size}"
        kind = "text/event-stream" if streamed else how.content_type
        lines = [f"HTTP/1.1 {how.status} Said", f"Content-Type: {kind}", framing]
        named = {name.lower() for name, _ in how.headers}
        lines += self._named() if START not in named else []
        lines += [f"{name}: {value}" for name, value in how.headers]
        return [("\r\n".join(lines) + "\r\n\r\n").encode(), *parts]

    def _body(self, request: Request, how: Behaviour) -> bytes:
        """Return the body of an answer that is not streamed."""
        if how.body is not None:
            return _echo(how.body, request).encode()
        if request.path == "/metrics":
            return self.metrics.encode()
        if request.path.endswith("/chat/completions"):
            message = self._message(request.body, how)
            choices = [{"index": 0, "message": message, "finish_reason": how.finish or _finish(message)}]
            answer = _answer(request.body, "chat.completion", choices if how.choices else [])
            answer |= _counted(how, _usage(request.body, message))
        elif request.path.endswith("/completions"):
            choices = [{"index": 0, "text": self.text, "finish_reason": "stop"}]
            usage = _usage({"messages": [{"content": request.body["prompt"]}]}, {"content": self.text})
            answer = _answer(request.body, "text_completion", choices, usage=usage)
        elif request.path.endswith("/models"):
            models = [{"id": name, "object": "model"} for name in self.models]
            answer = {"object": "list", "data": models}
        else:
            answer = {}
        return json.dumps(answer).encode()

    def _events(self, request: Request, how: Behaviour) -> list[bytes]:
        """Return the data of a stream's events: the deltas, the finish, the usage if asked for, [DONE]."""
        body, message = request.body, self._message(request.body, how)
        deltas: list[Json] = [{"role": "assistant", "content": ""}, *_deltas(message, how.fragments)]
        ends = [(delta, None) for delta in deltas] + [({}, how.finish or _finish(message))]
        choices = [[{"index": 0, "delta": delta, "finish_reason": end}] for delta, end in ends]
        kind = "chat.completion.chunk"
        tier = {"service_tier": how.service_tier} if how.service_tier else {}
        events = [_answer(body, kind, choice, **tier) for choice in (choices if how.choices else [[]])]
        if how.fail is not None:
            failure = {"message": _echo(how.failure, request), "type": "InternalServerError", "code": 500}
            events = [*events[: how.fail - 1], {"error": failure}]
        elif body.get("stream_options", {}).get("include_usage"):
            events.append(_answer(body, kind, []) | _counted(how, _usage(body, message)))
        data = [json.dumps(event, ensure_ascii=False).encode(errors="backslashreplace") for event in events] + [
            b"[DONE]"
        ] * how.done
        if how.garble is not None:
            data[how.garble - 1] = data[how.garble - 1][:-10]
        if how.noise is not None:
            data.insert(how.noise - 1, b'{"id": "chatcmpl-1", "obj')
        return data

    def _message(self, body: Json, how: Behaviour) -> Json:
        """Return the assistant's message: a text, a call of the first tool, or an object of the schema."""
        tools, text = body.get("tools"), how.text
        wanted: Json = body.get("response_format") or {}
        if text is None and self.answer:
            return self.answer(body)
        if text is None and tools and body["messages"][-1]["role"] != "tool":
            function = tools[0]["function"]
            arguments = json.dumps(instance(function.get("parameters") or {}))
            call = {"name": function["name"], "arguments": arguments}
            calls = [{"id": "call_1", "type": "function", "function": call}]
            return {"role": "assistant", "content": None, "tool_calls": calls}
        if text is None and wanted.get("type") == "json_schema":
            text = json.dumps(instance(wanted["json_schema"]["schema"]))
        return {"role": "assistant", "content": self.text if text is None else text}


class Loopback:
    """A thread with servers; leaving the `with` block ends them all at once, hanging ones too."""

    def __enter__(self) -> Loopback:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[Server] = []
        self._sockets: list[socket.socket] = []
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            self.stop(server)
        for held in self._sockets:
            held.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def serve(
        self,
        *script: Behaviour,
        then: Choice = OK,
        text: str = "All is well.",
        models: tuple[str, ...] = ("small",),
        answer: Callable[[Json], Json] | None = None,
        tls: Certificates | None = None,
        greets: bool = True,
    ) -> Server:
        """Start a server: the first requests follow `script`, later ones `then`."""
        server = Server(text, models, list(script), then, answer, greets)
        self._run(server.start(tls))
        self._servers.append(server)
        return server

    def stop(self, server: Server) -> None:
        """End a server and its connections; from now on its address refuses."""
        self._run(server.stop())

    def refusing(self) -> str:
        """Return a URL whose port is taken, so that nobody else gets it, and not listened on."""
        return f"http://127.0.0.1:{self._bound().getsockname()[1]}/v1"

    def dropping(self) -> str:
        """Return a URL whose connection requests are dropped: its queue is full and nobody accepts."""
        listener = self._bound()
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(3):  # Linux lets backlog + 1 in, then drops every SYN
            filler = socket.socket()
            filler.setblocking(False)
            assert filler.connect_ex(address) in (0, errno.EINPROGRESS)
            self._sockets.append(filler)
        return f"http://127.0.0.1:{address[1]}/v1"

    def _bound(self) -> socket.socket:
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        self._sockets.append(bound)
        return bound

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@dataclass(frozen=True)
class Certificates:
    """A private authority, and a certificate for 127.0.0.1 and localhost that it signed."""

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """Write both into `folder`, with the openssl program."""
        made = cls(folder / "ca.pem", folder / "server.pem", folder / "server.key")
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        new = ["openssl", "req", "-x509", *curve, "-nodes", "-days", "30"]
        ca_key = folder / "ca.key"
        authority = ["-subj", "/CN=Campus CA", "-keyout", ca_key, "-out", made.authority]
        signed = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        signed += ["-addext", "basicConstraints=critical,CA:FALSE", "-CA", made.authority, "-CAkey", ca_key]
        for options in (authority, [*signed, "-keyout", made.key, "-out", made.certificate]):
            subprocess.run([*new, *options], check=True, capture_output=True)
        return made

    def context(self) -> ssl.SSLContext:
        """Return what a server needs to show the certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def _deltas(message: Json, fragments: int) -> Iterator[Json]:
    """Yield a message in pieces: a word of reasoning or text each, and each call in so many fragments."""
    calls: list[Json] = message.get("tool_calls") or []
    for name, text in (("reasoning_content", message.get("reasoning_content")), ("content", message["content"])):
        if text or (name == "content" and not calls):
            *words, last = (text or "").split(" ")
            yield from ({name: each} for each in (*(f"{word} " for word in words), last))
    for index, call in enumerate(calls):
        arguments: str = call["function"]["arguments"]
        size = len(arguments) // fragments + 1
        pieces = [arguments[at : at + size] for at in range(0, len(arguments), size)]
        first = {**call, "function": {**call["function"], "arguments": pieces[0]}}
        yield {"tool_calls": [{"index": index, **first}]}
        yield from ({"tool_calls": [{"index": index, "function": {"arguments": each}}]} for each in pieces[1:])


def instance(schema: Json, root: Json | None = None) -> Any:
    """Return a small value that satisfies a JSON Schema of the usual kinds."""
    root = root or schema
    if "$ref" in schema:
        return instance(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "anyOf" in schema:
        return instance(schema["anyOf"][0], root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: instance(part, root) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema["items"], root)] * max(1, schema.get("minItems", 1))
    return {"string": "text", "integer": schema.get("minimum", 1), "number": 0.5, "boolean": True}.get(kind)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """Return the next request, None at the connection's end."""
    first = await reader.read(1)
    if first == b"\x16":  # a TLS greeting, to a server that speaks plain text
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
    if first in (b"", b"\x16"):
        return None
    start, *lines = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, path, _ = start.split(" ")
    return Request(method, path, headers, json.loads(body) if body else {})


async def _leaves(reader: asyncio.StreamReader, within: float | None) -> bool:
    """Wait until the client goes away, or until so many seconds are over; return whether it has gone."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            await reader.read(1)
            return True
    return False


def _reset(writer: asyncio.StreamWriter) -> None:
    """Let the connection end with a reset, once it is closed."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _drip(writer: asyncio.StreamWriter, streamed: bool, named: list[str]) -> None:
    """Send what keeps a connection alive, and no answer, until the client gives up."""
    kind, drop = ("text/event-stream", b": still here\n\n") if streamed else ("application/json", b" ")
    lines = ["HTTP/1.1 200 Said", f"Content-Type: {kind}", "Connection: close", *named]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    while True:
        writer.write(drop)
        await writer.drain()
        await asyncio.sleep(DRIP_SECONDS)


def _echo(text: str, request: Request) -> str:
    sent = request.headers
    key = sent.get("authorization") or sent.get("x-goog-api-key") or sent.get("x-api-key") or ""
    return text.replace("AUTHORIZATION", key)


def _answer(body: Json, kind: str, choices: list[Json], **more: Any) -> Json:
    start = {"id": "chatcmpl-1", "object": kind, "created": 1767225600, "model": body.get("model")}
    return {**start, "choices": choices, **more}


def _counted(how: Behaviour, usage: Json) -> Json:
    """Return what an answer states of its tokens."""
    stated = usage if how.usage is None else how.usage
    tier = {"service_tier": how.service_tier} if how.service_tier else {}
    return tier | ({"usage": stated} if stated else {})


def _finish(message: Json) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def _usage(body: Json, message: Json) -> Json:
    """Count words as tokens."""
    sent = sum(len(str(part.get("content")).split()) for part in body.get("messages", []))
    came = len((message.get("content") or "").split())
    return {"prompt_tokens": sent, "completion_tokens": came, "total_tokens": sent + came}
