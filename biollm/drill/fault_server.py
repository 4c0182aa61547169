"""A server on loopback that speaks OpenAI's dialect over plain HTTP/1.1 and breaks on request.

The standard library alone: a web framework would not reset a connection or cut an answer short.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from biollm.slurm.endpoints import PROOF, START, proof

_OK = {"id": "drill", "object": "chat.completion", "created": 0, "model": "drill"}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


@dataclass(eq=False)
class FaultServer:
    """One address, which may stand for several deployments: each is known by its (key, model)."""

    # (key, model) -> what is broken; everything else is answered. May change at any time
    faults: Mapping[tuple[str, str], str]
    requests: Counter[tuple[str, str]]  # counts the completions requested by (key, model)
    start: str = ""  # start, key: of a running server that this one replaces: it proves that start with that key
    key: str = field(default="", repr=False)
    url: str = ""  # the base URL, which stays the same while the server is closed
    _port: int = 0
    _server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen, on the same port as before."""
        if not self._server:
            self._server = await asyncio.start_server(self._handle, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{self._port}/v1"

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
            key, nonce = re.search(r"authorization: bearer (\S+)", head), re.search(r"nonce=(\w+)", head)
            deployment = (key[1] if key else "", str(body.get("model")))
            self.requests[deployment] += head.startswith("post")
            fault = "http_404" if head.startswith("get") else self.faults.get(deployment, "")
            if fault == "flapping":
                fault = "http_500" if self.requests[deployment] % 2 else ""
            if fault == "hang":
                await reader.read(1)  # until the client disconnects
            elif fault != "reset":
                headers = {START: self.start} if self.start else {}
                headers |= {PROOF: proof(self.key, nonce[1], self.start)} if nonce else {}
                writer.write(_response(fault, headers, stream=bool(body.get("stream"))))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass
        finally:
            writer.close()


def _response(fault: str, headers: dict[str, str], *, stream: bool) -> bytes:
    message = {"role": "assistant", "content": "" if fault == "empty" else "ok"}
    choices = [] if fault == "no choices" else [{"index": 0, "message": message, "finish_reason": "stop"}]
    good = json.dumps(_OK | {"choices": choices, "usage": _USAGE})
    status, kind = 200, "application/json"
    if fault.startswith("http_"):
        status = int(fault[5:])
        body = json.dumps({"error": {"message": f"The drill says {status}.", "type": "drill", "code": None}})
        headers |= {"Retry-After": "60"} if status == 429 else {}
    elif fault == "error in 200":
        body = json.dumps({"error": {"message": "The drill says 502.", "code": 502}})
    elif fault == "html":
        kind, body = "text/html", "<html><h1>Sign in to the network</h1></html>"
    elif fault == "truncated":
        body = good[: len(good) // 2]
    elif stream:
        kind, body = "text/event-stream", _events(fault)
    else:
        body = good
    if kind != "text/event-stream":
        headers |= {"Content-Length": str(len(body))}
    lines = [
        f"{name}: {value}\r\n" for name, value in (headers | {"Content-Type": kind, "Connection": "close"}).items()
    ]
    return f"HTTP/1.1 {status} Drill\r\n{''.join(lines)}\r\n{body}".encode()


def _events(fault: str) -> str:
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": "o"}, {"content": "k"}, {}]
    choices = [{"index": 0, "delta": delta, "finish_reason": None if delta else "stop"} for delta in deltas]
    chunks = [json.dumps(_OK | {"object": "chat.completion.chunk", "choices": [choice]}) for choice in choices]
    events = [*chunks, "[DONE]"]
    if fault == "malformed chunk":
        events[1] = events[1][:-10]
    kept = {"cut stream": events[:1], "no end marker": chunks}.get(fault, events)
    return "".join(f"data: {event}\n\n" for event in kept)
