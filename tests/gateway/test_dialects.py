"""Anthropic's and OpenAI's newer dialect over the whole way: their SDKs, the gateway, the waterfall, a provider."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from behaviours import CONTEXT_TOO_LONG, HTTP_401, HTTP_500, HTTP_503, Behaviour, limited
from provider import Loopback
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from biollm.config.values import Limit
from biollm.gateway import app as gateway
from biollm.gateway.auth import Admission, Key

Json = dict[str, Any]
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [{"name": "look", "input_schema": SCHEMA}]
FUNCTIONS: list[Any] = [{"type": "function", "name": "look", "parameters": SCHEMA, "strict": False}]
ASKED = {MESSAGES: {"model": "biollm", "max_tokens": 50, "messages": HI}, RESPONSES: {"model": "biollm", "input": "hi"}}
BOTH = pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
STREAMED = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture
def claude(tmp_path: Path) -> anthropic.Anthropic:
    transport = httpx2.HTTPTransport(uds=str(tmp_path / "s"))
    return anthropic.Anthropic(
        api_key="x", base_url="http://x", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


@pytest.fixture
def codex(tmp_path: Path) -> openai.OpenAI:
    transport = httpx.HTTPTransport(uds=str(tmp_path / "s"))
    return openai.OpenAI(
        api_key="x", base_url="http://x/v1", max_retries=0, http_client=httpx.Client(transport=transport)
    )


def calling(net: Loopback, *, text: str | None = "I look.", **how: Any) -> Any:
    """Return a server that thinks, writes and calls a tool twice, in fragments."""
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "look", "arguments": f'{{"path": "{at}"}}'}}
        for at in (1, 2)
    ]
    message = {"role": "assistant", "content": text, "reasoning_content": "Hm so." if text else "", "tool_calls": calls}
    return net.serve(then=Behaviour(fragments=3, **how), answer=lambda _: message)


@STREAMED
def test_a_message_thinks_writes_and_calls(
    net: Loopback, serve: Any, claude: anthropic.Anthropic, stream: bool
) -> None:
    used = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    server = calling(net, usage=used)
    serve(first=net.serve(then=HTTP_503), second=server)
    asked: Any = {"model": "biollm", "max_tokens": 50, "messages": HI, "tools": TOOLS, "system": "Be brief."}
    if stream:
        with claude.messages.stream(**asked) as events:
            message: Any = events.get_final_message()
    else:
        message = claude.messages.create(**asked)
    thinking, text, *calls = message.content
    assert (thinking.thinking, text.text, message.stop_reason) == ("Hm so.", "I look.", "tool_use")
    assert [(each.id, each.name, each.input) for each in calls] == [
        ("call_1", "look", {"path": "1"}),
        ("call_2", "look", {"path": "2"}),
    ]
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (5, 4, 5)
    assert message.model == "second/small"
    [sent] = server.completions
    assert sent.body["messages"] == [{"role": "system", "content": "Be brief."}, *HI]
    assert [each["function"]["name"] for each in sent.body["tools"]] == ["look"]
    assert sent.body["max_tokens"] == 50


@STREAMED
def test_a_response_thinks_writes_and_calls(net: Loopback, serve: Any, codex: openai.OpenAI, stream: bool) -> None:
    server = calling(net)
    serve(first=net.serve(then=HTTP_503), second=server)
    asked: Any = {
        "model": "biollm",
        "input": HI,
        "tools": FUNCTIONS,
        "instructions": "Be brief.",
        "max_output_tokens": 50,
    }
    if stream:
        with codex.responses.stream(**asked) as events:
            response: Any = events.get_final_response()
    else:
        response = codex.responses.create(**asked)
    reasoning, message, *calls = response.output
    assert reasoning.summary[0].text == "Hm so."
    assert (message.content[0].text, response.output_text, response.status) == ("I look.", "I look.", "completed")
    assert [(each.call_id, each.name, each.arguments) for each in calls] == [
        ("call_1", "look", '{"path": "1"}'),
        ("call_2", "look", '{"path": "2"}'),
    ]
    assert response.usage.total_tokens > 0
    [sent] = server.completions
    assert sent.body["messages"] == [{"role": "system", "content": "Be brief."}, *HI]
    assert sent.body["max_tokens"] == 50


@BOTH
def test_a_break_inside_a_call_is_not_seen(net: Loopback, serve: Any, path: str) -> None:
    client = serve(first=calling(net, text=None, cut=4), second=calling(net, text=None))
    tools = TOOLS if path == MESSAGES else FUNCTIONS
    text = client.post(path, json={**ASKED[path], "tools": tools, "stream": True}).text
    assert text.count("call_1") == text.count("call_2") > 0
    assert ("message_stop" if path == MESSAGES else "response.completed") in text


@BOTH
def test_a_break_after_text_is_an_error_event(net: Loopback, serve: Any, path: str) -> None:
    text = (
        serve(first=net.serve(Behaviour(cut=4), text="one two three"))
        .post(path, json={**ASKED[path], "stream": True})
        .text
    )
    last = json.loads(text.strip().split("data: ")[-1])
    error = last["error"] if path == MESSAGES else last["response"]["error"]
    assert error["message"].startswith("Connection error")
    assert last["type"] == ("error" if path == MESSAGES else "response.failed")
    assert error["type" if path == MESSAGES else "code"] == ("api_error" if path == MESSAGES else "server_error")


@BOTH
def test_a_break_after_text_goes_on_where_there_are_tools(net: Loopback, serve: Any, path: str) -> None:
    client = serve(first=net.serve(Behaviour(cut=4), text="one two three"), second=calling(net))
    tools = TOOLS if path == MESSAGES else FUNCTIONS
    text = client.post(path, json={**ASKED[path], "tools": tools, "stream": True}).text
    assert ("message_stop" if path == MESSAGES else "response.completed") in text
    assert "call_1" in text


# Both agents repeat a 5xx at once, many times.
REFUSALS: dict[str, tuple[Behaviour, int, str]] = {
    "limited": (limited("7"), 429, "rate_limit_error"),
    "keys": (HTTP_401, 400, "invalid_request_error"),
    "broken": (HTTP_500, 429, "rate_limit_error"),
}


@BOTH
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_has_a_status_that_agents_wait_after(net: Loopback, serve: Any, case: str, path: str) -> None:
    how, status, kind = REFUSALS[case]
    client = serve(first=net.serve(then=how))
    client.post(path, json=ASKED[path])
    answer = client.post(path, json=ASKED[path])
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status == 429)
    assert "x-should-retry" not in answer.headers or status == 400
    body = answer.json()
    assert body["error"]["message"]
    if path == MESSAGES:
        assert (body["type"], body["error"]["type"]) == ("error", kind)


@BOTH
def test_a_limited_stream_is_refused_by_its_status(net: Loopback, serve: Any, path: str) -> None:
    client = serve(first=net.serve(then=limited("7")))
    for _ in range(2):  # the first time it is a failed attempt
        answer = client.post(path, json={**ASKED[path], "stream": True})
        assert (answer.status_code, 1 <= int(answer.headers["retry-after"]) <= 7) == (429, True)


@STREAMED
def test_a_prompt_that_is_too_long_never_passes(net: Loopback, serve: Any, stream: bool) -> None:
    client = serve(first=net.serve(then=CONTEXT_TOO_LONG))
    answer = client.post(MESSAGES, json={**ASKED[MESSAGES], "stream": stream})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    answer = client.post(RESPONSES, json={**ASKED[RESPONSES], "stream": stream})
    if stream:  # Codex makes its conversation shorter only if a stream states this
        last = json.loads(answer.text.strip().split("data: ")[-1])
        assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "context_length_exceeded")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@BOTH
@STREAMED
def test_thinking_and_signatures_go_back_to_their_model(net: Loopback, serve: Any, path: str, stream: bool) -> None:
    signed = {"google": {"thought_signature": "c2ln"}}
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "look", "arguments": "{}"},
        "extra_content": signed,
    }
    message = {"role": "assistant", "content": None, "reasoning_content": "Hm so.", "tool_calls": [call]}
    server = net.serve(answer=lambda _: message)
    client = serve(first=server)
    asked = {**ASKED[path], "tools": TOOLS if path == MESSAGES else FUNCTIONS, "stream": stream}
    text = client.post(path, json=asked).text
    if path == MESSAGES:
        ident = re.findall(r'"id": ?"(call_1[^"]*)"', text)[0]
        blocks = [
            {"type": "thinking", "thinking": "Hm so.", "signature": ""},
            {"type": "tool_use", "id": ident, "name": "look", "input": {}},
        ]
        result = {"type": "tool_result", "tool_use_id": ident, "content": "seen"}
        more = [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
        client.post(path, json={**asked, "messages": [*HI, *more]})
    else:
        output = json.loads(text.strip().split("data: ")[-1])
        items = output["response"]["output"] if stream else output["output"]
        result = {"type": "function_call_output", "call_id": items[-1]["call_id"], "output": "seen"}
        client.post(path, json={**asked, "input": [*HI, *items, result]})
    sent = server.completions[-1].body["messages"]
    assert sent[1]["tool_calls"] == [call]
    assert sent[1]["reasoning_content"] == "Hm so."
    assert sent[2] == {"role": "tool", "tool_call_id": "call_1", "content": "seen"}


@BOTH
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "The body is not JSON. Line 1, column 2: Expecting property name"),
        ({"messages": HI, "input": HI, "model": "smal"}, 404, "Did you mean 'small'?"),
        ({"messages": [{"role": "tool"}], "input": [{"role": "tool"}]}, 400, ".role is 'tool'; it must be"),
        ({"messages": HI, "input": HI, "temperature": "warm"}, 400, "temperature has the wrong type"),
        ({"messages": [], "input": []}, 400, "There are no messages"),
        ({}, 400, "There are no messages"),
    ],
)
def test_a_bad_request_is_refused_in_the_dialect(
    net: Loopback, serve: Any, path: str, body: Any, status: int, message: str
) -> None:
    server = net.serve()
    content = body if isinstance(body, str) else json.dumps(body)
    answer = serve(first=server).post(path, content=content)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True)
    assert ("type" in answer.json()) == (path == MESSAGES)
    assert not server.completions


def test_a_stored_response_is_refused(net: Loopback, serve: Any, codex: openai.OpenAI) -> None:
    serve(first=net.serve())
    with pytest.raises(openai.BadRequestError, match="this gateway stores no responses"):
        codex.responses.create(model="biollm", input="hi", previous_response_id="resp_1")


@BOTH
def test_a_schema_is_kept_to(net: Loopback, serve: Any, path: str) -> None:
    server = net.serve(text='{"path": "x"}')
    wanted = {"type": "json_schema", "name": "n", "schema": {**SCHEMA, "required": ["path"]}}
    form = {"output_config": {"format": wanted}} if path == MESSAGES else {"text": {"format": wanted}}
    body = serve(first=server).post(path, json={**ASKED[path], **form}).json()
    text = body["content"][0]["text"] if path == MESSAGES else body["output"][0]["content"][0]["text"]
    assert json.loads(text) == {"path": "x"}


def test_tokens_are_counted_without_sending(net: Loopback, serve: Any, claude: anthropic.Anthropic) -> None:
    server = net.serve()
    serve(first=server)
    few = claude.messages.count_tokens(model="biollm", messages=HI).input_tokens
    many = claude.messages.count_tokens(model="biollm", messages=HI, system="word " * 3000, tools=TOOLS).input_tokens
    assert 0 < few < 1000
    assert 3000 < many < 7000
    assert not server.completions
    with pytest.raises(anthropic.BadRequestError, match="messages must be a list"):
        claude.messages.count_tokens(model="biollm", messages="hi")  # type: ignore


def test_models_in_both_shapes(net: Loopback, serve: Any, claude: anthropic.Anthropic, codex: openai.OpenAI) -> None:
    client = serve(first=net.serve())
    names = ["biollm", "biollm-local", "small"]
    assert [each.id for each in claude.models.list(limit=2)] == names  # it asks for the second page itself
    assert claude.models.retrieve("small").display_name == "small"
    assert [each.id for each in codex.models.list()] == names
    assert [each["id"] for each in client.get("/v1/models?limit=1").json()["data"]] == names[:1]


@BOTH
def test_a_silent_stream_is_kept_open(net: Loopback, serve: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway._Events, "KEEP_ALIVE_S", 0.1)
    client = serve(first=net.serve(Behaviour(hang=4, pause=2), text="one two three"))
    text = client.post(path, json={**ASKED[path], "stream": True}).text
    assert ('event: ping\ndata: {"type":"ping"}\n\n' if path == MESSAGES else ": keep-alive\n\n") in text


def test_a_request_without_a_key_is_refused_in_the_dialect() -> None:
    client = TestClient(Admission(PlainTextResponse("in"), [Key("ann", "k" * 16)], "testserver"))
    answer = client.post(MESSAGES, json=ASKED[MESSAGES])
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert client.post(RESPONSES, json=ASKED[RESPONSES]).json().keys() == {"error"}


def test_counting_tokens_is_no_request_of_a_limited_key(waterfall: Any, net: Loopback) -> None:
    waterfall(first=net.serve())
    limits = (Limit("requests", 1, "day"),)
    client = TestClient(Admission(PlainTextResponse("in"), [Key("ann", "k" * 16, limits=limits)], "testserver"))
    client.headers["x-api-key"] = "k" * 16
    statuses = [client.post(path).status_code for path in (f"{MESSAGES}/count_tokens",) * 2 + (MESSAGES,) * 2]
    assert statuses == [200, 200, 200, 429]
