"""ASGI middleware of a model server: the key on every route but GET /health, proof of its start, a count of requests.

What vLLM lacks: its own key covers only /v1 and leaves /invocations (which generates), /tokenize, /metrics
and more open. Standard library only (Python 3.9): it is imported by the server (`--middleware MODULE.Guard`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

_NONCE = re.compile(rb"(?:^|&)nonce=([0-9a-f]{32,64})(?:&|$)")
UNCOUNTED = ("/health", "/metrics")  # asked by supervisors and monitors: no work, no sign of use


class Guard:
    """ASGI middleware: the key on every route but GET /health, the start's id on every answer, and a count.

    GET /health?nonce=HEX, which needs no key, is answered with `x-biollm-proof`: the HMAC-SHA256 of nonce and start id
    under the key, in hex. Clients ask for it before they send key and prompt: another program on this port, after
    this server has ended, cannot answer it. It tells nothing of the key, which is random and 256 bits long.

    An answer to whoever has the key also tells `x-biollm-flying` (requests in flight) and `x-biollm-idle`
    (seconds since the last one ended): draining and the idle stop need no metric names, which change.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._start = os.environ["BIOLLM_START"].encode()
        if not (key := Path(os.environ["BIOLLM_KEY_FILE"]).read_bytes().strip()):
            raise ValueError(f"{os.environ['BIOLLM_KEY_FILE']} holds no key.")
        self._secret, self._key = key, _digest(b"Bearer " + key)
        self._flying = 0
        self._last = time.monotonic()
        lifeline = int(os.environ["BIOLLM_LIFELINE"])
        threading.Thread(target=_die_with_supervisor, args=(lifeline,), daemon=True).start()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: D102
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope.get("headers") or ())
        known = hmac.compare_digest(_digest(headers.get(b"authorization", b"")), self._key)
        health = scope["type"] == "http" and scope["path"] == "/health" and scope["method"] in ("GET", "HEAD")
        if not (known or health):
            await _refuse(scope, send, self._tags(known=False))
            return
        nonce = _NONCE.search(scope.get("query_string") or b"") if health else None
        tags = [(b"x-biollm-proof", self._prove(nonce[1]))] if nonce else []
        counted = scope["path"] not in UNCOUNTED

        async def tagged(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._tags(known), *tags]}
            await send(message)

        self._flying += counted
        try:
            await self._app(scope, receive, tagged)
        finally:
            self._flying -= counted
            if counted:
                self._last = time.monotonic()

    def _prove(self, nonce: bytes) -> bytes:
        return hmac.new(self._secret, nonce + self._start, hashlib.sha256).hexdigest().encode()

    def _tags(self, known: bool) -> list[tuple[bytes, bytes]]:
        tags = [(b"x-biollm-start", self._start)]
        if known:
            idle = 0.0 if self._flying else time.monotonic() - self._last
            tags += [(b"x-biollm-flying", b"%d" % self._flying), (b"x-biollm-idle", b"%.1f" % idle)]
        return tags


async def _refuse(scope: Any, send: Any, tags: list[tuple[bytes, bytes]]) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer"), *tags]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    body = b'{"error": {"message": "The key is missing or wrong.", "type": "authentication_error"}}'
    await send({"type": "http.response.body", "body": body})


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _die_with_supervisor(lifeline: int) -> None:
    """Kill this server's process group when the other end of the pipe closes: nobody would ever stop it."""
    os.read(lifeline, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)
