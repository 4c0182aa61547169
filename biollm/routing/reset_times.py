"""Reads how long a provider asks to wait, from its headers, its JSON or its message. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any, cast

from biollm.config.values import Limit
from biollm.ledger.quotas import period

_MIN_S, _MAX_S = 1.0, 31 * 86400.0  # a wait outside of this is clamped
_GEMINI_DAY = Limit("requests", 1, "day", "00:00 America/Los_Angeles")  # ai.google.dev/gemini-api/docs/rate-limits
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*(ms|s|m(?!o)|h|d)")  # not "months"
_IN = re.compile(
    r"(?:(?:try again|retry|available again|resets?)\b[^.\n\d]{0,30}?\b(?:in|after)|please wait(?: for)?)\s+"
    r"((?:\d{1,18}(?:\.\d+)?\s*(?:ms|s|m(?!o)|h|d)[a-z]*[\s,]*)+)",
    re.I,
)
_DATE = re.compile(r"\b(\d{4}-\d\d-\d\d)(?:[T ]|\s+at\s+)?(\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?)?")
_AT = re.compile(r"(?:try again|retry|available again|resets?|regain access)\b[^.\n\d]{0,30}(?=\d{4}-)", re.I)
_LEFT_NONE = re.compile(r"\b(?:r|remaining)=0\s*[;,]\s*(?:t|reset)=(\d{1,18})")  # header RateLimit of the IETF drafts
_ECHOED = frozenset({"input", "ctx", "loc", "param", "messages", "request", "flagged_input"})
_DEPTH = 12  # levels of JSON; more than providers use
# Header that says what is left -> header that says when it is full again; counted only where nothing is left.
_RESETS = [
    *((f"x-ratelimit-remaining{what}", f"x-ratelimit-reset{what}") for what in ("", "-requests", "-tokens")),
    *(
        (f"anthropic-ratelimit-{what}-remaining", f"anthropic-ratelimit-{what}-reset")
        for what in ("requests", "tokens", "input-tokens", "output-tokens")
    ),
    ("ratelimit-remaining", "ratelimit-reset"),
]


def stated(headers: Mapping[str, str], fields: Sequence[tuple[str, Any]], message: str, now: float) -> float | None:
    """Return the seconds that a response asks to wait, between 1 s and 31 days, or None if it names no time.

    Args:
        headers: Of the response.
        fields: Every key and value of its JSON, as `walk` yields them.
        message: The provider's own words.
        now: Epoch seconds.
    """
    if "PerDay" in " ".join(str(value) for key, value in fields if key == "quotaId"):
        return period(_GEMINI_DAY, now)[1] - now  # whatever retryDelay says
    lower = {name.lower(): value for name, value in headers.items()}
    # OpenRouter quotes headers in its body.
    quoted = {key.lower(): str(value) for key, value in fields if not isinstance(value, dict | list)}
    within, at = _IN.search(message), _AT.search(message)
    named = [
        _number(quoted.get("resets_in_seconds")),  # Codex
        _number(lower.get("retry-after-ms"), 0.001),
        retry_after(lower.get("retry-after"), now),
        _reset(lower, now),
        _span(quoted.get("retrydelay", "")),
        _reset(quoted, now),
        _span(within[1]) if within else None,
        date_in(message[at.end() :], now) if at else None,
    ]
    # The first that names a time counts; 0 s only if none of the others gives more.
    found = next((wait for wait in named if wait), 0.0 if 0.0 in named else None)
    return None if found is None else min(max(found, _MIN_S), _MAX_S)


def date_in(message: str, now: float) -> float | None:
    """Return the seconds until a date in `message` ("2026-12-01 at 00:00 UTC"), or None."""
    found = _DATE.search(message)
    left = _moment(f"{found[1]}T{found[2] or '00:00'}", now) if found else None
    return min(left, _MAX_S) if left and left > 0 else None


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds of a Retry-After header (seconds, a fraction or an HTTP date), or None; never below 0."""
    if not value:
        return None
    if (seconds := _number(value)) is not None:
        return max(0.0, seconds)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until the last exhausted limit is full again, by its headers."""
    waits = [
        _until(headers[reset], now) for left, reset in _RESETS if reset in headers and _number(headers.get(left)) == 0
    ]
    waits += map(float, _LEFT_NONE.findall(headers.get("ratelimit", "")))
    return max((wait for wait in waits if wait is not None), default=None)


def _until(value: str, now: float) -> float | None:
    """Return the seconds of a reset header: a span ("6m0s", "12"), an epoch in s or ms, or a date."""
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
    parts = [float(number) * _UNITS_S[unit.lower()] for number, unit in _PART.findall(str(value))]
    return sum(parts) if parts else None


def _number(value: str | None, unit: float = 1.0) -> float | None:
    try:
        number = float(value or "") * unit
    except ValueError:
        return None
    return number if isfinite(number) else None


def parse(text: str) -> Any:
    """Return the JSON in `text`, after a sentence that LiteLLM may have put before it; None if there is none."""
    for start in (at for at in (text.find("{"), text.find("[{")) if at >= 0):
        try:
            return json.JSONDecoder().raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
    return None


def walk(value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of nested JSON, except what it echoes of the request."""
    if depth and isinstance(value, dict):
        for key, inner in cast("dict[str, Any]", value).items():
            if key in _ECHOED:
                continue
            if key == "raw" and isinstance(inner, str):  # OpenRouter: its provider's answer
                parsed = parse(inner)
                key, inner = ("message", inner) if parsed is None else (key, parsed)
            yield key, inner
            yield from walk(inner, depth - 1)
    elif depth and isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from walk(inner, depth - 1)
