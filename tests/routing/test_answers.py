"""The chunks of a stream are folded into the answer that OpenAI's own SDK makes of them, and parallel calls stay apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from biollm.routing.answers import Answer, Fold, kind
from biollm.types import Fields

FRAME: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
END: dict[str, Any] = {**FRAME, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE: dict[str, Any] = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}], "refusal": None}


def chunk(**delta: Any) -> dict[str, Any]:
    return {**FRAME, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def call(arguments: str, index: int | None = 0, ident: str = "", name: str = "", **more: Any) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": name} if name else {})}
    start = {"id": ident, "type": "function"} if ident else {}
    at = {} if index is None else {"index": index}
    return chunk(tool_calls=[{**at, **start, "function": function, **more}])


def folded(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    fold = Fold()
    for each in copy.deepcopy(chunks):
        fold.add(each)
    return fold.whole()


TEXT = [chunk(role="assistant", content=""), *(chunk(content=f"{at} ") for at in range(9))]
BLAST = [call("", 0, "call-1", "blast"), call('{"db":', 0), call('"nt"}', 0)]
OPENAI = {
    "text": [*TEXT, END],
    "refusal": [chunk(role="assistant", refusal="I "), chunk(refusal="won't"), END],
    "logprobs": [TEXT[0], {**FRAME, "choices": [{**TEXT[1]["choices"][0], "logprobs": copy.deepcopy(LOGPROBS)}]}, END],
    "a tool call after text": [*TEXT, *BLAST, END],
    "two calls, interleaved": [TEXT[0], *BLAST[:1], call("{", 1, "call-2", "sleep"), *BLAST[1:], call("}", 1), END],
    "usage": [*TEXT, END, {**FRAME, "choices": [], "usage": USAGE}],
}


@pytest.mark.parametrize("chunks", OPENAI.values(), ids=OPENAI)
def test_a_stream_makes_the_answer_of_openais_sdk(chunks: list[dict[str, Any]]) -> None:
    from openai.lib.streaming.chat import ChatCompletionStreamState
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    state = ChatCompletionStreamState[None]()
    for each in copy.deepcopy(chunks):
        state.handle_chunk(ChatCompletionChunk.model_validate(each))
    expected = state.current_completion_snapshot.model_dump(exclude_none=True)
    for choice in expected["choices"]:
        choice["message"].pop("parsed", None)
        for each in choice["message"].get("tool_calls", ()):
            each.pop("index", None)
            each["function"].pop("parsed_arguments", None)
    assert ChatCompletion.model_validate(folded(chunks)).model_dump(exclude_none=True) == expected


CALLS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, str]]]] = {
    "one index, two ids": (
        [call('{"a":1}', 0, "1", "f"), call('{"b":2}', 0, "2", "g")],
        [("1", "f", '{"a":1}'), ("2", "g", '{"b":2}')],
    ),
    "one index, two ids, in fragments": (
        [call("", 0, "1", "f"), call("{}", 0), call("", 0, "2", "g"), call("[]", 0)],
        [("1", "f", "{}"), ("2", "g", "[]")],
    ),
    "the id and the name in every fragment": (
        [call("{", 0, "1", "f"), call("}", 0, "1", "f")],
        [("1", "f", "{}")],
    ),
    "no index": ([call("{", None, "1", "f"), call("}", None)], [("1", "f", "{}")]),
    "no id": ([call("{}", 0, "", "f")], [("call_0", "f", "{}")]),
    "empty ids after the first": ([call("{", 0, "1", "f"), call("}", 0, "", "")], [("1", "f", "{}")]),
}


@pytest.mark.parametrize(("chunks", "expected"), CALLS.values(), ids=CALLS)
def test_parallel_tool_calls_stay_apart(chunks: list[dict[str, Any]], expected: list[tuple[str, str, str]]) -> None:
    calls = folded([*chunks, END])["choices"][0]["message"]["tool_calls"]
    assert [(each["id"], each["function"]["name"], each["function"]["arguments"]) for each in calls] == expected
    assert {each["type"] for each in calls} == {"function"}


def test_fields_that_nobody_here_knows_are_kept() -> None:
    google = {"google": {"thought_signature": "c2ln"}}
    whole = folded(
        [
            {**chunk(reasoning_content="th"), "service_tier": "flex"},
            {**chunk(reasoning_content="ink", annotations=[{"url": "a"}]), "citations": ["c"]},
            chunk(content="a", annotations=[{"url": "b"}]),
            call("{}", 0, "1", "f", extra_content=google),
            {**END, "usage": USAGE},
        ]
    )
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("think", "a")
    assert message["annotations"] == [{"url": "a"}, {"url": "b"}]
    assert message["tool_calls"][0]["extra_content"] == google
    assert (whole["service_tier"], whole["citations"], whole["usage"]) == ("flex", ["c"], USAGE)


def test_content_in_parts_is_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert folded([chunk(content=parts), END])["choices"][0]["message"]["content"] == "one two"


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (chunk(content="a", reasoning_content="b"), "text"),
        (chunk(reasoning_content="b"), "reasoning"),
        (call("{}"), "tool_call"),
        (chunk(role="assistant"), "usage"),
        (END, "usage"),
        ({**FRAME, "choices": []}, "usage"),
    ],
)
def test_a_chunk_has_a_kind(chunk: dict[str, Any], expected: str) -> None:
    assert kind(chunk) == expected


@pytest.mark.parametrize("stated", [True, False])
def test_tokens_are_the_providers_or_an_estimate(stated: bool) -> None:
    answer = Answer({})
    for each in [*TEXT, END, *([{**FRAME, "choices": [], "usage": USAGE}] if stated else [])]:
        answer.fold.add(each)
    usage = answer.spent(prompt=7)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.estimated) == (
        (1, 2, False) if stated else (7, 4, True)
    )


def test_the_fields_of_a_json_object_are_attributes_as_well() -> None:
    raw = Fields({"choices": [{"message": {"content": "a", "tool_calls": None}}]})
    assert raw.choices[0].message.content == raw["choices"][0]["message"]["content"] == "a"
    assert raw.choices[0].message.tool_calls is None
    with pytest.raises(AttributeError, match="absent"):
        _ = raw.absent
    assert copy.deepcopy(raw) == raw
