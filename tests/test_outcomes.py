"""What an exception of LiteLLM means: the reason, and what rests for how long."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from biollm.outcomes import (
    BROKEN,
    KEY_REFUSED,
    NOT_SERVED,
    RATE_LIMITED,
    UNREACHABLE,
    classify,
    retry_after,
    timed_out,
)

NOW = datetime(2026, 11, 23, 20, 0, tzinfo=UTC).timestamp()  # noon in Los Angeles
GEMINI = '{"error": {"message": "quota", "details": [{"quotaId": "GenerateRequestsPer%sPerProject"}, {"retryDelay": "17s"}]}}'


def answered(status: int, text: str = "no", headers: dict[str, str] | None = None, kind: str = "APIError") -> Exception:
    """Return an exception as LiteLLM raises it for an HTTP answer: its own status is not to be trusted."""
    error = _litellm(kind, f"litellm.{kind}: OpenAIException - {text}")
    response = httpx.Response(status, text=text, headers=headers, request=httpx.Request("POST", "http://x"))
    error.__cause__ = httpx.HTTPStatusError("refused", request=response.request, response=response)
    return error


def broke(*chain: str) -> Exception:
    """Return an exception as LiteLLM raises it for a failure of the network: the truth is at the chain's end."""
    error: BaseException = _litellm("InternalServerError", "litellm.InternalServerError: Connection error.")
    link = error
    for name in chain:
        link.__cause__ = type(name, (Exception,), {})("http://user:password@proxy")
        link = link.__cause__
    return error


def _litellm(kind: str, text: str) -> Any:
    error: Any = type(kind, (Exception,), {})(text)
    error.status_code = 500
    return error


@pytest.mark.parametrize(
    ("error", "cools", "seconds", "passing", "fault"),
    [
        (answered(400), "", 0, False, True),
        (answered(422), "", 0, False, True),
        (answered(400, kind="ContextWindowExceededError"), "", 0, False, False),
        (answered(400, kind="ContentPolicyViolationError"), "", 0, False, False),
        (answered(401), "key", KEY_REFUSED, False, False),
        (answered(403), "deployment", NOT_SERVED, False, False),
        (answered(404), "deployment", NOT_SERVED, False, False),
        (answered(408), "endpoint", BROKEN, True, False),
        (answered(429), "account", RATE_LIMITED, True, False),
        (answered(429, headers={"retry-after": "7"}), "account", 7, True, False),
        (answered(429, headers={"retry-after": "1.5"}), "account", 1.5, True, False),
        (answered(429, headers={"retry-after": "Mon, 23 Nov 2026 20:00:30 GMT"}), "account", 30, True, False),
        (answered(429, GEMINI % "Minute"), "account", 17, True, False),
        (answered(429, GEMINI % "Day"), "account", 12 * 3600, True, False),
        (answered(500), "endpoint", BROKEN, True, False),
        (answered(503, headers={"retry-after": "4"}), "endpoint", 4, True, False),
        (answered(529), "endpoint", BROKEN, True, False),
        (broke("ConnectError", "ClientConnectorError", "ConnectionRefusedError"), "endpoint", BROKEN, True, False),
        (broke("ConnectError", "ClientConnectorDNSError", "gaierror"), "endpoint", UNREACHABLE, True, False),
        (broke("ProtocolError", "ClientConnectorCertificateError"), "endpoint", UNREACHABLE, True, False),
        (broke("ConnectTimeout", "ConnectionTimeoutError"), "endpoint", UNREACHABLE, True, False),
        (broke("ReadTimeout", "SocketTimeoutError"), "endpoint", BROKEN, True, False),
        (broke("ProxyError"), "endpoint", BROKEN, True, False),
        (broke("ReadError", "ClientPayloadError"), "endpoint", BROKEN, True, False),
        (broke("ReadError", "ServerDisconnectedError"), "", 0, True, False),
        (answered(407), "endpoint", BROKEN, True, False),
        (broke("JSONDecodeError"), "endpoint", BROKEN, True, False),
    ],
)
def test_a_failure_cools_what_it_concerns(
    error: Exception, cools: str, seconds: float, passing: bool, fault: bool
) -> None:
    verdict = classify(error, NOW)
    assert (verdict.cools, verdict.seconds, verdict.passing, verdict.fault) == (cools, seconds, passing, fault)


def test_the_status_is_only_what_a_server_really_sent() -> None:
    assert classify(answered(503), NOW).status == 503
    assert classify(broke("ConnectionRefusedError"), NOW).status is None


def test_the_text_of_a_transport_error_is_never_quoted() -> None:
    assert "password" not in classify(broke("ProxyError"), NOW).reason


def test_a_timeout_that_the_caller_shortened_cools_nothing() -> None:
    assert timed_out(0.1, shortened=True).cools == ""
    assert classify(broke("ReadTimeout"), NOW, shortened=True).cools == ""
    assert timed_out(60, shortened=False).cools == "endpoint"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The model does not exist.", "HTTP 404: The model does not exist."),
        ('{"error": {"message": "No such model", "code": 1}}', "HTTP 404: No such model"),
        ("one\ntwo", "HTTP 404: one two"),
        ("<html><h1>Bad</h1></html>", "HTTP 404: Bad"),
        ("Refused: Bearer sk-123", "HTTP 404: Refused: ***"),
        ("x" * 500, "HTTP 404: " + "x" * 200),
    ],
)
def test_the_reason_is_the_providers_own_word_on_one_line(text: str, said: str) -> None:
    assert classify(answered(404, text), NOW).reason == said


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("12", 12),
        ("0.25", 0.25),
        ("-3", 0),
        ("soon", None),
        ("Mon, 23 Nov 2026 19:00:00 GMT", 0),
    ],
)
def test_retry_after_is_seconds_a_fraction_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


def test_a_day_ends_at_midnight_of_its_zone_also_when_the_clock_changes() -> None:
    before_dst = datetime(2026, 11, 1, 7, 0, tzinfo=UTC).timestamp()  # midnight in Los Angeles, a day of 25 hours
    assert classify(answered(429, GEMINI % "Day"), before_dst).seconds == 25 * 3600
