"""A provider in a process of its own that answers at once, as cheaply as Python can.

The first part of a request's path says how: /ok answers, /429 and /500 refuse, /capped answers 60 requests in any
60 s and refuses the rest; GET /capped/log lists (arrival in epoch seconds, status); /slow-300 answers
after 300 ms; /stream sends 20 tokens a second,
as many and marked with the number that the prompt says: "NUMBER COUNT".
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CAP, WINDOW, PER_SECOND = 60, 60.0, 20
_MESSAGE = {"role": "assistant", "content": "All is well."}
_USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
_CHOICES = [{"index": 0, "message": _MESSAGE, "finish_reason": "stop"}]
_OK: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1767225600, "model": "small"}


def _answer(status: int, body: Any) -> bytes:
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


def _error(status: int) -> bytes:
    return _answer(status, {"error": {"message": "No.", "type": "server_error", "code": status}})


_ANSWERS = {
    "ok": _answer(200, {**_OK, "choices": _CHOICES, "usage": _USAGE}),
    "429": _error(429),
    "500": _error(500),
}
_arrivals: list[tuple[float, int]] = []


def _capped() -> bytes:
    now = time.time()
    status = 429 if sum(now - at < WINDOW and said == 200 for at, said in _arrivals) >= CAP else 200
    _arrivals.append((now, status))
    return _ANSWERS["ok" if status == 200 else "429"]


def text(number: int, count: int) -> str:
    """Return the whole text of a stream."""
    return "".join(f"{number}.{at} " for at in range(count))


async def _stream(transport: Any, number: int, count: int) -> None:
    def send(data: str) -> None:
        frame = f"data: {data}\n\n"
        transport.write(f"{len(frame):x}\r\n{frame}\r\n".encode())

    def chunk(delta: Any, end: str | None = None) -> str:
        return json.dumps({**_OK, "object": "chat.completion.chunk",
                           "choices": [{"index": 0, "delta": delta, "finish_reason": end}]})  # fmt: skip

    transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    began = time.monotonic()
    for at in range(count):
        if transport.is_closing():
            return
        send(chunk({"role": "assistant", "content": f"{number}.{at} "}))
        await asyncio.sleep(max(0.0, began + (at + 1) / PER_SECOND - time.monotonic()))
    send(chunk({}, "stop"))
    send(json.dumps({**_OK, "object": "chat.completion.chunk", "choices": [], "usage": _USAGE}))
    send("[DONE]")
    transport.write(b"0\r\n\r\n")


class _Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + size:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + size], self.buffer[end + 4 + size :]
            how = head.split(b" ", 2)[1].decode().split("/")
            if how[1:] == ["capped", "log"]:
                self.transport.write(_answer(200, _arrivals))
            elif how[1] == "stream":
                number, count = map(int, json.loads(body)["messages"][-1]["content"].split())
                self.streaming = asyncio.ensure_future(_stream(self.transport, number, count))
            elif how[1].startswith("slow-"):
                later = int(how[1].removeprefix("slow-")) / 1000
                asyncio.get_running_loop().call_later(later, self.transport.write, _ANSWERS["ok"])
            else:
                self.transport.write(_capped() if how[1] == "capped" else _ANSWERS[how[1]])


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until who started it is gone
    server.close()


@contextmanager
def process() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a provider; give its address, and its process."""
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout
        yield f"http://127.0.0.1:{one.stdout.readline().strip()}", one
        one.communicate()


@contextmanager
def running() -> Iterator[str]:
    """Start the provider; give its address."""
    with process() as (address, _):
        yield address


def arrivals(address: str) -> list[tuple[float, int]]:
    """Return when each request to /capped came, and what it was told."""
    with urllib.request.urlopen(f"{address}/capped/log") as answer:
        return [(at, status) for at, status in json.load(answer)]


if __name__ == "__main__":
    asyncio.run(_serve())
