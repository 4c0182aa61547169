"""Checks whether a request's host is reachable, and whether it may be sent a key or a prompt.

A firewall that drops packets must cost 3 s, not the whole request timeout; LiteLLM honours a separate connect timeout
for OpenAI's client only. That check runs beside the request and does not delay it.
"""

from __future__ import annotations

import asyncio
import hmac
import ssl
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from biollm._ownership import address, is_this_host, objection
from biollm._runtime import apart, background
from biollm.routing.deployments import Deployment
from biollm.slurm.endpoints import PROOF, challenge, proof, unproven

if TYPE_CHECKING:
    from biollm.config import Cluster
    from biollm.providers.credentials import Credential

_Place = tuple[str, str, tuple[str, ...], tuple[str, ...]]
_STEPS = 12
_KNOWN = 60.0  # seconds for which a host that answered needs no watching
# Seconds for which a check of an address holds, so that with the choice among replicas and what LiteLLM does first it is
# at most 5 s old when the request is sent; and after which it is renewed beside a request.
TRUSTED, RENEWED = 4.0, 2.0
PATIENCE = 10.0  # seconds for a server to prove its start
_HOSTS = {"gemini": "https://generativelanguage.googleapis.com"}  # where LiteLLM sends without an api_base


class Reach:
    """The hosts that answered this process. `patience` is in seconds."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: dict[str, float] = {}

    def note(self, deployment: Deployment) -> None:
        """Remember that the deployment's host answered."""
        self._seen[deployment.endpoint] = time.monotonic()

    def watch(self, deployment: Deployment, scope: asyncio.Timeout) -> asyncio.Task[bool] | None:
        """Connect beside the request; if no connection comes up, end `scope`. The task returns whether one did."""
        url = deployment.base_url or _HOSTS.get(deployment.litellm_model.split("/")[0])
        if not url or time.monotonic() - self._seen.get(deployment.endpoint, -_KNOWN) < _KNOWN:
            return None
        return asyncio.create_task(self._connect(url, scope))

    async def _connect(self, url: str, scope: asyncio.Timeout) -> bool:
        (host, port), scheme = address(url), urlsplit(url).scheme
        tls = scheme == "https"
        if proxy := proxy_of(url):
            through = urlsplit(proxy)
            host, port, tls = through.hostname or "", through.port or 80, False
        opening = asyncio.ensure_future(asyncio.open_connection(host, port, ssl=_any_certificate() if tls else None))
        opening.add_done_callback(_close)
        try:
            # In steps, so that a loop that was blocked (LiteLLM's imports take seconds) loses one step, not the whole wait.
            for _ in range(_STEPS):
                if (await asyncio.wait({opening}, timeout=self._patience / _STEPS))[0]:
                    return True  # also after an error: the host is there, and the request itself gets that
            scope.reschedule(asyncio.get_running_loop().time())
            return False
        finally:
            opening.cancel()


def _close(opening: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    """Close a connection that was opened, also if nothing waits for it any more."""
    if not opening.cancelled() and not opening.exception():
        opening.result()[1].close()


class Trust:
    """Checks whether an address may be sent a key or a prompt, and remembers it. For the background loop only.

    A server found by its record proves its start; at a fixed address on this host, the listener's owner is looked up.
    Both take milliseconds, so a result holds for `TRUSTED` seconds. In use it is renewed earlier, beside the requests.
    """

    def __init__(self) -> None:
        self._good: dict[_Place, float] = {}
        self._looks: dict[_Place, asyncio.Task[str | None]] = {}
        self._client: Any = None

    async def objection(self, deployment: Deployment, known: Credential, cluster: Cluster) -> str | None:
        """Return why the deployment may not be sent a request, one sentence, or None. Every sender asks this first.

        Raises:
            httpx.HTTPError: A server found by its record cannot be reached.
            TimeoutError: It accepts the connection, and proves nothing in time.
        """
        url = known.base_url or deployment.base_url
        if not url:
            return None
        place = (_origin(url), deployment.start, cluster.local_hosts, cluster.trusted_owners)
        age = time.monotonic() - self._good.get(place, -TRUSTED)
        if age >= RENEWED and place not in self._looks:
            self._looks[place] = look = asyncio.create_task(self._look(place, url, deployment.model, known.secret))
            look.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may have left
        return await asyncio.shield(self._looks[place]) if age >= TRUSTED else None

    def forget(self, deployment: Deployment) -> None:
        """Check again before the next request, since one got no answer: another program may have taken the port."""
        origin = _origin(deployment.base_url or "")
        self._good = {place: at for place, at in self._good.items() if place[0] != origin}

    async def _look(self, place: _Place, url: str, model: str, secret: str) -> str | None:
        _, start, local_hosts, trusted_owners = place
        now = time.monotonic()
        try:
            ask = partial(objection, url, local_hosts=local_hosts, trusted_owners=trusted_owners)
            if start:
                found = None if await self._proves(url, start, secret) else unproven(url, model)
            else:
                found = await apart(ask) if is_this_host(address(url)[0]) else ask()
            if not found:
                self._good = {each: at for each, at in self._good.items() if now - at < TRUSTED} | {place: now}
            return found
        finally:
            del self._looks[place]

    async def _proves(self, url: str, start: str, secret: str) -> bool:
        """Return whether the server at `url` proves its start, on a new connection: a kept one would tell of the past."""
        import httpx

        if self._client is None:
            once, patience = httpx.Limits(max_keepalive_connections=0), httpx.Timeout(PATIENCE, connect=3.0)
            self._client = httpx.AsyncClient(trust_env=False, timeout=patience, limits=once)
            background().closing.append(self._client.aclose)
        nonce, path = challenge()
        async with asyncio.timeout(PATIENCE), self._client.stream("GET", urljoin(url, path)) as answer:
            said = answer.headers.get(PROOF, "")
            return hmac.compare_digest(said.encode(), proof(secret, nonce, start).encode())


def proxy_of(url: str) -> str | None:
    """Return the URL of the environment's proxy for a request; httpx and aiohttp would read ~/.netrc as well."""
    if not (found := getproxies()):
        return None
    parts = urlsplit(url)
    proxy = found.get(parts.scheme) or found.get("all")
    if not proxy or proxy_bypass(parts.hostname or ""):
        return None
    return proxy if "//" in proxy else f"http://{proxy}"


def _origin(url: str) -> str:
    """Return scheme, host and port: many models may share one listener."""
    return "/".join(url.split("/", 3)[:3])


def trust() -> Trust:
    """Return the process's one Trust."""
    return background().once("trust", Trust)


class FixedServers:
    """Checks which models the local servers with a fixed address serve."""

    _PATIENCE = 3.0  # seconds

    def __init__(self) -> None:
        self._listed: dict[str, tuple[float, set[str]]] = {}

    async def objection(self, deployment: Deployment, known: Credential) -> str | None:
        """Return why the server should not be asked, one sentence, or None; the request itself finds a dead one."""
        import httpx

        url = deployment.base_url or ""
        at, listed = self._listed.get(url, (-_KNOWN, set[str]()))
        if time.monotonic() - at >= _KNOWN:
            headers = {"Authorization": f"Bearer {known.secret}"} if known.secret else {}
            try:
                async with httpx.AsyncClient(timeout=self._PATIENCE, trust_env=False) as client:
                    answer = await client.get(f"{url}/models", headers=headers)
                listed = {str(entry["id"]) for entry in answer.json()["data"]}
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                return None
            self._listed[url] = (time.monotonic(), listed)
        name = deployment.litellm_model.split("/", 1)[1]
        return None if name in listed else f"the server at {url} serves {', '.join(sorted(listed)) or 'nothing'}"


def _any_certificate() -> ssl.SSLContext:
    """Return a context that accepts any certificate: nothing is sent after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
