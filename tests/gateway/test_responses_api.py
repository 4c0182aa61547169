"""OpenAI's Responses API as chat completions, and back; streams are read by OpenAI's own SDK."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from dialects import call, chunks, spoiled, tool_delta, whole

from biollm.errors import UsageError
from biollm.gateway import responses_api
from biollm.routing import import_router

Json = dict[str, Any]
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
LOOK = {"type": "function", "name": "look", "description": "Looks.", "strict": False, "parameters": SCHEMA}
SPACE = {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [{**LOOK, "name": "read"}]}
PATCH = {
    "type": "custom", "name": "apply_patch", "description": "Patches.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"},
}  # fmt: skip
SEARCH = {"type": "web_search", "external_web_access": True}
HI = [{"role": "user", "content": "hi"}]


def chat_tool(name: str, description: str = "Looks.", parameters: Any = SCHEMA) -> Json:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


FREE = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
CHAT_PATCH = chat_tool("apply_patch", "Patches.\n\nThe input follows this lark grammar:\nstart: /x/", FREE)


def message(role: str, *texts: str, kind: str = "input_text") -> Json:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}


def output(ident: str, given: Any, kind: str = "function_call_output") -> Json:
    return {"type": kind, "call_id": ident, "output": given}


CONVERSATIONS: dict[str, tuple[Json, list[Json]]] = {
    "a string": ({"input": "hi"}, HI),
    "items without a type": ({"input": HI}, HI),
    "instructions and developer": (
        {"instructions": "a", "input": [message("developer", "b", "c"), message("user", "hi")]},
        [{"role": "system", "content": "a\n\nb\n\nc"}, *HI],
    ),
    "developer in the middle": (
        {"input": [message("user", "hi"), message("assistant", "yes?", kind="output_text"), message("developer", "d")]},
        [*HI, {"role": "assistant", "content": "yes?"},
         {"role": "user", "content": "<system-reminder>\nd\n</system-reminder>"}],
    ),
    "an image and a file": (
        {"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"},
            {"type": "input_file", "filename": "t.pdf", "file_data": "data:application/pdf;base64,AA"}]}]},
        [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
            {"type": "file", "file": {"filename": "t.pdf", "file_data": "data:application/pdf;base64,AA"}}]}],
    ),
    "reasoning, text, parallel calls of each kind": (
        {"input": [
            message("user", "hi"),
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": None},
            message("assistant", "I look.", kind="output_text"),
            {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"path": "1"}'},
            {"type": "function_call", "call_id": "b", "name": "read", "namespace": "mcp__files", "arguments": "{}"},
            {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "x"},
            output("a", "one"), output("b", [{"type": "input_text", "text": "two"}]),
            output("c", "three", "custom_tool_call_output"),
            {"type": "web_search_call", "id": "w", "status": "completed"}]},
        [*HI, {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [
            call("a", "look", '{"path": "1"}'), call("b", "mcp__files__read", "{}"),
            call("c", "apply_patch", '{"input": "x"}')]},
         {"role": "tool", "tool_call_id": "a", "content": "one"},
         {"role": "tool", "tool_call_id": "b", "content": "two"},
         {"role": "tool", "tool_call_id": "c", "content": "three"}],
    ),
    "text after the calls, an image in a result": (
        {"input": [
            message("user", "hi"),
            {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
            message("assistant", "I look.", kind="output_text"),
            output("a", [{"type": "input_image", "image_url": "data:image/png;base64,AA"}])]},
        [*HI, {"role": "assistant", "content": "I look.", "tool_calls": [call("a", "look", "{}")]},
         {"role": "tool", "tool_call_id": "a", "content": "(attached below)"},
         {"role": "user", "content": [{"type": "text", "text": "From the result of a:"},
                                      {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_conversation_is_translated(case: str) -> None:
    body, messages = CONVERSATIONS[case]
    assert responses_api.request({"model": "biollm", **body}) == {"model": "biollm", "messages": messages}


FIELDS: dict[str, tuple[Json, Json]] = {
    "a stream": ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
    "numbers": (
        {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 7},
        {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7},
    ),
    "what only OpenAI's servers have": (
        {"store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "client_metadata": {"a": "b"},
         "previous_response_id": None, "truncation": "auto", "safety_identifier": "s", "tools": [SEARCH]},
        {},
    ),
    "reasoning without effort": ({"reasoning": {"summary": "auto"}}, {}),
    "effort, verbosity": (
        {"reasoning": {"effort": "low"}, "text": {"verbosity": "low", "format": {"type": "text"}}},
        {"reasoning_effort": "low", "verbosity": "low"},
    ),
    "a schema": (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
    ),
    "json": ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    "tools of each kind": (
        {"tools": [LOOK, SPACE, PATCH, SEARCH], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [chat_tool("look"), chat_tool("mcp__files__read", "Files.\n\nLooks."), CHAT_PATCH]},
    ),
    "one at a time": (
        {"tools": [LOOK], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [chat_tool("look")], "tool_choice": "required", "parallel_tool_calls": False},
    ),
    "one tool": (
        {"tools": [LOOK, SPACE], "tool_choice": {"type": "function", "name": "read", "namespace": "mcp__files"}},
        {"tools": [chat_tool("look"), chat_tool("mcp__files__read", "Files.\n\nLooks.")],
         "tool_choice": {"type": "function", "function": {"name": "mcp__files__read"}}},
    ),
    "some tools": (
        {"tools": [LOOK, PATCH], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [LOOK]}},
        {"tools": [chat_tool("look")], "tool_choice": "required"},
    ),
    "a strict tool": (
        {"tools": [{"type": "function", "name": "f", "parameters": None, "strict": True}]},
        {"tools": [{"type": "function", "function": {
            "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}}]},
    ),
    "tags": ({"metadata": {"a": "b"}, "biollm": {"deadline": 5}}, {"metadata": {"a": "b"}, "biollm": {"deadline": 5}}),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_fields_are_translated(case: str) -> None:
    given, made = FIELDS[case]
    assert responses_api.request({"model": "biollm", "input": "hi", **given}) == {
        "model": "biollm",
        "messages": HI,
        **made,
    }


def test_tools_may_come_in_the_input() -> None:
    body = {"input": [{"type": "additional_tools", "role": "developer", "tools": [LOOK]}, *HI]}
    assert responses_api.request(body) == {"messages": HI, "tools": [chat_tool("look")]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "x", "previous_response_id": "r"}, "previous_response_id is not supported: this gateway stores no responses."),
        ({"input": "x", "background": True}, "background is not supported"),
        ({}, "There are no messages: input is missing or empty."),
        ({"input": 7}, "input must be a list of objects."),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0] is of type 'item_reference', which this gateway does not know."),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role is 'tool'; it must be user, assistant, system or developer."),
        ({"input": [{"role": "user", "content": [{"type": "audio"}]}]}, "input[0].content[0] is of type 'audio'; it must be one of"),
        ({"input": [output("a", 7)]}, "input[0].output must be a list of objects."),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0].arguments must be a string."),
        ({"input": "x", "tools": [{"type": "mcp", "server_label": "s"}]}, "tools[0] is of type 'mcp', which only OpenAI's models have."),
        ({"input": "x", "text": []}, "text must be an object."),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(body: Json, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        responses_api.request(body)
    assert message in str(refused.value)


def test_no_spoiled_body_is_an_internal_error() -> None:
    body = {
        "model": "biollm", "instructions": "a", "tools": [LOOK, SPACE, PATCH], "stream": True,
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [LOOK]}, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
        "input": [
            message("user", "x"), {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
            {"type": "function_call", "call_id": "a", "name": "read", "namespace": "n", "arguments": "{}"},
            output("a", [{"type": "input_image", "image_url": "data:x"}]),
            {"type": "additional_tools", "tools": [LOOK]},
        ],
    }  # fmt: skip
    refused = 0
    for each in spoiled(body):
        try:
            responses_api.request(each)
            responses_api.answer(whole("x", [call("a", "look", "{}")]), each)
        except UsageError:
            refused += 1
    assert refused > 50


ASKED = {"tools": [LOOK, SPACE, PATCH], "temperature": 0.5, "store": True}
CALLS = [
    call("a", "look", '{"path": "1"}'), call("b", "mcp__files__read", "{}"), call("c", "apply_patch", '{"input": "x"}'),
    call("d", "other", ""), call("e", "apply_patch", "*** Begin Patch"),
]  # fmt: skip
ITEMS = [
    {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"path": "1"}', "status": "completed"},
    {"type": "function_call", "call_id": "b", "name": "read", "namespace": "mcp__files", "arguments": "{}", "status": "completed"},
    {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "x"},
    {"type": "function_call", "call_id": "d", "name": "other", "arguments": "{}", "status": "completed"},
    {"type": "custom_tool_call", "call_id": "e", "name": "apply_patch", "input": "*** Begin Patch"},
]  # fmt: skip


def without_ids(items: list[Json]) -> list[Json]:
    return [{name: value for name, value in each.items() if name != "id"} for each in items]


def test_an_answer_is_translated() -> None:
    made = responses_api.answer(whole("Text.", CALLS, "tool_calls", reasoning_content="Hm."), ASKED)
    reasoning, text, *calls = made["output"]
    assert (reasoning["summary"], reasoning["type"]) == ([{"type": "summary_text", "text": "Hm."}], "reasoning")
    assert (text["content"][0]["text"], text["role"]) == ("Text.", "assistant")
    assert without_ids(calls) == ITEMS
    assert (made["object"], made["status"], made["model"], made["store"]) == ("response", "completed", "p/m", False)
    assert made["temperature"] == 0.5
    assert made["usage"] == {
        "input_tokens": 100, "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
        "output_tokens": 20, "output_tokens_details": {"reasoning_tokens": 7}, "total_tokens": 120,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [("stop", "completed", None), ("tool_calls", "completed", None),
     ("length", "incomplete", "max_output_tokens"), ("content_filter", "incomplete", "content_filter")],
)  # fmt: skip
def test_the_reason_of_the_end(finish: str, status: str, reason: str | None) -> None:
    last = read(responses_api.Events({}), chunks({"content": "x"}, finish=finish))[-1]
    assert last["type"] == f"response.{status}"
    for made in (responses_api.answer(whole("x", finish=finish), {}), last["response"]):
        assert made["status"] == status
        assert made["incomplete_details"] == (reason and {"reason": reason})


def test_long_names_and_signatures_come_back() -> None:
    tools = [{**SPACE, "name": "mcp__" + "x" * 70}]
    sent = responses_api.request({"input": "hi", "tools": tools})["tools"][0]["function"]["name"]
    assert len(sent) == 64
    signed = {"google": {"thought_signature": "abc/+="}}
    [item] = responses_api.answer(whole(None, [call("a", sent, "{}", extra_content=signed)]), {"tools": tools})[
        "output"
    ]
    assert (item["name"], item["namespace"]) == ("read", tools[0]["name"])
    first, second = responses_api.request({"input": [item, output(item["call_id"], "r")], "tools": tools})["messages"]
    assert first["tool_calls"] == [call("a", sent, "{}", extra_content=signed)]
    assert second["tool_call_id"] == "a"


def text_of(events: responses_api.Events, given: list[Json]) -> str:
    return "".join(piece for chunk in given for piece in events.feed(chunk)) + "".join(events.end())


def read(events: responses_api.Events, given: list[Json]) -> list[Json]:
    return parsed(text_of(events, given))


def parsed(text: str) -> list[Json]:
    return [json.loads(each.partition("data: ")[2]) for each in text.split("\n\n") if each]


def sdk(body: str, status: int = 200) -> openai.OpenAI:
    """Return OpenAI's client of a server that answers with this."""
    kind = "text/event-stream" if status == 200 else "application/json"
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=body, headers={"content-type": kind}))
    return openai.OpenAI(api_key="x", base_url="http://x", max_retries=0, http_client=httpx.Client(transport=transport))


def test_the_sdk_reads_a_stream() -> None:
    given = chunks(
        {"reasoning_content": "H"}, {"reasoning_content": "m."}, {"content": "I "}, {"content": "look."},
        *({"tool_calls": [{"index": at, **each}]} for at, each in enumerate(CALLS)), finish="tool_calls",
    )  # fmt: skip
    body = text_of(responses_api.Events(ASKED), given)
    with sdk(responses_api.PING + body).responses.stream(model="m", input="hi") as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert [each.delta for each in events if each.type == "response.output_text.delta"] == ["I ", "look."]
    assert [each.delta for each in events if each.type == "response.reasoning_summary_text.delta"] == ["H", "m."]
    assert response.output_text == "I look."
    assert [each.type for each in response.output[:2]] == ["reasoning", "message"]
    assert without_ids(parsed(body)[-1]["response"]["output"][2:]) == ITEMS
    assert (response.usage.input_tokens, response.usage.total_tokens) == (100, 120)  # type: ignore
    assert [each["sequence_number"] for each in parsed(body)] == list(range(len(parsed(body))))
    done = [
        (each["output_index"], each["item"]) for each in parsed(body) if each["type"] == "response.output_item.done"
    ]
    assert done == list(enumerate(parsed(body)[-1]["response"]["output"]))
    assert len({item["id"] for _, item in done}) == len(done)


def test_a_stream_has_openais_events() -> None:
    given = chunks(
        {"reasoning_content": "H"}, {"content": "I "}, {"content": "look."}, tool_delta(0, "a", "look", "{}")
    )
    kinds = [each["type"].removeprefix("response.") for each in read(responses_api.Events(ASKED), given)]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta", "reasoning_summary_text.done",
        "reasoning_summary_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    first = read(responses_api.Events(ASKED), given)[2]
    assert (first["item"]["summary"], first["item"]["status"]) == ([], "in_progress")  # Codex needs the summary


@pytest.mark.parametrize(
    ("status", "code", "made", "text"),
    [
        (429, "rate_limit_exceeded", "rate_limit_exceeded", "No.\nPlease try again in 7s."),
        (400, "context_length_exceeded", "context_length_exceeded", "No."),
        (503, "stream_interrupted", "server_error", "No."),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_fails_in_codes_that_codex_knows(status: int, code: str, made: str, text: str, begun: bool) -> None:
    events = responses_api.Events({"model": "biollm"})
    before = "".join(events.feed(chunks({"content": "x"})[1])) if begun else ""
    body = before + "".join(events.fail(status, {"error": {"message": "No.", "code": code}}, 7))
    with sdk(body).responses.stream(model="m", input="hi") as stream:
        *_, last = stream
    assert (last.type, last.response.status) == ("response.failed", "failed")  # type: ignore
    assert (last.response.error.code, last.response.error.message) == (made, text)  # type: ignore


@pytest.mark.slow
def test_litellm_translates_the_common_part_alike() -> None:
    import_router()
    from litellm.responses.litellm_completion_transformation.transformation import LiteLLMCompletionResponsesConfig

    given = CONVERSATIONS["reasoning, text, parallel calls of each kind"][0]["input"][:-1]
    fields = {"instructions": "s", "tools": [LOOK, SPACE], "temperature": 0.5, "max_output_tokens": 7}
    translate = LiteLLMCompletionResponsesConfig.transform_responses_api_request_to_chat_completion_request
    theirs: Any = json.loads(json.dumps(translate("gpt-4o", given, fields)))
    for each in theirs["messages"]:
        if isinstance(each["content"], list):
            each["content"] = each["content"][0]["text"]
        for made in each.get("tool_calls", ()):
            del made["index"]
            made["function"]["arguments"] = made["function"]["arguments"].replace("content", "input")
    for each in theirs["tools"]:
        del each["function"]["strict"]  # false
    assert theirs == responses_api.request({"model": "gpt-4o", "input": given, **fields})
