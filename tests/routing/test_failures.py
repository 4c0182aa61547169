"""What an exception of LiteLLM means: the reason, and what rests for how long."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from behaviours import Behaviour
from failures import CASES, NOW, WORDINGS, Case, gemini, openai, quota, retry
from provider import Loopback

from biollm._runtime import ledger
from biollm.client import ContentPolicyError, get_model_client
from biollm.routing.classify import classify
from biollm.routing.failures import timed_out
from biollm.routing.reset_times import retry_after


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


@pytest.mark.parametrize("case", [*CASES, *WORDINGS], ids=lambda case: case.number)
def test_an_http_error_is_of_one_kind(case: Case) -> None:
    text = case.body if isinstance(case.body, str) else json.dumps(case.body)
    found = classify(answered(case.status, text, dict(case.headers)), NOW)
    assert (found.kind, found.cools, found.status) == (case.kind, case.rests, case.status)
    assert found.wait == (None if case.wait is None else pytest.approx(case.wait, abs=0.01))


@pytest.mark.parametrize("case", [*CASES, *WORDINGS], ids=lambda case: case.number)
def test_it_is_of_the_same_kind_where_only_litellms_words_quote_it(case: Case) -> None:
    """The body of a stream's error may be gone; LiteLLM's exception then holds it behind a few words of its own."""
    text = case.body if isinstance(case.body, str) else json.dumps(case.body)
    error = answered(case.status, "", dict(case.headers))
    error.args = (f"litellm.APIError: APIError: OpenAIException - {text}",)
    assert classify(error, NOW).kind == case.kind


def test_what_the_account_can_afford_is_read() -> None:
    (case,) = [case for case in CASES if case.kind == "affordable"]
    assert classify(answered(case.status, json.dumps(case.body)), NOW).afford == 1234


@pytest.mark.parametrize(
    ("error", "kind", "rests"),
    [
        (answered(400, kind="ContextWindowExceededError"), "too_long", ""),
        (answered(400, kind="ContentPolicyViolationError"), "refusal", ""),
        (answered(401), "key", "key"),
        (answered(500), "overloaded", "deployment"),
        (answered(407), "proxy", "endpoint"),
        (broke("ConnectError", "ClientConnectorError", "ConnectionRefusedError"), "refused", "endpoint"),
        (broke("ConnectError", "ClientOSError", "ConnectionResetError"), "reset", "endpoint"),
        (broke("ConnectError", "ClientConnectorDNSError", "gaierror"), "unreachable", "endpoint"),
        (broke("ProtocolError", "ClientConnectorCertificateError"), "unreachable", "endpoint"),
        (broke("ConnectTimeout", "ConnectionTimeoutError"), "unreachable", "endpoint"),
        (broke("ReadTimeout", "SocketTimeoutError"), "timeout", "deployment"),
        (broke("ProxyError"), "proxy", "endpoint"),
        (broke("ReadError", "ClientPayloadError"), "broken", "deployment"),
        (broke("ReadError", "ServerDisconnectedError"), "hung_up", "endpoint"),
        (broke("JSONDecodeError"), "broken", "deployment"),
    ],
)
def test_a_failure_without_an_answer_is_of_one_kind(error: Exception, kind: str, rests: str) -> None:
    failure = classify(error, NOW)
    assert (failure.kind, failure.cools) == (kind, rests)


@pytest.mark.parametrize(
    ("names", "reached"),
    [
        (("ConnectError", "ClientConnectorDNSError", "gaierror"), False),
        (("ConnectError", "ClientConnectorError", "ConnectionRefusedError"), False),
        (("ProtocolError", "ClientConnectorCertificateError"), False),
        (("ConnectTimeout", "ConnectionTimeoutError"), False),
        (("ProxyError",), False),
        (("ConnectError", "ClientOSError", "SSLError"), True),  # also in the middle of an answer
        (("ConnectError", "ClientOSError", "ConnectionResetError"), True),
        (("ReadTimeout", "SocketTimeoutError"), True),
    ],
)
def test_a_request_counts_unless_the_provider_cannot_have_got_it(names: tuple[str, ...], reached: bool) -> None:
    assert classify(broke(*names), NOW).reached is reached


@pytest.mark.parametrize(
    ("error", "kind", "goes_on"),
    [
        (_litellm("APIConnectionError", "Missing corresponding tool call for tool response message."), "unsent", False),
        (_litellm("UnsupportedParamsError", "reasoning_effort is not supported"), "unsupported", True),
        (_litellm("APIConnectionError", "Invalid Message passed in - {'role': 'alien'}"), "unsupported", True),
        (_litellm("ImageFetchError", "Unable to fetch image"), "modality", True),
    ],
)
def test_what_was_raised_before_anything_was_sent_rests_nothing(error: Exception, kind: str, goes_on: bool) -> None:
    failure = classify(error, NOW, translated=False)
    assert (failure.kind, failure.cools, failure.sent, failure.rule.next) == (kind, "", False, goes_on)


def test_a_connection_that_breaks_while_a_token_is_fetched_is_no_fault_of_the_request() -> None:
    error = _litellm("APIConnectionError", "no token")
    error.__cause__ = httpx.ConnectError("no route")
    assert classify(error, NOW, translated=False).kind == "unreachable"


def test_the_status_is_only_what_a_server_really_sent() -> None:
    assert classify(answered(503), NOW).status == 503
    assert classify(broke("ConnectionRefusedError"), NOW).status is None


def test_the_text_of_a_transport_error_is_never_quoted() -> None:
    assert "password" not in classify(broke("ProxyError"), NOW).reason


def test_a_timeout_that_the_caller_shortened_cools_nothing() -> None:
    assert timed_out(0.1, shortened=True).cools == ""
    assert classify(broke("ReadTimeout"), NOW, shortened=True).cools == ""
    assert timed_out(60, shortened=False).cools == "deployment"


def test_a_late_first_token_rests_nothing_until_it_repeats() -> None:
    late = timed_out(12, shortened=False, first=True)
    assert (late.kind, late.rule.ladder[:2]) == ("late", (0.0, 15.0))


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
    day = json.dumps(gemini(429, "quota", "RESOURCE_EXHAUSTED", quota("Day"), retry("17s")))
    assert classify(answered(429, day), before_dst).wait == 25 * 3600


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, '{"a":' * 50_000),
        (400, "[" * 900 + "{" * 50),
        (400, json.dumps({"a": None}).replace("null", '{"a":' * 900 + "1" + "}" * 900)),
        (402, "can only afford , tokens"),
        (402, "can only afford " + "9" * 5000),
        (400, "<" * 100_000),
        (400, '"message": "' + "\\x" * 50_000),
        (429, json.dumps({"error": {"resets_in_seconds": float("nan"), "message": "try again in " + "1s " * 2000}})),
        (400, "'" + " 'a" * 30_000),
        (429, "Try again at 9999-99-99T99:99"),
    ],
    ids=range(10),
)
def test_no_answer_is_too_odd_to_be_judged(status: int, text: str) -> None:
    error = answered(status, text)
    start = time.perf_counter()
    assert classify(error, NOW).status == status
    assert time.perf_counter() - start < 1


# --- an error where an answer was expected ----------------------------------------------------------------------------

STREAMS = [pytest.param(False, id="whole"), pytest.param(True, id="stream")]


def inside(body: Any, *, stream: bool) -> Behaviour:
    """Return an answer of status 200 that holds an error."""
    text = json.dumps(body)
    return (
        Behaviour(body=f"data: {text}\n\ndata: [DONE]\n\n", content_type="text/event-stream")
        if stream
        else Behaviour(body=text)
    )


def ask(*, stream: bool) -> Any:
    client = get_model_client()
    return list(client.stream("hi"))[-1].completion if stream else client.complete("hi")  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("dialect", ["openai", "hosted_vllm", "openrouter"])
@pytest.mark.parametrize(
    ("body", "rests"),
    [
        (openai("Insufficient credits.", 402), "account"),
        (openai("Rate limit reached.", 429), "account"),
        (openai("No such key.", 401), "key"),
        (openai("This model's maximum context length is 8192 tokens.", 400), ""),
        (openai("Upstream error.", 502), "deployment"),
        (openai("Odd."), "deployment"),
    ],
    ids=["credit", "limited", "key", "too-long", "upstream", "odd"],
)
def test_an_error_inside_an_answer_rests_what_it_names(
    net: Loopback, waterfall: Callable[..., Path], body: Any, rests: str, dialect: str, stream: bool
) -> None:
    first = net.serve(then=inside(body, stream=stream))
    waterfall(
        first={"base_url": first.url, "litellm_provider": dialect, "rate_limit": "100/min"},
        last=net.serve(text="from last"),
    )
    assert ask(stream=stream).text == "from last"
    assert {key.partition(":")[0] for key in ledger().blocked()} == ({rests} if rests else set())


REFUSED = openai("no", "content_filter")
MESSAGE = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
DECLINED = {"id": "1", "object": "chat.completion", "created": 1, "model": "small", "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "stream"), [(REFUSED, False), (REFUSED, True), (DECLINED, False)], ids=["code", "code-stream", "field"]
)
def test_a_refusal_inside_an_answer_is_a_refusal(
    net: Loopback, waterfall: Callable[..., Path], body: Any, stream: bool
) -> None:
    waterfall(first=net.serve(then=inside(body, stream=stream)), last=net.serve())
    with pytest.raises(ContentPolicyError):
        ask(stream=stream)
