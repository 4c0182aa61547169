"""API-key authentication for the gateway's TCP port: on a login node, every user can reach loopback.

LiteLLM's proxy is open to all unless it has a master key, and keeps further keys in Postgres.
"""

from __future__ import annotations

import binascii
import hmac
import logging
import math
import os
import re
import secrets
import socket
import stat
import time
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from biollm._files import locked, write_private
from biollm._ownership import is_private
from biollm._runtime import ledger
from biollm.config import Config, values, yaml
from biollm.config.loader import sentence
from biollm.config.paths import config_dirs, state_dir
from biollm.errors import ConfigError, Problem, nearest
from biollm.gateway.dialects import Dialect
from biollm.gateway.openai_api import problem
from biollm.ledger import Claim, Refused
from biollm.monitoring.page import key_needed
from biollm.providers import gateway_key
from biollm.providers.gateway_key import KEYS, SHORTEST
from biollm.types import DATA_POLICIES

MAX_BODY = 32 << 20  # bytes
_log = logging.getLogger("biollm")
_WHERE = "`biollm serve status` shows where it has its keys."
_PAGES = ("/", "/events", "/metrics")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:]+))(?::[0-9]+)?")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)
    key: str = Field(min_length=SHORTEST)
    tags: dict[str, str] = {}
    rate_limit: values.Requests = ()
    start_local: bool = False


@dataclass(frozen=True)
class Key:
    """A key: its rate limits, the tags of its usage records, and whether it may start servers on Slurm.

    A key derived for an agent also has a data policy and an expiry, in epoch seconds.
    """

    name: str
    secret: str = field(repr=False)
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    limits: Sequence[values.Limit] = ()
    start_local: bool = False
    policy: str = "any"
    expires: float = math.inf


def keys() -> tuple[tuple[Key, ...], str]:
    """Return the keys and their source: BIOLLM_GATEWAY_KEY, gateway_keys.yaml, or a random key in a file of its own.

    Raises:
        ConfigError: gateway_keys.yaml is invalid or others can read it, or BIOLLM_GATEWAY_KEY is too short.
    """
    found: list[Key] = []
    if key := os.environ.get("BIOLLM_GATEWAY_KEY"):
        if len(key := key.strip()) < SHORTEST:
            why, hint = f"has fewer than {SHORTEST} characters.", "Make one: openssl rand -hex 16."
            raise ConfigError([Problem("BIOLLM_GATEWAY_KEY", 0, "", why, hint)])
        found.append(Key("environment", key))
    if file := next((path for _, folder in reversed(config_dirs()) if (path := folder / KEYS).exists()), None):
        # The file's entry wins where both hold the same key: it says what the key may do.
        return (*_read(file), *found), str(file)
    if found:
        return tuple(found), "BIOLLM_GATEWAY_KEY"
    file = gateway_key.random_key_file(state_dir())
    return (Key("random", _random(file)),), str(file)


def _random(file: Path) -> str:
    """Return the key in `file`; write a new one unless it holds a whole key that only this user can read."""
    with locked(file.with_name("gateway.key.lock")):
        key = file.read_text(errors="replace").strip() if is_private(file, stat.S_ISREG) else ""
        if len(key) < SHORTEST or not re.fullmatch("[!-~]+", key):
            if file.exists():  # a full disk or a crash can leave it empty
                _log.warning("%s did not hold a complete, private key; it now has a new one.", file)
            key = secrets.token_urlsafe(32)
            write_private(file, f"{key}\n")
    return key


def _read(file: Path) -> list[Key]:
    if not is_private(file, stat.S_ISREG):
        raise ConfigError([Problem(str(file), 0, "", "holds keys and can be read by others.", f"chmod 600 {file}")])
    document = yaml.read(file)
    problems, found = list(document.problems), list[Key]()
    for name, value in document.value.items():
        try:
            entry = _Entry.model_validate(value)
        except ValidationError as error:  # its own text would show the key
            for each in error.errors(include_input=False, include_url=False):
                key = str(each["loc"][0]) if each["type"] == "extra_forbidden" else ""
                known = _Entry.model_fields
                hint = key and (nearest(key, known) or f"Known: {', '.join(known)}.")
                problems.append(document.problem((name, *each["loc"][:1]), sentence(each), hint or None))
        else:
            found.append(Key(name, entry.key, entry.tags, entry.rate_limit, entry.start_local))
    if problems or not found:
        raise ConfigError(problems or [Problem(str(file), 0, "", "holds no key.", "Write NAME: {key: ...}.")])
    return found


class Admission:
    """ASGI middleware: a key opens every route, as a bearer token or as Anthropic's x-api-key.

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
        self._inner, self._known, self._config = inner, known, config
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
        scope["biollm.tags"] = {"key": key.name, **key.tags}
        scope["biollm.start_local"] = key.start_local
        if key.policy != "any":
            _tighten(scope, key.policy)
        asks = request.method == "POST" and path.startswith("/v1/") and not path.endswith("/count_tokens")
        return await _limited(key, path, self._config) if asks else None

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
        same = [hmac.compare_digest(digest, sha256(each.secret.encode()).digest()) for each in self._known]
        whole = (key for key, fits in zip(self._known, same, strict=True) if fits and given)
        return next(whole, None) or next(filter(None, (_derived(given, each) for each in self._known)), None)


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


async def _limited(key: Key, path: str, config: Config | None) -> Response | None:
    """Count a request against the key's limits; return the refusal where one is used up."""
    if not key.limits:
        return None
    found = await ledger(config).reserve(Claim(f"gateway/{key.name}", tuple(key.limits)))
    if not isinstance(found, Refused):
        return None
    wait = {"retry-after": str(max(1, round(found.until - time.time())))}
    return _refusal(path, 429, f"This key is at its limit: {found.reason}.", "rate_limit_exceeded", wait)


def _refusal(path: str, status: int, message: str, code: str, headers: Mapping[str, Any] | None = None) -> Response:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return JSONResponse(Dialect(path).problem(status, problem(message, kind, code)), status, headers)
