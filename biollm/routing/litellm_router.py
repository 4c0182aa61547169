"""LiteLLM's Router, kept in step with the pool of deployments.

LiteLLM makes a connection pool for each key, address and timeout, and forgets the older of 200 of them with their
connections open; here all requests share one. It would send even loopback requests through HTTP_PROXY.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import litellm

from biollm._runtime import background
from biollm.providers.credentials import Credential
from biollm.routing import callback, litellm_answers, router_config
from biollm.routing.answers import Answer
from biollm.routing.calls import Call, parameters, text_prompt
from biollm.routing.candidates import DeploymentPool
from biollm.routing.deployments import Deployment
from biollm.routing.request import InFlight, Run
from biollm.routing.structured import Message

_IMPORTED_IN = os.getpid()
_LITELLM: Any = litellm  # its own types are partial
_MAX_CONNECTIONS = 1000
_IDLE_S = 60  # that an unused connection is kept, and the address that a name resolved to


class LiteLLMRouter:
    """The Router of one pool of deployments."""

    def __init__(self, pool: DeploymentPool) -> None:
        self._pool = pool
        if (close := _LITELLM.close_litellm_async_clients) not in background().closing:
            background().closing.append(close)  # else aiohttp complains at exit
        self._router: Any = _LITELLM.Router(model_list=self._entries(), **router_config.router_settings(pool.config))

    def discard(self) -> None:
        """Take back what the Router registered with LiteLLM; it still serves."""
        self._router.retire()

    def follow(self) -> None:
        """Take over the pool's deployments."""
        wanted = {entry["model_info"]["id"]: entry for entry in self._entries()}
        gone = set(self._router.registry().names(kind="ids")) - set(wanted)
        self._change(list(wanted.values()), delete=list(gone))

    def renew(self, deployment: Deployment, found: Credential) -> None:
        """Take over a deployment's new credential."""
        self._change(router_config.model_list([deployment], {deployment.id: _params(found)}))

    def _change(self, upsert: Sequence[dict[str, Any]], delete: Sequence[str] = ()) -> None:
        added = [_LITELLM.Deployment(**entry) for entry in upsert]
        self._router.apply(_LITELLM.router_api.ChangeSet(upsert=added, delete=delete))

    def _entries(self) -> list[dict[str, Any]]:
        _bypass_proxies(self._pool.deployments)
        keys = {ident: _params(found) for ident, found in self._pool.credentials.items()}
        return router_config.model_list(self._pool.deployments, keys)

    async def call(self, run: Run, inflight: InFlight, call: Call, messages: Sequence[Message]) -> Answer:
        """Let LiteLLM choose among the deployments of `inflight`, which have one order, and call one."""
        token = callback.current.set(call)
        callback.install()
        try:
            return litellm_answers.answer(await self._ask(run, inflight, messages, stream=inflight.stream))
        except UnicodeEncodeError as error:
            raise callback.cause(call, error) from None
        finally:
            callback.current.reset(token)
            call.on_choice = call.on_send = None  # a connection that is kept open keeps the call that it was opened in

    def _ask(self, run: Run, inflight: InFlight, messages: Sequence[Message], *, stream: bool) -> Awaitable[Any]:
        if os.getpid() != _IMPORTED_IN:  # LiteLLM cannot choose from a group in a forked child
            inflight.choice = [random.choice(inflight.choice)]  # noqa: S311
        request, first = run.request, inflight.choice[0]
        # The host program's LiteLLM callbacks see nothing of ours.
        params = parameters(run, first, stream=stream)
        params |= {"timeout": inflight.limit, "disable_fallbacks": True, "no-log": True}
        if stream:  # for which LiteLLM ignores `timeout`
            params["stream_timeout"] = inflight.limit
        group = router_config.LOCAL_GROUP if request.requirements.policy == "local_only" else router_config.GROUP
        model = first.id if len(inflight.choice) == 1 else group  # by its id, LiteLLM need not choose: 1 ms less
        if not request.middle:
            return self._router.acompletion(model=model, messages=list(messages), shared_session=_session(), **params)
        prompt = text_prompt(request.middle, first)
        return self._router.atext_completion(model=model, prompt=prompt, **params)


def _session() -> aiohttp.ClientSession:
    """Return the one pool of connections of this process, made on its loop."""
    here = background()

    def make() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, keepalive_timeout=_IDLE_S, ttl_dns_cache=_IDLE_S)
        made = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        here.closing.append(made.close)
        return made

    return here.once("session", make)


def _bypass_proxies(found: Sequence[Deployment]) -> None:
    hosts = {urlsplit(each.base_url).hostname or "" for each in found if each.local and each.base_url}
    hosts |= {"127.0.0.1" for each in found if each.embedded}
    if getproxies() and (proxied := sorted(host for host in hosts if not proxy_bypass(host))):
        kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [kept, *proxied]))


def _params(found: Credential) -> dict[str, Any]:
    """Return a credential as LiteLLM's parameters."""
    # LiteLLM would refuse more than `rpm` requests at once; the ledger counts, over all processes.
    params: dict[str, Any] = {"api_key": found.secret or "none", "max_parallel_requests": 1_000_000}
    if found.headers:
        params["extra_headers"] = dict(found.headers)
    if found.base_url:
        params["api_base"] = found.base_url
    return params
