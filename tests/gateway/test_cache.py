"""The gateway's cache: a request asks for it, a header states what came of it, and keys share no answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from behaviours import Behaviour
from conftest import Ran
from provider import Loopback, Server

from biollm.client import get_model_client, normalize_log

pytestmark = pytest.mark.slow
Serve = Callable[..., httpx.Client]
ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "why?"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "why?"}], "max_tokens": 99},
    "/v1/responses": {"input": "why?", "instructions": "Be brief."},
    "/v1/completions": {"prompt": "why"},
}


@pytest.fixture
def server(net: Loopback) -> Server:
    made = net.serve()
    made.answer = lambda body: {"role": "assistant", "content": f"answer {len(made.requests)}"}
    return made


def ask(gateway: httpx.Client, path: str = "/v1/chat/completions", **ours: Any) -> httpx.Response:
    stream = ours.pop("stream", False)
    body = {"model": "biollm", **ROUTES[path], "biollm": ours, **({"stream": True} if stream else {})}
    return gateway.post(path, json=body).raise_for_status()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_header_states_hit_miss_or_off_on_every_route(path: str, serve: Serve, server: Server) -> None:
    gateway = serve(first=server)
    found = [ask(gateway, path, **ours) for ours in ({}, {"cache": True}, {"cache": "7d"}, {"cache": False})]
    assert [each.headers["x-biollm-cache"] for each in found] == ["off", "miss", "hit", "off"]
    assert found[2].json()["biollm"]["cached"] is True
    assert (found[2].json()["biollm"]["cost_usd"], found[2].headers["x-biollm-deployment"]) == (0, "first/small")
    streams = [ask(gateway, path, cache=True, stream=True) for _ in range(2)]
    assert [each.headers["x-biollm-cache"] for each in streams] == ["hit", "hit"]
    assert "answer 2" in streams[0].text
    assert len(server.requests) == 3


def test_a_stream_is_stored_and_given_as_a_stream(serve: Serve, server: Server) -> None:
    gateway = serve(first=server)
    first, second = (ask(gateway, cache=True, stream=True) for _ in range(2))
    assert [each.headers["x-biollm-cache"] for each in (first, second)] == ["miss", "hit"]
    events = [json.loads(line[6:]) for line in second.text.splitlines() if line.startswith("data: {")]
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in events) == "answer 1"
    assert (events[0]["model"], events[-1]["choices"][0]["finish_reason"]) == ("first/small", "stop")
    assert second.headers["x-biollm-degraded"] == "false"
    assert second.text.endswith("data: [DONE]\n\n")


def test_a_stream_that_waits_for_another_begins_and_gets_the_stored_answer(serve: Serve, server: Server) -> None:
    gateway = serve({"routing": {"headers_after": 0.2}}, first=server)
    server.behaviour = Behaviour(hang=1, pause=1.5)
    from threading import Thread

    leader = Thread(target=ask, args=(gateway,), kwargs={"cache": True})
    leader.start()
    while not server.requests:
        pass
    waiter = ask(gateway, cache=True, stream=True)
    leader.join()
    assert "answer 1" in waiter.text
    assert (len(server.requests), waiter.headers["x-biollm-cache"]) == (1, "miss")


def test_similar_requests(serve: Serve, server: Server) -> None:
    gateway = serve(first=server)

    def about(sample: str, similar: Any) -> httpx.Response:
        messages = [{"role": "user", "content": f"2026-11-2{len(sample)} {sample}: exit 137"}]
        return gateway.post(
            "/v1/chat/completions", json={"model": "biollm", "messages": messages, "biollm": {"cache_similar": similar}}
        )

    first, second, third = about("t1", ["t1"]), about("tumor", ["tumor"]), about("t1", True)
    assert [each.headers["x-biollm-cache"] for each in (first, second, third)] == ["miss", "hit", "miss"]
    (note,) = second.json()["biollm"]["notes"]
    assert note.endswith("UTC for a similar request: 2026-11-22 t1: exit 137")
    refused = about("t1", "yes")
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400, "biollm.cache_similar is 'yes'; it must be true, false, or a list of names.",
    )  # fmt: skip


def test_a_wrong_age_is_refused(serve: Serve, server: Server) -> None:
    answer = serve(first=server).post(
        "/v1/chat/completions", json={"model": "biollm", **ROUTES["/v1/chat/completions"], "biollm": {"cache": 7}}
    )
    assert (answer.status_code, "a time such as 7d" in answer.text) == (400, True)


def test_keys_share_no_answers(
    waterfall: Callable[..., Path], gateway: Callable[..., Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = waterfall(first=server)
    keys = folder / "gateway_keys.yaml"
    keys.write_text("ann: {key: ann-0123456789abcdef}\nbob: {key: bob-0123456789abcdef}\n")
    keys.chmod(0o600)
    url = gateway("--port", "0")["url"]

    def cached(name: str) -> str:
        body = {"model": "biollm", **ROUTES["/v1/chat/completions"], "biollm": {"cache": True}}
        headers = {"Authorization": f"Bearer {name}-0123456789abcdef"}
        return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).headers["x-biollm-cache"]

    assert [cached(name) for name in ("ann", "ann", "bob", "bob")] == ["miss", "hit", "miss", "hit"]


def test_the_client_and_the_command_line_pass_the_option_on(
    waterfall: Callable[..., Path],
    gateway: Callable[..., Any],
    server: Server,
    biollm: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waterfall(first=server)
    gateway()
    client = get_model_client()
    first, second = (client.complete("why?", cache=True) for _ in range(2))
    assert (first.cached, second.cached, second.cost_usd) == (False, True, 0)
    streamed = list(client.stream("why?", cache=True))[-1].completion
    assert streamed is not None
    assert (streamed.cached, str(streamed)) == (True, "answer 1")
    ran = biollm("complete", "why?", "--cache")
    assert (ran.out, "stored answer of first/small" in ran.err) == ("answer 1\n", True)
    similar = biollm("complete", "a: exit 137 at 10:11:12", "--cache-similar", "--cache-name", "a")
    again = biollm("complete", "b: exit 137 at 23:59:12", "--cache-similar", "--cache-name", "b")
    assert (similar.out, again.out) == ("answer 2\n", "answer 2\n")
    assert "for a similar request: a: exit 137 at 10:11:12" in again.err
    monkeypatch.setenv("BIOLLM_GATEWAY", "off")  # one file for the gateway and for what runs without it
    assert biollm("complete", "why?", "--cache").out == "answer 1\n"
    mine = client.complete("c: exit 137 at 01:02:03", cache_key=lambda text: normalize_log(text, ["c"]))
    assert (mine.cached, len(server.requests)) == (True, 2)
