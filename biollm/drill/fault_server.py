"""Plays providers on loopback, healthy or broken, for the drill; OpenAI's dialect over plain HTTP/1.1."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any

from biollm.slurm.endpoints import PROOF, START, proof

_OK = {"id": "drill", "object": "chat.completion", "created": 0, "model": "drill"}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
_HTML = "<html><h1>Sign in to the network</h1></html>"


class Stage:
    """One address. `faults` names by "key model" what is broken; all else is answered well.

    `asked` counts the completions asked for, by "key model". With a `start` it takes the place of a server found by its
    record: it proves that start, and names it.
    """

    def __init__(self, faults: dict[str, str], asked: Counter[str], start: str = "", key: str = "") -> None:
        self._faults, self._asked, self._start, self._start_key = faults, asked, start, key
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Return its base URL, also while it refuses connections."""
        return f"http://127.0.0.1:{self._port}/v1"

    async def open(self) -> None:
        """Listen, on the same port as before."""
        if not self._server:
            self._server = await asyncio.start_server(self._handle, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Refuse connections."""
        if self._server:
            self._server.close()
            self._server = None

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            size = re.search(r"content-length: (\d+)", head)
            body: Any = json.loads(await reader.readexactly(int(size[1])) if size else b"{}")
            key = re.search(r"authorization: bearer (\S+)", head)
            who = f"{key[1] if key else ''} {body.get('model')}"
            fault = self._faults.get(who, "")
            self._asked[who] += head.startswith("post")
            if fault == "flapping":
                fault = "http_500" if self._asked[who] % 2 else ""
            if fault == "hang":
                await reader.read(1)  # until the client goes away
            elif fault != "reset":
                said = reply("http_404" if head.startswith("get") else fault, stream=bool(body.get("stream")))
                nonce = re.search(r"nonce=(\w+)", head)
                proven = f"\r\n{PROOF}: {proof(self._start_key, nonce[1], self._start)}" if nonce else ""
                named = f"\r\n{START}: {self._start}{proven}".encode() if self._start else b""
                writer.write(said.replace(b"\r\n", named + b"\r\n", 1))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass
        finally:
            writer.close()


def reply(fault: str, *, stream: bool) -> bytes:
    """Return what a rung with that fault ("" is none) sends, headers and all."""
    status, kind, more = 200, "application/json", ""
    text = "" if fault == "empty" else "ok"
    choices: list[Any] = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
    body = json.dumps(_OK | {"choices": [] if fault == "no choices" else choices, "usage": _USAGE})
    if fault.startswith("http_"):
        status = int(fault[5:])
        body = json.dumps({"error": {"message": f"The drill says {status}.", "type": "drill", "code": None}})
        more = "Retry-After: 60\r\n" if status == 429 else ""
    elif fault == "error in 200":
        body = json.dumps({"error": {"message": "The drill says 502.", "code": 502}})
    elif fault == "html":
        kind, body = "text/html", _HTML
    elif fault == "truncated":
        body = body[: len(body) // 2]
    elif stream:
        kind, body = "text/event-stream", _events(fault)
    size = "" if kind == "text/event-stream" else f"Content-Length: {len(body)}\r\n"
    return f"HTTP/1.1 {status} Drill\r\nContent-Type: {kind}\r\n{size}{more}Connection: close\r\n\r\n{body}".encode()


def _events(fault: str) -> str:
    steps: list[Any] = [{"index": 0, "delta": {"role": "assistant", "content": "o"}, "finish_reason": None}]
    steps += [{"index": 0, "delta": {"content": "k"}, "finish_reason": None}]
    steps += [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    events = [json.dumps(_OK | {"object": "chat.completion.chunk", "choices": [step]}) for step in steps] + ["[DONE]"]
    if fault == "malformed chunk":
        events[1] = events[1][:-10]
    kept = {"cut stream": events[:1], "no end marker": events[:-1]}.get(fault, events)
    return "".join(f"data: {event}\n\n" for event in kept)
