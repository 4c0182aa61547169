"""API-key authentication for the gateway's TCP port: on a login node, every user can reach loopback.

LiteLLM's proxy is open to all unless it has a master key, and keeps further keys in Postgres.
"""

from __future__ import annotations

import binascii
import hmac
import logging
import re
import socket
import time
from base64 import b64decode
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from biollm._runtime import ledger
from biollm.config import Config
from biollm.gateway.dialects import Dialect
from biollm.gateway.keys import Key, Known
from biollm.gateway.openai_api import problem
from biollm.ledger import Claim, Record, Refused
from biollm.monitoring.page import key_needed
from biollm.providers import gateway_key
from biollm.types import DATA_POLICIES

MAX_BODY = 32 << 20  # bytes
_log = logging.getLogger("biollm")
_WHERE = "`biollm serve status` shows where it has its keys."
_PAGES = ("/", "/events", "/metrics")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:]+))(?::[0-9]+)?")


class Admission:
    """ASGI middleware: a key opens every route but, for some, the pages; as a bearer token or as Anthropic's x-api-key.

    Browsers give it as HTTP Basic to see the pages; that opens nothing else, since browsers also send it with the
    requests of other sites. /health is open.

    Args:
        inner: The gateway.
        known: The keys.
        host: The name it listens at; a Host header may hold it, an address, or a name of this machine.
        names: Further names that a Host header may hold: of a balancer, or of a proxy that adds TLS.
        config: Names the ledger in which the keys' limits are counted; None is the state folder's.
    """

    def __init__(
        self, inner: ASGIApp, known: Sequence[Key], host: str, config: Config | None = None, names: Sequence[str] = ()
    ) -> None:
        self._inner, self._known, self._config = inner, Known(known), config
        hosts = ("localhost", host, socket.gethostname(), socket.getfqdn(), *names)
        self._hosts = {each.lower() for each in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] == "http":
            refusal = self._malformed(request := Request(scope)) or await self._unauthorized(request, scope)
            await (refusal or self._inner)(scope, receive, send)

    def _malformed(self, request: Request) -> Response | None:
        path = request.scope["path"]
        host = request.headers.get("host", "")  # of a page elsewhere that has rebound its name to us it is that name
        if not self._knows(host) and (host or path != "/health"):  # balancers look at /health without one
            return _refusal(path, 421, "This gateway does not serve that host name.", "wrong_host")
        length = request.headers.get("content-length", "0")
        if request.headers.get("transfer-encoding") or not length.isdecimal():
            return _refusal(path, 411, "Send the body's length.", "length_required")
        return _refusal(path, 413, "The body is too large.", "too_large") if int(length) > MAX_BODY else None

    async def _unauthorized(self, request: Request, scope: Scope) -> Response | None:
        path: str = scope["path"]  # that of request.url is read out of the Host header too (CVE-2026-48710)
        if path == "/health":
            return None
        page = request.method == "GET" and path in _PAGES
        scheme, given = _credentials(request.headers)
        key = self._key(given) if scheme == "bearer" or (page and scheme == "basic") else None
        if key is None:
            challenge = 'Basic realm="biollm: any user name, the gateway key as password"' if page else "Bearer"
            message = f"{'This is not a key' if given else 'Send a key'} of this gateway. {_WHERE}"
            headers = {"www-authenticate": challenge}
            if page and "text/html" in request.headers.get("accept", ""):
                return HTMLResponse(key_needed(message), 401, headers)
            return _refusal(path, 401, message, "invalid_api_key", headers)
        if key.expires < time.time():
            message = f"This key has expired. Start the agent again: biollm run {key.tags['agent']}."
            return _refusal(path, 401, message, "invalid_api_key", {"www-authenticate": "Bearer"})
        if scheme == "basic" and request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _refusal(path, 403, "Requests from other sites are refused.", "cross_site")
        if path in _PAGES and not key.pages:
            message = "This key does not open the pages. GET /usage shows what was used with it."
            return _refusal(path, 403, message, "no_pages")
        scope["biollm.tags"] = {**key.tags, "key": key.name}
        scope["biollm.start_local"] = key.start_local
        scope["biollm.key"] = key
        if key.policy != "any":
            _tighten(scope, key.policy)
        asks = request.method == "POST" and path.startswith("/v1/") and not path.endswith("/count_tokens")
        return await self._limited(key, scope) if asks and key.limits else None

    def _knows(self, host: str) -> bool:
        """Return whether a Host header is an address or one of our names, with an optional port and nothing else."""
        if (found := _HOST.fullmatch(host.lower())) is None:
            return False
        try:
            return bool(ip_address(found[1] or found[2]))
        except ValueError:
            return found[2] is not None and found[2].rstrip(".") in self._hosts

    def _key(self, given: str) -> Key | None:
        """Return the key that was given; the time it takes does not depend on how much of it is right."""
        digest = sha256(given.encode()).digest()
        known = self._known()
        same = [hmac.compare_digest(digest, each.digest) for each in known]
        whole = (key for key, fits in zip(known, same, strict=True) if fits and given)
        return next(whole, None) or next(filter(None, (_derived(given, each) for each in known if each.secret)), None)

    async def _limited(self, key: Key, scope: Scope) -> Response | None:
        """Count a request against the key's limits; return the refusal where one is used up.

        The request counts more with `scope["biollm.further"]`, which on a refusal counts it no more.
        """
        ledger(self._config).finished = self._charge
        granted: list[tuple[int, str]] = []

        def further(count: int) -> Awaitable[Response | None]:
            return self._reserve([key.requests] * count, granted, scope["path"])

        scope["biollm.further"] = further
        return await self._reserve((key.requests, key.usage), granted, scope["path"])

    async def _reserve(self, claims: Sequence[Claim], granted: list[tuple[int, str]], path: str) -> Response | None:
        counts = ledger(self._config)
        for claim in claims:
            found = await counts.reserve(claim)
            if isinstance(found, Refused):
                for reservation in granted:
                    counts.release(*reservation)
                wait = {"retry-after": str(max(1, round(found.until - time.time())))}
                return _refusal(path, 429, f"This key is at its limit: {found.reason}.", "rate_limit_exceeded", wait)
            granted.append((found, claim.scope))
        return None

    def _charge(self, record: Record) -> None:
        """Count what an attempt used against the limits of the key whose request it was for."""
        key = next((each for each in self._known() if each.name == record.tags.get("key")), None)
        if key and key.usage.limits:
            ledger(self._config).charge(key.usage, record)


def _derived(given: str, parent: Key) -> Key | None:
    """Return the agent's key that was given, if it was derived from `parent`."""
    if (grant := gateway_key.verified(given, parent.secret)) is None:
        return None
    tags = {**parent.tags, "agent": grant.agent}
    return replace(parent, tags=tags, policy=grant.policy, expires=grant.expires)


def _tighten(scope: Scope, policy: str) -> None:
    """Let the request ask for `policy`, unless it asks for a stricter one."""
    name, headers = b"x-biollm-policy", scope["headers"]
    weaker = [(name, each.encode()) for each in DATA_POLICIES[: DATA_POLICIES.index(policy)]]
    headers = [each for each in headers if each not in weaker]
    scope["headers"] = headers if any(each[0] == name for each in headers) else [*headers, (name, policy.encode())]


def _credentials(headers: Headers) -> tuple[str, str]:
    """Return the scheme of a request's key, in small letters, and the key: a token or password."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if not scheme and "x-api-key" in headers:
        return "bearer", headers["x-api-key"]
    if (scheme := scheme.lower()) != "basic":
        return scheme, given.strip()
    try:
        return scheme, b64decode(given).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return scheme, ""


def _refusal(path: str, status: int, message: str, code: str, headers: Mapping[str, Any] | None = None) -> Response:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return JSONResponse(Dialect(path).problem(status, problem(message, kind, code)), status, headers)
