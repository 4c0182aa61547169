"""Admits to the gateway's TCP port who has a key: a loopback is shared by everybody on a login node.

LiteLLM's proxy answers everybody unless it is given a master key, and keeps further keys in Postgres.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from biollm._files import locked, write_private
from biollm._ownership import is_private
from biollm._runtime import ledger
from biollm.config import values as forms
from biollm.config import yaml
from biollm.config.paths import config_dirs, own_dir, state_dir
from biollm.errors import ConfigError, Problem
from biollm.gateway.openai_api import problem
from biollm.ledger import Claim, Refused

MAX_BODY, MAX_LOGIN = 32 << 20, 4096  # bytes
KEYS = "gateway_keys.yaml"
SHORTEST = 16  # characters of a key
_log = logging.getLogger("biollm")
_PAGES = ("/", "/events", "/metrics")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:]+))(?::[0-9]+)?")
_LOGIN = (
    '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>biollm</title>'
    '<body style="font:16px system-ui;margin:4em auto;max-width:20em"><form method="post" action="/login">'
    '<label>Key of this gateway<br><input name="key" type="password" autocomplete="current-password" autofocus></label> <button>Show</button></form>'
)
_HEADERS = {"cache-control": "no-store", "x-frame-options": "DENY", "content-security-policy": "frame-ancestors 'none'"}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)
    key: str = Field(min_length=SHORTEST, repr=False)
    tags: dict[str, str] = {}
    rate_limit: forms.Requests = ()
    start_local: bool = False


@dataclass(frozen=True)
class Key:
    """Who may ask, how often, what is noted with each of its requests, and whether they may start servers on Slurm."""

    name: str
    secret: str = field(repr=False)
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    limits: Sequence[forms.Limit] = ()
    start_local: bool = False


def keys() -> tuple[tuple[Key, ...], str]:
    """Return the keys and where they are: BIOLLM_GATEWAY_KEY, gateway_keys.yaml, else a random one in a file of its own.

    Raises:
        ConfigError: gateway_keys.yaml is wrong, or others can read it; or a key is too short.
    """
    found: list[Key] = []
    if key := os.environ.get("BIOLLM_GATEWAY_KEY"):
        if len(key := key.strip()) < SHORTEST:
            why, hint = f"has fewer than {SHORTEST} characters.", "Make one: openssl rand -hex 16."
            raise ConfigError([Problem("BIOLLM_GATEWAY_KEY", 0, "", why, hint)])
        found.append(Key("environment", key))
    file = next((path for _, folder in reversed(config_dirs()) if (path := folder / KEYS).exists()), None)
    if file:
        found = [*_read(file), *found]  # the file says what a key may do, also where the variable holds the same one
        return tuple(found), str(file)
    if found:
        return tuple(found), "BIOLLM_GATEWAY_KEY"
    file = own_dir(state_dir()) / "gateway.key"
    with locked(file.with_name("gateway.key.lock")):
        key = file.read_text(errors="replace").strip() if is_private(file, stat.S_ISREG) else ""
        if len(key) < SHORTEST or not re.fullmatch("[!-~]+", key):
            if file.exists():  # a full disk or a crash can leave it empty
                _log.warning("%s did not hold a whole, private key: it has a new one.", file)
            key = secrets.token_urlsafe(32)
            write_private(file, f"{key}\n")
    return (Key("random", key),), str(file)


def _read(file: Path) -> Iterable[Key]:
    if not is_private(file, stat.S_ISREG):
        raise ConfigError([Problem(str(file), 0, "", "holds keys, and others can read it.", f"chmod 600 {file}")])
    document = yaml.read(file)
    problems, found = list(document.problems), list[Key]()
    for name, value in document.value.items():
        try:
            entry = _Entry.model_validate(value)
        except ValidationError as error:  # its own text would show the key
            told = error.errors(include_input=False, include_url=False)
            problems += [document.problem((name, *each["loc"][:1]), f"{each['msg']}.") for each in told]
        else:
            found.append(Key(name, entry.key, entry.tags, entry.rate_limit, entry.start_local))
    if problems or not found:
        raise ConfigError(problems or [Problem(str(file), 0, "", "holds no key.", "Write NAME: {key: ...}.")])
    return found


class Admission:
    """Lets requests with a key through to `inner`, with the key's tags; /health answers everybody.

    Args:
        inner: The gateway.
        known: The keys.
        host: The name it listens at, which a request's Host header may hold beside this machine's names.
    """

    def __init__(self, inner: ASGIApp, known: Sequence[Key], host: str) -> None:
        self._inner, self._known = inner, known
        self._hosts = {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        # Browsers send a cookie to every port of a host, so it is no key: it opens the pages, until this process ends.
        self._cookie = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] == "http":
            answer = await self._judge(Request(scope, receive), scope)
            await (answer or self._inner)(scope, receive, send)

    async def _judge(self, request: Request, scope: Scope) -> Response | None:
        """Return why a request goes no further; None lets it through."""
        path: str = scope["path"]  # that of request.url is read out of the Host header too (CVE-2026-48710)
        if not self._knows(request.headers.get("host", "")):  # else a page elsewhere could rebind its name to us
            return _refusal(421, "This gateway does not go by that host's name.", "wrong_host")
        length = request.headers.get("content-length", "0")
        if request.headers.get("transfer-encoding") or not length.isdecimal():
            return _refusal(411, "Send the body's length.", "length_required")
        if int(length) > (MAX_LOGIN if path == "/login" else MAX_BODY):
            return _refusal(413, "The body is too large.", "too_large")
        if path == "/health":
            return None
        if path == "/login" and request.method == "POST":
            return self._login(await request.body())
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if (key := self._key(given.strip() if scheme.lower() == "bearer" else "")) is not None:
            scope["biollm.tags"] = {"key": key.name, **key.tags}
            scope["biollm.start_local"] = key.start_local
            return await _limited(key) if path.startswith("/v1/") and request.method == "POST" else None
        if request.method == "GET" and path in _PAGES:
            if hmac.compare_digest(request.cookies.get("biollm", "").encode(), self._cookie.encode()):
                return None
            if "text/html" in request.headers.get("accept", ""):
                return HTMLResponse(_LOGIN, 401, _HEADERS)
        return _refusal(401, "A key of this gateway is needed.", "invalid_api_key", {"www-authenticate": "Bearer"})

    def _knows(self, host: str) -> bool:
        """Return whether a Host header is an address or one of our names, with an optional port and nothing else."""
        if (found := _HOST.fullmatch(host.lower())) is None:
            return False
        try:
            return bool(ip_address(found[1] or found[2]))
        except ValueError:
            return found[2] is not None and found[2].rstrip(".") in self._hosts

    def _key(self, given: str) -> Key | None:
        """Return the key that was given, in a time that does not tell how near it comes to one."""
        digest = sha256(given.encode()).digest()
        same = [hmac.compare_digest(digest, sha256(each.secret.encode()).digest()) for each in self._known]
        return next((key for key, fits in zip(self._known, same, strict=True) if fits and given), None)

    def _login(self, body: bytes) -> Response:
        if self._key(parse_qs(body.decode(errors="replace")).get("key", [""])[0].strip()) is None:
            return HTMLResponse(f"{_LOGIN}<p>That is none of its keys.", 401, _HEADERS)
        answer = RedirectResponse("/", 303)
        answer.set_cookie("biollm", self._cookie, httponly=True, samesite="strict")
        return answer


async def _limited(key: Key) -> Response | None:
    """Count a request against the key's limits; say so when one is used up."""
    if not key.limits:
        return None
    found = await ledger().reserve(Claim(f"gateway/{key.name}", tuple(key.limits)))
    if not isinstance(found, Refused):
        return None
    wait = {"retry-after": str(max(1, round(found.until - time.time())))}
    return _refusal(429, f"This key is at its limit: {found.reason}.", "rate_limit_exceeded", wait)


def _refusal(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> Response:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return JSONResponse(problem(message, kind, code), status, headers)
