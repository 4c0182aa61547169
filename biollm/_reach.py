"""Watches beside a request whether its host takes a connection at all, so that a firewall that drops packets costs 3 s.

LiteLLM honours a separate connect timeout for OpenAI's client only; for the others (vLLM, Gemini) a dropped packet
costs the whole request timeout. The watch runs beside the request and delays nothing.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from biollm.routing import Deployment

_KNOWN = 60.0  # seconds for which a host that answered needs no watching
_HOSTS = {"gemini": "https://generativelanguage.googleapis.com"}  # where LiteLLM sends without an api_base


class Reach:
    """What is known of the hosts, in this process. `patience` is in seconds."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: dict[str, float] = {}

    def note(self, deployment: Deployment) -> None:
        """Remember that the deployment's host answered."""
        self._seen[deployment.endpoint] = time.monotonic()

    def watch(self, deployment: Deployment, scope: asyncio.Timeout) -> asyncio.Task[bool] | None:
        """Connect beside the request; if nothing takes the connection, end `scope`. The task's result says whether."""
        url = deployment.base_url or _HOSTS.get(deployment.litellm_model.split("/")[0])
        if not url or time.monotonic() - self._seen.get(deployment.endpoint, -_KNOWN) < _KNOWN:
            return None
        return asyncio.create_task(self._connect(url, scope))

    async def _connect(self, url: str, scope: asyncio.Timeout) -> bool:
        where = urlsplit(url)
        host, port, tls = (
            where.hostname or "",
            where.port or (443 if where.scheme == "https" else 80),
            where.scheme == "https",
        )
        proxy = getproxies().get(where.scheme)
        if proxy and not proxy_bypass(host):
            through = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
            host, port, tls = through.hostname or "", through.port or 80, False
        try:
            async with asyncio.timeout(self._patience):
                _, writer = await asyncio.open_connection(host, port, ssl=_any_certificate() if tls else None)
            writer.close()
        except TimeoutError:
            scope.reschedule(asyncio.get_running_loop().time())
            return False
        except (OSError, ssl.SSLError):
            pass  # it answered, if only to refuse: the request itself will tell
        return True


def _any_certificate() -> ssl.SSLContext:
    """Return a context that trusts anybody: no byte is sent, the handshake alone shows that someone is there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
