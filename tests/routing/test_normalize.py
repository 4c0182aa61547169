"""What a request may hold, what is made of it, and the one sentence for what cannot be sent."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from biollm.errors import UsageError
from biollm.routing.normalize import Reader, text, texts

BAD, GOOD = "bad \udcff", "bad \ufffd"
PNG = "data:image/png;base64,iVBORw0KGgo="


class Said(BaseModel):
    """A message as a library's object."""

    role: str = "assistant"
    content: str = BAD


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("plain", "plain"),
        ("naïve 😀", "naïve 😀"),
        (BAD, GOOD),
        ("\udcff", "\ufffd"),
        ("\ud83d\ude00", "😀"),  # a pair is a character
        ("a\ud83db", "a\ufffdb"),
        ("\ude00\ud83d!", "\ufffd\ufffd!"),
        (b"caf\xe9!".decode(errors="surrogateescape"), "caf\ufffd!"),
    ],
)
def test_a_lone_surrogate_becomes_a_replacement_character(given: str, made: str) -> None:
    assert text(given) == made
    made.encode()


@pytest.mark.parametrize(
    ("prompt", "made"),
    [
        ("hi", user("hi")),
        (BAD, user(GOOD)),
        (user(BAD), user(GOOD)),
        (tuple(user(BAD)), user(GOOD)),
        (user([{"type": "text", "text": BAD}, image({"url": PNG})]), user([{"type": "text", "text": GOOD}, image({"url": PNG})])),
        (user([image("https://example.org/a.png")]), user([image("https://example.org/a.png")])),
        ([{"role": "tool", "tool_call_id": BAD, "content": BAD}], [{"role": "tool", "tool_call_id": GOOD, "content": GOOD}]),
        ([{"role": "user", "name": BAD, "content": None}], [{"role": "user", "name": GOOD, "content": None}]),
        (
            [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": BAD}}]}],
            [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": GOOD}}]}],
        ),
        ([Said()], [{"role": "assistant", "content": GOOD}]),
        ([{"role": "alien", "content": "hi"}], [{"role": "alien", "content": "hi"}]),  # the provider may know it
    ],
)  # fmt: skip
def test_messages_become_plain_json(prompt: Any, made: list[Any]) -> None:
    assert Reader().messages(prompt) == made


def test_the_system_message_comes_first() -> None:
    assert Reader().messages("hi", BAD) == [{"role": "system", "content": GOOD}, *user("hi")]


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"max_tokens": np.int64(100)}, {"max_tokens": 100}),
        ({"max_completion_tokens": 100.0}, {"max_completion_tokens": 100}),
        ({"temperature": np.float32(0.5), "top_p": Decimal("0.5")}, {"temperature": 0.5, "top_p": 0.5}),
        ({"seed": np.array(7), "logprobs": np.bool_(True)}, {"seed": 7, "logprobs": True}),
        ({"logit_bias": {50256: -100}}, {"logit_bias": {"50256": -100}}),
        ({"stop": ("a", BAD), "user": None}, {"stop": ["a", GOOD]}),
        ({"tools": [{"type": "function", "n": np.int8(3)}]}, {"tools": [{"type": "function", "n": 3}]}),
        ({"tools": []}, {}),
    ],
)
def test_arguments_become_plain_json(given: dict[str, Any], made: dict[str, Any]) -> None:
    found = Reader().params(given)
    assert json.dumps(found) == json.dumps(made)


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (b"hi", "The prompt is a bytes; it must be a string or a list of messages."),
        (7, "The prompt is an int; it must be a string or a list of messages."),
        ({"role": "user", "content": "hi"}, "The prompt is a dict; it must be a string or a list of messages."),
        ([], "There are no messages."),
        (["hi"], "messages[0] is a str; it must be an object with a role and content."),
        ([{"content": "hi"}], 'messages[0] has no role; it must be a string such as "user".'),
        ([*user("hi"), {"role": 3}], 'messages[1] has a role that is an int; it must be a string such as "user".'),
        ([*user("hi"), {"role": "usr"}], "messages[1].role is 'usr'."),
        (user(b"hi"), "messages[0].content is a bytes; it must be a string or a list of parts."),
        (user(7), "messages[0].content is an int; it must be a string or a list of parts."),
        (user(object()), "messages[0].content is an object; it must be a string or a list of parts."),
        (user(["hi"]), 'messages[0].content[0] is a str; it must be an object such as {"type": "text", "text": "..."}.'),
        (user([{"text": "hi"}]), "messages[0].content[0] has no type; it must be an object such as"),
        (user([{"type": "text", "text": 7}]), "messages[0].content[0].text is an int; it must be a string."),
        (user([image({"url": "nonsense"})]), "messages[0].content[0].image_url is neither an http(s) URL nor a base64 data URL."),
        (user([{"type": "text", "text": ""}, image({})]), "messages[0].content[1].image_url is neither an http(s) URL"),
        (user([{"type": "image_url"}]), "messages[0].content[0].image_url is neither an http(s) URL"),
        (user([image(np.zeros(3))]), "messages[0].content[0].image_url is a ndarray, which is not JSON."),
        (user([image("data:image/png;base64,")]), "messages[0].content[0].image_url is neither an http(s) URL"),
        ([{"role": "assistant", "tool_calls": {1, 2}}], "messages[0].tool_calls is a set, which is not JSON."),
        ([{"role": "user", "content": "hi", "x": CYCLE}], "messages[0] contains itself or is nested too deeply."),
    ],
)  # fmt: skip
def test_a_message_that_cannot_be_sent_is_named_by_its_path(prompt: Any, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Reader().messages(prompt)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"temperature": float("nan")}, "extra.temperature is nan, which is not a JSON number."),
        ({"temperature": np.float32("inf")}, "extra.temperature is inf, which is not a JSON number."),
        ({"temperature": "hot"}, "extra.temperature is 'hot'; it must be a number from 0 to 2."),
        ({"seed": 10**400}, "extra.seed is too large, which is not a JSON number."),
        ({"max_tokens": 0}, "extra.max_tokens is 0; it must be a whole number of at least 1."),
        ({"max_completion_tokens": 1.5}, "extra.max_completion_tokens is 1.5; it must be a whole number of at least 1."),
        ({"max_tokens": "many"}, "extra.max_tokens is 'many'; it must be a whole number of at least 1."),
        ({"tools": {"f"}}, "extra.tools is a set, which is not JSON."),
        ({"tools": "f"}, "extra.tools is a str; it must be a list."),
        ({"tools": ["f"]}, "extra.tools[0] is a str; it must be an object."),
        ({"tools": [{"function": {"required": {"a"}}}]}, "extra.tools[0].function.required is a set, which is not JSON."),
        ({"stop": b"x"}, "extra.stop is a bytes, which is not JSON."),
        ({"logit_bias": {("a",): 1}}, "extra.logit_bias has a key that is a tuple; it must be a string."),
        ({"response_format": Said}, "extra.response_format is a ModelMetaclass, which is not JSON."),
        ({"messages": []}, "extra.messages cannot be set here: the call itself sets it."),
        ({"stream": True}, "extra.stream cannot be set here: the call itself sets it."),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_sent_is_named_by_its_path(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Reader().params(given, "extra.")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "tokens", "rest", "media"),
    [
        ("hello, world", 3, 4, set[str]()),
        ("häß", 4, 4, set[str]()),
        (user([{"type": "text", "text": "hello"}, image({"url": PNG * 1000})]), 1, 3008, {"images"}),
        (user([{"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}}]), 0, 3004, {"audio"}),
        (user([{"type": "file", "file": {"file_id": "f"}}]), 0, 3004, {"files"}),
    ],
)
def test_the_pass_measures_what_it_reads(prompt: Any, tokens: int, rest: int, media: set[str]) -> None:
    reader = Reader()
    reader.messages(prompt)
    assert (reader.tokens, reader.rest, reader.media) == (tokens, rest, media)


def test_tags_are_texts() -> None:
    assert texts({BAD: BAD, 1: np.int64(2)}) == {GOOD: GOOD, "1": "2"}


def test_a_megabyte_of_messages_does_not_hold_up_a_gateway() -> None:
    messages = [message for _ in range(100) for message in user("log line ä\n" * 900)]
    began = time.process_time()
    Reader().messages(messages)
    assert time.process_time() - began < 1  # it takes 2 ms
