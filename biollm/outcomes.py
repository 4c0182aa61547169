"""Reads what went wrong with an attempt out of LiteLLM's exception: the reason, and what must cool for how long.

LiteLLM's classes and status codes are not to be trusted: a refused connection is an InternalServerError 500, a 401
may be a BadRequestError. The truth is in the chain of causes: an httpx.HTTPStatusError means that a server answered;
else the class of the innermost exception says what broke. Pure: nothing is sent or stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from biollm._forms import Limit
from biollm._quotas import period

Cooled = Literal["", "account", "key", "endpoint", "deployment"]

# Seconds. A minute is the window of most rate limits; the others are how long such faults usually last.
RATE_LIMITED = 60.0
BROKEN = 15.0
UNREACHABLE = 600.0
NOT_SERVED = 600.0
KEY_REFUSED = 365 * 86400.0  # until the key changes: what cools is the key's fingerprint
_GEMINI_DAY = Limit("requests", 1, "day", "00:00 America/Los_Angeles")  # ai.google.dev/gemini-api/docs/rate-limits


@dataclass(frozen=True)
class Verdict:
    """What an attempt's failure means.

    Attributes:
        reason: One sentence; may quote the provider, so redact keys before showing it.
        status: The HTTP status, or None when no answer came.
        cools: What must rest: the account (or its model, where limits are per model), the key, the endpoint, or
            this deployment alone.
        seconds: For how long.
        passing: Whether a later try may succeed.
        fault: Whether the provider blames the request itself.
    """

    reason: str
    status: int | None = None
    cools: Cooled = ""
    seconds: float = 0.0
    passing: bool = True
    fault: bool = False


EMPTY = Verdict("answered with empty content and no tool call")
NO_CHOICES = Verdict("answered with no choices")
CUT = Verdict("the stream ended before the provider said it was done")


def timed_out(seconds: float, *, shortened: bool, what: str = "answer") -> Verdict:
    """Return the verdict on an attempt that gave no answer in `seconds`; the caller's own short limit cools nothing."""
    reason = f"no {what} within {seconds:g} s"
    return Verdict(reason) if shortened else Verdict(reason, cools="endpoint", seconds=BROKEN)


def unreachable(seconds: float) -> Verdict:
    """Return the verdict on a host to which no connection came about in `seconds`."""
    return Verdict(f"no connection within {seconds:g} s (a firewall?)", cools="endpoint", seconds=UNREACHABLE)


def classify(error: BaseException, now: float, *, shortened: bool = False) -> Verdict:
    """Return what `error`, raised by LiteLLM, means.

    Args:
        error: The exception.
        now: Epoch seconds, for a Retry-After that is a date.
        shortened: Whether the caller set a timeout shorter than the configured one.
    """
    chain = list(_chain(error))
    names = " ".join(type(link).__name__ for link in chain)
    answer = next((link for link in chain if type(link).__name__.endswith("HTTPStatusError")), None)
    if answer is not None:
        response: Any = getattr(answer, "response")  # noqa: B009 # httpx is not imported for its types
        return _answered(names, response.status_code, response.headers, _text(response) or str(error), now)
    if "ContextWindowExceeded" in names or "ContentPolicyViolation" in names:
        return Verdict(_message(str(error)), passing=False)
    if "ProxyError" in names or "ProxyConnection" in names:
        status = next((link.status for link in chain if hasattr(link, "status")), None)  # type: ignore[attr-defined]
        return Verdict(f"the proxy refused{f' (HTTP {status})' if status else ''}", cools="endpoint", seconds=BROKEN)
    if "Empty or invalid response" in str(error):  # LiteLLM, of HTML that OpenAI's client let pass
        names += " JSONDecodeError"
    for signs, seconds, reason in _NETWORK:
        if any(sign in names for sign in signs):
            return Verdict(reason, cools="endpoint" if seconds else "", seconds=seconds)
    if "Timeout" in names:
        return Verdict("no answer in time", cools="" if shortened else "endpoint", seconds=BROKEN)
    if "RequestError" in names or "ReadError" in names or "ClientError" in names:
        return Verdict("the connection broke", cools="endpoint", seconds=BROKEN)
    return Verdict(f"failed: {_message(str(error))}", cools="endpoint", seconds=BROKEN)


# Class names in an exception's chain -> how long the endpoint rests, and what happened; the first match counts.
# Transport texts are never quoted: they can hold a proxy's password.
_NETWORK: tuple[tuple[tuple[str, ...], float, str], ...] = (
    (("JSONDecodeError",), BROKEN, "answered with something that is not JSON"),
    (("gaierror", "DNSError"), UNREACHABLE, "the host's name does not resolve"),
    (
        ("CertificateError", "CertVerificationError"),
        UNREACHABLE,
        "its certificate is not trusted (a private CA? set SSL_CERT_FILE)",
    ),
    (("SSLError", "SSLZero"), UNREACHABLE, "no TLS connection came about"),
    (("ConnectTimeout", "ConnectionTimeoutError"), UNREACHABLE, "no connection came about in time"),
    (("ConnectionRefusedError",), BROKEN, "the connection was refused"),
    # A kept connection that the server closed at this very moment looks the same, so nothing cools.
    (("ServerDisconnectedError",), 0.0, "the server hung up without an answer"),
    (("PayloadError", "ProtocolError"), BROKEN, "the connection broke in the middle of the answer"),
    (("ConnectError",), UNREACHABLE, "the host cannot be reached"),
)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _text(response: Any) -> str:
    """Return an answer's body, or "" where it cannot be read any more."""
    try:
        return response.text
    except Exception:  # a stream that was not read (httpx.ResponseNotRead)
        return ""


def _answered(names: str, status: int, headers: Mapping[str, str], body: str, now: float) -> Verdict:
    """Judge an HTTP error status."""
    reason = f"HTTP {status}: {_message(body)}"
    if status == 429:
        seconds = _rests(body, headers, now)
        return Verdict(f"{reason} (rests {round(seconds, 1):.10g} s)", status, "account", seconds)
    if status == 401:
        return Verdict(reason, status, "key", KEY_REFUSED, passing=False)
    if status in (403, 404):
        return Verdict(reason, status, "deployment", NOT_SERVED, passing=False)
    if status == 407:
        return Verdict("the proxy refused (HTTP 407)", cools="endpoint", seconds=BROKEN)
    if "ContextWindowExceeded" in names or "ContentPolicyViolation" in names:
        return Verdict(reason, status, passing=False)
    if status == 408 or status >= 500:
        retry = retry_after(headers.get("retry-after"), now)
        return Verdict(reason, status, "endpoint", BROKEN if retry is None else retry)
    return Verdict(reason, status, passing=False, fault=True)


def _rests(body: str, headers: Mapping[str, str], now: float) -> float:
    """Return how long a 429 asks to wait: until Gemini's day ends, its header, Gemini's body, or a minute."""
    if re.search(r"quotaId\W+\w*PerDay", body):
        return period(_GEMINI_DAY, now)[1] - now
    header = retry_after(headers.get("retry-after"), now)
    if header is not None:
        return header
    delay = re.search(r"retryDelay\W+([\d.]+)s", body)
    return float(delay[1]) if delay else RATE_LIMITED


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds of a Retry-After header (seconds, a fraction or an HTTP date), or None."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def _message(text: str) -> str:
    """Return what the provider said, without JSON or LiteLLM's prefixes, at most 200 characters on one line."""
    if quoted := re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', text):
        text = quoted[1].replace('\\"', '"')
    else:
        text = re.sub(r"^(litellm\.)?(\w+(Error|Exception): )*(\w*[eE]xception - )?", "", text)
        text = re.sub(r"<[^>]*>", " ", text)
    text = re.sub(r"Bearer \S+|//[^/@\s]+@", "***", text)
    return " ".join(text.split())[:200]
