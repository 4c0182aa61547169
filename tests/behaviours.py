"""The ways in which the loopback provider answers, or fails to, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any


@dataclass(frozen=True)
class Behaviour:
    """How one request is answered; the default is a proper answer.

    `hang`, `cut`, `tear` and `fail` count what still goes out: 0 is nothing, 1 the headers, n the headers and
    n-1 pieces (events of a stream, thirds of a body). `cut` ends the answer as if it were complete, `tear`
    closes in the middle of the next piece, `fail` sends an error event as vLLM does (not streaming: a 500).
    `reset` ends with a TCP reset instead, and may be a fraction: 0.5 is half of the headers. With `pause`, seconds,
    the answer goes on after `hang`. `garble` is the number of an event of which the end is lost, `noise` of one more
    that is no JSON and carries nothing.
    A streamed call comes in `fragments`. `every` is the pause before each further piece, in seconds.
    `usage` replaces the count of words; an empty one states nothing.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None  # sent instead of a completion; AUTHORIZATION becomes the key as it was sent
    content_type: str = "application/json"
    text: str | None = None  # instead of the server's own
    choices: bool = True
    finish: str | None = None  # the reason of the end, instead of "stop"
    hang: int | None = None
    cut: int | None = None
    tear: int | None = None
    reset: float | None = None
    pause: float | None = None
    fragments: int = 1
    every: float = 0
    garble: int | None = None
    noise: int | None = None
    done: bool = True  # whether a stream ends with [DONE]
    fail: int | None = None
    failure: str = "EngineCore died."
    drip: bool = False  # white space or SSE comments, for ever
    length: float | None = None  # times the true Content-Length
    usage: Mapping[str, Any] | None = None
    service_tier: str | None = None


def error(
    status: int, message: str, code: str | None = None, *, type_: str = "invalid_request_error", **more: Any
) -> Behaviour:
    """Return a refusal with an error body as OpenAI writes it; `headers=` passes through."""
    body = {"error": {"message": message, "type": type_, "param": None, "code": code}}
    return Behaviour(status, body=json.dumps(body), **more)


def limited(retry_after: str | None = None) -> Behaviour:
    """Return a 429, with a Retry-After header as given."""
    headers = (("Retry-After", retry_after),) if retry_after else ()
    return error(429, "Rate limit reached.", "rate_limit_exceeded", type_="requests", headers=headers)


def limited_until(epoch: float) -> Behaviour:
    """Return a 429 whose Retry-After is an HTTP date."""
    return limited(formatdate(epoch, usegmt=True))


def gemini_limited(period: str, delay: str) -> Behaviour:
    """Return Gemini's 429: a limit per "Day" or "Minute", free again after `delay` ("17s", "12.5s")."""
    google = "type.googleapis.com/google.rpc."
    quota = f"GenerateRequestsPer{period}PerProjectPerModel-FreeTier"
    details = [
        {"@type": google + "QuotaFailure", "violations": [{"quotaId": quota, "quotaValue": "20"}]},
        {"@type": google + "RetryInfo", "retryDelay": delay},
    ]
    message = f"You exceeded your current quota. Please retry in {delay}."
    body = {"error": {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED", "details": details}}
    return Behaviour(429, body=json.dumps(body))


OK = Behaviour()
HTTP_400 = error(400, "Invalid value for 'temperature'.", "invalid_value")
HTTP_401 = error(401, "Incorrect API key provided.", "invalid_api_key")
HTTP_401_ECHO = error(401, "Refused: AUTHORIZATION", "invalid_api_key")
HTTP_403 = error(403, "This account may not use this model.", "forbidden")
HTTP_404 = error(404, "The model does not exist.", "model_not_found")
HTTP_408 = error(408, "Request timed out.", type_="timeout")
HTTP_429 = limited()
HTTP_500 = error(500, "Internal server error.", type_="server_error")
HTTP_502 = Behaviour(502, body="<html><h1>502 Bad Gateway</h1></html>", content_type="text/html")
HTTP_503 = error(503, "The engine is overloaded.", type_="server_error")
HTTP_529 = error(529, "Overloaded.", type_="overloaded_error")
PROXY_403 = Behaviour(403, body="denied by policy", content_type="text/plain")
PROXY_407 = Behaviour(407, headers=(("Proxy-Authenticate", 'Basic realm="campus"'),), body="who are you?")
HANG = Behaviour(hang=0)
HANG_IN_BODY = Behaviour(hang=2)
DRIP = Behaviour(drip=True)
HTML = Behaviour(body="<html><h1>Sign in to the campus network</h1></html>", content_type="text/html")
TRUNCATED = Behaviour(body='{"id": "chatcmpl-1", "choices": [{"index": 0, "message": {"role": "assis')
NO_CHOICES = Behaviour(choices=False)
EMPTY = Behaviour(text="")
CUT = Behaviour(cut=3)
TORN = Behaviour(tear=3)
SSE_ERROR = Behaviour(fail=3)
LENGTH_OVER = Behaviour(length=1.5)
LENGTH_UNDER = Behaviour(length=0.5)
CONTEXT_TOO_LONG = error(
    400,
    "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens. "
    "Please reduce the length of the messages.",
    "context_length_exceeded",
)
CONTENT_POLICY = error(
    400,
    "Your request was rejected as a result of our safety system. Your prompt may contain text that is not "
    "allowed by our safety system.",
    "content_policy_violation",
)
