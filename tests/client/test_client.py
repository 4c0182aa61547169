"""The client answers from the first rung that can, says what happened, and is usable from anywhere."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from behaviours import (
    CONTENT_POLICY,
    CUT,
    EMPTY,
    HANG,
    HTTP_400,
    HTTP_401,
    HTTP_429,
    HTTP_500,
    HTTP_503,
    OK,
    SSE_ERROR,
    Behaviour,
    error,
    gemini_limited,
    limited,
)
from conftest import until
from provider import Json, Loopback
from pydantic import BaseModel

from biollm._runtime import ledger
from biollm.client import (
    AllLimitedError,
    BiollmError,
    Client,
    Completion,
    CompletionError,
    ContentPolicyError,
    DeadlineError,
    InterruptedStreamError,
    KeysRefusedError,
    ModelRouter,
    RequestRejectedError,
    StreamChunk,
    StreamRestarted,
    UnknownNameError,
    UsageError,
    get_model_client,
)

Write = Callable[..., Path]


def trail(answer: Completion | CompletionError) -> list[tuple[str, str]]:
    """Return who was asked or passed over, and the outcome."""
    return [(attempt.deployment.split("/")[0], attempt.outcome) for attempt in answer.attempts]


class Diagnosis(BaseModel):
    category: str
    confidence: float


# --- who answers ---------------------------------------------------------------------------------------------------


def test_an_answer_says_who_gave_it_and_what_it_took(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(text="out of memory"))
    answer = get_model_client().complete("Why?")
    assert str(answer) == answer.text == "out of memory"
    assert (answer.provider, answer.account, answer.model, answer.deployment) == (
        "first",
        "default",
        "small",
        "first/small",
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    assert answer.latency_ms > 0
    assert answer.finish_reason == "stop"
    assert trail(answer) == [("first", "ok")]
    assert not answer.degraded
    assert answer.raw.choices[0].message.content == "out of memory"


@pytest.mark.slow
def test_what_rests_rests_for_every_process(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(limited("300")), second=net.serve())
    assert trail(get_model_client().complete("hi")) == [("first", "failed"), ("second", "ok")]
    assert trail(get_model_client().complete("hi")) == [("first", "limited"), ("second", "ok")]
    code = "from biollm.client import *; print([a.outcome for a in get_model_client().complete('x').attempts])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "['limited', 'ok']"
    assert seen.stderr == "", "no warnings at exit"


def test_a_dead_rung_is_passed_at_once(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.refusing(), second=net.serve())
    assert trail(get_model_client().complete("hi")) == [("first", "failed"), ("second", "ok")]


def test_a_living_replica_of_the_same_order_answers(net: Loopback, waterfall: Write) -> None:
    accounts = [{"name": f"a{n}", "env_key": f"{name}_KEY"} for n, name in enumerate(("FIRST", "LAST"))]
    live = net.serve(HTTP_429, text="alive")
    waterfall(first={"base_url": live.url, "accounts": accounts}, last=net.serve(text="last"))
    answer = get_model_client().complete("hi")
    assert (answer.text, len(live.completions)) == ("alive", 2)


def test_each_account_sends_its_own_key_and_a_missing_one_borrows_none(
    net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-openai-0123456789")
    keyless, second = net.serve(), net.serve()
    waterfall(keyless={"base_url": keyless.url, "env_key": "NOT_SET"}, second=second)
    answer = get_model_client().complete("hi")
    assert answer.attempts[0].reason == "no key: set NOT_SET"
    assert keyless.requests == []
    assert second.completions[0].headers["authorization"] == "Bearer sk-planted-second-0123456789"


def test_a_forced_provider_or_model_is_the_only_one_asked(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(text="1"), second={"base_url": net.serve(text="2").url, "models": ["large"]})
    client = get_model_client()
    assert client.complete("hi", provider="second").text == "2"
    assert client.complete("hi", model="large").text == "2"
    mine = get_model_client(provider="second", model="large")
    assert mine.complete("hi").text == "2"
    assert mine.complete("hi", provider="first").text == "1", "the client's own model is not asked for too"


def test_a_model_may_be_named_with_its_provider(net: Loopback, waterfall: Write, biollm: Callable[..., Any]) -> None:
    waterfall(first=net.serve(text="1"), second=net.serve(text="2"))
    client = get_model_client()
    assert client.complete("hi", model="second/small").text == "2"
    assert get_model_client(model="second/small").complete("hi").text == "2"
    assert client.complete("hi", provider="second", model="second/small").text == "2"
    assert next(str(piece) for piece in client.stream("hi", model="second/small")) == "2"
    assert biollm("complete", "hi", "--model", "second/small").out == "2\n"
    assert [each["deployment"] for each in biollm("explain", "--model", "second/small", "--json").json] == [
        "second/small"
    ]
    wrongs: list[Any] = [{"model": "second/smal"}, {"provider": "first", "model": "second/small"}, {"model": "smal"}]
    for wrong in wrongs:
        with pytest.raises(UnknownNameError) as caught:
            client.complete("hi", **wrong)
        assert (caught.value.hint or "").endswith("Known: small.")


def test_an_unknown_name_lists_those_that_exist(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve())
    with pytest.raises(UnknownNameError, match="no provider named 'frist'") as caught:
        get_model_client(provider="frist")
    assert caught.value.hint == "Did you mean 'first'? Known: first."
    with pytest.raises(UnknownNameError, match="no model named 'x'"):
        get_model_client().complete("hi", model="x")


def test_an_unknown_option_is_an_error_that_names_the_nearest(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve())
    with pytest.raises(UsageError) as caught:
        get_model_client().complete("hi", temprature=1)  # type: ignore[call-arg]
    assert caught.value.hint == "Did you mean temperature?"


def test_messages_system_and_parameters_reach_the_provider(net: Loopback, waterfall: Write) -> None:
    server = net.serve()
    waterfall(first=server)
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    get_model_client().complete(history, system="be brief", temperature=0.1, max_tokens=7, extra={"seed": 3})
    body = server.completions[0].body
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.1, 7, 3)


def text(letters: int) -> dict[str, str]:
    return {"type": "text", "text": "x" * letters}


IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * 1_000_000}"}}


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ("x" * 10672, "ready"),
        ("x" * 10680, "unfit"),
        ([text(3000), text(7672)], "ready"),
        ([text(3000), text(7680)], "unfit"),
        ([text(10672), IMAGE], "ready"),
        ([text(10680), IMAGE], "unfit"),
        ([{"type": "text", "text": None}], "ready"),
        (None, "ready"),
    ],
)
def test_a_prompt_is_as_long_as_its_text(net: Loopback, waterfall: Write, content: Any, status: str) -> None:
    """An image's base64 is no text: a model that could answer must not be skipped for it."""
    waterfall({"models": {"small": {"type": "api", "context_length": 1000}}}, first=net.serve())
    [candidate] = get_model_client().explain([{"role": "user", "content": content}])
    assert candidate.status == status


@pytest.mark.slow
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_longer_than_fits_is_asked_for_shorter(
    net: Loopback, waterfall: Write, stream: bool, name: str
) -> None:
    """Agents ask every model for 32,000 tokens; vLLM refuses what its context cannot hold beside the prompt."""
    tight, small, listed, roomy = (net.serve(then=HTTP_500) for _ in range(4))
    models = {"tight": {"type": "api", "context_length": 1000}, "small": {"type": "api", "context_length": 8192}}
    waterfall(
        {"models": models},
        tight={"base_url": tight.url, "models": ["tight"]},
        small=small,
        listed={"base_url": listed.url, "models": ["gpt-4o"]},  # LiteLLM's map knows the length of its answers
        roomy={"base_url": roomy.url, "models": ["roomy"]},
    )
    extra, client = {"extra": {name: 32_000}}, get_model_client()
    with pytest.raises(CompletionError) as caught:
        _ = list(client.stream("x" * 300, **extra)) if stream else client.complete("x" * 300, **extra)
    assert caught.value.attempts[0].reason == "needs about 2076 tokens, its context is 1000"
    assert tight.requests == []
    fits, *rest = (each.requests[0].body[name] for each in (small, listed, roomy))
    assert 7500 < fits < 8100
    assert rest == [16_384, 32_000]


SEES = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_images_rests_nobody_and_the_next_image_goes_elsewhere(
    net: Loopback, waterfall: Write, stream: bool
) -> None:
    refuses = error(400, "The model is not multimodal. Please remove image inputs.")
    blind = net.serve(then=lambda request: refuses if "image_url" in str(request.body) else OK)
    seeing = net.serve(text="a cat")
    name = f"blind{stream:d}"  # a refusal is remembered by name, as long as this process lives
    waterfall(**{name: blind, "seeing": seeing})
    client = get_model_client()

    def ask(prompt: Any) -> str:
        return "".join(map(str, client.stream(prompt) if stream else [client.complete(prompt)]))

    assert (ask(SEES), len(blind.requests)) == ("a cat", 1)
    assert (ask(SEES), len(blind.requests)) == ("a cat", 1)
    assert (ask("hi"), len(seeing.requests)) == ("All is well.", 2)
    assert client.explain(SEES)[0].reason == "refused images before"


CUT_OFF, THOUGHT = Behaviour(text="Once upon", finish="length"), Behaviour(text="", finish="length")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small", "roomy", "wanted", "text", "finish", "trail_"),
    [
        (CUT_OFF, OK, 32_000, "All is well.", "stop", [("small", "failed"), ("roomy", "ok")]),
        (THOUGHT, OK, 32_000, "All is well.", "stop", [("small", "failed"), ("roomy", "ok")]),
        (CUT_OFF, OK, 4000, "Once upon", "length", [("small", "ok")]),  # as wanted
        (CUT_OFF, HTTP_500, 32_000, "Once upon", "length", [("small", "ok"), ("roomy", "failed"), ("roomy", "failed")]),
        (CUT_OFF, THOUGHT, 32_000, "Once upon", "length", [("small", "ok"), ("roomy", "failed")]),
        (CUT_OFF, CUT_OFF, 32_000, "Once upon", "length", [("small", "failed"), ("roomy", "ok")]),
    ],
)
def test_an_answer_cut_for_want_of_room_is_given_only_where_nobody_has_more(
    net: Loopback,
    waterfall: Write,
    small: Behaviour,
    roomy: Behaviour,
    wanted: int,
    text: str,
    finish: str,
    trail_: Any,
) -> None:
    narrow, tiny, wide = net.serve(then=small), net.serve(), net.serve(then=roomy)
    models = {"small": {"type": "api", "context_length": 8192}, "tiny": {"type": "api", "context_length": 4096}}
    waterfall(
        {"models": models},
        small=narrow,
        tiny={"base_url": tiny.url, "models": ["tiny"]},  # has even less room
        roomy={"base_url": wide.url, "models": ["roomy"]},
    )
    answer = get_model_client().complete("hi", max_tokens=wanted, max_retries=2)
    assert (str(answer), answer.finish_reason, trail(answer)) == (text, finish, trail_)
    assert tiny.requests == []
    ledger().flush()
    assert len(list(ledger().history())) == len(narrow.completions) + len(wide.completions)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"litellm_provider": "openrouter"}, {"type": "local"}])
def test_a_developer_message_is_sent_as_a_system_message(
    net: Loopback, waterfall: Write, more: Any, stream: bool
) -> None:
    server = net.serve()
    waterfall(
        {"models": {"small": {"type": more.get("type", "api"), "hf_id": "x/y"}}}, first={"base_url": server.url, **more}
    )
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    client = get_model_client()
    _ = list(client.stream(messages)) if stream else client.complete(messages)
    assert server.completions[0].body["messages"] == [{"role": "system", "content": "be brief"}, messages[1]]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_schema_joins_the_first_message_whatever_its_form(net: Loopback, waterfall: Write, role: str) -> None:
    server = net.serve(text='{"a": 1}')
    waterfall(first=server)
    parts = [{"type": "text", "text": "be brief"}]
    messages = [{"role": role, "content": parts}, {"role": "user", "content": "hi"}]
    assert get_model_client().complete(messages, response_model={"type": "object"}).parsed == {"a": 1}
    first, second = server.requests[0].body["messages"]
    assert (first["role"], first["content"][0], second["role"]) == ("system", parts[0], "user")
    assert "JSON Schema" in first["content"][1]["text"]


def test_an_image_passes_over_who_takes_none(net: Loopback, waterfall: Write) -> None:
    blind, listed, unknown = net.serve(), net.serve(), net.serve(text="a cat")
    waterfall(
        {"models": {"small": {"type": "api", "vision": False}}},
        blind=blind,
        listed={"base_url": listed.url, "models": ["o3-mini"]},  # LiteLLM's map says that it is blind
        unknown={"base_url": unknown.url, "models": ["unheard-of"]},
    )
    answer = get_model_client().complete(SEES)
    assert [attempt.reason for attempt in answer.attempts] == ["does not support images", "does not support images", ""]
    assert (str(answer), blind.requests, listed.requests) == ("a cat", [], [])
    assert get_model_client().complete("hi").provider == "blind"


# --- What cannot be sent -----------------------------------------------------------------------------------------

ODD, READ = "bad \udcff", "bad \ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_lone_surrogates_are_replaced_and_the_request_is_answered(
    net: Loopback, waterfall: Write, state: Path, stream: bool
) -> None:
    server = net.serve()
    waterfall(first=server)
    client = get_model_client(system=ODD, tags={"agent": ODD})
    parts = [{"type": "text", "text": ODD}]
    messages = [
        {"role": "user", "name": ODD, "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [_call("c", ODD)]},
        {"role": "tool", "tool_call_id": "c", "content": ODD},
    ]
    assert "".join(map(str, client.stream(messages) if stream else [client.complete(messages)])) == "All is well."
    body = server.requests[0].body
    assert [message.get("content") for message in body["messages"]] == [READ, [{**parts[0], "text": READ}], None, READ]
    assert (body["messages"][1]["name"], body["messages"][2]["tool_calls"]) == (READ, [_call("c", READ)])
    assert get_model_client().complete("hi").attempts[0].outcome == "ok"


def _call(ident: str, arguments: str) -> dict[str, Any]:
    return {"id": ident, "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_code_to_fill_in_may_hold_lone_surrogates(net: Loopback, waterfall: Write) -> None:
    model = {"type": "local", "hf_id": "x/coder", "capabilities": ["fill-in-middle"], "fim": ["<P>", "<S>", "<M>"]}
    server = net.serve(models=("coder",))
    waterfall({"models": {"coder": model}}, gpu={"type": "local", "base_url": server.url, "models": ["coder"]})
    assert str(get_model_client().fill_in_middle(ODD, ODD)) == "All is well."
    assert server.requests[-1].body["prompt"] == f"<P>{READ}<S>{READ}<M>"


def test_a_log_that_is_not_utf8_is_answered_like_the_other_nineteen(net: Loopback, waterfall: Write) -> None:
    server = net.serve()
    waterfall(first=server)
    logs = ["fine"] * 4 + [b"caf\xe9".decode(errors="surrogateescape")] + ["fine"] * 15
    assert [str(answer) for answer in get_model_client().complete_many(logs)] == ["All is well."] * 20
    assert sorted(request.body["messages"][0]["content"] for request in server.completions)[0] == "caf\ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_holds_no_lone_surrogate(net: Loopback, waterfall: Write, stream: bool) -> None:
    waterfall(first=net.serve(text=ODD))
    client = get_model_client()
    assert "".join(map(str, client.stream("hi") if stream else [client.complete("hi")])) == READ


def test_neither_does_what_is_told_of_a_failure(net: Loopback, waterfall: Write) -> None:
    """SQLite takes none: the ledger would be given up for one in a provider's message."""
    waterfall(first=net.serve(then=Behaviour(fail=1, failure=ODD)), second=net.serve())
    *_, last = get_model_client().stream("hi")
    assert isinstance(last, StreamChunk) and last.completion
    assert READ in last.completion.attempts[0].reason
    ledger().flush()
    assert [record.outcome for record in ledger().history()] == ["failed", "ok"]


def test_numbers_of_numpy_are_numbers(net: Loopback, waterfall: Write) -> None:
    import numpy as np

    server = net.serve()
    waterfall(first=server)
    options = {"max_tokens": np.int64(100), "temperature": np.float32(0.5), "timeout": np.float64(9)}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"maximum": np.int8(3)}}}]
    get_model_client().complete("hi", tools=tools, extra={"seed": np.int32(7)}, max_retries=np.int64(1), **options)
    body = server.requests[0].body
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (100, 0.5, 7)
    assert body["tools"][0]["function"]["parameters"]["maximum"] == 3


class Callback(BaseModel):
    """A shape that JSON does not have."""

    call: Callable[[], None]


UNSENDABLE: list[tuple[Any, dict[str, Any], str]] = [
    ([{"content": "hi"}], {}, "messages[0] has no role"),
    ([{"role": 3, "content": "hi"}], {}, "messages[0] has a role that is an int"),
    ([{"role": "user", "content": b"hi"}], {}, "messages[0].content is a bytes"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, "content[0].image_url is neither"),
    ("hi", {"tools": [{"function": {"required": {"a"}}}]}, "tools[0].function.required is a set"),
    ("hi", {"tools": ["f"]}, "tools[0] is a str"),
    ("hi", {"temperature": float("nan")}, "temperature is nan"),
    ("hi", {"deadline": float("nan")}, "deadline is nan"),
    ("hi", {"max_tokens": "many"}, "max_tokens is 'many'"),
    ("hi", {"extra": {"stop": object()}}, "extra.stop is an object"),
    ("hi", {"extra": {"stream": True}}, "extra.stream cannot be set"),
    ("hi", {"response_model": {"type": "object", "required": {"a"}}}, "response_model.required is a set"),
    ("hi", {"response_model": {"type": "odd"}}, "response_model is no JSON Schema: 'odd' is not valid"),
    ("hi", {"response_model": "Diagnosis"}, "response_model is 'Diagnosis'; it must be a pydantic class"),
    ("hi", {"response_model": Callback}, "response_model has no JSON Schema: Cannot generate a JsonSchema for"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("prompt", "options", "told"), UNSENDABLE)
def test_what_cannot_be_sent_is_the_callers_error_and_rests_nobody(
    net: Loopback, waterfall: Write, prompt: Any, options: Any, told: str, many: bool
) -> None:
    first, second = net.serve(text="from first"), net.serve()
    waterfall(first=first, second=second)
    client = get_model_client()
    with pytest.raises(UsageError) as caught:
        _ = client.complete_many([prompt], **options) if many else client.complete(prompt, **options)
    assert told in str(caught.value)
    assert (first.requests, second.requests) == ([], [])
    assert str(client.complete("hi")) == "from first"


@pytest.mark.slow
def test_what_litellm_cannot_translate_is_the_callers_error_in_each_of_eight_processes(
    net: Loopback, waterfall: Write, state: Path
) -> None:
    part = {"content": {"role": "model", "parts": [{"text": "from first"}]}, "finishReason": "STOP"}
    said = {"candidates": [part], "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 3}}
    first, second = net.serve(then=Behaviour(body=json.dumps(said))), net.serve(text="from second")
    waterfall(first={"base_url": first.url, "litellm_provider": "gemini"}, second=second)
    code = """
        from biollm.client import CompletionError, get_model_client
        client, lost = get_model_client(), {"role": "tool", "tool_call_id": "call_1", "content": "42"}
        try:  # a tool's result without its call
            client.complete([{"role": "user", "content": "hi"}, lost])
        except CompletionError as error:
            print(type(error).__name__, client.complete("hi"))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = [process.communicate(timeout=250)[0].strip() for process in processes]
    assert said == ["RequestRejectedError from first"] * 8
    assert (len(first.requests), len(second.requests)) == (8, 0)
    assert [record.outcome for record in ledger().history()] == ["ok"] * 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("weights", "degraded", "told"),
    [
        (False, False, "No model can be started on the cluster"),
        (True, False, "There is no scontrol on this machine"),
        (True, True, "There is no scontrol on this machine"),  # the embedded model might have answered
    ],
)
def test_a_server_that_cannot_be_started_is_why_nobody_answers(
    waterfall: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: bool,
    degraded: bool,
    told: str,
    stream: bool,
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bin/vllm", *(("config.json", "model.safetensors") if weights else ())):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", "/nowhere")
    own = {"type": "local", "path": str(tmp_path), "gpus_required": 1}
    cluster = {"run_dir": str(tmp_path / "run"), "environment": {"venv": str(tmp_path)}}
    waterfall({"models": {"own": own}, "cluster": cluster}, mine={"type": "local", "models": ["own"]})
    client = get_model_client(start_local=True, allow_degraded=degraded)
    with pytest.raises(BiollmError, match=told):
        list(client.stream("hi")) if stream else client.complete("hi")


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_content_policy_starts_no_server(net: Loopback, waterfall: Write, stream: bool) -> None:
    waterfall(first=net.serve(then=CONTENT_POLICY))
    client = get_model_client(start_local=True, allow_degraded=True)
    with pytest.raises(ContentPolicyError):
        list(client.stream("hi")) if stream else client.complete("hi")


# --- what rests, what repeats, what ends ---------------------------------------------------------------------------


def test_retry_after_cools_the_account_with_all_its_models(net: Loopback, waterfall: Write) -> None:
    server = net.serve(limited("30"))
    first = {"base_url": server.url, "models": ["small", "large"], "rate_limit": "100/min"}
    waterfall(first=first, last=net.serve())
    assert trail(get_model_client().complete("hi")) == [("first", "failed"), ("first", "limited"), ("last", "ok")]
    assert len(server.completions) == 1


def test_where_limits_are_per_model_only_the_model_rests(net: Loopback, waterfall: Write) -> None:
    server = net.serve(gemini_limited("Minute", "30s"), text="large one")
    waterfall(first={"base_url": server.url, "models": ["small", "large"], "limits_per": "model"})
    answer = get_model_client().complete("hi")
    assert (answer.model, answer.text) == ("large", "large one")


def test_a_rate_limit_is_honoured_before_anything_is_sent(net: Loopback, waterfall: Write) -> None:
    server = net.serve()
    waterfall(first={"base_url": server.url, "rate_limit": "2/min"}, second=net.serve(text="second"))
    client = get_model_client()
    assert [client.complete("hi").provider for _ in range(4)] == ["first", "first", "second", "second"]
    assert len(server.completions) == 2


def test_when_all_are_limited_the_error_says_when_to_come_back(net: Loopback, waterfall: Write) -> None:
    waterfall(first={"base_url": net.serve().url, "rate_limit": "1/min"})
    client = get_model_client()
    client.complete("hi")
    with pytest.raises(AllLimitedError) as caught:
        client.complete("hi")
    assert 50 < caught.value.retry_after <= 62
    assert trail(caught.value) == [("first", "limited")]


def test_a_token_budget_counts_what_was_used(net: Loopback, waterfall: Write) -> None:
    waterfall(first={"base_url": net.serve().url, "token_budget": "1/day"}, second=net.serve())
    client = get_model_client()
    assert [client.complete("hi").provider for _ in range(2)] == ["first", "second"]


def test_a_request_that_every_deployment_rejects_is_an_error_of_its_own(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(HTTP_400), second=net.serve(HTTP_400))
    with pytest.raises(RequestRejectedError, match="temperature") as caught:
        get_model_client().complete("hi")
    assert trail(caught.value) == [("first", "failed"), ("second", "failed")]


def test_refused_keys_are_an_error_of_their_own(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(HTTP_401), second={"base_url": net.serve().url, "env_key": "NOT_SET"})
    with pytest.raises(KeysRefusedError, match="NOT_SET"):
        get_model_client().complete("hi")


def test_a_refused_key_rests_until_it_changes(net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    server = net.serve(HTTP_401)
    waterfall(first=server, last=net.serve())
    assert trail(get_model_client().complete("hi")) == [("first", "failed"), ("last", "ok")]
    assert trail(get_model_client().complete("hi")) == [("first", "refused"), ("last", "ok")]
    monkeypatch.setenv("FIRST_KEY", "sk-planted-first-new-key")
    assert get_model_client().complete("hi").provider == "first"


def test_a_key_that_one_address_refused_is_sent_to_another(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(then=HTTP_401))
    with pytest.raises(KeysRefusedError):
        get_model_client().complete("hi")
    waterfall(first=net.serve())
    assert get_model_client().complete("hi").provider == "first"


def test_health_ends_the_cooldown_of_a_key_that_is_accepted_again(
    net: Loopback, waterfall: Write, biollm: Callable[..., Any]
) -> None:
    waterfall(first=net.serve(HTTP_401))
    with pytest.raises(KeysRefusedError):
        get_model_client().complete("hi")
    assert biollm("health").code == 0
    ledger().flush()
    assert get_model_client().complete("hi").provider == "first"


def test_a_key_file_is_read_again_after_a_401(net: Loopback, waterfall: Write, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("old-key-0123456789")
    file.chmod(0o600)
    server = net.serve(text="fine")
    waterfall(first={"base_url": server.url, "key_file": str(file)}, last=net.serve(text="last"))
    client = get_model_client()
    client.complete("hi")
    file.write_text("new-key-0123456789")
    server.script.append(HTTP_401)
    assert client.complete("hi").text == "fine"
    assert [r.headers["authorization"][7:10] for r in server.completions] == ["old", "old", "new"]


@pytest.mark.slow
def test_further_passes_wait_for_the_soonest_that_frees(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(limited("0.2"), text="at last"), second=net.serve(limited("300")))
    answer = ModelRouter().complete(prompt="hi", fallback=True, max_retries=3)
    assert trail(answer) == [("first", "failed"), ("second", "failed"), ("first", "ok")]


@pytest.mark.slow
def test_without_fallback_the_first_is_asked_alone_and_repeated(net: Loopback, waterfall: Write) -> None:
    first, second = net.serve(limited("0.1"), EMPTY, text="third time"), net.serve()
    waterfall(first=first, second=second)
    assert get_model_client().complete("hi", fallback=False, max_retries=2).text == "third time"
    assert second.requests == []


def test_without_fallback_its_own_error_is_raised(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(then=HTTP_503), second=net.serve())
    with pytest.raises(CompletionError, match="The engine is overloaded") as caught:
        get_model_client().complete("hi", fallback=False)
    assert (trail(caught.value), caught.value.attempts[0].status) == ([("first", "failed")], 503)


def test_a_short_timeout_of_the_callers_own_cools_nothing(net: Loopback, waterfall: Write) -> None:
    first = net.serve(HANG, text="slow but fine")
    waterfall(first=first, second=net.serve(text="second"))
    client = get_model_client()
    assert client.complete("warm", provider="second").text == "second"
    assert client.complete("hi", timeout=1).text == "second"
    assert client.complete("hi").text == "slow but fine"


def test_a_deadline_bounds_the_whole_call(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(then=HANG))
    with pytest.raises(DeadlineError, match=r"0\.3 s"):
        get_model_client().complete("hi", deadline=0.3)


@pytest.mark.slow
def test_a_host_that_drops_packets_costs_three_seconds_once(net: Loopback, waterfall: Write) -> None:
    dropping = {"base_url": net.dropping(), "litellm_provider": "hosted_vllm"}
    waterfall(first=dropping, second=net.serve())
    client = get_model_client()
    first = client.complete("hi")
    assert first.attempts[0].reason == "127.0.0.1: no connection within 3 s (a firewall?)"
    assert 2900 < first.attempts[0].ms < 10_000
    assert client.complete("hi").attempts[0].outcome == "cooling"


# --- data, degraded, capabilities ----------------------------------------------------------------------------------


def test_local_only_sends_nothing_elsewhere(net: Loopback, waterfall: Write) -> None:
    near = net.serve(text="near")
    waterfall(far={"base_url": "https://far.invalid/v1"}, near=near)
    answer = get_model_client().complete("hi", local_only=True)
    assert (answer.text, trail(answer)) == ("near", [("far", "skipped"), ("near", "ok")])


def test_local_requests_stay_off_the_proxy(net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = net.serve()
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    waterfall(near=net.serve(text="near"))
    assert (get_model_client().complete("hi").text, proxy.requests) == ("near", [])


@pytest.mark.parametrize("how", ["environment", "configuration", "client"])
def test_under_a_local_only_policy_cloud_deployments_are_not_even_built(
    net: Loopback, waterfall: Write, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    waterfall(
        {"data_policy": "local_only"} if how == "configuration" else {}, far={"base_url": "https://far.invalid/v1"}
    )
    if how == "environment":
        monkeypatch.setenv("BIOLLM_LOCAL_ONLY", "1")
    client = get_model_client(**({"local_only": True} if how == "client" else {}))
    with pytest.raises(CompletionError) as caught:
        client.complete("hi", local_only=False)
    assert caught.value.attempts == ()


@pytest.mark.parametrize(("options", "answers"), [({}, "free"), ({"data_policy": "no_training"}, "paid")])
def test_a_calls_data_policy_tightens_it(net: Loopback, waterfall: Write, options: Any, answers: str) -> None:
    waterfall(free={"base_url": net.serve().url, "trains_on_prompts": True}, paid=net.serve())
    assert get_model_client().complete("hi", **options).provider == answers


def test_a_calls_data_policy_never_loosens_it(net: Loopback, waterfall: Write) -> None:
    waterfall({"data_policy": "no_training"}, free={"base_url": net.serve().url, "trains_on_prompts": True})
    with pytest.raises(CompletionError, match="may train on prompts"):
        get_model_client().complete("hi", data_policy="any")


def test_an_unknown_data_policy_names_the_known_ones(net: Loopback, waterfall: Write) -> None:
    waterfall(one=net.serve())
    with pytest.raises(UsageError, match="any, no_training, local_only"):
        get_model_client().complete("hi", data_policy=cast("Any", "none"))


def test_a_stream_has_one_choice(net: Loopback, waterfall: Write) -> None:
    waterfall(one=net.serve())
    with pytest.raises(UsageError, match="n must be 1"):
        get_model_client().stream("hi", extra={"n": 2})


def test_no_training_leaves_out_who_may_train(net: Loopback, waterfall: Write) -> None:
    free = net.serve()
    waterfall({"data_policy": "no_training"}, free={"base_url": free.url, "trains_on_prompts": True}, paid=net.serve())
    assert trail(get_model_client().complete("hi")) == [("free", "skipped"), ("paid", "ok")]
    assert free.requests == []


def test_rungs_that_lack_what_a_request_needs_are_skipped_unsent(net: Loopback, waterfall: Write) -> None:
    first = net.serve()
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    waterfall(first={"base_url": first.url, "tools": False}, second=net.serve())
    answer = get_model_client().complete("hi", tools=[tool])
    assert (answer.provider, first.requests) == ("second", [])
    assert answer.tool_calls[0]["function"]["name"] == "look"


# --- structured answers --------------------------------------------------------------------------------------------

GOOD, BAD = '{"category": "memory", "confidence": 0.9}', '{"category": "memory"}'


def says(*texts: str) -> Callable[[Json], Json]:
    """Answer with one text after the other."""
    queue = list(texts)
    return lambda body: {"role": "assistant", "content": queue.pop(0) if len(queue) > 1 else queue[0]}


def test_the_schema_is_sent_where_the_deployment_takes_one(net: Loopback, waterfall: Write) -> None:
    server = net.serve(answer=says(GOOD))
    waterfall(first={"base_url": server.url, "json_schema": True})
    answer = get_model_client().complete("Why?", response_model=Diagnosis)
    assert answer.parsed == Diagnosis(category="memory", confidence=0.9)
    sent = server.completions[0].body
    assert sent["response_format"]["json_schema"]["schema"] == Diagnosis.model_json_schema()
    assert len(sent["messages"]) == 1


def test_and_put_in_the_prompt_where_not(net: Loopback, waterfall: Write) -> None:
    server = net.serve(answer=says(f"Here it is:\n```json\n{GOOD}\n```"))
    waterfall(first={"base_url": server.url, "json_schema": False})
    answer = get_model_client().complete("Why?", system="be kind", response_model=Diagnosis)
    assert answer.parsed == Diagnosis(category="memory", confidence=0.9)
    sent = server.completions[0].body
    assert "response_format" not in sent
    assert [m["role"] for m in sent["messages"]] == ["system", "user"]
    assert sent["messages"][0]["content"].startswith("be kind")
    assert "confidence" in sent["messages"][0]["content"]


def test_a_wrong_shape_is_repaired_once(net: Loopback, waterfall: Write) -> None:
    server = net.serve(answer=says(BAD, GOOD))
    waterfall(first=server)
    assert get_model_client().complete("Why?", response_model=Diagnosis).parsed.confidence == 0.9
    assert "confidence" in server.completions[1].body["messages"][-1]["content"]


def test_then_the_next_rung_is_asked(net: Loopback, waterfall: Write) -> None:
    first = net.serve(answer=says(BAD))
    waterfall(first=first, second=net.serve(answer=says(GOOD)))
    answer = get_model_client().complete("Why?", response_model=Diagnosis)
    assert (answer.provider, len(first.completions)) == ("second", 2)


def test_a_json_schema_gives_plain_data(net: Loopback, waterfall: Write) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    waterfall(first=net.serve(answer=says('{"n": "x"}', '{"n": 3}')))
    assert get_model_client().complete("?", response_model=schema).parsed == {"n": 3}


# --- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_yields_text_and_ends_with_the_completion(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(text="All is well."))
    pieces = list(get_model_client().stream("hi"))
    assert "".join(map(str, pieces)) == "All is well."
    last = pieces[-1]
    assert not isinstance(last, StreamRestarted)
    assert last.completion is not None
    assert (last.completion.text, last.completion.finish_reason) == ("All is well.", "stop")
    assert last.completion.usage.completion_tokens > 0


@pytest.mark.slow
def test_a_long_stream_keeps_few_of_its_chunks(net: Loopback, waterfall: Write) -> None:
    text = " ".join(map(str, range(1000)))
    waterfall(first=net.serve(text=text))
    most, pieces = 0, list[Any]()
    for piece in get_model_client().stream("hi"):
        pieces.append(piece)
        if len(pieces) % 250 == 0:
            most = max(most, sum(type(each).__name__ == "ModelResponseStream" for each in gc.get_objects()))
    last = pieces[-1]
    assert isinstance(last, StreamChunk) and last.completion
    assert last.completion.raw.choices[0].message.content == text
    assert 0 < most < 200


def test_a_stream_that_dies_before_its_first_content_moves_on_unseen(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(then=HTTP_500), second=net.serve(text="fine"))
    assert "".join(map(str, get_model_client().stream("hi"))) == "fine"


@pytest.mark.parametrize("fault", [CUT, SSE_ERROR], ids=["cut", "error event"])
def test_a_broken_stream_raises_with_its_partial_text(net: Loopback, waterfall: Write, fault: Any) -> None:
    waterfall(first=net.serve(then=fault, text="one two three four five"), second=net.serve())
    pieces: list[str] = []
    with pytest.raises(InterruptedStreamError) as caught:
        pieces.extend(str(piece) for piece in get_model_client().stream("hi"))
    assert caught.value.partial == "".join(pieces) != ""


def test_or_starts_again_on_the_next_rung_and_says_so(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(then=CUT, text="one two three four"), second=net.serve(text="whole"))
    pieces = list(get_model_client().stream("hi", on_interrupt="restart"))
    (event,) = [piece for piece in pieces if isinstance(piece, StreamRestarted)]
    assert (str(event), event.attempt.deployment) == ("", "first/small")
    assert "".join(map(str, pieces[pieces.index(event) :])) == "whole"


def test_leaving_a_stream_early_ends_the_request(net: Loopback, waterfall: Write, state: Path) -> None:
    waterfall(first=net.serve(text="one two three four five six"))
    client = get_model_client()
    for _ in client.stream("hi"):
        break
    assert client.complete("hi").text


def test_a_stream_takes_no_response_model(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve())
    with pytest.raises(UsageError, match="no response_model"):
        get_model_client().stream("hi", response_model=Diagnosis)


# --- from everywhere -----------------------------------------------------------------------------------------------


def test_async_over_several_event_loops_and_inside_a_running_one(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(text="fine"))
    client = get_model_client()

    async def both() -> tuple[str, str, str]:
        streamed = "".join([str(piece) async for piece in client.astream("hi")])
        return (await client.acomplete("hi")).text, streamed, client.complete("sync inside a loop").text

    for _ in range(2):
        assert asyncio.run(both()) == ("fine", "fine", "fine")


def test_many_are_answered_in_order_with_bounded_concurrency(net: Loopback, waterfall: Write) -> None:
    server = net.serve(answer=lambda body: {"role": "assistant", "content": body["messages"][-1]["content"].upper()})
    waterfall(first=server)
    seen: list[tuple[int, int]] = []
    answers = get_model_client().complete_many(
        list("abcde"), concurrency=2, progress=lambda done, all: seen.append((done, all))
    )
    assert [str(answer) for answer in answers] == list("ABCDE")
    assert sorted(seen) == [(n, 5) for n in range(1, 6)]
    assert server.connections <= 4, "two requests at once, and a probe beside the first of each"


def test_many_return_errors_in_their_place(net: Loopback, waterfall: Write) -> None:
    waterfall(first={"base_url": net.serve().url, "rate_limit": "1/min"})
    first, second = get_model_client().complete_many(["a", "b"], concurrency=1)
    assert isinstance(first, Completion)
    assert isinstance(second, AllLimitedError)


def bounded(call: Callable[[], Any], seconds: float = 10) -> Any:
    """Return what a call returns or raises; one that hangs is a failure."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(seconds)


@pytest.mark.parametrize("method", [Client.complete, lambda client, text: list(client.stream(text)), Client.explain])
@pytest.mark.parametrize("callback", ["on_send", "progress"])
def test_a_callback_that_calls_a_blocking_method_is_told_so(
    net: Loopback, waterfall: Write, callback: str, method: Callable[[Client, str], Any]
) -> None:
    waterfall(first=net.serve())
    client = get_model_client()
    with pytest.raises(UsageError, match="would wait for itself"):
        bounded(lambda: client.complete_many(["a"], **{callback: lambda *_: method(client, "b")}))
    assert client.complete("hi").provider == "first", "what a callback raises is no fault of the provider"


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("callback", ["on_send", "progress"])
def test_many_are_cancelled_when_a_callback_raises(
    net: Loopback, waterfall: Write, callback: str, error: type[BaseException]
) -> None:
    server = net.serve(Behaviour(), then=HANG)
    waterfall(first=server)
    calls: list[object] = []

    def fails(*_: object) -> None:
        calls.append(_)
        if callback == "progress" or len(calls) == 3:
            raise error

    with pytest.raises(error):
        bounded(lambda: get_model_client().complete_many(list("abc"), concurrency=3, **{callback: fails}))
    until(lambda: len(server.tasks) < 2)  # the connection of the answer is kept, those of the other requests are closed


def test_threads_share_one_router(net: Loopback, waterfall: Write) -> None:
    waterfall(first={"base_url": net.serve().url, "rate_limit": "10/min"}, second=net.serve())
    client, answers = get_model_client(), []
    threads = [threading.Thread(target=lambda: answers.append(client.complete("hi").provider)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    assert (answers.count("first"), answers.count("second")) == (10, 10)


def _in_a_fork(queue: Any) -> None:
    queue.put(get_model_client().complete("hi").text)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_gets_a_loop_of_its_own_and_writes_what_waits_when_it_ends(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(text="fine"))
    assert get_model_client().complete("hi").text == "fine"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_fork, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == "fine"
    child.join()
    ledger().flush()
    assert len(list(ledger().history())) == 2


def test_cancelling_cancels_the_request(net: Loopback, waterfall: Write) -> None:
    server = net.serve(then=HANG)
    waterfall(first=server)

    async def main() -> None:
        task = asyncio.create_task(get_model_client().acomplete("hi"))
        while not server.completions:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while server.tasks:  # the connection goes away
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_reload_sees_a_changed_file(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(text="old"))
    client = get_model_client()
    assert client.complete("hi").text == "old"
    waterfall(first=net.serve(text="new"))
    assert client.complete("hi").text == "old"
    client.reload()
    assert client.complete("hi").text == "new"


def test_each_client_keeps_the_configuration_it_was_made_with(net: Loopback, waterfall: Write) -> None:
    waterfall(first=net.serve(text="old"))
    old = get_model_client()
    waterfall(first=net.serve(text="new"))
    new = get_model_client()
    assert [old.complete("hi").text, new.complete("hi").text] == ["old", "new"]
    assert [new.complete("hi").text, old.complete("hi").text] == ["new", "old"]


def test_a_request_under_way_survives_a_reload(net: Loopback, waterfall: Write) -> None:
    go = threading.Event()
    waterfall(first=net.serve(answer=lambda _body: go.wait(10) and {"role": "assistant", "content": "old"}))
    client = get_model_client()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.complete, "hi")
        for _ in range(12):
            client.reload()
        go.set()
        assert waiting.result(10).text == "old"


@pytest.mark.slow
def test_a_long_run_keeps_few_connections_open(
    net: Loopback, waterfall: Write, caplog: pytest.LogCaptureFixture
) -> None:
    server = net.serve()
    waterfall(first=server, second=server)
    client = get_model_client(provider="first")
    assert client.complete("hi").provider == "first"
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(250):  # LiteLLM keeps a client for each timeout, and 200 of them
        assert client.complete("hi", timeout=20 + number / 100, provider=("first", "second")[number % 2]).text
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 20
    gc.collect()
    assert not [message for message in caplog.messages if "Unclosed" in message]


@pytest.mark.slow
def test_configurations_that_nobody_uses_are_forgotten(net: Loopback, waterfall: Write) -> None:
    from biollm.routing.waterfall import Waterfall

    server, begun = net.serve(), len(cast("Any", sys.modules["litellm"])._async_success_callback)
    for number in range(12):
        waterfall({"routing": {"timeout": 30 + number}}, first=server)
        assert get_model_client().complete("hi").provider == "first"
        assert get_model_client().complete("hi").provider == "first"
    gc.collect()
    assert sum(isinstance(each, Waterfall) for each in gc.get_objects()) <= 9
    assert len(cast("Any", sys.modules["litellm"])._async_success_callback) - begun <= 9


def test_as_a_context_manager_what_was_done_is_on_disk_at_the_end(net: Loopback, waterfall: Write, state: Path) -> None:
    from biollm.ledger import Ledger

    waterfall(first=net.serve())
    with Client(tags={"agent": "tester"}) as client:
        client.complete("hi", tags={"step": "1"})
    (record,) = Ledger(state).history()
    assert (record.provider, record.outcome, record.tags) == ("first", "ok", {"step": "1"})


@pytest.mark.slow
def test_the_host_programs_litellm_notices_nothing(net: Loopback, waterfall: Write) -> None:
    server = net.serve(text="ours")
    waterfall(first=server)
    host = net.serve(text="theirs")
    code = f"""
        import litellm, logging, os, json
        from litellm.integrations.custom_logger import CustomLogger
        seen = []
        class Theirs(CustomLogger):
            async def async_log_success_event(self, kwargs, response_obj, start_time, end_time): seen.append("async")
            def log_success_event(self, kwargs, response_obj, start_time, end_time): seen.append("sync")
        theirs = Theirs()
        litellm.callbacks = [theirs]
        settings = (litellm.drop_params, litellm.num_retries, litellm.set_verbose)
        level = logging.getLogger().level, logging.getLogger().handlers[:]
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "x")  # LiteLLM sets it where it counts tokens
        environment = dict(os.environ)
        from biollm.client import get_model_client
        assert get_model_client().complete("hi").text == "ours"
        assert "".join(map(str, get_model_client().stream("hi"))) == "ours"
        assert seen == [], seen
        assert theirs in litellm.callbacks
        assert settings == (litellm.drop_params, litellm.num_retries, litellm.set_verbose)
        assert level == (logging.getLogger().level, logging.getLogger().handlers)
        os.environ["TIKTOKEN_CACHE_DIR"] = environment["TIKTOKEN_CACHE_DIR"]
        assert environment == dict(os.environ)
        answer = litellm.completion("openai/m", messages=[{{"role": "user", "content": "x"}}], api_key="k", api_base="{host.url}")
        assert answer.choices[0].message.content == "theirs"
        assert seen == ["sync"], seen
    """
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # the host's own import of LiteLLM
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, env=environment
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr


@pytest.mark.slow
def test_processes_share_a_limit_exactly(net: Loopback, waterfall: Write) -> None:
    server = net.serve()
    waterfall(first={"base_url": server.url, "rate_limit": "15/min"}, second=net.serve())
    code = """
        import asyncio
        from biollm.client import get_model_client
        client = get_model_client()
        for _ in range(5): client.complete("sync")
        asyncio.run(client.acomplete_many(["async"] * 5))
        print("ok")
    """
    environment = os.environ | {"PYTHONWARNINGS": "error::ResourceWarning"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(3)
    ]
    began = time.time()
    assert [process.communicate()[0].strip() for process in processes] == ["ok"] * 3
    assert time.time() - began < 60, "all within one window, or the count below means nothing"
    assert len(server.completions) == 15


def test_keys_show_nowhere(net: Loopback, waterfall: Write, caplog: pytest.LogCaptureFixture) -> None:
    from behaviours import HTTP_401_ECHO

    waterfall(first=net.serve(then=HTTP_401_ECHO))
    client = get_model_client()
    with caplog.at_level("DEBUG"), pytest.raises(CompletionError) as caught:
        client.complete("hi")
    shown = json.dumps([str(caught.value), repr(caught.value), repr(caught.value.attempts), repr(client), caplog.text])
    assert "sk-planted" not in shown
    assert "***" in str(caught.value)


# --- servers of our own at a fixed address -------------------------------------------------------------------------


def test_a_fixed_server_serves_the_models_that_it_lists(net: Loopback, waterfall: Write) -> None:
    server = net.serve(models=("large",), text="large one")
    waterfall(
        {"models": {name: {"type": "local", "hf_id": f"lab/{name}"} for name in ("small", "large")}},
        gpu={"type": "local", "base_url": server.url, "models": ["small", "large"]},
    )
    answer = get_model_client().complete("hi")
    assert (answer.model, answer.attempts[0].reason) == ("large", f"the server at {server.url} serves large")
    assert [request.body["model"] for request in server.completions] == ["large"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_a_server_of_another_user_gets_nothing(net: Loopback, waterfall: Write) -> None:
    code = "import os, socket, time; os.setuid(65534); s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout
    url = f"http://127.0.0.1:{other.stdout.readline().strip()}/v1"
    waterfall(
        {"models": {"small": {"type": "local", "hf_id": "lab/small"}}},
        gpu={"type": "local", "base_url": url},
        last=net.serve(),
    )
    try:
        answer = get_model_client().complete("hi")
        assert answer.provider == "last"
        assert "belongs to another user" in answer.attempts[0].reason
    finally:
        other.kill()
        other.wait()


def test_code_is_filled_in_through_the_models_own_tokens(net: Loopback, waterfall: Write) -> None:
    server = net.serve(text="return a + b")
    models = {"small": {"type": "local", "hf_id": "lab/small", "fim": ["<pre>", "<suf>", "<mid>"]}}
    waterfall({"models": models}, cloud=net.serve(), gpu={"type": "local", "base_url": server.url})
    answer = get_model_client().fill_in_middle("def add(a, b):\n    ", "\n\nadd(1, 2)", max_tokens=20)
    assert answer.text == "return a + b"
    assert trail(answer) == [("cloud", "skipped"), ("gpu", "ok")]
    (request,) = [request for request in server.requests if request.path.endswith("/completions")]
    assert request.body["prompt"] == "<pre>def add(a, b):\n    <suf>\n\nadd(1, 2)<mid>"
