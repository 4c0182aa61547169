"""Sends OpenAI's JSON to deployments that speak it, and relays what comes; LiteLLM is not imported.

LiteLLM takes 3 s to import, 5 ms of CPU per request and 0.4 ms per chunk of a stream, and drops fields that it does not
know. What may be sent where, the ledger, the deadlines and the failure table are the same as for LiteLLM's Router.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from biollm import __version__
from biollm._runtime import background
from biollm.providers.credentials import Credential
from biollm.routing import router_config, wire
from biollm.routing.answers import Answer
from biollm.routing.calls import Call, parameters, text_prompt
from biollm.routing.candidates import DeploymentPool
from biollm.routing.deployments import Deployment
from biollm.routing.host_check import proxy_of
from biollm.routing.request import InFlight, Request, Run
from biollm.routing.structured import Message
from biollm.types import Json, part

if TYPE_CHECKING:
    import aiohttp

_MOST, _MOST_ERROR = 64 << 20, 1 << 16  # bytes of an answer or an event; of an error's body
_CONNECTIONS, _IDLE_S = 1000, 60  # in all; that an unused one is kept, and the address that a name resolved to
_END_S = 0.2  # that a connection may take to end a stream after its last event; later it is not kept
_OPENAI = "https://api.openai.com/"
_GEMINI = "https://generativelanguage.googleapis.com/v1beta/openai"
_TRANSLATED = {"thinking", "functions", "function_call", "web_search_options", "audio", "modalities"}
_REASONS = re.compile(r"o\d|gpt-5")  # OpenAI's models that refuse the parameters of sampling
_SAMPLING = {"temperature", "top_p", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "logit_bias"}


class HTTPStatusError(Exception):
    """The provider answered with an error; `response` is what `classify` reads of httpx's."""

    def __init__(self, status: int, reason: str | None, headers: Mapping[str, str], text: str) -> None:
        super().__init__(reason or "")
        self.response = _Response(status, headers, text)


class _Response:
    def __init__(self, status: int, headers: Mapping[str, str], text: str) -> None:
        self.status_code, self.headers, self.text = status, headers, text


class ErrorFrame(Exception):  # noqa: N818
    """An error inside a response of status 200, or its stream."""

    def __init__(self, error: Any) -> None:
        self.body: Json = cast("Json", error) if isinstance(error, dict) else {"message": str(error)}
        self.code = self.body.get("code")
        super().__init__(str(self.body.get("message") or ""))


class ResponseTooLongError(Exception):
    """A body or an event is longer than any answer."""


def speaks(deployment: Deployment, request: Request | None = None) -> bool:
    """Return whether the deployment takes OpenAI's JSON, and the request needs none of LiteLLM's translations."""
    prefix = deployment.litellm_model.partition("/")[0]
    if request and request.params.keys() & _TRANSLATED:
        return False
    if prefix == "gemini":  # at Google's OpenAI endpoint, which takes fewer kinds of content and schema
        odd = request and (request.requirements.media or request.schema or "response_format" in request.params)
        return not odd and (deployment.base_url or _GEMINI).rstrip("/").endswith("/openai")
    return prefix in ("openai", "hosted_vllm")


class Direct:
    """The direct sender of one pool of deployments."""

    def __init__(self, pool: DeploymentPool) -> None:
        self._pool = pool

    async def call(self, run: Run, inflight: InFlight, call: Call, messages: Sequence[Message]) -> Answer:
        """Choose by the weights of the limits, reserve, send, and return what comes: an answer, or its stream."""
        weights = [router_config.requests_per_minute(each.limits) or 0 for each in inflight.choice]
        chosen = random.choices(inflight.choice, weights if all(weights) else None)[0]  # noqa: S311
        known = self._pool.credentials[chosen.id]  # now: its server may leave while the ledger is asked
        path, body = request_body(run, chosen, messages, stream=inflight.stream)
        call.translated = True
        await call.reserve(chosen.id)
        return await _post(chosen, known, path, body, fresh=chosen.id in run.repeated)


def request_body(run: Run, chosen: Deployment, messages: Sequence[Message], *, stream: bool) -> tuple[str, Json]:
    """Return the path below the base URL, and the JSON to send there."""
    request = run.request
    given = parameters(run, chosen, stream=stream)
    params: Json = {name: value for name, value in given.items() if value is not None}
    extra: Json = params.pop("extra_body", {})
    model = {"model": chosen.litellm_model.partition("/")[2]}
    if request.middle:
        return "completions", {**model, "prompt": text_prompt(request.middle, chosen), **params, **extra}
    if not params.get("tools"):
        params.pop("tool_choice", None)
    if (chosen.base_url or "").startswith(_OPENAI):
        if "max_tokens" in params:
            params["max_completion_tokens"] = params.pop("max_tokens")
        if _REASONS.match(model["model"]):
            params = {name: value for name, value in params.items() if name not in _SAMPLING}
    else:
        params.pop("user", None)  # not every such API takes it, nor the role `developer`
        messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    return "chat/completions", {**model, "messages": list(messages), **params, **extra}


async def _post(chosen: Deployment, known: Credential, path: str, body: Json, *, fresh: bool) -> Answer:
    """Send the request and return what comes. `fresh`: on a new connection, since a kept one may have been cut."""
    import aiohttp

    url = f"{(known.base_url or chosen.base_url or _GEMINI).rstrip('/')}/{path}"
    headers = {"User-Agent": f"biollm/{__version__}", "Authorization": f"Bearer {known.secret or 'none'}"}
    options: dict[str, Any] = {"proxy": None if chosen.local or chosen.embedded else proxy_of(url)}
    if url.startswith("https:"):
        options["ssl"] = _certificates(os.environ.get("SSL_CERT_FILE"))
    try:
        response = await _session(fresh=fresh).post(
            url, json=body, headers=headers | known.headers, allow_redirects=False, **options
        )
    except aiohttp.ClientHttpProxyError:
        raise
    except aiohttp.ClientResponseError:  # what came is not HTTP, and would be quoted
        raise aiohttp.ClientPayloadError from None
    try:
        return await _answer(response, stream="stream" in body)
    except BaseException:
        response.close()
        raise


async def _answer(response: aiohttp.ClientResponse, *, stream: bool) -> Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    if response.status != 200:
        text = (await _read(response, _MOST_ERROR)).decode(errors="replace")
        raise HTTPStatusError(response.status, response.reason, headers, text)
    if stream and "json" not in headers.get("content-type", ""):
        return Answer(headers, chunks=_events(response))
    data = await _read(response, _MOST)
    if len(data) >= _MOST:
        raise ResponseTooLongError
    whole = wire.loads(data)
    response.release()
    if whole.get("error") and not whole.get("choices"):
        raise ErrorFrame(whole["error"])
    _tidy(whole, "message")
    if not stream:
        return Answer(headers, whole)
    choices: Sequence[Json] = whole.get("choices") or ()
    for choice in choices:
        choice["delta"] = choice.pop("message", None)
    return Answer(headers, chunks=_once(whole))


async def _once(chunk: Json) -> AsyncGenerator[Json, None]:
    yield chunk


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return at most so many bytes of a body."""
    found = bytearray()
    async for data in response.content.iter_any():
        found += data
        if len(found) >= most:
            response.close()
            break
    return bytes(found[:most])


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[Json, None]:
    """Yield the chunks of a stream. A last line without an end was cut, and is none."""
    import aiohttp

    rest: list[bytes] = []
    size, ended = 0, False
    try:
        async for data in response.content.iter_any():
            *lines, last = data.split(b"\n")
            if lines:
                lines[0] = b"".join([*rest, lines[0]])
                rest, size = [], 0
            rest.append(last)
            if (size := size + len(last)) > _MOST:
                raise ResponseTooLongError
            for line in lines:
                if not line.startswith(b"data:") or not (text := line[5:].strip()):
                    continue
                if text == b"[DONE]":
                    ended = True
                    with suppress(TimeoutError, OSError, aiohttp.ClientError):
                        async with asyncio.timeout(_END_S):
                            await response.content.read(1)
                    return
                if chunk := wire.event(line):
                    if chunk.get("error"):
                        raise ErrorFrame(chunk["error"])
                    _tidy(chunk, "delta")
                    yield chunk
    finally:
        if ended:
            response.release()  # closed as well unless it has ended
        else:
            response.close()


def _tidy(found: Json, name: str) -> None:
    """Call a model's reasoning by the name that most providers and agents use."""
    choices: Sequence[Json] = found.get("choices") or ()
    for choice in choices:
        if reasoning := part(choice, name).pop("reasoning", None):
            choice[name].setdefault("reasoning_content", reasoning)


def _session(*, fresh: bool) -> aiohttp.ClientSession:
    """Return the process's connections; `fresh`: those that are used once."""
    import aiohttp

    here = background()

    def make() -> aiohttp.ClientSession:
        pool: dict[str, Any] = {"force_close": True} if fresh else {"keepalive_timeout": _IDLE_S}
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS, ttl_dns_cache=_IDLE_S, **pool)
        timeout, cookies = aiohttp.ClientTimeout(total=None), aiohttp.DummyCookieJar()
        made = aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=cookies, read_bufsize=1 << 18)
        here.closing.append(made.close)
        return made

    return here.once(f"direct{fresh}", make)


@cache
def _certificates(file: str | None) -> ssl.SSLContext:
    import certifi

    return ssl.create_default_context(cafile=file or certifi.where())
