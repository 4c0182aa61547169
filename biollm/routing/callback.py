"""The LiteLLM callback that narrows each choice to what may serve, and reserves at the ledger before anything is sent.

LiteLLM's own limits count per deployment, per process and per clock minute, and its cooldowns turn a short Retry-After
into 30 s; the ledger counts per account, over all processes, in any window. What a request left for LiteLLM to choose
from rides in a context variable, so calls that the host program makes itself pass through untouched.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import httpx
import litellm
from litellm.integrations.custom_logger import CustomLogger

from biollm._runtime import THREAD
from biollm.routing import litellm_private, wire
from biollm.routing.calls import Call


def cause(call: Call, error: UnicodeEncodeError) -> Exception:
    """Return what the Router could not raise, as its text holds half of a surrogate pair."""
    answers = [each for each in call.posted.values() if isinstance(each, httpx.HTTPStatusError)]
    failed = [each for each in answers if each.response.is_error]
    return failed[-1] if failed else RuntimeError(error.object)


current: ContextVar[Call | None] = ContextVar("biollm_call", default=None)
_ours: ContextVar[bool] = ContextVar("biollm_ours", default=False)  # follows a call into LiteLLM's worker threads


def _deployment_id(entry: Mapping[str, Any]) -> str:
    """Return the deployment's id, the same in the groups `biollm` and `biollm-local`."""
    return str(entry["model_info"]["id"]).removesuffix("@local")


class Callback(CustomLogger):
    """Four of LiteLLM's hooks. The signatures are LiteLLM's."""

    async def async_filter_deployments(  # noqa: D102
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: Any,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        if (call := current.get()) is None:
            return healthy_deployments
        return [entry for entry in healthy_deployments if _deployment_id(entry) in call.claims]

    async def async_pre_call_check(self, deployment: dict[str, Any], parent_otel_span: Any) -> dict[str, Any]:  # noqa: D102
        if (call := current.get()) is None:
            return deployment
        await call.reserve(_deployment_id(deployment))
        return deployment

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: Any) -> None:  # noqa: D102
        if call := current.get():
            call.translated = True

    async def async_post_call_success_deployment_hook(  # noqa: D102
        self, request_data: dict[str, Any], response: Any, call_type: Any
    ) -> None:
        if current.get():
            litellm_private.skip_pricing(response)


_send = httpx.AsyncClient.send
_HELD = "_biollm_sends_once"
# JSON may hold these as they are, but httpx and LiteLLM take them for the ends of lines.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


async def _send_once(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
    """Send a request of ours once, and follow no redirect: the ledger counts requests, and knows where they go.

    LiteLLM's handler posts again after a reset, OpenAI's SDK after a 422, and neither has a switch for it. They
    get what came of the first request instead.
    """
    call = current.get()
    if call is None or request.method != "POST":
        return await _send(self, request, **options)
    if before := call.posted.get(request.url):
        raise before
    options["follow_redirects"] = False
    try:
        response = await _send(self, request, **options)
    except Exception as error:
        call.posted[request.url] = error
        raise
    call.posted[request.url] = httpx.HTTPStatusError(f"HTTP {response.status_code}", request=request, response=response)
    if not response.is_closed and "text/event-stream" in response.headers.get("content-type", ""):
        vars(response)["aiter_bytes"] = partial(_events, response.aiter_bytes())
    return response


async def _events(pieces: AsyncIterator[bytes], chunk_size: int | None = None) -> AsyncIterator[bytes]:
    """Yield a stream's lines. LiteLLM drops an event that it cannot read, and the answer would lack its text."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            yield b"".join(_checked(line) + b"\n" for line in lines)
    if rest:  # the stream broke here, and whoever reads it notices that it never ended
        yield rest


def _checked(line: bytes) -> bytes:
    """Return a line of a stream as LiteLLM can read it; b"" for noise. Raises as `wire.event`."""
    if not line.startswith(b"data:") or line[5:].strip() in (b"", b"[DONE]"):
        return line
    if wire.event(line) is None:
        return b""
    line = wire.without_lone_surrogates(line)
    line = line.replace(b"[DONE]", rb"\u005bDONE]")  # in a text; LiteLLM would take it for the stream's end
    return line if line.isascii() else line.decode().translate(_LINE_ENDS).encode()


class _Hush(logging.Filter):
    """Drops what LiteLLM logs of our calls: failures are in the list of attempts, and a log could hold a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != THREAD and not _ours.get()


def install() -> None:
    """Put one Callback among LiteLLM's callbacks; again, if the host program has replaced them since. Mark the call as ours."""
    _ours.set(True)
    litellm_private.skip_success_events()
    if not vars(httpx.AsyncClient).get(_HELD):  # once: the host program may have put something around ours since
        setattr(httpx.AsyncClient, "send", _send_once)  # noqa: B010 # other requests pass through untouched
        setattr(httpx.AsyncClient, _HELD, True)
    if any(isinstance(callback, Callback) for callback in litellm.callbacks):
        return
    litellm.callbacks.append(Callback())
    for name in (*litellm_private.LOGGERS, "openai._base_client", "httpx"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Hush) for each in logger.filters):
            logger.addFilter(_Hush())
