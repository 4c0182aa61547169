"""ASGI middleware of a model server: requires the key on every route but GET /health, and counts requests.

What vLLM lacks: its own key covers only /v1 and leaves /invocations (which generates), /tokenize, /metrics and more
open. Standard library only (Python 3.9); the server imports it (`--middleware MODULE.AuthMiddleware`).
"""

from __future__ import annotations

import hmac
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

_NONCE = re.compile(rb"(?:^|&)nonce=([0-9a-f]{32,64})(?:&|$)")
_UNCOUNTED = ("/health", "/metrics")  # requested by supervisors and monitors: neither work nor use


class AuthMiddleware:
    """Authenticates requests, and adds headers to every answer.

    x-biollm-start: The id of this start.
    x-biollm-proof: On GET /health?nonce=HEX, which needs no key: HMAC-SHA256 of nonce and start id under the key, in
        hex. Clients request it before they send key and prompt: another program may have this port by now.
    x-biollm-in-flight, x-biollm-idle: To authenticated clients: requests in flight, and seconds since the last one
        ended. Draining and the idle stop use them, because vLLM's metric names change.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._start = os.environ["BIOLLM_START"].encode()
        if not (key := Path(os.environ["BIOLLM_KEY_FILE"]).read_bytes().strip()):
            raise ValueError(f"{os.environ['BIOLLM_KEY_FILE']} holds no key.")
        self._key, self._authorization = key, b"Bearer " + key
        self._in_flight = 0
        self._last = time.monotonic()
        lifeline = int(os.environ["BIOLLM_LIFELINE"])
        threading.Thread(target=_die_with_supervisor, args=(lifeline,), daemon=True).start()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: D102
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope.get("headers") or ())
        authenticated = hmac.compare_digest(headers.get(b"authorization", b""), self._authorization)
        health = scope["type"] == "http" and scope["path"] == "/health" and scope["method"] in ("GET", "HEAD")
        if not (authenticated or health):
            await _refuse(scope, send, self._headers(authenticated=False))
            return
        nonce = _NONCE.search(scope.get("query_string") or b"") if health else None
        proof = hmac.new(self._key, nonce[1] + self._start, "sha256").hexdigest().encode() if nonce else b""
        counted = scope["path"] not in _UNCOUNTED

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [*self._headers(authenticated), *([(b"x-biollm-proof", proof)] if proof else [])]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        self._in_flight += counted
        try:
            await self._app(scope, receive, with_headers)
        finally:
            self._in_flight -= counted
            if counted:
                self._last = time.monotonic()

    def _headers(self, authenticated: bool) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-biollm-start", self._start)]
        if authenticated:
            idle = 0.0 if self._in_flight else time.monotonic() - self._last
            headers += [(b"x-biollm-in-flight", b"%d" % self._in_flight), (b"x-biollm-idle", b"%.1f" % idle)]
        return headers


async def _refuse(scope: Any, send: Any, headers: list[tuple[bytes, bytes]]) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer"), *headers]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    body = b'{"error": {"message": "The API key is missing or wrong.", "type": "authentication_error"}}'
    await send({"type": "http.response.body", "body": body})


def _die_with_supervisor(lifeline: int) -> None:
    """Kill this server's process group when the supervisor's end of the pipe closes: nothing else would stop it."""
    os.read(lifeline, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)
