"""Reads what went wrong with an attempt out of LiteLLM's exception: the reason, and what must cool for how long.

LiteLLM maps most failures of the network to InternalServerError 500, so the truth is taken from the innermost
exception of the chain and from whether the server sent headers. Pure: nothing is sent or stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from zoneinfo import ZoneInfo

Cooled = Literal["", "account", "key", "endpoint", "deployment"]

# Seconds. A minute is the window of most rate limits; the others are how long such faults usually last.
RATE_LIMITED = 60.0
BROKEN = 15.0
UNREACHABLE = 600.0
NOT_SERVED = 600.0
KEY_REFUSED = 365 * 86400.0  # until the key changes: what cools is the key's fingerprint


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
    names = [type(link).__name__ for link in _chain(error)]
    headers = getattr(error, "litellm_response_headers", None)
    status = getattr(error, "status_code", None)
    if "JSONDecodeError" in names or "Empty or invalid response" in str(error) or "Unable to get json" in str(error):
        return Verdict("answered with something that is not JSON", cools="endpoint", seconds=BROKEN)
    if isinstance(status, int) and (headers is not None or "HTTPStatusError" in names):
        return _answered(error, status, headers or {}, now)
    return _network(error, names, shortened)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _network(error: BaseException, names: list[str], shortened: bool) -> Verdict:
    """Judge a failure without an HTTP answer by the innermost exception's class."""
    text = " ".join(names)
    if "gaierror" in text or "DNSError" in text:
        return Verdict("the host's name does not resolve", cools="endpoint", seconds=UNREACHABLE)
    if "CertificateError" in text or "SSLCertVerificationError" in text:
        hint = "its certificate is not trusted (a private CA? set SSL_CERT_FILE)"
        return Verdict(hint, cools="endpoint", seconds=UNREACHABLE)
    if "SSL" in text:
        return Verdict("no TLS connection came about", cools="endpoint", seconds=UNREACHABLE)
    if "ProxyError" in text or "ProxyConnection" in text:
        return Verdict(f"the proxy refused: {_message(error)}", cools="endpoint", seconds=BROKEN)
    if "ConnectionRefusedError" in text:
        return Verdict("the connection was refused", cools="endpoint", seconds=BROKEN)
    if "ConnectionTimeoutError" in text or "ConnectTimeout" in text:
        return Verdict("no connection came about in time", cools="endpoint", seconds=UNREACHABLE)
    if "Timeout" in text:
        return Verdict("no answer in time", cools="" if shortened else "endpoint", seconds=BROKEN)
    if "OSError" in text or "ConnectError" in text or "ConnectorError" in text:
        return Verdict("the host cannot be reached", cools="endpoint", seconds=UNREACHABLE)
    if "PayloadError" in text or "ReadError" in text or "ServerDisconnected" in text or "RemoteProtocol" in text:
        return Verdict("the connection broke in the middle of the answer", cools="endpoint", seconds=BROKEN)
    return Verdict(f"{type(error).__name__}: {_message(error)}", cools="endpoint", seconds=BROKEN)


def _answered(error: BaseException, status: int, headers: Mapping[str, str], now: float) -> Verdict:
    """Judge an HTTP error status."""
    reason = f"HTTP {status}: {_message(error)}"
    kind = type(error).__name__
    if status == 429:
        seconds = _rests(error, headers, now)
        return Verdict(f"{reason} (rests {seconds:.3g} s)", status, "account", seconds)
    if status == 401:
        return Verdict(reason, status, "key", KEY_REFUSED, passing=False)
    if status == 403:
        return Verdict(reason, status, "deployment", NOT_SERVED, passing=False)
    if status == 404:
        return Verdict(reason, status, "deployment", NOT_SERVED, passing=False)
    if kind in ("ContextWindowExceededError", "ContentPolicyViolationError"):
        return Verdict(reason, status, passing=False)
    if status == 408 or status >= 500:
        retry = retry_after(headers.get("retry-after"), now)
        return Verdict(reason, status, "endpoint", BROKEN if retry is None else retry)
    return Verdict(reason, status, passing=False, fault=True)


def _rests(error: BaseException, headers: Mapping[str, str], now: float) -> float:
    """Return how long a 429 asks to wait: its header, Gemini's body, or a minute."""
    told = f"{getattr(error, 'body', '')} {error}"
    if re.search(r"quotaId\W+\w*PerDay", told):
        return seconds_to_midnight(now, "America/Los_Angeles")  # ai.google.dev/gemini-api/docs/rate-limits
    header = retry_after(headers.get("retry-after"), now)
    if header is not None:
        return header
    delay = re.search(r"retryDelay\W+([\d.]+)s", told)
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


def seconds_to_midnight(now: float, zone: str) -> float:
    """Return the seconds from `now` (epoch) to the next midnight in `zone`."""
    here = datetime.fromtimestamp(now, ZoneInfo(zone))
    midnight = (here + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight.astimezone(UTC).timestamp() - now


def _message(error: BaseException) -> str:
    """Return what the provider said, without LiteLLM's prefixes, at most 200 characters on one line."""
    body: dict[str, object] | object = getattr(error, "body", None)
    text = str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
    if quoted := re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', text):
        text = quoted[1]
    else:
        text = re.sub(r"^(litellm\.)?(\w+(Error|Exception): )*(\w*[eE]xception - )?", "", text).split("\n")[0]
    return " ".join(text.split())[:200]
