"""Anthropic's Messages API as chat completions, and back; streams are read by Anthropic's own SDK."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import pytest
from dialects import call, chunks, spoiled, tool_delta, whole

from biollm.errors import UsageError
from biollm.gateway import messages_api
from biollm.routing import import_router

Json = dict[str, Any]
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
LONG = "mcp__" + "x" * 80
TOOLS = [{"name": "look", "description": "Looks.", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}]
CHAT_TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}]
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
CHAT_PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
HI = [{"role": "user", "content": "hi"}]


def use(ident: str, path: str) -> Json:
    return {"type": "tool_use", "id": ident, "name": "look", "input": {"path": path}}


def chat_use(ident: str, path: str, **more: Any) -> Json:
    return call(ident, "look", json.dumps({"path": path}), **more)


def result(ident: str, content: Any, **more: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": ident, "content": content, **more}


CONVERSATIONS: dict[str, tuple[Json, list[Json]]] = {
    "a string": ({"messages": HI}, HI),
    "system blocks become one": (
        {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}],
         "messages": [{"role": "system", "content": "c"}, *HI]},
        [{"role": "system", "content": "a\n\nb\n\nc"}, *HI],
    ),
    "system in the middle": (
        {"messages": [*HI, {"role": "assistant", "content": "yes?"}, {"role": "system", "content": "Be brief."}]},
        [*HI, {"role": "assistant", "content": "yes?"},
         {"role": "user", "content": "<system-reminder>\nBe brief.\n</system-reminder>"}],
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, PNG]}]},
        [{"role": "user", "content": [{"type": "text", "text": "see"}, CHAT_PNG]}],
    ),
    "an image by its address, a document, a text": (
        {"messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
            {"type": "document", "title": "t.pdf", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA"}},
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "plain"}}]}]},
        [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
            {"type": "file", "file": {"filename": "t.pdf", "file_data": "data:application/pdf;base64,AA"}},
            {"type": "text", "text": "plain"}]}],
    ),
    "thinking, text and parallel calls": (
        {"messages": [*HI, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look."}, use("a", "1"), use("b", "2")]},
            {"role": "user", "content": [result("a", "one"), result("b", [{"type": "text", "text": "two"}]),
                                         {"type": "text", "text": "go on"}]}]},
        [*HI, {"role": "assistant", "content": "I look.", "reasoning_content": "hm",
               "tool_calls": [chat_use("a", "1"), chat_use("b", "2")]},
         {"role": "tool", "tool_call_id": "a", "content": "one"}, {"role": "tool", "tool_call_id": "b", "content": "two"},
         {"role": "user", "content": "go on"}],
    ),
    "a call alone, a failed result, an image in a result": (
        {"messages": [*HI, {"role": "assistant", "content": [use("a", "1"), use("b", "2")]},
                      {"role": "user", "content": [result("a", "no", is_error=True), result("b", [PNG])]}]},
        [*HI, {"role": "assistant", "content": None, "tool_calls": [chat_use("a", "1"), chat_use("b", "2")]},
         {"role": "tool", "tool_call_id": "a", "content": "Error:\nno"},
         {"role": "tool", "tool_call_id": "b", "content": "(attached below)"},
         {"role": "user", "content": [{"type": "text", "text": "From the result of b:"}, CHAT_PNG]}],
    ),
    "messages of nothing, thinking alone": (
        {"messages": [{"role": "user", "content": []}, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}, *HI,
                      {"role": "assistant", "content": ""}]},
        HI,
    ),
    "two messages of one role": (
        {"messages": [*HI, *HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "hi"}]},
         {"role": "assistant", "content": "ab"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_conversation_is_translated(case: str) -> None:
    body, messages = CONVERSATIONS[case]
    assert messages_api.request({"model": "biollm", "max_tokens": 5, **body}) == {
        "model": "biollm",
        "max_tokens": 5,
        "messages": messages,
    }


FIELDS: dict[str, tuple[Json, Json]] = {
    "a stream": ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
    "numbers": ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
    "stop": ({"stop_sequences": ["x"]}, {"stop": ["x"]}),
    "what is Anthropic's own": (
        {"metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"}, "top_k": 3, "service_tier": "auto",
         "context_management": {"edits": []}, "betas": ["x"]},
        {},
    ),
    "effort high is the default": ({"output_config": {"effort": "high"}}, {}),
    "effort": ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
    "a schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
    ),
    "tools": ({"tools": TOOLS}, {"tools": CHAT_TOOLS}),
    "auto": ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, {"tools": CHAT_TOOLS, "tool_choice": "auto"}),
    "any, one at a time": (
        {"tools": TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {"tools": CHAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    ),
    "one tool": (
        {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "look"}},
        {"tools": CHAT_TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ),
    "a server's tool is left out": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}], "tool_choice": {"type": "tool", "name": "web_search"}},
        {},
    ),
    "our own field": ({"biollm": {"tags": {"a": "b"}}}, {"biollm": {"tags": {"a": "b"}}}),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_fields_are_translated(case: str) -> None:
    given, made = FIELDS[case]
    assert messages_api.request({"model": "biollm", "messages": HI, **given}) == {
        "model": "biollm",
        "messages": HI,
        **made,
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": "hi"}, "messages must be a list of objects."),
        ({"messages": ["hi"]}, "messages must be a list of objects."),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'; it must be user, assistant or system."),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type must be a string."),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0] is of type 'audio'; it must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "messages[0].content[0].source.media_type must be a string."),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "which an assistant's message cannot hold here."),
        ({"messages": HI, "tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0] is of type 'bash_20250124', which only Anthropic's models have."),
        ({"messages": HI, "mcp_servers": [{}]}, "mcp_servers and container are not supported"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(body: Json, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        messages_api.request(body)
    assert message in str(refused.value)


def test_no_spoiled_body_is_an_internal_error() -> None:
    body = {
        "model": "biollm", "max_tokens": 5, "system": [{"type": "text", "text": "a"}], "tools": TOOLS, "stream": True,
        "tool_choice": {"type": "tool", "name": "look"}, "output_config": {"effort": "low", "format": {"schema": {}}}, "stop_sequences": ["x"],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}, PNG]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, use("a", "1")]},
            {"role": "user", "content": [result("a", [PNG], is_error=True)]},
        ],
    }  # fmt: skip
    refused = 0
    for each in spoiled(body):
        try:
            messages_api.request(each)
            messages_api.answer(whole("x", [call("a", "look", "{}")]), each)
        except UsageError:
            refused += 1
    assert refused > 50


def test_an_answer_is_translated() -> None:
    calls = [call("a", "look", '{"path": "1"}'), call("b", "look", ""), call("c", "look", "{oops")]
    made = messages_api.answer(whole("Text.", calls, "tool_calls", reasoning_content="Hm."), {"tools": TOOLS})
    assert made["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Text."},
        use("a", "1"),
        {**use("b", ""), "input": {}},
        {**use("c", ""), "input": {"invalid_json": "{oops"}},
    ]
    assert (made["type"], made["role"], made["model"], made["stop_reason"]) == (
        "message",
        "assistant",
        "p/m",
        "tool_use",
    )
    used = {"input_tokens": 30, "output_tokens": 20, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 10}
    assert made["usage"] == {**used, "output_tokens_details": {"thinking_tokens": 7}}


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal"), ("tool_calls", "tool_use")],
)
def test_the_reason_of_the_end(finish: str, reason: str) -> None:
    assert messages_api.answer(whole("x", finish=finish), {})["stop_reason"] == reason
    events = read(messages_api.Events({}), chunks({"content": "x"}, finish=finish))
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": None}


def test_a_stop_sequence_is_named_where_the_server_does() -> None:
    events = read(messages_api.Events({"stop_sequences": ["##"]}), chunks({"content": "x"}, stop_reason="##"))
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "##"}


def test_long_names_and_signatures_come_back() -> None:
    tools = [{"name": LONG, "input_schema": SCHEMA}]
    sent = messages_api.request({"messages": HI, "tools": tools})["tools"][0]["function"]["name"]
    assert len(sent) == 64
    signed = {"google": {"thought_signature": "abc/+="}}
    [block] = messages_api.answer(whole(None, [call("a", sent, "{}", extra_content=signed)]), {"tools": tools})[
        "content"
    ]
    assert block["name"] == LONG
    history = [{"role": "assistant", "content": [block]}, {"role": "user", "content": [result(block["id"], "r")]}]
    first, second = messages_api.request({"messages": history, "tools": tools})["messages"]
    assert first["tool_calls"] == [call("a", sent, "{}", extra_content=signed)]
    assert second["tool_call_id"] == "a"


def text_of(events: messages_api.Events, given: list[Json]) -> str:
    return "".join(piece for chunk in given for piece in events.feed(chunk)) + "".join(events.end())


def read(events: messages_api.Events, given: list[Json]) -> list[Json]:
    return [json.loads(each.partition("data: ")[2]) for each in text_of(events, given).split("\n\n") if each]


def sdk(body: str, status: int = 200) -> anthropic.Anthropic:
    """Return Anthropic's client of a server that answers with this."""
    kind = "text/event-stream" if status == 200 else "application/json"
    transport = httpx2.MockTransport(lambda _: httpx2.Response(status, text=body, headers={"content-type": kind}))
    return anthropic.Anthropic(
        api_key="x", base_url="http://x", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


def test_the_sdk_reads_a_stream() -> None:
    given = chunks(
        {"reasoning_content": "H"}, {"reasoning_content": "m."}, {"content": "I "}, {"content": "look."},
        tool_delta(0, "a", "look", '{"path": "1"}'), tool_delta(1, "b", "look", '{"path": "2"}'), finish="tool_calls",
    )  # fmt: skip
    body = text_of(messages_api.Events({}), given)
    with sdk(messages_api.PING + body).messages.stream(model="m", max_tokens=5, messages=HI) as stream:  # type: ignore
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert pieces == ["I ", "look."]
    assert [each.type for each in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (message.content[0].thinking, message.content[1].text) == ("Hm.", "I look.")
    assert [(each.id, each.input) for each in message.content[2:]] == [("a", {"path": "1"}), ("b", {"path": "2"})]
    assert (message.stop_reason, message.model) == ("tool_use", "p/m")
    assert (message.usage.input_tokens, message.usage.output_tokens, message.usage.cache_read_input_tokens) == (
        30,
        20,
        60,
    )
    kinds = [json.loads(each.partition("data: ")[2])["type"] for each in body.split("\n\n") if each]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    two = [*block[:2], *block[1:]]
    assert kinds == ["message_start", *two, *two, *block, *block, "message_delta", "message_stop"]


def test_two_calls_in_one_chunk_are_two_blocks() -> None:
    calls = [*tool_delta(0, "a", "look", "{}")["tool_calls"], *tool_delta(1, "b", "look", "{}")["tool_calls"]]
    events = read(messages_api.Events({}), chunks({"tool_calls": calls}))
    starts = [(each["index"], each["content_block"]["id"]) for each in events if each["type"] == "content_block_start"]
    assert starts == [(0, "a"), (1, "b")]


def test_an_empty_stream_is_whole() -> None:
    kinds = [each["type"] for each in read(messages_api.Events({}), chunks(usage=None))]
    assert kinds == ["message_start", "message_delta", "message_stop"]


def test_the_sdk_raises_the_error_of_a_stream() -> None:
    events = messages_api.Events({})
    error = {"error": {"message": "Connection error: it broke.", "type": "server_error", "param": None, "code": "x"}}
    body = "".join([*events.feed(chunks({"content": "x"})[1]), *events.fail(503, error, 15)])
    with pytest.raises(anthropic.APIStatusError, match="Connection error: it broke"):  # noqa: SIM117
        with sdk(body).messages.stream(model="m", max_tokens=5, messages=HI) as stream:  # type: ignore
            stream.until_done()


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "not_found_error"), (429, "rate_limit_error"),
     (500, "api_error"), (504, "timeout_error")],
)  # fmt: skip
def test_errors_are_anthropics(status: int, kind: str) -> None:
    body = messages_api.problem(status, {"error": {"message": "No.", "code": "x"}})
    assert body == {"type": "error", "error": {"type": kind, "message": "No."}}
    with pytest.raises(anthropic.APIStatusError) as raised:
        sdk(json.dumps(body), status).messages.create(model="m", max_tokens=5, messages=HI)  # type: ignore
    assert raised.value.status_code == status


def test_models_come_in_pages() -> None:
    listed = [{"id": name, "context_length": 10} for name in "abc"]
    first = messages_api.models(listed, 2, None)
    assert ([each["id"] for each in first["data"]], first["has_more"], first["last_id"]) == (["a", "b"], True, "b")
    last = messages_api.models(listed, 2, "b")
    assert ([each["id"] for each in last["data"]], last["has_more"]) == (["c"], False)
    assert last["data"][0]["max_input_tokens"] == 10
    assert messages_api.models(listed, 2, "c") == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.slow
def test_litellm_translates_the_common_part_alike() -> None:
    import_router()
    from litellm.llms.anthropic.messages.adapters.transformation import AnthropicAdapter

    body = {
        "model": "gpt-4o", "max_tokens": 5, "system": "s", "tools": TOOLS, "tool_choice": {"type": "any"},
        "temperature": 0.5, "stop_sequences": ["x"],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "see"}, PNG]},
            {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use("a", "1"), use("b", "2")]},
            {"role": "user", "content": [result("a", "one"), result("b", "two"), {"type": "text", "text": "go"}]},
        ],
    }  # fmt: skip
    theirs: Any = json.loads(json.dumps(AnthropicAdapter().translate_completion_input_params({**body})))
    ours = messages_api.request(body)
    theirs["messages"] = [_simple(each) for each in theirs["messages"]]
    for tool in theirs["tools"]:
        tool.pop("cache_control", None)
        tool["function"].pop("cache_control", None)
    assert {name: theirs.get(name) for name in ours} == ours


def _simple(message: Json) -> Json:
    """Return a message with a single text as a string, and without LiteLLM's empty fields."""
    message = {name: value for name, value in message.items() if value is not None}
    match message["content"]:
        case [{"type": "text", "text": text}]:
            message["content"] = text
    return message
