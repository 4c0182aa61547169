"""What an OpenAI client sees of the waterfall: JSON, events, errors and headers, over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from behaviours import HTTP_400, HTTP_401, HTTP_500, Behaviour, limited
from conftest import until
from provider import Loopback

from biollm._runtime import ledger
from biollm.client import Client
from biollm.gateway import app as gateway
from biollm.gateway import openai_api

CHAT = "/v1/chat/completions"
HI = {"model": "biollm", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"path": {"type": "string"}}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WANTED = {"type": "json_schema", "json_schema": {"name": "pair", "strict": True, "schema": SCHEMA}}


def events(response: httpx.Response) -> list[Any]:
    """Return the data of a stream's events."""
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def said(response: httpx.Response) -> str:
    """Return the text of a stream."""
    chunks = [each for each in events(response) if each != "[DONE]" and each.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_an_answer_says_who_gave_it_and_what_was_tried(net: Loopback, serve: Any) -> None:
    second = net.serve(text="from second")
    client = serve(first=net.serve(then=HTTP_500), second=second)
    answer = client.post(CHAT, json={**HI, "seed": 7, "stop": ["x"], "top_k": 3, "max_completion_tokens": 9})
    body = answer.json()
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "from second"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert (body["object"], body["model"]) == ("chat.completion", "second/small")
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"] > 0
    assert [each["outcome"] for each in body["biollm"]["attempts"]] == ["failed", "failed", "ok"]
    names = ("deployment", "attempts", "policy", "degraded")
    headers = [answer.headers[f"x-biollm-{name}"] for name in names]
    assert headers == ["second/small", "first/small=failed, first/small=failed, second/small=ok", "any", "false"]
    sent = second.completions[-1].body
    assert {"seed": 7, "stop": ["x"], "top_k": 3, "max_tokens": 9}.items() <= sent.items()


def test_a_body_cannot_say_where_the_key_goes(net: Loopback, serve: Any) -> None:
    server, thief = net.serve(), net.serve()
    answer = serve(first=server).post(CHAT, json={**HI, "api_base": thief.url, "base_url": thief.url, "api_key": "x"})
    assert answer.status_code == 200
    assert (len(server.completions), thief.connections) == (1, 0)
    assert server.completions[0].headers["authorization"] == "Bearer sk-planted-first-0123456789"


def test_a_stream_has_openais_chunks(net: Loopback, serve: Any) -> None:
    client = serve(first=net.serve(text="one two three"))
    answer = client.post(CHAT, json={**HI, "stream": True})
    *chunks, done = events(answer)
    assert done == "[DONE]"
    assert said(answer) == "one two three"
    assert len(chunks) > 3
    assert [each["choices"][0]["finish_reason"] for each in chunks] == [*[None] * (len(chunks) - 1), "stop"]
    assert [each["choices"][0]["delta"].get("role") for each in chunks[:2]] == ["assistant", None]
    assert chunks[-1]["biollm"]["deployment"] == answer.headers["x-biollm-deployment"] == "first/small"
    assert not any("usage" in each for each in chunks)


def test_tokens_come_in_a_chunk_of_their_own_when_asked_for(net: Loopback, serve: Any) -> None:
    asked = {**HI, "stream": True, "stream_options": {"include_usage": True}}
    *_, before, usage, done = events(serve(first=net.serve()).post(CHAT, json=asked))
    assert before["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(net: Loopback, serve: Any, stream: bool) -> None:
    answer = serve(first=net.serve()).post(CHAT, json={**HI, "tools": [TOOL], "stream": stream})
    if stream:
        choices = [each["choices"][0] for each in events(answer)[:-1]]
        [call] = next(each["delta"]["tool_calls"] for each in choices if each["delta"].get("tool_calls"))
        assert (call["index"], choices[-1]["finish_reason"]) == (0, "tool_calls")
    else:
        [choice] = answer.json()["choices"]
        [call] = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
    assert call["function"] == {"name": "look", "arguments": '{"path": "text"}'}
    assert (call["id"], call["type"]) == ("call_1", "function")


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_to(net: Loopback, serve: Any, stream: bool) -> None:
    server = net.serve(Behaviour(text='{"a": "x"}'), Behaviour(text='Sure:\n```json\n{"a": 2}\n```'))
    answer = serve(first=server).post(CHAT, json={**HI, "response_format": WANTED, "stream": stream})
    text = said(answer) if stream else answer.json()["choices"][0]["message"]["content"]
    assert json.loads(text) == {"a": 2}
    assert len(server.completions) == 2


def test_several_choices_come_from_one_request(net: Loopback, serve: Any) -> None:
    two = [{"index": at, "message": {"role": "assistant", "content": f"{at}"}, "logprobs": None} for at in (0, 1)]
    logged = {"content": [{"token": "1", "logprob": -0.1, "bytes": [49], "top_logprobs": []}], "refusal": None}
    two = [{**each, "finish_reason": "stop", "logprobs": logged} for each in two]
    given = {"id": "a", "object": "chat.completion", "created": 1, "model": "small", "choices": two}
    server = net.serve(then=Behaviour(body=json.dumps(given)))
    choices = serve(first=server).post(CHAT, json={**HI, "n": 2, "logprobs": True}).json()["choices"]
    assert [each["message"]["content"] for each in choices] == ["0", "1"]
    assert choices[0]["logprobs"]["content"][0]["token"] == "1"
    assert server.completions[0].body["n"] == 2


REFUSALS = {
    "limited": ([limited("7")], 429, "rate_limit_exceeded", "AllLimitedError"),
    "keys": ([HTTP_401], 502, "keys_refused", "KeysRefusedError"),
    "rejected": ([HTTP_400, HTTP_400], 400, "request_rejected", "RequestRejectedError"),
    "broken": ([HTTP_500], 503, "no_answer", "CompletionError"),
    "late": ([Behaviour(hang=0)], 504, "deadline_exceeded", "DeadlineError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_who_gets_no_answer_gets_openais_error(net: Loopback, serve: Any, case: str, stream: bool) -> None:
    hows, status, code, name = REFUSALS[case]
    client = serve(**{f"r{at}": net.serve(then=how) for at, how in enumerate(hows)})
    asked = {**HI, "stream": stream, "biollm": {"deadline": 1 if case == "late" else 30}}
    answer = client.post(CHAT, json=asked)
    if case == "limited":  # the first time it is a failed attempt
        answer = client.post(CHAT, json=asked)
        assert 1 <= int(answer.headers["retry-after"]) <= 7
        assert 0 < answer.json()["error"]["biollm"]["retry_after"] <= 7
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["biollm"]["class"]) == (status, code, name)
    assert error["biollm"]["attempts"][0]["deployment"] == "r0/small"
    assert {"message", "type", "param"} <= error.keys()
    assert answer.headers["x-biollm-attempts"].startswith("r0/small=")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        (CHAT, '{"a": 1,\n oops}', 400, "The body is not JSON. Line 2, column 2: Expecting property name"),
        (CHAT, "", 400, "The body is not JSON. It is empty."),
        (CHAT, [], 400, "must be a JSON object"),
        (CHAT, {"model": "biollm"}, 400, "no messages"),
        (CHAT, {**HI, "messages": []}, 400, "at least one"),
        (CHAT, {**HI, "model": "smal"}, 404, "Did you mean 'small'?"),
        (CHAT, {**HI, "max_tokens": "many"}, 400, "max_tokens has the wrong type: str; it must be a whole number."),
        (CHAT, {**HI, "maxtokens": 5}, 400, "There is no field 'maxtokens'.\nDid you mean max_tokens?"),
        (CHAT, {**HI, "tempreature": 0}, 400, "Did you mean temperature?"),
        (
            CHAT,
            {**HI, "max_completion_tokens": 0},
            400,
            "max_completion_tokens is 0; it must be a whole number of at least 1.",
        ),
        (CHAT, {**HI, "biollm": {"deadline": -5}}, 400, "biollm.deadline is -5; it must be a finite number"),
        (
            "/v1/responses",
            {"input": "hi", "max_output_tokens": "a"},
            400,
            "max_output_tokens is 'a'; it must be a whole",
        ),
        ("/chat/completions", HI, 404, "The path is /v1/chat/completions: the base URL of this client ends in /v1."),
        ("/v1/v1/messages", HI, 404, "The path is /v1/messages: the base URL of this client does not end in /v1."),
        (CHAT, {**HI, "temperature": 99}, 400, "temperature is 99; it must be a number from 0 to 2."),
        (
            CHAT,
            {"messages": [{"role": "usr", "content": "hi"}]},
            400,
            "messages[0].role is 'usr'.\nDid you mean 'user'?",
        ),
        (CHAT, {**HI, "stream": True, "n": 2}, 400, "n must be 1"),
        (CHAT, {**HI, "response_format": {"type": "json_schema"}}, 400, "must be a JSON Schema"),
        (CHAT, {**HI, "response_format": {**WANTED, "json_schema": {"schema": {"type": 1}}}}, 400, "is no JSON Schema"),
        (CHAT, {**HI, "biollm": {"fallbak": True}}, 400, "no option biollm.fallbak"),
        (
            CHAT,
            {**HI, "biollm": {"data_policy": "all"}},
            400,
            "biollm.data_policy is 'all'; it must be one of any, no_training, local_only",
        ),
        (CHAT, {"prompt": "once"}, 400, "/v1/completions"),
        ("/v1/completions", HI, 400, "/v1/chat/completions"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "one text"),
        ("/v1/embeddings", {"input": "hi"}, 404, "Not Found: POST /v1/embeddings"),
    ],
)
def test_what_makes_no_sense_is_told(net: Loopback, serve: Any, path: str, body: Any, status: int, told: str) -> None:
    server = net.serve()
    answer = serve(first=server).post(path, content=body if isinstance(body, str) else json.dumps(body))
    assert (answer.status_code, server.requests) == (status, [])
    assert told in answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"messages": [{"role": 3, "content": "hi"}]}, "messages[0] has a role that is an int"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content is an int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url is neither an http(s) URL",
        ),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"tools": ["f"]}, "tools[0] is a str"),
        ({"top_k": float("inf")}, "extra.extra_body.top_k is inf"),
        ({"biollm": {"deadline": float("nan")}}, "deadline is nan"),
        ({"model": "bad \udcff"}, "There is no model named 'bad "),
    ],
)
def test_what_cannot_be_sent_is_the_callers_error_and_rests_nobody(
    net: Loopback, serve: Any, more: Any, told: str, stream: bool
) -> None:
    server = net.serve()
    client = serve(first=server)
    answer = client.post(CHAT, content=json.dumps({**HI, "stream": stream, **more}))
    error = answer.json()["error"]
    assert (answer.status_code // 100, error["type"], server.requests) == (4, "invalid_request_error", [])
    assert told in error["message"]
    assert client.post(CHAT, json=HI).json()["biollm"]["attempts"][0]["outcome"] == "ok"


def test_lone_surrogates_are_replaced_and_the_request_is_answered(net: Loopback, serve: Any) -> None:
    server = net.serve()
    body = {**HI, "messages": [{"role": "user", "content": "bad \udcff"}], "metadata": {"agent": "bad \udcff"}}
    assert serve(first=server).post(CHAT, content=json.dumps(body)).status_code == 200
    assert server.requests[0].body["messages"][0]["content"] == "bad \ufffd"


EXTENSIONS = """
    add_generation_prompt allowed_token_ids audio bad_words best_of cache_control cache_prompt chat_template_kwargs
    continue_final_message documents enable_thinking grammar guided_choice guided_json guided_regex ignore_eos include
    include_reasoning instructions keep_alive length_penalty max_new_tokens max_output_tokens max_prompt_tokens
    max_reasoning_tokens min_p min_tokens mirostat models n_predict n_probs num_ctx options parallel_tools plugins priority
    prompt_cache_key prompt_cache_retention prompt_logprobs prompt_mode provider random_seed reasoning reasoning_format
    repetition_penalty request_id return_token_ids route safe_prompt safety_identifier search_parameters
    skip_special_tokens stop_sequences stop_token_ids structured_outputs system tfs_z think thinking thinking_budget
    tool_stream top_a top_k transforms truncate_prompt_tokens typical_p usage use_beam_search user_id vllm_xargs
    web_search_options
"""


def test_fields_that_only_some_servers_know_are_passed_on(net: Loopback, serve: Any) -> None:
    server, more = net.serve(), dict.fromkeys(EXTENSIONS.split(), 1)
    assert serve(first=server).post(CHAT, json={**HI, **more}).status_code == 200
    assert server.requests[0].body.items() >= more.items()


def test_tags_that_are_none_are_named(net: Loopback, serve: Any) -> None:
    answer = serve(first=net.serve()).post(CHAT, json=HI, headers={"x-biollm-tags": "agent"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("x-biollm-tags has 'agent', which is not key=value.")


@pytest.mark.parametrize("name", ["x-biollm-policy", "x-biollm-on-interrupt"])
def test_a_header_that_makes_no_sense_is_told(net: Loopback, serve: Any, name: str) -> None:
    server = net.serve()
    answer = serve(first=server).post(CHAT, json=HI, headers={name: "odd"})
    assert (answer.status_code, server.requests) == (400, [])
    assert f"{name} is 'odd'; it must be one of " in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_long_list_of_attempts_is_cut_where_a_header_may_end(net: Loopback, serve: Any) -> None:
    many = {
        "base_url": net.refusing(),
        "models": [f"m{number:07}" for number in range(101)],
    }  # cut after 100 and a space
    models = {name: {"type": "api", "capabilities": ["chat"]} for name in many["models"]}
    answer = serve({"models": models}, p=many).post(CHAT, json={**HI, "biollm": {"capability": "vision"}})
    assert answer.status_code == 400
    attempts = answer.headers["x-biollm-attempts"].split(", ")
    assert (len(attempts), attempts[-1]) == (100, "p/m0000099=skipped")


def test_code_is_filled_in_where_a_local_model_can(net: Loopback, serve: Any) -> None:
    model = {"type": "local", "hf_id": "x/coder", "capabilities": ["fill-in-middle"], "fim": ["<P>", "<S>", "<M>"]}
    server = net.serve(text="return a", models=("coder",))
    local = {"type": "local", "base_url": server.url, "models": ["coder"]}
    client = serve({"models": {"coder": model}}, mine=local)
    answer = client.post("/v1/completions", json={"model": "coder", "prompt": "def f(a):", "suffix": "\nf(1)"})
    assert answer.json()["choices"][0]["text"] == "return a"
    assert server.requests[-1].body["prompt"] == "<P>def f(a):<S>\nf(1)<M>"


def test_a_text_is_continued_by_a_local_server_alone(net: Loopback, serve: Any) -> None:
    """Editors write a model's own tokens into the prompt."""
    cloud, server = net.serve(), net.serve(text="return a", models=("small",))
    model = {"type": "local", "hf_id": "x/small"}
    local = {"type": "local", "base_url": server.url, "models": ["small"]}
    client = serve({"models": {"small": model}}, cloud=cloud, mine=local)
    asked = {"model": "biollm", "prompt": "<P>def f(a):<S>f(1)<M>", "stream": True}
    answer = client.post("/v1/completions", json=asked)
    assert [each["choices"][0]["text"] for each in events(answer)[:-1]] == ["return a", ""]
    assert (server.requests[-1].body["prompt"], cloud.requests) == (asked["prompt"], [])
    error = serve(cloud=cloud).post("/v1/completions", json=asked).json()["error"]
    assert error["biollm"]["attempts"][0]["reason"] == "supports chat messages only, not plain text"


def test_a_stream_that_breaks_ends_with_an_error_and_without_done(net: Loopback, serve: Any) -> None:
    first, second = net.serve(text="one two three four", then=Behaviour(cut=4)), net.serve(text="whole")
    answer = serve(first=first, second=second).post(CHAT, json={**HI, "stream": True})
    *_, last = events(answer)
    assert said(answer).startswith("one")
    assert answer.headers["x-biollm-degraded"] == "false"
    assert last["error"]["code"] == "stream_interrupted"
    assert last["error"]["biollm"]["class"] == "InterruptedStreamError"
    assert not second.requests


@pytest.mark.parametrize("where", ["header", "body"])
def test_a_stream_restarts_unseen_where_asked_to(net: Loopback, serve: Any, where: str) -> None:
    first, second = net.serve(text="one two three four", then=Behaviour(cut=4)), net.serve(text="whole")
    client = serve(first=first, second=second)
    asked = {**HI, "stream": True}
    if where == "header":
        unseen = client.post(CHAT, json=asked, headers={"x-biollm-on-interrupt": "restart"})
    else:
        unseen = client.post(CHAT, json={**asked, "biollm": {"on_interrupt": "restart"}})
    assert {each["model"] for each in events(unseen)[:-1]} == {"second/small"}
    assert (said(unseen), events(unseen)[-1]) == ("whole", "[DONE]")
    assert unseen.headers["x-biollm-attempts"] == "first/small=failed, second/small=ok"


def test_a_restart_takes_back_the_text_so_far(net: Loopback, serve: Any) -> None:
    first, second = net.serve(text="one two three four", then=Behaviour(cut=4)), net.serve(text="whole")
    asked = {**HI, "stream": True, "biollm": {"on_interrupt": "restart"}}
    client = serve(first=first, second=second)
    chunks = events(client.post(CHAT, json=asked, headers={"x-biollm-restarts": "taken"}))
    at = next(at for at, each in enumerate(chunks) if "restarted" in each.get("biollm", ""))
    assert chunks[at]["choices"] == []
    assert chunks[at]["biollm"]["restarted"]["attempt"]["deployment"] == "first/small"
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks[at + 1 : -1]) == "whole"
    named = [each["model"] for each in chunks[:-1]]
    assert (set(named[: at + 1]), set(named[at + 1 :])) == ({"first/small"}, {"second/small"})


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_takes_the_request_along_within_a_second(net: Loopback, serve: Any, stream: bool) -> None:
    server = net.serve(then=Behaviour(hang=3 if stream else 0), text="a b c d e")
    counts: list[int] = []
    client = serve(first=server, touched=counts.append)
    client.post(CHAT, json={**HI, "model": "nobody"})  # LiteLLM is not asked, uvicorn has served
    path = client._transport._pool._uds  # pyright: ignore
    body = json.dumps({**HI, "stream": stream}).encode()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(path)
        raw.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
        until(lambda: server.requests)
        if stream:
            assert b"200 OK" in raw.recv(10_000)
        assert server.tasks
        assert counts[-1] == 1
    assert until(lambda: not server.tasks) < 1
    assert until(lambda: counts[-1] == 0) < 1
    ledger().flush()
    assert [record.outcome for record in ledger().history(None, None)] == ["cancelled"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "extension", "header", "policy", "who"),
    [
        ("biollm", {}, "", "any", "first/small"),
        ("biollm", {}, "no_training", "no_training", "second/small"),
        ("biollm", {"data_policy": "local_only"}, "no_training", "local_only", "third/own"),
        ("biollm-local", {}, "", "local_only", "third/own"),
        ("second/small", {}, "", "any", "second/small"),
        ("own", {}, "", "any", "third/own"),
        ("biollm", {"provider": "second"}, "", "any", "second/small"),
    ],
)
def test_model_and_policy_choose_who_may_answer(
    net: Loopback, serve: Any, model: str, extension: Any, header: str, policy: str, who: str
) -> None:
    far = "https://api.example.invalid/v1"  # a loopback address would be local
    first, second = ({"base_url": far if policy == "local_only" else net.serve().url} for _ in range(2))
    first = {**first, "trains_on_prompts": True}
    third = {"type": "local", "base_url": net.serve(models=("own",)).url, "models": ["own"]}
    own = {"type": "local", "hf_id": "x/own"}
    client = serve({"models": {"own": own}}, first=first, second=second, third=third)
    headers = {"x-biollm-policy": header} if header else {}
    answer = client.post(CHAT, json={**HI, "model": model, "biollm": extension}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert (answer.headers["x-biollm-policy"], answer.headers["x-biollm-deployment"]) == (policy, who)


@pytest.mark.parametrize("name", openai_api._EXTENSION)
def test_a_null_is_an_option_that_was_not_given(net: Loopback, waterfall: Callable[..., Path], name: str) -> None:
    waterfall(first=net.serve())
    body = {**HI, "model": "first/small", "stream": True, "temperature": None}
    for headers in ({}, {"x-biollm-policy": "no_training", "x-biollm-tags": "a=1", "x-biollm-on-interrupt": "restart"}):
        bodies = ({**body, "biollm": ours} for ours in ({}, {name: None}))
        bare, null = (openai_api.read(each, headers, Client().config, {}, chat=True) for each in bodies)
        assert null == bare


def test_tags_are_stored(net: Loopback, serve: Any) -> None:
    client = serve(first=net.serve())
    asked = {**HI, "metadata": {"a": "1"}, "biollm": {"tags": {"c": "3"}}}
    assert client.post(CHAT, json=asked, headers={"x-biollm-tags": "b=2, d=4"}).status_code == 200
    ledger().flush()
    assert [record.tags for record in ledger().history(None, None)] == [{"a": "1", "b": "2", "c": "3", "d": "4"}]


def test_the_models_are_listed(net: Loopback, serve: Any) -> None:
    client = serve(first=net.serve(), second={"base_url": net.serve().url, "models": ["small", "org/large"]})
    data = client.get("/v1/models").json()["data"]
    assert [each["id"] for each in data] == ["biollm", "biollm-local", "small", "org/large"]
    assert next(each for each in data if each["id"] == "small")["owned_by"] == "first,second"
    for name in ("biollm", "org/large", "second/small"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    unknown = client.get("/v1/models/smal")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_the_models_state_their_context(net: Loopback, serve: Any) -> None:
    sizes = {"small": 4096, "large": 65536, "absent": 1_000_000}
    models = {name: {"type": "api", "context_length": size} for name, size in sizes.items()}
    client = serve(
        {"models": models},
        first={"base_url": net.serve().url, "models": ["small", "large"]},
        second={"base_url": net.serve().url, "models": ["absent"], "env_key": "NOT_SET_KEY"},
    )
    data = {each["id"]: each.get("context_length") for each in client.get("/v1/models").json()["data"]}
    assert data == {"biollm": 65536, "biollm-local": 65536, "small": 4096, "large": 65536, "absent": 1_000_000}
    assert client.get("/v1/models/first/small").json()["max_model_len"] == 4096
    assert client.get("/v1/models/first/small").json()["owned_by"] == "first"


def test_it_is_ready_when_a_rung_could_answer(net: Loopback, serve: Any) -> None:
    server = net.serve(then=limited("60"))
    client = serve(first=server)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"ready": True, "first": "first/small"}
    assert not server.requests
    client.post(CHAT, json=HI)
    assert client.get("/ready").status_code == 503


def test_figures_and_the_picture_of_now(net: Loopback, serve: Any) -> None:
    counts: list[int] = []
    client = serve(first=net.serve(), touched=counts.append)
    client.post(CHAT, json=HI)
    ledger().flush()
    assert 'biollm_requests_total{provider="first"' in client.get("/metrics").text
    assert "first/small" in client.get("/").text
    with client.stream("GET", "/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert "first/small" in next(line for line in lines if line.startswith("data: "))
    assert counts == [1, 0]  # a page that is left open is no request


def test_it_runs_on_the_loop_that_asks_too(net: Loopback, waterfall: Callable[..., Path]) -> None:
    from biollm._runtime import background

    waterfall(first=net.serve(text="same loop"))
    transport = httpx.ASGITransport(gateway.app(Client()))

    async def ask() -> list[str]:
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            whole = await client.post(CHAT, json=HI)
            stream = await client.post(CHAT, json={**HI, "stream": True})
            return [whole.json()["choices"][0]["message"]["content"], said(stream)]

    assert asyncio.run_coroutine_threadsafe(ask(), background().loop).result(60) == ["same loop"] * 2


def test_no_caller_learns_which_files_the_host_has(net: Loopback, serve: Any, tmp_path: Path) -> None:
    (file := tmp_path / "a.log").touch()
    client = serve(first=(server := net.serve()))
    for text in (str(file), str(tmp_path / "gone.log")):
        assert client.post(CHAT, json={**HI, "biollm": {"attachments": [text]}}).status_code == 200
        assert text in server.completions[-1].body["messages"][-1]["content"]


ENSEMBLES = [
    # biollm.ensemble, who answered, status, what the error names
    pytest.param(2, ["first/small", "second/small"], 200, "", id="number"),
    pytest.param(["second/small"], ["second/small"], 200, "", id="list"),
    pytest.param({"members": 2, "method": "vote", "quorum": 1}, ["first/small", "second/small"], 200, "", id="object"),
    pytest.param("3", [], 400, "biollm.ensemble has the wrong type: str; it must be a number", id="text"),
    pytest.param({"member": 2}, [], 400, "There is no option biollm.ensemble.member", id="misspelt"),
    pytest.param({"members": True}, [], 400, "biollm.ensemble.members has the wrong type", id="boolean"),
    pytest.param(["nothing"], [], 404, "nothing", id="unknown"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("given", "names", "status", "problem"), ENSEMBLES)
def test_an_ensemble_answers_where_the_body_asks_for_one(
    net: Loopback, serve: Any, given: Any, names: list[str], status: int, problem: str, stream: bool
) -> None:
    client = serve(first=net.serve(text="yes"), second=net.serve(text="Yes"))
    answer = client.post(CHAT, json={**HI, "stream": stream, "biollm": {"ensemble": given}})
    assert answer.status_code == status
    if status != 200:
        assert problem in answer.json()["error"]["message"]
    elif stream:
        assert said(answer).lower() == "yes"
        assert [each["name"] for each in events(answer)[-2]["biollm"]["members"]] == names
    else:
        assert [each["name"] for each in answer.json()["biollm"]["members"]] == names
        assert answer.json()["biollm"]["agreement"] == 1


def test_a_gateway_that_drains_answers_and_sends_clients_elsewhere(net: Loopback, waterfall: Any) -> None:
    waterfall(first=net.serve(text="fine"))
    draining = False
    made = gateway.app(Client(sender="direct"), touched=lambda _: None, draining=lambda: draining)

    async def see() -> list[tuple[int, str | None]]:
        transport = httpx.ASGITransport(made)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found = [await client.post(CHAT, json=HI), await client.get("/health"), await client.get("/ready")]
        return [(each.status_code, each.headers.get("connection")) for each in found]

    assert asyncio.run(see()) == [(200, None), (200, None), (200, None)]
    draining = True
    assert asyncio.run(see()) == [(200, "close"), (503, None), (503, None)]
