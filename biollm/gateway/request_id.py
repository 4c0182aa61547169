"""ASGI middleware that names every answer: Qwen Code tries a broken stream again only where it had an `x-request-id`."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADER, _NAMED = b"x-request-id", "biollm.request_id"
_ECHOED = re.compile(rb"[\w.:-]{1,64}", re.ASCII)


class RequestId:
    """Adds `x-request-id` to each response: the caller's own where it is short and plain, else a new one."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http" or _NAMED in scope:  # named around the check of keys already
            return await self._inner(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
        scope[_NAMED] = ident = given if _ECHOED.fullmatch(given) else b"req_" + uuid4().hex.encode()

        def named(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (_HEADER, ident)]
            return send(message)

        return await self._inner(scope, receive, named)
