"""Streams that coding agents survive: what leaves when, and what a break in the middle leads to, over both senders."""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from behaviours import CONTEXT_TOO_LONG, HTTP_500, Behaviour, limited
from conftest import until
from provider import Loopback, Server

from biollm.gateway import app as gateway
from biollm.routing import import_router

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
HI: Json = {"model": "biollm", "messages": [{"role": "user", "content": "hi"}], "stream": True}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
AGENT = {**HI, "tools": TOOLS}
SEAM = "\n\n[The stream of {} broke. Another answer follows.]\n\n"


@pytest.fixture(autouse=True, params=["litellm", "direct"])
def sender(request: pytest.FixtureRequest, state: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BIOLLM_SENDER", request.param)
    if request.param == "litellm":
        import_router()  # else the first test's headers leave while it is imported
    return request.param


def agent(
    net: Loopback, name: str, *, text: str | None = None, thought: str = "", calls: int = 2, **how: Any
) -> Server:
    """Return a provider that thinks, writes, and calls a tool, in three fragments each time."""
    made = [
        {"id": f"{name}_{at}", "type": "function", "function": {"name": "look", "arguments": f'{{"path": "{at}"}}'}}
        for at in range(calls)
    ]
    message = {"role": "assistant", "content": text, "reasoning_content": thought, "tool_calls": made}
    return net.serve(then=Behaviour(fragments=3, **how), answer=lambda _: message)


def events(response: httpx.Response) -> list[Any]:
    """Return the data of a stream's events."""
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def deltas(found: list[Any]) -> list[Json]:
    return [each["choices"][0]["delta"] for each in found if each != "[DONE]" and each.get("choices")]


def text_of(found: list[Any]) -> str:
    return "".join(delta.get("content") or "" for delta in deltas(found))


def calls_of(found: list[Any]) -> list[Json]:
    """Return the tool calls of a stream, each of which is whole and in a chunk of its own."""
    chunks = [delta["tool_calls"] for delta in deltas(found) if delta.get("tool_calls")]
    assert all(len(calls) == 1 and json.loads(calls[0]["function"]["arguments"]) for calls in chunks)
    return [calls[0] for calls in chunks]


# --- What leaves when ---------------------------------------------------------------------------------------------


def test_headers_leave_with_the_first_reasoning(net: Loopback, serve: Any) -> None:
    """Nothing else comes from the provider while the caller waits for the headers."""
    client = serve(first=agent(net, "a", thought="Hm so.", text="I look.", hang=3))
    with client.stream("POST", CHAT, json=HI) as answer:
        assert (answer.status_code, answer.headers["x-biollm-deployment"]) == (200, "first/small")
        line = next(answer.iter_lines())
        assert json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["reasoning_content"].startswith("Hm")


def test_one_silent_deployment_is_replaced_before_the_headers_leave(net: Loopback, serve: Any) -> None:
    client = serve({"routing": {"stream_timeout": 1}}, first=net.serve(then=Behaviour(hang=0)), second=agent(net, "b"))
    answer = client.post(CHAT, json=AGENT)
    assert answer.headers["x-biollm-attempts"] == "first/small=failed, second/small=ok"
    assert len(calls_of(events(answer))) == 2


def test_an_error_before_the_headers_has_a_status(net: Loopback, serve: Any) -> None:
    silent, server = net.serve(then=Behaviour(hang=0)), net.serve(then=HTTP_500)
    answer = serve({"routing": {"stream_timeout": 0.3}}, first=silent, second=server).post(CHAT, json=AGENT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_answer")


def test_headers_leave_without_a_chunk_in_the_end(net: Loopback, serve: Any) -> None:
    client = serve({"routing": {"headers_after": 0.1}}, first=net.serve(then=Behaviour(hang=0)))
    with client.stream("POST", CHAT, json=HI) as answer:
        assert answer.status_code == 200
        assert "x-biollm-deployment" not in answer.headers


def test_who_leaves_before_the_first_chunk_takes_the_request_along(net: Loopback, serve: Any) -> None:
    server = net.serve(then=Behaviour(hang=0))
    client = serve({"routing": {"headers_after": 0.1}}, first=server)
    body = json.dumps(HI).encode()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(client._transport._pool._uds)
        raw.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
        assert b"200 OK" in raw.recv(10_000)
        until(lambda: server.requests)
        assert server.tasks
    assert until(lambda: not server.tasks) < 1


def test_who_leaves_before_the_headers_takes_the_request_along_without_an_error(
    net: Loopback, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = net.serve(then=Behaviour(hang=0))
    client = serve(first=server)
    body = json.dumps(HI).encode()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(client._transport._pool._uds)
        raw.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
        until(lambda: server.tasks)
    until(lambda: not server.tasks)
    assert client.get("/health").status_code == 200
    assert capsys.readouterr().err == ""


def test_an_error_after_the_headers_is_an_event_that_agents_try_again_after(net: Loopback, serve: Any) -> None:
    top = {"routing": {"headers_after": 0.1, "stream_timeout": 0.4}}
    [error] = events(serve(top, first=net.serve(then=Behaviour(hang=0))).post(CHAT, json=AGENT))
    assert error["error"]["message"].startswith("Connection error: ")
    assert error["error"]["code"] == "no_answer"


@pytest.mark.parametrize("at", [0, 3, 5], ids=["before the first chunk", "in the text", "in a call"])
def test_comments_keep_a_silent_stream_open(
    net: Loopback, serve: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(gateway._Events, "KEEP_ALIVE_S", 0.05)
    server = agent(net, "a", text="I look.", hang=at, pause=0.5)
    answer = serve({"routing": {"headers_after": 0.05}}, first=server).post(CHAT, json=AGENT)
    assert ": keep-alive\n\n" in answer.text
    assert text_of(events(answer)) == "I look."
    assert [call["id"] for call in calls_of(events(answer))] == ["a_0", "a_1"]


def test_reasoning_and_text_come_in_pieces_and_calls_whole(net: Loopback, serve: Any) -> None:
    answer = serve(first=agent(net, "a", thought="Hm so it.", text="I will look.")).post(CHAT, json=AGENT)
    *chunks, done = events(answer)
    found = deltas(chunks)
    kinds = [next(name for name in ("tool_calls", "content", "reasoning_content", "end") if each.get(name) or name == "end") for each in found]  # fmt: skip
    assert kinds == ["reasoning_content"] * 3 + ["content"] * 3 + ["tool_calls"] * 2 + ["end"]
    assert (found[0]["role"], done) == ("assistant", "[DONE]")
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    names = [(call["index"], call["id"], call["type"], call["function"]["name"]) for call in calls_of(chunks)]
    assert names == [(0, "a_0", "function", "look"), (1, "a_1", "function", "look")]


def test_usage_keeps_its_details(net: Loopback, serve: Any) -> None:
    used = {
        "prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4, "novel_tokens": 2}, "queue_time": 0.5,
        "completion_tokens_details": {"reasoning_tokens": 3, "accepted_prediction_tokens": 1, "draft_tokens": 6},
    }  # fmt: skip
    client = serve(first=net.serve(then=Behaviour(usage=used)))
    *_, last, _done = events(client.post(CHAT, json={**HI, "stream_options": {"include_usage": True}}))
    whole = client.post(CHAT, json={**HI, "stream": False}).json()
    for usage in (last["usage"], whole["usage"]):
        names = ("prompt_tokens", "completion_tokens", "total_tokens", "queue_time")
        assert [usage[name] for name in names] == [9, 5, 14, 0.5]
        assert usage["prompt_tokens_details"].items() >= used["prompt_tokens_details"].items()
        assert usage["completion_tokens_details"].items() >= used["completion_tokens_details"].items()


# --- A break in the middle ----------------------------------------------------------------------------------------

BREAKS = {
    "before anything": {"cut": 2},
    "inside the first call": {"cut": 4},
    "between two calls": {"cut": 5},
    "inside the second call": {"cut": 6},
    "after all fragments": {"cut": 8},
    "an error event": {"fail": 6},
    "a reset": {"reset": 6},
}


@pytest.mark.parametrize("case", BREAKS)
def test_each_tool_runs_once_and_the_break_is_not_seen(net: Loopback, serve: Any, case: str) -> None:
    answer = serve(first=agent(net, "a", **BREAKS[case]), second=agent(net, "b")).post(CHAT, json=AGENT)
    found = events(answer)
    assert Counter(call["id"] for call in calls_of(found)) == {"b_0": 1, "b_1": 1}
    assert (text_of(found), found[-1]) == ("", "[DONE]")
    assert not any("error" in each for each in found)


def test_a_break_after_reasoning_is_replaced_without_a_mark(net: Loopback, serve: Any) -> None:
    client = serve(first=agent(net, "a", thought="Hm so it.", cut=4), second=agent(net, "b", text="I look."))
    found = events(client.post(CHAT, json=AGENT))
    assert text_of(found) == "I look."
    assert [call["id"] for call in calls_of(found)] == ["b_0", "b_1"]


def test_a_break_after_white_space_is_replaced_without_a_mark(net: Loopback, serve: Any) -> None:
    client = serve(first=agent(net, "a", text=" I look.", cut=3), second=agent(net, "b", text="Let me see."))
    found = events(client.post(CHAT, json=AGENT))
    assert text_of(found) == " Let me see."
    assert not any("restarted" in each.get("biollm", {}) for each in found[:-1])


@pytest.mark.parametrize("cut", [4, 7, 8], ids=["in the text", "inside a call", "between two calls"])
def test_with_tools_the_next_answer_follows_a_break_after_text(net: Loopback, serve: Any, cut: int) -> None:
    first, second = agent(net, "a", text="I look.", cut=cut), agent(net, "b", text="Let me see.")
    answer = serve(first=first, second=second).post(CHAT, json=AGENT)
    found = events(answer)
    assert text_of(found) == "I look." + SEAM.format("first/small") + "Let me see."
    assert [call["id"] for call in calls_of(found)] == ["b_0", "b_1"]
    assert found[-1] == "[DONE]"
    assert [each["outcome"] for each in found[-2]["biollm"]["attempts"]] == ["failed", "ok"]


def test_it_goes_on_when_the_next_deployments_break_or_fail_too(net: Loopback, serve: Any) -> None:
    broken = [agent(net, name, text="I look.", cut=4) for name in "ab"]
    client = serve(
        first=broken[0], second=broken[1], third=net.serve(then=HTTP_500), fourth=agent(net, "d", text="Done.")
    )
    found = events(client.post(CHAT, json=AGENT))
    assert text_of(found) == f"I look.{SEAM.format('first/small')}I look.{SEAM.format('second/small')}Done."
    assert [call["id"] for call in calls_of(found)] == ["d_0", "d_1"]


def test_where_no_other_answers_the_break_is_an_error(net: Loopback, serve: Any) -> None:
    client = serve(first=agent(net, "a", text="I look.", cut=4), second=net.serve(then=HTTP_500))
    answer = client.post(CHAT, json=AGENT)
    *_, last = events(answer)
    assert last["error"]["message"].startswith("Connection error: The stream broke.")
    assert last["error"]["code"] == "stream_interrupted"
    assert answer.headers["x-request-id"]
    assert calls_of(events(answer)[:-1]) == []


ENDS: dict[str, tuple[Json, Json]] = {
    "no tools": (HI, {}),
    "an empty list of tools": ({**HI, "tools": []}, {}),
    "a response format": ({**AGENT, "response_format": {"type": "json_object"}}, {}),
    "raise in the header": (AGENT, {"x-biollm-on-interrupt": "raise"}),
    "raise in the body": ({**AGENT, "biollm": {"on_interrupt": "raise"}}, {}),
}


@pytest.mark.parametrize("case", ENDS)
def test_else_a_break_after_text_is_an_error(net: Loopback, serve: Any, case: str) -> None:
    body, headers = ENDS[case]
    second = agent(net, "b")
    client = serve(first=agent(net, "a", text="I look.", calls=0, cut=4), second=second)
    answer = client.post(CHAT, json=body, headers=headers)
    *_, last = events(answer)
    assert last["error"]["message"].startswith("Connection error: ")
    assert answer.headers["x-request-id"]
    assert not second.requests


@pytest.mark.parametrize(
    ("body", "headers"),
    [(HI, {"x-biollm-on-interrupt": "splice"}), ({**HI, "biollm": {"on_interrupt": "splice"}}, {})],
    ids=["header", "body"],
)
def test_without_tools_it_goes_on_where_asked_to(net: Loopback, serve: Any, body: Json, headers: Json) -> None:
    client = serve(first=agent(net, "a", text="I look.", calls=0, cut=4), second=net.serve(text="whole"))
    found = events(client.post(CHAT, json=body, headers=headers))
    assert text_of(found) == f"I look.{SEAM.format('first/small')}whole"


def test_restart_hides_the_break_with_tools_too(net: Loopback, serve: Any) -> None:
    client = serve(first=agent(net, "a", text="I look.", cut=4), second=agent(net, "b", text="Let me see."))
    found = events(client.post(CHAT, json=AGENT, headers={"x-biollm-on-interrupt": "restart"}))
    assert text_of(found) == "Let me see."
    assert [call["id"] for call in calls_of(found)] == ["b_0", "b_1"]


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_all_at_a_limit_is_429_with_the_time(net: Loopback, serve: Any, stream: bool) -> None:
    client = serve(first=net.serve(then=limited("7")), second=net.serve(then=limited("9")))
    answers = [client.post(CHAT, json={**AGENT, "stream": stream}) for _ in range(2)]
    assert [each.status_code for each in answers] == [429, 429]
    assert all(1 <= int(each.headers["retry-after"]) <= 7 for each in answers)


LONG = {"messages": [{"role": "user", "content": "word " * 3000}]}
SMALL = {"models": {"small": {"type": "api", "context_length": 1000}}}
TOO_LONG: dict[str, tuple[Json, list[Behaviour]]] = {
    "by its context length": (SMALL, []),
    "as the provider says": ({}, [CONTEXT_TOO_LONG]),
    "as both providers say": ({}, [CONTEXT_TOO_LONG, CONTEXT_TOO_LONG]),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", TOO_LONG)
def test_a_prompt_that_is_too_long_for_all_is_the_callers_error(
    net: Loopback, serve: Any, case: str, stream: bool
) -> None:
    top, refusals = TOO_LONG[case]
    keyless = {"base_url": net.serve().url, "env_key": "NOT_SET_KEY"}
    servers = {f"r{at}": net.serve(then=how) for at, how in enumerate(refusals or [HTTP_500])}
    answer = serve(top, keyless=keyless, **servers).post(CHAT, json={**AGENT, **LONG, "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (
        400,
        "context_length_exceeded",
        "invalid_request_error",
    )
    assert error["biollm"]["class"] == "PromptTooLongError"


@pytest.mark.parametrize(
    ("other", "status", "code"),
    [(HTTP_500, 503, "no_answer"), (limited("7"), 429, "rate_limit_exceeded")],
    ids=["broken", "limited"],
)
def test_a_prompt_that_another_may_take_later_is_not(
    net: Loopback, serve: Any, other: Behaviour, status: int, code: str
) -> None:
    client = serve(first=net.serve(then=CONTEXT_TOO_LONG), second=net.serve(then=other))
    answer = client.post(CHAT, json={**AGENT, **LONG})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status == 429)
    again = client.post(CHAT, json={**AGENT, **LONG})  # the other one cools down now
    assert (again.status_code, again.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_what_no_deployment_can_ever_serve_is_the_callers_error(net: Loopback, serve: Any) -> None:
    server = net.serve()
    answer = serve(first=server).post(CHAT, json={**AGENT, "biollm": {"capability": "vision"}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_rejected")
    assert not server.requests


def test_where_a_server_may_be_started_it_may_take_more(net: Loopback, serve: Any) -> None:
    client = serve(SMALL, first=net.serve())
    error = client.post(CHAT, json={**AGENT, **LONG, "biollm": {"start_local": True}}).json()["error"]
    assert error["biollm"]["class"] == "UnavailableError"


def test_max_tokens_are_lowered_to_what_the_context_leaves(net: Loopback, serve: Any) -> None:
    """Qwen Code and Claude Code ask for 32,000 tokens of answer."""
    server = agent(net, "a")
    client = serve({"models": {"small": {"type": "api", "context_length": 32768}}}, first=server)
    prompt = [{"role": "user", "content": "word " * 6000}]
    answer = client.post(CHAT, json={**AGENT, "messages": prompt, "max_tokens": 32000})
    assert len(calls_of(events(answer))) == 2
    assert 2048 <= server.completions[0].body["max_tokens"] <= 32768 - 6000
