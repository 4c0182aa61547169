"""Every failure of real providers leads where the failure table says: what rests, who is asked next, and what is told."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from behaviours import EMPTY, HTTP_400, HTTP_401, HTTP_500, HTTP_503, OK, Behaviour, gemini_limited, limited
from conftest import until
from failures import CASES, Case
from provider import Json, Loopback, Request, Server

from biollm._files import write_private
from biollm._runtime import ledger
from biollm.client import (
    AllLimitedError,
    Client,
    Completion,
    CompletionError,
    ContentPolicyError,
    InterruptedStreamError,
    KeysRefusedError,
    RequestRejectedError,
    StreamRestarted,
    get_model_client,
)
from biollm.config import load_config
from biollm.config.paths import state_dir
from biollm.ledger import Ledger
from biollm.routing.health import check, check_all_providers

pytestmark = pytest.mark.slow

Write = Callable[..., Path]
STREAMS = [pytest.param(False, id="whole"), pytest.param(True, id="stream")]


def ask(client: Client, *, stream: bool = False, **options: Any) -> Completion:
    """Return the answer, of a stream the completion at its end."""
    if not stream:
        return client.complete("hi", **options)
    last = list(client.stream("hi", **options))[-1]
    assert not isinstance(last, StreamRestarted) and last.completion
    return last.completion


def trail(answer: Completion | CompletionError) -> list[tuple[str, str]]:
    """Return which deployment was asked or passed over, and the outcome."""
    return [(attempt.deployment, attempt.outcome) for attempt in answer.attempts]


def resting() -> set[str]:
    """Return the kinds of what is on cooldown."""
    return {key.partition(":")[0] for key in ledger().blocked()}


def asked(server: Server, model: str = "small") -> int:
    return sum(request.body["model"] == model for request in server.completions)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.number)
def test_what_a_provider_says_decides_what_rests(net: Loopback, waterfall: Write, case: Case, stream: bool) -> None:
    first, last = net.serve(then=case.behaviour), net.serve(text="from last")
    waterfall(first={"base_url": first.url, "rate_limit": "100/min"}, last=last)
    client = get_model_client()
    if case.next:
        assert ask(client, stream=stream).text == "from last"
    else:
        with pytest.raises(ContentPolicyError):
            ask(client, stream=stream)
    assert resting() == ({case.rests} if case.rests else set())
    once = 2 if case.kind == "affordable" or (case.kind == "overloaded" and case.wait is None) else 1
    assert asked(first) == once
    ledger().flush()
    assert len(list(ledger().history())) == once + asked(last), "each request on the wire is in the ledger"
    first.behaviour = OK
    assert ask(client, stream=stream).provider == ("last" if case.rests else "first")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("how", "rests", "said"),
    [
        (
            Behaviour(body='{"error": {"message": "upstream error", "code": 502}}'),
            "deployment",
            "upstream error|broken",
        ),
        (Behaviour(fail=1), "deployment", "EngineCore died|HTTP 500"),
        (
            Behaviour(status=200, body="<html>maintenance</html>", content_type="text/html"),
            "deployment",
            "JSON|before it was complete",
        ),
    ],
    ids=["error-in-200", "error-event-first", "html"],
)
def test_an_error_inside_an_answer_is_no_answer(
    net: Loopback, waterfall: Write, how: Behaviour, rests: str, said: str, stream: bool
) -> None:
    first = net.serve(then=how)
    waterfall(first=first, last=net.serve(text="from last"))
    assert ask(get_model_client(), stream=stream).text == "from last"
    assert resting() == {rests}


# --- one address, several models ------------------------------------------------------------------------------------


def of_model(name: str, how: Behaviour) -> Callable[[Request], Behaviour]:
    """Return a server's behaviour that is broken for one model alone."""
    return lambda request: how if request.body.get("model") == name else OK


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    "how",
    [HTTP_503, limited(), limited("30"), gemini_limited("Minute", "30s"), Behaviour(hang=0), Behaviour(cut=1), EMPTY],
    ids=["503", "429", "429-after", "gemini", "hang", "cut", "empty"],
)
def test_models_behind_one_address_are_fallbacks_for_each_other(
    net: Loopback, waterfall: Write, how: Behaviour, stream: bool
) -> None:
    server = net.serve(then=of_model("small", how))
    waterfall(one={"base_url": server.url, "models": ["small", "large"], "timeout": 1})
    client = get_model_client()
    for _ in range(3):
        assert ask(client, stream=stream).model == "large"


def test_the_address_rests_once_a_second_model_of_it_fails_alike(net: Loopback, waterfall: Write) -> None:
    server = net.serve(then=HTTP_503)
    waterfall(one={"base_url": server.url, "models": ["a", "b", "c"]}, last=net.serve())
    client = get_model_client()
    assert trail(client.complete("hi"))[-2:] == [("one/c", "cooling"), ("last/small", "ok")]
    assert [asked(server, name) for name in "abc"] == [2, 2, 0]
    assert resting() == {"deployment", "endpoint"}


def test_a_limit_of_unknown_scope_rests_the_account_once_a_second_model_meets_it(
    net: Loopback, waterfall: Write
) -> None:
    server = net.serve(then=limited("30"))
    waterfall(one={"base_url": server.url, "models": ["a", "b", "c"]}, last=net.serve())
    client = get_model_client()
    assert trail(client.complete("hi"))[-2:] == [("one/c", "limited"), ("last/small", "ok")]
    assert resting() == {"deployment", "account"}


def test_failures_of_different_kinds_do_not_add_up(net: Loopback, waterfall: Write) -> None:
    server = net.serve(then=lambda request: HTTP_503 if request.body.get("model") == "a" else Behaviour(cut=1))
    waterfall(one={"base_url": server.url, "models": ["a", "b"]}, last=net.serve())
    get_model_client().complete("hi")
    assert resting() == {"deployment"}


# --- once more at the same deployment -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
def test_a_slip_is_asked_once_more_and_rests_nothing(net: Loopback, waterfall: Write, stream: bool) -> None:
    first = net.serve(HTTP_500)
    waterfall(first=first, last=net.serve())
    answer = ask(get_model_client(), stream=stream)
    assert trail(answer) == [("first/small", "failed"), ("first/small", "ok")]
    assert resting() == set()
    ledger().flush()
    assert [record.outcome for record in ledger().history()] == ["failed", "ok"]


def test_what_is_known_to_fail_is_asked_once(net: Loopback, waterfall: Write, state: Path) -> None:
    first = net.serve(then=HTTP_500)
    waterfall(first=first, last=net.serve())
    client = get_model_client()
    client.complete("hi")
    assert len(first.completions) == 2
    ledger().flush()
    with sqlite3.connect(state / "quotas.db") as db:
        db.execute("UPDATE cooldown SET until = ?", (time.time() - 1,))  # its cooldown is over
    ledger().refresh()
    client.complete("hi")
    assert len(first.completions) == 3


def test_the_second_try_counts_against_the_limits(net: Loopback, waterfall: Write) -> None:
    first = net.serve(then=HTTP_500)
    waterfall(first={"base_url": first.url, "rate_limit": "1/min"}, last=net.serve())
    answer = get_model_client().complete("hi")
    assert trail(answer) == [("first/small", "failed"), ("first/small", "limited"), ("last/small", "ok")]
    assert len(first.completions) == 1


def test_a_timeout_is_not_tried_again(net: Loopback, waterfall: Write) -> None:
    first = net.serve(then=Behaviour(hang=0))
    waterfall(first={"base_url": first.url, "timeout": 0.5}, last=net.serve())
    get_model_client().complete("hi")
    assert len(first.completions) == 1


# --- credit, refusals, tokens ---------------------------------------------------------------------------------------


def test_what_the_credit_still_buys_is_asked_for_once(net: Loopback, waterfall: Write) -> None:
    (case,) = [case for case in CASES if case.kind == "affordable"]
    first = net.serve(case.behaviour)
    waterfall(first=first, last=net.serve())
    assert get_model_client().complete("hi", max_tokens=32000).provider == "first"
    assert [request.body["max_tokens"] for request in first.completions] == [32000, 1234]


REFUSALS = [
    next(case.behaviour for case in CASES if case.number == "23"),
    Behaviour(text="", finish="content_filter"),
]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("how", REFUSALS, ids=["http-400", "finish-reason"])
@pytest.mark.parametrize("where", ["routing", "provider"])
def test_a_refusal_ends_the_request_unless_the_user_says_otherwise(
    net: Loopback, waterfall: Write, how: Behaviour, stream: bool, where: str
) -> None:
    first, last = net.serve(then=how), net.serve()
    waterfall(first=first, last=last)
    with pytest.raises(ContentPolicyError) as caught:
        ask(get_model_client(), stream=stream)
    assert "first/small" in str(caught.value) and caught.value.attempts[0].reason in str(caught.value)
    assert (len(first.completions), len(last.completions), resting()) == (1, 0, set())
    own = {"on_refusal": "next"} if where == "provider" else {}
    top = {} if own else {"routing": {"on_refusal": "next"}}
    waterfall(top, first={"base_url": first.url, **own}, last=last)
    client = get_model_client()
    client.reload()
    assert ask(client, stream=stream).provider == "last"


@pytest.mark.parametrize("stream", STREAMS)
def test_an_answer_that_thinking_used_up_is_one_clear_error(net: Loopback, waterfall: Write, stream: bool) -> None:
    first, last = net.serve(then=Behaviour(text="", finish="length")), net.serve()
    waterfall(first=first, last=last)
    with pytest.raises(RequestRejectedError, match="max_tokens") as caught:
        ask(get_model_client(), stream=stream, max_tokens=50)
    assert "Raise max_tokens" in (caught.value.hint or "")
    assert (len(first.completions), len(last.completions), resting()) == (1, 0, set())


@pytest.mark.parametrize("text", ["", "\n\n"], ids=["nothing", "blanks"])
@pytest.mark.parametrize(
    ("finish", "error"), [("length", RequestRejectedError), ("content_filter", ContentPolicyError), ("stop", None)]
)
def test_a_stream_of_thoughts_alone_is_no_answer(
    net: Loopback, waterfall: Write, text: str, finish: str, error: type[CompletionError] | None
) -> None:
    def event(delta: Json, end: str | None = None) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": end}]
        return f"data: {json.dumps({'id': '1', 'object': 'chat.completion.chunk', 'model': 'small', 'choices': choices})}\n\n"

    said = event({"role": "assistant", "reasoning_content": "I think"}) + event({"content": text}) + event({}, finish)
    first = net.serve(then=Behaviour(body=f"{said}data: [DONE]\n\n", content_type="text/event-stream"))
    waterfall(first=first, last=net.serve())
    if error:
        with pytest.raises(error):
            ask(get_model_client(), stream=True, max_tokens=50)
    else:
        assert ask(get_model_client(), stream=True).provider == "last"
    assert resting() == set()


def test_a_forbidden_model_is_no_missing_key(net: Loopback, waterfall: Write) -> None:
    (case,) = [case for case in CASES if case.number == "14c"]
    waterfall(only=net.serve(then=case.behaviour))
    with pytest.raises(CompletionError) as caught:
        get_model_client().complete("hi")
    assert not isinstance(caught.value, KeysRefusedError)


def test_a_request_that_two_dialects_call_malformed_still_meets_a_healthy_deployment(
    net: Loopback, waterfall: Write
) -> None:
    rungs: Json = {
        "first": net.serve(then=HTTP_400),
        "second": {"base_url": net.serve(then=HTTP_400).url, "litellm_provider": "hosted_vllm"},
    }
    waterfall(**rungs, third=net.serve(text="from third"))
    client = get_model_client()
    assert client.complete("hi").text == "from third"
    waterfall(**rungs)
    client.reload()
    with pytest.raises(RequestRejectedError, match="temperature") as caught:
        client.complete("hi")
    assert "different APIs" in (caught.value.hint or "")
    assert resting() == set()


def test_a_digit_in_a_message_decides_nothing(net: Loopback, waterfall: Write) -> None:
    body = json.dumps({"error": {"message": "Field 401 must be below 429, not 402 or 503."}})
    waterfall(first=net.serve(then=Behaviour(400, body=body)), last=net.serve())
    get_model_client().complete("hi")
    assert resting() == set()


def test_when_every_answer_was_a_limit_the_error_says_when_to_come_back(net: Loopback, waterfall: Write) -> None:
    waterfall(only=net.serve(then=limited("30")))
    with pytest.raises(AllLimitedError) as caught:
        get_model_client().complete("hi")
    assert 25 < caught.value.retry_after <= 30


def test_a_key_that_gemini_refuses_with_400_is_a_refused_key(net: Loopback, waterfall: Write) -> None:
    (case,) = [case for case in CASES if case.number == "12"]
    waterfall(only={"base_url": net.serve(then=case.behaviour).url, "litellm_provider": "gemini"})
    with pytest.raises(KeysRefusedError):
        get_model_client().complete("hi")


def test_a_refused_key_is_named_by_its_variable_or_file_and_a_host_by_its_name(
    net: Loopback, waterfall: Write, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    write_private(file, "sk-planted-0123456789")
    waterfall(
        first=net.serve(then=HTTP_401),
        filed={"base_url": net.serve(then=HTTP_401).url, "key_file": str(file)},
        away="https://away.invalid/v1",
    )
    with pytest.raises(CompletionError) as caught:
        get_model_client().complete("hi")
    first, filed, away = (attempt.reason for attempt in caught.value.attempts)
    assert first.endswith(" (key: FIRST_KEY)") and filed.endswith(f" (key: {file})")
    assert away == "away.invalid: the host name does not resolve"
    assert "sk-planted" not in f"{first} {filed}"


@pytest.mark.parametrize("sender", ["direct", "litellm"])
@pytest.mark.parametrize("url", ["https://away.invalid/v1", "http://127.0.0.1:9/v1"])
def test_a_request_that_reaches_no_host_does_not_count(
    net: Loopback, waterfall: Write, biollm: Callable[..., Any], sender: Any, url: str
) -> None:
    waterfall(
        first={"base_url": url, "rate_limit": ["2/day", "1/min"]},
        last={"base_url": net.serve().url, "rate_limit": "9/day"},
    )
    assert get_model_client(sender=sender).complete("hi").provider == "last"
    ledger().flush()
    report = biollm("usage", "--json").json
    used = {each["scope"].split("/")[0]: each["used"] for each in report["quotas"]}
    assert used == {"first": 0, "last": 1}
    assert {row["name"]: row["errors"] for row in report["rows"]} == {"first": 1, "last": 0}


# --- patience, and what is merely late ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["routing", "provider", "call"])
@pytest.mark.parametrize("stream", STREAMS)
def test_patience_waits_for_an_earlier_deployment(net: Loopback, waterfall: Write, how: str, stream: bool) -> None:
    first, last = net.serve(limited("1")), net.serve()
    own = {"patience": 3} if how == "provider" else {}
    waterfall({"routing": {"patience": 3}} if how == "routing" else {}, first={"base_url": first.url, **own}, last=last)
    notes: list[str] = []
    own = {"patience": 3} if how == "call" else {}
    answer = ask(get_model_client(), stream=stream, on_note=notes.append, **own)
    assert [re.fullmatch(r"waiting (0\.\d|1\.0) s for first/small: .+", note) is not None for note in notes] == [True]
    assert trail(answer) == [("first/small", "failed"), ("first/small", "ok")]
    assert (len(first.completions), last.completions) == (2, [])


def test_patience_does_not_wait_longer_than_it_has(net: Loopback, waterfall: Write) -> None:
    waterfall({"routing": {"patience": 1.5}}, first=net.serve(then=limited("1")), last=net.serve())
    answer = get_model_client().complete("hi")
    assert [outcome for _, outcome in trail(answer)].count("failed") == 2, "1 s, and then 1 s is more than is left"
    assert answer.provider == "last"


def test_patience_ends_though_accounts_free_in_turns(
    net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = net.serve(then=replace(limited("1"), pause=0.7))
    accounts = [{"name": name, "env_key": f"{name}_KEY"} for name in ("LAB", "CORE")]
    for name in ("LAB", "CORE"):
        monkeypatch.setenv(f"{name}_KEY", f"sk-planted-{name}-0123456789")
    waterfall(first={"base_url": server.url, "accounts": accounts, "patience": 1.5})
    with pytest.raises(AllLimitedError):
        get_model_client().complete("hi", deadline=20)
    assert len(server.completions) <= 5


def test_a_pinned_deployment_is_asked_once_a_pass(net: Loopback, waterfall: Write) -> None:
    server = net.serve(then=replace(HTTP_503, headers=(("Retry-After", "1"),)))
    waterfall(only=server)
    with pytest.raises(CompletionError):
        get_model_client().complete("hi", fallback=False, max_retries=2, patience=5, deadline=20)
    assert len(server.completions) == 3


def test_what_says_how_long_to_wait_is_not_asked_again_at_once(net: Loopback, waterfall: Write) -> None:
    first = net.serve(then=replace(HTTP_503, headers=(("Retry-After", "30"),)))
    waterfall(first=first, last=net.serve())
    get_model_client().complete("hi")
    assert len(first.completions) == 1


def test_the_news_that_a_deployment_is_well_reaches_a_process_that_asks_nothing(
    net: Loopback, waterfall: Write
) -> None:
    waterfall(only=net.serve(HTTP_503, HTTP_503))
    client = get_model_client()
    with pytest.raises(CompletionError):
        client.complete("hi")
    ledger().flush()
    elsewhere = Ledger(state_dir())  # as another process has it
    elsewhere.refresh()
    elsewhere.recover(list(elsewhere.blocked()))
    elsewhere.close()
    time.sleep(1)
    assert client.complete("hi").provider == "only"


def test_patience_does_not_wait_for_an_estimate(net: Loopback, waterfall: Write) -> None:
    first = net.serve(then=limited())
    waterfall({"routing": {"patience": 300}}, first=first, last=net.serve())
    assert get_model_client().complete("hi").provider == "last"


def test_a_first_token_that_is_late_rests_nothing_until_it_repeats(net: Loopback, waterfall: Write) -> None:
    first = net.serve(then=Behaviour(hang=1))
    waterfall({"routing": {"stream_timeout": 1}}, first=first, last=net.serve())
    client = get_model_client()
    for rests in (set(), {"deployment"}):
        assert ask(client, stream=True).provider == "last"
        assert resting() == rests
        time.sleep(1)  # what is late together is one failure


# --- what a cooldown says, and what ends it -------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "whose"), [(limited("30"), "given by the provider"), (HTTP_503, "estimated")])
def test_explain_says_whose_time_a_cooldown_is(net: Loopback, waterfall: Write, how: Behaviour, whose: str) -> None:
    waterfall(first=net.serve(then=how), last=net.serve())
    client = get_model_client()
    client.complete("hi")
    assert f"(time {whose})" in client.explain()[0].reason


def test_a_success_elsewhere_ends_an_estimated_cooldown(net: Loopback, waterfall: Write) -> None:
    server = net.serve(then=HTTP_503)
    waterfall(one={"base_url": server.url, "models": ["a", "b"]}, last=net.serve())
    client = get_model_client()
    client.complete("hi")
    assert "endpoint" in resting()
    server.behaviour = OK
    for key in [key for key in ledger().blocked() if not key.endswith("one/a")]:
        ledger().recover([key])
    assert client.complete("hi").model == "b"
    assert set(ledger().blocked()) == {"deployment:one/a"}


def test_a_probe_ends_an_estimated_cooldown_of_an_address_that_answers_again(net: Loopback, waterfall: Write) -> None:
    back = net.serve(then=lambda request: Behaviour(reset=0) if request.method == "POST" else OK)
    waterfall(gone=net.refusing(), back=back, last=net.serve())
    client = get_model_client()
    client.complete("hi")
    assert len(ledger().blocked()) == 2
    check_all_providers()
    assert [key for key in ledger().blocked() if back.url in key] == []
    assert resting() == {"endpoint"}, "the other still refuses"


def test_health_says_what_is_on_cooldown_and_whose_time_it_is(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(then=lambda request: limited("30") if request.method == "POST" else OK), last=net.serve())
    get_model_client().complete("hi")
    first, last = check(load_config())
    assert first.available and "(time given by the provider)" in first.resting
    assert not last.resting


def test_a_stream_that_breaks_after_text_is_interrupted_and_not_tried_again(net: Loopback, waterfall: Write) -> None:
    first = net.serve(then=Behaviour(fail=4), text="one two three four five")
    waterfall(first=first, last=net.serve())
    with pytest.raises(InterruptedStreamError):
        ask(get_model_client(), stream=True)
    assert len(first.completions) == 1
    until(lambda: resting() == {"deployment"})


def test_an_answer_that_ends_with_an_error_is_interrupted(net: Loopback, waterfall: Write) -> None:
    first = net.serve(then=replace(OK, finish="error"), text="one two")
    waterfall(first=first, last=net.serve())
    with pytest.raises(InterruptedStreamError):
        ask(get_model_client(), stream=True)
