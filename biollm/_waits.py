"""Reads how long a provider asks to wait, from headers, its own JSON, or its words. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any, cast

from biollm._forms import Limit
from biollm._quotas import period

SHORTEST, LONGEST = 1.0, 31 * 86400.0  # seconds: what a provider can mean; outside of it the value is clamped
_GEMINI_DAY = Limit("requests", 1, "day", "00:00 America/Los_Angeles")  # ai.google.dev/gemini-api/docs/rate-limits
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_IN = re.compile(
    r"(?:try again|retry|available again|resets?)\b[^.\n\d]{0,30}?\b(?:in|after)\s+"
    r"((?:\d+(?:\.\d+)?\s*(?:ms|s|m|h|d|sec|second|min|minute|hour|day)[a-z]*[\s,]*)+)",
    re.I,
)
_DATE = re.compile(r"\b(\d{4}-\d\d-\d\d)(?:[T ]|\s+at\s+)?(\d\d:\d\d(?::\d\d)?)?")
# Header that says what is left -> header that says when it is full again; counted only where nothing is left.
_RESETS = [
    *((f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}") for kind in ("requests", "tokens")),
    *(
        (f"anthropic-ratelimit-{kind}-remaining", f"anthropic-ratelimit-{kind}-reset")
        for kind in ("requests", "tokens", "input-tokens", "output-tokens")
    ),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
    ("ratelimit-remaining", "ratelimit-reset"),
]


def stated(headers: Mapping[str, str], body: Any, message: str, now: float) -> float | None:
    """Return the seconds that an answer asks to wait, between 1 s and 31 days, or None where it names none.

    Args:
        headers: Of the answer.
        body: Its JSON; anything where it has none.
        message: The provider's own sentence.
        now: Epoch seconds.
    """
    quotas = " ".join(str(value) for key, value in _walk(body) if key == "quotaId")
    if "PerDay" in quotas:
        return period(_GEMINI_DAY, now)[1] - now  # whatever retryDelay says
    lower = {name.lower(): value for name, value in headers.items()}
    found = _number(lower.get("retry-after-ms"), 0.001)
    found = retry_after(lower.get("retry-after"), now) if found is None else found
    if found is None:
        found = _reset(lower, now)
    if found is None:
        found = next((_span(value) for key, value in _walk(body) if key == "retryDelay"), None)
    if found is None:
        quoted: Any = next((value for key, value in _walk(body) if key == "headers"), None)  # OpenRouter
        inner = cast("dict[str, Any]", quoted) if isinstance(quoted, dict) else {}
        found = _reset({name.lower(): str(value) for name, value in inner.items()}, now)
    if found is None and (spoken := _IN.search(message)):
        found = _span(spoken[1])
    return None if found is None else min(max(found, SHORTEST), LONGEST)


def date_in(message: str, now: float) -> float | None:
    """Return the seconds until a date that `message` names in UTC ("2026-12-01 at 00:00 UTC"), or None."""
    found = _DATE.search(message)
    left = _moment(f"{found[1]}T{found[2] or '00:00'}", now) if found else None
    return min(left, LONGEST) if left and left > 0 else None


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds of a Retry-After header (seconds, a fraction or an HTTP date), or None; never below 0."""
    if not value:
        return None
    if (seconds := _number(value)) is not None:
        return max(0.0, seconds)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    """Return when the last exhausted limit is full again, by the headers that say so."""
    waits = [
        _until(headers[reset], now) for left, reset in _RESETS if reset in headers and _number(headers.get(left)) == 0
    ]
    return max((wait for wait in waits if wait is not None), default=None)


def _until(value: str, now: float) -> float | None:
    """Return the seconds that a reset header means: a span ("6m0s", "12"), an epoch in s or ms, or a date."""
    number = _number(value)
    if number is None:
        return _span(value) if _PART.match(value) and "T" not in value else _moment(value, now)
    if number > 1e11:
        number /= 1000
    return number - now if number > 1e9 else number


def _moment(value: str, now: float) -> float | None:
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return None
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp() - now


def _span(value: object) -> float | None:
    """Return the seconds of "7m12.5s", "450ms" or "20 seconds", or None."""
    parts = [float(number) * _UNITS[unit.lower()] for number, unit in _PART.findall(str(value))]
    return sum(parts) if parts else None


def _number(value: str | None, unit: float = 1.0) -> float | None:
    try:
        number = float(value or "") * unit
    except ValueError:
        return None
    return number if isfinite(number) else None


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of nested JSON."""
    if isinstance(value, dict):
        for key, inner in cast("dict[str, Any]", value).items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _walk(inner)
