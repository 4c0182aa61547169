"""The loopback provider does what the other tests believe it does."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import behaviours as b
import httpx
import pytest
from behaviours import Behaviour
from provider import Certificates, Loopback, instance

ASK = {"model": "small", "messages": [{"role": "user", "content": "two words"}]}


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with Loopback() as net:
        yield net


def ask(url: str, *, read: float = 5, **more: Any) -> httpx.Response:
    timeout = httpx.Timeout(5, read=read, connect=0.3)
    return httpx.post(url + "/chat/completions", json={**ASK, **more}, timeout=timeout, trust_env=False)


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_it_answers_and_records_what_was_asked(net: Loopback) -> None:
    server = net.serve(text="three short words")
    answer = ask(server.url).json()
    assert answer["choices"][0]["message"]["content"] == "three short words"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    (request,) = server.completions
    assert (request.method, request.path, request.body) == ("POST", "/v1/chat/completions", ASK)
    assert request.headers["content-type"] == "application/json"


def test_it_streams_word_by_word_and_counts_when_asked(net: Loopback) -> None:
    chunks = events(ask(net.serve().url, stream=True, stream_options={"include_usage": True}))
    *words, last, usage = chunks
    assert [chunk["choices"][0]["delta"]["content"] for chunk in words] == ["", "All ", "is ", "well."]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_it_calls_the_first_tool_until_it_has_the_result(net: Loopback, stream: bool) -> None:
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "read", "parameters": parameters}}]
    answer = ask(net.serve().url, tools=tools, stream=stream)
    message = events(answer)[1]["choices"][0]["delta"] if stream else answer.json()["choices"][0]["message"]
    call = message["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("read", {"path": "text"})
    result = {"role": "tool", "tool_call_id": "call_1", "content": "42"}
    final = ask(net.serve().url, tools=tools, messages=[*ASK["messages"], result]).json()
    assert final["choices"][0]["message"]["content"] == "All is well."


def test_it_fills_a_schema() -> None:
    grade = {"enum": ["low", "high"]}
    step = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}, "grade": grade}}
    steps = {"type": "array", "items": {"$ref": "#/$defs/Step"}, "minItems": 2}
    schema = {"properties": {"steps": steps, "ok": {"type": "boolean"}}, "$defs": {"Step": step}}
    assert instance(schema) == {"steps": [{"n": 3, "grade": "low"}] * 2, "ok": True}


def test_a_script_is_used_up_request_by_request(net: Loopback) -> None:
    server = net.serve(b.HTTP_503, b.limited("1.5"), models=("small", "large"))
    answers = [ask(server.url) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 429, 200]
    assert answers[1].headers["retry-after"] == "1.5"
    server.behaviour = b.HTTP_401_ECHO
    echoed = httpx.get(server.url + "/models", headers={"Authorization": "Bearer k"}, trust_env=False)
    assert echoed.json()["error"]["message"] == "Refused: Bearer k"
    server.behaviour = b.OK
    listed = httpx.get(server.url + "/models", trust_env=False).json()
    assert [model["id"] for model in listed["data"]] == ["small", "large"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "stream", "what"),
    [
        (b.HANG, False, httpx.ReadTimeout),
        (b.HANG, True, httpx.ReadTimeout),
        (b.HANG_IN_BODY, False, httpx.ReadTimeout),
        (b.HANG_IN_BODY, True, httpx.ReadTimeout),
        (b.TRUNCATED, False, json.JSONDecodeError),
        (b.HTML, False, json.JSONDecodeError),
        (b.CUT, False, json.JSONDecodeError),
        (b.TORN, False, httpx.RemoteProtocolError),
        (b.TORN, True, httpx.RemoteProtocolError),
        (Behaviour(tear=0), False, httpx.RemoteProtocolError),
        (b.LENGTH_OVER, False, httpx.RemoteProtocolError),
        (b.LENGTH_OVER, True, httpx.RemoteProtocolError),
        (b.LENGTH_UNDER, False, json.JSONDecodeError),
        (Behaviour(reset=0), False, httpx.ReadError),
        (Behaviour(reset=0.5), False, httpx.ReadError),
        (Behaviour(reset=2.5), True, httpx.ReadError),
        (Behaviour(hang=2, pause=0.05, tear=2), True, httpx.RemoteProtocolError),
    ],
)
def test_a_broken_answer_breaks_as_it_should(
    net: Loopback, how: Behaviour, stream: bool, what: type[Exception]
) -> None:
    url = net.serve(then=how).url
    with pytest.raises(what):
        ask(url, stream=stream, read=0.2).json()


def test_a_clean_cut_has_content_and_no_finish(net: Loopback) -> None:
    with pytest.raises(AssertionError):
        events(ask(net.serve(then=b.CUT).url, stream=True))
    with httpx.stream("POST", net.serve(then=b.CUT).url + "/chat/completions", json={**ASK, "stream": True}) as s:
        text = s.read().decode()
    assert '"content": "All "' in text
    assert '"stop"' not in text
    assert "[DONE]" not in text


def test_one_event_is_no_json_and_the_others_are(net: Loopback) -> None:
    answer = ask(net.serve(then=Behaviour(garble=3)).url, stream=True)
    good: list[Any] = []
    for line in answer.text.split("\n\n")[:-2]:
        with suppress(json.JSONDecodeError):
            good.append(json.loads(line.removeprefix("data: ")))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in good] == ["", "All ", "well.", None]


def test_a_stream_goes_on_after_a_pause_and_may_lack_its_end_marker(net: Loopback) -> None:
    started = time.monotonic()
    answer = ask(net.serve(then=Behaviour(hang=1, pause=0.2, done=False)).url, stream=True)
    assert time.monotonic() - started > 0.2
    assert '"stop"' in answer.text and "[DONE]" not in answer.text


def test_an_error_event_comes_after_content_with_status_200(net: Loopback) -> None:
    answer = ask(net.serve(then=b.SSE_ERROR).url, stream=True)
    assert answer.status_code == 200
    *_, word, failure = events(answer)
    assert word["choices"][0]["delta"]["content"] == "All "
    assert failure["error"]["message"] == "EngineCore died."
    assert ask(net.serve(then=b.SSE_ERROR).url).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_drip_outlives_a_read_timeout(net: Loopback, stream: bool) -> None:
    body = {**ASK, "stream": stream}
    with httpx.stream("POST", net.serve(then=b.DRIP).url + "/chat/completions", json=body, timeout=5) as answer:
        drops = answer.iter_raw()
        assert {next(drops).strip() for _ in range(3)} <= {b"", b": still here"}


def test_no_choices_and_empty_content(net: Loopback) -> None:
    assert ask(net.serve(then=b.NO_CHOICES).url).json()["choices"] == []
    assert ask(net.serve(then=b.EMPTY).url).json()["choices"][0]["message"]["content"] == ""
    (chunk,) = events(ask(net.serve(then=b.NO_CHOICES).url, stream=True))
    assert chunk["choices"] == []


def test_gemini_says_which_limit_and_how_long(net: Loopback) -> None:
    details = ask(net.serve(then=b.gemini_limited("Day", "17s")).url).json()["error"]["details"]
    assert "PerDay" in details[0]["violations"][0]["quotaId"]
    assert details[1]["retryDelay"] == "17s"


def test_addresses_that_refuse_drop_and_do_not_exist(net: Loopback) -> None:
    stopped = net.serve()
    net.stop(stopped)
    for url in (net.refusing(), stopped.url):
        with pytest.raises(httpx.ConnectError, match="refused"):
            ask(url)
    with pytest.raises(httpx.ConnectTimeout):
        ask(net.dropping())
    with pytest.raises(httpx.ConnectError):
        ask("http://nobody.invalid/v1")


def test_tls_needs_the_authority_and_a_server_that_speaks_it(net: Loopback, tmp_path: Path) -> None:
    certificates = Certificates.make(tmp_path)
    server = net.serve(tls=certificates)
    trusting = ssl.create_default_context(cafile=certificates.authority)
    assert httpx.get(server.url + "/models", verify=trusting, trust_env=False).status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(server.url)
    with pytest.raises(httpx.ConnectError, match="SSL"):
        ask(net.serve().url.replace("http:", "https:"))


@pytest.mark.parametrize("how", [b.PROXY_403, b.PROXY_407])
def test_a_proxy_refuses_to_connect(net: Loopback, how: Behaviour) -> None:
    proxy = net.serve(then=how)
    with pytest.raises(httpx.ProxyError, match=str(how.status)):
        httpx.get("https://127.0.0.1:1/v1/models", proxy=proxy.url.removesuffix("/v1"))
    assert [(request.method, request.path) for request in proxy.requests] == [("CONNECT", "127.0.0.1:1")]


def test_leaving_lets_go_of_whatever_hangs() -> None:
    with Loopback() as net, httpx.Client(timeout=30) as client:
        server = net.serve(then=b.HANG_IN_BODY)
        with client.stream("POST", server.url + "/chat/completions", json=ASK) as answer:
            started = time.monotonic()
            net.stop(server)
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()
    assert time.monotonic() - started < 10
