"""The CLI and the client ask the running gateway: the same answers and errors, and nobody else's socket."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from behaviours import HANG, HTTP_400, HTTP_401, HTTP_500, OK, Behaviour, limited
from conftest import Ran, until
from provider import Loopback
from pydantic import BaseModel

from biollm._runtime import ledger
from biollm.client import (
    AllLimitedError,
    Client,
    CompletionError,
    DeadlineError,
    InterruptedStreamError,
    KeysRefusedError,
    StreamChunk,
    StreamRestarted,
    UnknownNameError,
    UsageError,
    get_model_client,
)
from biollm.client import remote as gate
from biollm.errors import UnavailableError
from biollm.gateway import openai_api
from biollm.types import Attempt, Completion, Fields, Usage

pytestmark = pytest.mark.slow  # each takes seconds

Biollm = Callable[..., Ran]
Waterfall = Callable[..., Path]
Gateway = Callable[..., dict[str, Any]]
HI = {"model": "biollm", "messages": [{"role": "user", "content": "hi"}], "biollm": {}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"path": {"type": "string"}}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what a call gives or raises, but for times, ids and what is LiteLLM's."""
    try:
        facts = {**vars(call())}
    except CompletionError as error:
        facts = {
            "error": type(error),
            **vars(error),
            "said": re.sub(r"\d+ s\b", "", f"{error} {error.hint}"),
            "hint": "",
        }
    facts["attempts"] = [
        (each.deployment, each.outcome, re.sub(r"\d+ s\b", "", each.reason), each.status) for each in facts["attempts"]
    ]
    facts["tool_calls"] = [{**call, "id": ""} for call in facts.get("tool_calls", ())]
    return {
        name: value
        for name, value in facts.items()
        if name not in ("id", "latency_ms", "raw", "partial", "retry_after")
    }


def asks_the_gateway(client: Client) -> bool:
    return isinstance(client._route(lambda: client._request("hi", {})), gate.Connection)


def last(pieces: Iterator[Any]) -> Any:
    return list(pieces)[-1].completion


def test_it_gives_and_raises_what_the_waterfall_does(
    net: Loopback, waterfall: Waterfall, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def server(then: Behaviour = OK) -> dict[str, Any]:
        return {"base_url": net.serve(then=then, text="one two three").url, "json_schema": True}

    faults = {"refused": HTTP_401, "limited": limited("600"), "broken": HTTP_500}
    waterfall(ok=server(), bad=server(HTTP_400), **{name: server(fault) for name, fault in faults.items()})
    gateway()
    client, restart = get_model_client(), {"on_interrupt": "restart"}
    calls: dict[str, Callable[[], Any]] = {
        "text": lambda: client.complete("hi", system="short", max_tokens=5, temperature=0.5, extra={"seed": 7}),
        "messages": lambda: client.complete([{"role": "user", "content": "hi"}], tags={"a": "b"}, deadline=30),
        "tools": lambda: client.complete("hi", tools=[TOOL], tool_choice="auto"),
        "schema": lambda: client.complete("hi", response_model=SCHEMA),
        "stream": lambda: last(client.stream("hi", **restart)),
        "stream of tools": lambda: last(client.stream("hi", tools=[TOOL])),
        "async": lambda: asyncio.run(client.acomplete("hi")),
        "rejected": lambda: client.complete("hi", provider="bad", fallback=False),
        "rejected stream": lambda: last(client.stream("hi", provider="bad")),
    }
    for name, call in calls.items():
        monkeypatch.setenv("BIOLLM_GATEWAY", "off")
        here = outcome(call)
        monkeypatch.delenv("BIOLLM_GATEWAY")
        assert outcome(call) == here, name
    found: dict[str, Any] = {}
    for name in faults:  # here once: the provider then rests
        with pytest.raises(CompletionError) as error:
            client.complete("hi", provider=name)
        found[name] = error.value
    assert [type(error) for error in found.values()] == [KeysRefusedError, AllLimitedError, CompletionError]
    assert [error.attempts[0].status for error in found.values()] == [401, 429, 500]
    with pytest.raises(AllLimitedError) as again:
        client.complete("hi", provider="limited")
    assert 500 < again.value.retry_after <= 600
    assert asks_the_gateway(client), "the gateway is gone"


def test_a_script_needs_no_litellm(net: Loopback, waterfall: Waterfall, gateway: Gateway) -> None:
    server = net.serve(text="one two three")
    waterfall(first=server)
    gateway()
    code = """
import sys
from biollm.client import get_model_client
client = get_model_client()
said = [str(client.complete("a")), "".join(map(str, client.stream("b")))]
light = not {"pydantic", "yaml", "sqlite3", "asyncio"} & sys.modules.keys()
import asyncio
async def main():
    return str(await client.acomplete("c")), "".join([str(piece) async for piece in client.astream("d")])
said += asyncio.run(main())
print(said == ["one two three"] * 4, light, "litellm" in sys.modules)
"""
    environment = {**os.environ, "BIOLLM_TAGS": "user=ann", "BIOLLM_LOCAL_ONLY": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("True True False\n", "")
    assert [request.body["messages"][0]["content"] for request in server.completions] == ["a", "b", "c", "d"]
    assert {record.tags["user"] for record in ledger().history(None, None)} == {"ann"}


def test_a_stream_that_breaks_says_what_came(net: Loopback, waterfall: Waterfall, gateway: Gateway) -> None:
    waterfall(first=net.serve(then=Behaviour(tear=4), text="lost words that break"))
    gateway()
    with pytest.raises(InterruptedStreamError) as error:
        list(get_model_client().stream("hi"))
    assert error.value.partial.startswith("lost")


def test_a_stream_restarts(net: Loopback, waterfall: Waterfall, gateway: Gateway) -> None:
    torn = net.serve(then=Behaviour(tear=4), text="lost words that break")
    waterfall(first=torn, second=net.serve(text="kept"))
    gateway()
    client = get_model_client()
    pieces = list(client.stream("hi", on_interrupt="restart"))
    at = next(at for at, piece in enumerate(pieces) if isinstance(piece, StreamRestarted))
    assert "".join(map(str, pieces[:at])).startswith("lost")
    assert "".join(map(str, pieces[at:])) == "kept"
    end = pieces[-1]
    assert isinstance(end, StreamChunk) and end.completion
    assert (end.completion.text, end.completion.deployment) == ("kept", "second/small")


@pytest.mark.parametrize("here", [True, False], ids=["in this process", "through the gateway"])
def test_a_stream_goes_on_with_the_next_answer(
    net: Loopback, waterfall: Waterfall, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    torn = [net.serve(then=Behaviour(tear=4), text="lost words that break") for _ in range(3)]
    waterfall(first=torn[0], second=torn[1], third=net.serve(), alone={"base_url": torn[2].url, "models": ["alone"]})
    gateway()
    client = get_model_client()
    assert asks_the_gateway(client)
    if here:
        monkeypatch.setenv("BIOLLM_GATEWAY", "off")
    *pieces, end = client.stream("hi", model="small", on_interrupt="splice")
    text = "".join(map(str, pieces))
    marks = re.findall(r"\n\n\[The stream of (\S+) broke\. Another answer follows\.\]\n\n", text)
    assert marks == ["first/small", "second/small"]
    assert text.startswith("lost") and text.endswith("All is well.")
    assert isinstance(end, StreamChunk) and end.completion
    assert (end.completion.text, end.completion.deployment) == (text, "third/small")
    assert [each.outcome for each in end.completion.attempts] == ["failed", "failed", "ok"]
    with pytest.raises(InterruptedStreamError) as error:
        list(client.stream("hi", model="alone", on_interrupt="splice"))
    assert error.value.partial.startswith("lost")


def test_biollm_complete_restarts(net: Loopback, waterfall: Waterfall, gateway: Gateway, biollm: Biollm) -> None:
    waterfall(first=net.serve(then=Behaviour(tear=4), text="lost words that break"), second=net.serve(text="kept"))
    gateway()
    ran = biollm("complete", "hi", "--stream")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "kept")
    assert "first/small broke off" in ran.err


WAYS: dict[str, Callable[..., Any]] = {
    "complete": lambda client, **options: client.complete("hi", **options),
    "stream": lambda client, **options: list(client.stream("hi", **options)),
    "acomplete": lambda client, **options: asyncio.run(client.acomplete("hi", **options)),
}


@pytest.mark.parametrize(
    ("way", "options", "kind", "told"),
    [
        *((way, {"deadline": 2}, DeadlineError, "deadline of 2 s") for way in WAYS),
        ("stream", {}, CompletionError, "The gateway no longer answers"),
    ],
)
def test_a_gateway_that_stands_still_holds_nobody(
    way: str, options: Any, kind: Any, told: str, net: Loopback, waterfall: Waterfall, gateway: Gateway
) -> None:
    server = net.serve(Behaviour(), then=HANG)
    waterfall(first=server)
    pid, client = gateway()["pid"], get_model_client()
    assert str(client.complete("hi"))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(WAYS[way], client, **options)
        until(lambda: len(server.completions) == 2)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(kind, match=told):
                asked.result(40)
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("way", WAYS)
def test_the_deadline_bounds_the_way_to_a_gateway_too(
    way: str, net: Loopback, waterfall: Waterfall, monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(first=net.serve())
    monkeypatch.setenv("BIOLLM_GATEWAY", net.dropping())
    client, began = get_model_client(), time.monotonic()
    with pytest.raises(DeadlineError, match="deadline of 2 s"):
        WAYS[way](client, deadline=2)
    assert time.monotonic() - began < 8


def test_one_that_only_works_on_is_waited_for(net: Loopback, waterfall: Waterfall, gateway: Gateway) -> None:
    def slow(_body: Any) -> Any:
        time.sleep(12)  # longer than between two looks
        return {"role": "assistant", "content": "at last"}

    waterfall(first=net.serve(answer=slow))
    gateway()
    assert str(get_model_client().complete("hi")) == "at last"


def test_one_that_was_started_without_a_key_is_not_asked(
    net: Loopback,
    waterfall: Waterfall,
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waterfall(first=net.serve(text="first"), second=net.serve(text="second"))
    monkeypatch.delenv("FIRST_KEY")
    told = gateway()
    assert "sk-planted" not in json.dumps(told)
    assert [str(get_model_client().complete("hi")) for _ in range(2)] == ["second", "second"]
    assert not caplog.messages
    monkeypatch.setenv("FIRST_KEY", "sk-planted-first-0123456789")
    assert [str(get_model_client().complete("hi")) for _ in range(2)] == ["first", "first"]
    [said] = caplog.messages
    assert "started without FIRST_KEY" in said
    assert "sk-planted" not in said


def test_many_prompts_and_gaps_in_code_go_through_it(
    net: Loopback, waterfall: Waterfall, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"type": "local", "hf_id": "x/coder", "capabilities": ["fill-in-middle"], "fim": ["<P>", "<S>", "<M>"]}
    server = net.serve(text="return a", models=("coder",))
    local = {"type": "local", "base_url": server.url, "models": ["coder"]}
    waterfall({"models": {"coder": model}}, first=net.serve(text="fine"), mine=local)
    gateway()
    monkeypatch.setenv("FIRST_KEY", "")  # who answers here is the gateway
    client = get_model_client()
    assert [str(answer) for answer in client.complete_many(list("abc"), concurrency=2)] == ["fine"] * 3
    answer = client.fill_in_middle("def f(a):", "\nf(1)")
    assert (str(answer), answer.deployment) == ("return a", "mine/coder")
    assert server.requests[-1].body["prompt"] == "<P>def f(a):<S>\nf(1)<M>"
    code = "import sys; from biollm.client import get_model_client as c; c().fill_in_middle('a', 'b'); c().complete_many(['x'])"
    ran = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('litellm' in sys.modules)"])
    assert ran.returncode == 0, "it was asked in place of this process"


@pytest.mark.parametrize("stream", [False, True])
def test_who_is_cancelled_leaves(stream: bool, net: Loopback, waterfall: Waterfall, gateway: Gateway) -> None:
    server = net.serve(then=HANG)
    waterfall(first=server)
    gateway()
    client = get_model_client()

    async def ask() -> None:
        task = asyncio.ensure_future(anext(client.astream("hi")) if stream else client.acomplete("hi"))
        while not server.completions:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    until(lambda: not server.tasks)  # the provider works no more


class Pair(BaseModel):
    a: int


@pytest.mark.parametrize(
    "options",
    [{"on_send": print}, {"on_state": print}, {"response_model": Pair}, {"extra": {"n": 2}}, {"extra": {"logprobs": True}},
     {"response_model": SCHEMA, "tools": [TOOL]}],
)  # fmt: skip
def test_what_cannot_travel_stays(options: Any, net: Loopback, waterfall: Waterfall) -> None:
    waterfall(first=net.serve())
    assert gate.body_of(Client()._request("hi", options)) is None


# --- Whether a gateway is asked ----------------------------------------------------------------------------------


class Fake:
    """A gateway that says what it is told to, over and over."""

    def __init__(self, folder: Path, answer: bytes = b"") -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = folder / gate.SOCKET
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.path.chmod(0o600)
        self.listener.listen()
        (folder / gate.RECORD).write_text(json.dumps({"identity": gate.identity()}))
        self.answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            with line:
                heard = b""
                while b"}}" not in heard and (more := line.recv(65536)):  # the end of the body
                    heard += more
                if heard:
                    line.sendall(self.answer)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def body(policy: str = "any") -> dict[str, Any]:
    return {**HI, "biollm": {"data_policy": policy}}


def test_only_one_with_the_same_configuration_is_asked(
    runtime: Path,
    waterfall: Waterfall,
    net: Loopback,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = waterfall(first=net.serve())
    gate._warn.cache_clear()
    with closing(Fake(runtime)):
        assert gate.reach(HI)
        assert gate.reach(None) is None
        with monkeypatch.context() as patch:
            for value in ("off", "OFF", "0", "no"):
                patch.setenv("BIOLLM_GATEWAY", value)
                assert gate.reach(HI) is None
        with monkeypatch.context() as patch:
            patch.setenv("BIOLLM_STATE_DIR", "/elsewhere")
            assert gate.reach(HI) is None
        (warning,) = caplog.messages
        assert warning.startswith("The gateway was started with another configuration or version and is not used.")
        client = Client()
        assert asks_the_gateway(client)
        assert not asks_the_gateway(Client(config_dir=folder))
        (folder / "models.yaml").write_text("models: {}\n")
        assert gate.reach(HI) is None
        assert asks_the_gateway(client), "it has read what the gateway has read"
        client.reload()
        assert not asks_the_gateway(client)
        assert caplog.messages == [warning], "once"
    (folder / "models.yaml").unlink()
    assert gate.reach(HI) is None, "nobody listens"


def test_a_client_whose_gateway_has_gone_reads_the_configuration_then(
    runtime: Path, waterfall: Waterfall, net: Loopback
) -> None:
    waterfall({"data_policy": "no_training"}, first={"base_url": net.serve().url, "trains_on_prompts": True})
    with closing(Fake(runtime)):
        first, second = Client(), Client()
        assert first.policy() == "any", "the gateway adds its configuration's"
    with pytest.raises(CompletionError) as error:
        first.complete("hi")
    assert "train" in error.value.attempts[0].reason
    assert first.policy() == "no_training"
    with pytest.raises(UnknownNameError, match="no model named 'smal'"):
        second.complete("hi", model="smal")


def test_a_socket_that_others_can_reach_is_left_alone(runtime: Path) -> None:
    with closing(Fake(runtime)) as fake:
        for path, mode in ((runtime, 0o750), (fake.path, 0o660)):
            usual = path.stat().st_mode
            path.chmod(mode)
            assert gate.reach(HI) is None, path
            path.chmod(usual)
        assert gate.reach(HI)
        real = runtime.rename(runtime.with_name("moved"))
        runtime.symlink_to(real)
        assert gate.reach(HI) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("user", [0, 65534])
def test_another_users_process_is_told_nothing(runtime: Path, user: int) -> None:
    runtime.mkdir(mode=0o700)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(runtime / gate.SOCKET))
    (runtime / gate.SOCKET).chmod(0o600)
    (runtime / gate.RECORD).write_text(json.dumps({"identity": gate.identity()}))
    code = f"import os, socket, sys; os.setuid({user}); socket.socket(fileno={listener.fileno()}).listen(); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=-1, stdout=-1, pass_fds=[listener.fileno()], text=True) as process:
        assert process.stdout and process.stdout.readline() == "1\n"
        assert bool(gate.reach(HI)) is (user == 0)
        process.communicate()
    listener.close()


def test_one_that_is_named_must_be_there(net: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOLLM_GATEWAY", "yes please")
    with pytest.raises(UsageError, match="it must be a URL, or off"):
        gate.reach(HI)
    monkeypatch.setenv("BIOLLM_GATEWAY", net.refusing())
    line = gate.reach(HI)
    assert line
    with pytest.raises(UnavailableError, match="does not answer"):
        line.complete()


def test_one_that_is_named_is_asked_with_its_key(
    net: Loopback, waterfall: Waterfall, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, biollm: Biollm
) -> None:
    waterfall(first=net.serve(text="hello"))
    monkeypatch.setenv("BIOLLM_GATEWAY_KEY", "a-key-of-this-test")
    record = gateway("--port", "0")
    for url in (record["url"], f"{record['url']}/v1/"):
        monkeypatch.setenv("BIOLLM_GATEWAY", url)
        assert str(get_model_client().complete("hi")) == "hello"
    assert biollm("complete", "hi", "--stream").out == "hello\n"
    monkeypatch.setenv("BIOLLM_GATEWAY_KEY", "another-key")
    ran = biollm("complete", "hi")
    assert (ran.code, "The gateway refuses the key." in ran.err) == (69, True)
    monkeypatch.setenv("BIOLLM_GATEWAY", "off")


def http(status: int, data: Any, policy: str = "", kind: str = "application/json") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    head = f"HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\nconnection: close\r\n"
    return f"{head}{f'x-biollm-policy: {policy}' + chr(13) + chr(10) if policy else ''}\r\n{text}".encode()


@pytest.mark.parametrize(
    ("asked", "confirmed", "honoured"),
    [("any", "any", True), ("any", "local_only", True), ("no_training", "local_only", True), ("local_only", "local_only", True),
     ("any", "", False), ("no_training", "any", False), ("local_only", "no_training", False), ("local_only", "", False),
     ("any", "whatever", False)],
)  # fmt: skip
def test_the_policy_is_confirmed_or_the_call_fails(runtime: Path, asked: str, confirmed: str, honoured: bool) -> None:
    story = {"provider": "p", "account": "a", "model": "m", "deployment": "p/m", "cost_usd": 0, "latency_ms": 1,
             "degraded": False, "attempts": []}  # fmt: skip
    choice = {"message": {"content": "hello"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    with closing(Fake(runtime, http(200, {"choices": [choice], "usage": usage, "biollm": story}, confirmed))):
        line = gate.reach(body(asked))
        assert line
        if honoured:
            assert str(line.complete()) == "hello"
        else:
            with pytest.raises(CompletionError, match=f"The gateway does not confirm the data policy {asked}."):
                line.complete()


@pytest.mark.parametrize(
    ("answer", "error"),
    [(b"", "The gateway broke off"), (b"HTTP/1.1 200 OK\r\n", "does not confirm the data policy"), (b"rubbish\r\n\r\n", "The gateway broke off"),
     (http(500, "<html>"), "The gateway answered HTTP 500."), (http(200, "{", "any"), "The gateway broke off"),
     (http(503, {"error": {"message": "down"}}), "down"), (http(404, {"error": "no such model"}), "The gateway answered HTTP 404."),
     (http(404, {"detail": "Not Found"}), "The gateway answered HTTP 404."), (http(404, ["error"]), "The gateway answered HTTP 404."),
     (http(503, {"error": {"message": "x", "biollm": {"class": "Sequence", "message": "odd"}}}), "odd")],
)  # fmt: skip
def test_one_that_breaks_off_is_an_error(runtime: Path, answer: bytes, error: str) -> None:
    with closing(Fake(runtime, answer)):
        for way in (gate.Connection.complete, lambda line: list(gate.Connection.stream(line))):
            line = gate.reach(body())
            assert line
            with pytest.raises(CompletionError, match=re.escape(error)):
                way(line)


def test_another_server_in_its_place_is_named(
    net: Loopback, waterfall: Waterfall, monkeypatch: pytest.MonkeyPatch, biollm: Biollm
) -> None:
    server = net.serve(then=Behaviour(404, body="Not Found"))
    waterfall(first=server)
    monkeypatch.setenv("BIOLLM_GATEWAY", server.url)
    url = server.url.removesuffix("/v1")
    assert (
        f"The gateway at {url} answered HTTP 404.\nBIOLLM_GATEWAY must be the URL of a biollm gateway."
        in biollm("complete", "hi").err
    )


NEWER = {"deployment": "p/m", "outcome": "failed", "reason": "HTTP 500", "kind": "broken", "rests_s": 15}
STORY = {"provider": "p", "account": "a", "model": "m", "deployment": "p/m", "cost_usd": 0, "latency_ms": 1,
         "degraded": False, "attempts": [NEWER], "estimated": False}  # fmt: skip


def test_what_a_newer_gateway_says_besides_is_passed_over(runtime: Path) -> None:
    told = {"choices": [{"message": {"content": "hello", "audio": {}}, "finish_reason": "stop", "index": 0}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "details": {}}, "biollm": STORY}  # fmt: skip
    with closing(Fake(runtime, http(200, told, "any"))):
        line = gate.reach(body())
        assert line
        answer = line.complete()
    assert (str(answer), answer.attempts) == ("hello", (Attempt("p/m", "failed", "HTTP 500"),))


def test_tokens_and_price_arrive_as_the_gateway_counted_them(runtime: Path) -> None:
    raw = Fields({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})
    usage = Usage(10, 5, cached_tokens=4, cache_write_tokens=1, reasoning_tokens=3, estimated=True)
    sent = Completion("hello", "p", "a", "m", "p/m", usage, None, finish_reason="stop", raw=raw)
    told = openai_api.answer(sent)
    assert told["usage"] == {
        "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "estimated": True,
        "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }  # fmt: skip
    with closing(Fake(runtime, http(200, told, "any"))):
        line = gate.reach(body())
        assert line
        assert (answer := line.complete()).usage == usage
    assert answer.cost_usd is None


def test_a_stream_passes_over_events_and_fields_that_it_does_not_know(runtime: Path) -> None:
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": "lost"}}]},
        {"choices": [], "biollm": {"restarted": {"attempt": NEWER, "why": "broken"}}},
        {"type": "ping"},
        {"choices": [{"delta": {"content": "hello"}, "index": 0}], "usage": None},
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "biollm": {"progress": 1}},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}, "biollm": STORY},
        {"biollm": {"cost": "later"}},
    ]
    text = ": a comment\n\n" + "".join(f"event: x\ndata: {json.dumps(each)}\n\n" for each in events)
    with closing(Fake(runtime, http(200, text + "data: [DONE]\n\n", "any", "text/event-stream"))):
        line = gate.reach(body())
        assert line
        *_, end = line.stream()
    answer = getattr(end, "completion", None)
    assert answer and (answer.text, answer.finish_reason, len(answer.attempts)) == ("hello", "stop", 1)


def test_an_error_of_a_newer_gateway_keeps_its_attempts(runtime: Path) -> None:
    told = {"error": {"message": "x", "biollm": {"class": "LaterError", "message": "nobody", "attempts": [NEWER]}}}
    with closing(Fake(runtime, http(503, told))):
        line = gate.reach(body())
        assert line
        with pytest.raises(CompletionError, match="nobody") as error:
            line.complete()
    assert error.value.attempts == (Attempt("p/m", "failed", "HTTP 500"),)


@pytest.mark.parametrize("told", [{"identities": []}, ["x"], 7, None])
def test_a_record_of_another_version_is_no_reason_to_fail(runtime: Path, biollm: Biollm, told: Any) -> None:
    with closing(Fake(runtime)):
        (runtime / gate.RECORD).write_text(json.dumps(told))
        assert gate.reach(HI) is None
        assert biollm("serve", "status").out == biollm("serve", "stop").out == "Gateway is not running.\n"


@pytest.mark.parametrize("told", ["overloaded", None, ["overloaded"]])
def test_a_stream_may_end_with_any_error(runtime: Path, told: Any) -> None:
    with closing(Fake(runtime, http(200, f"data: {json.dumps({'error': told})}\n\n", "any", "text/event-stream"))):
        line = gate.reach(body())
        assert line
        with pytest.raises(CompletionError):
            list(line.stream())


def test_a_stream_without_its_end_is_an_interrupted_one(runtime: Path) -> None:
    chunk = {"choices": [{"delta": {"content": "so far"}, "finish_reason": None}]}
    with closing(Fake(runtime, http(200, f"data: {json.dumps(chunk)}\n\n", "any", "text/event-stream"))):
        line = gate.reach(body())
        assert line
        with pytest.raises(InterruptedStreamError, match="before its end") as error:
            list(line.stream())
    assert error.value.partial == "so far"


# --- The command line --------------------------------------------------------------------------------------------


def test_a_command_is_quick_and_keeps_its_options(
    net: Loopback,
    waterfall: Waterfall,
    gateway: Gateway,
    biollm: Biollm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = net.serve(text="one two three")
    waterfall(
        first=net.serve(then=HTTP_500), second={"base_url": server.url, "json_schema": True}, far="https://x.invalid/v1"
    )
    gateway()
    code = """
import sys
sys.argv = ["biollm", "complete", "hi"]
from biollm.cli.app import _run
assert _run() == 0
heavy = "pydantic yaml rich httpx biollm.config.loader biollm.client.local litellm asyncio sqlite3".split()
print([name for name in heavy if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], stdin=-3, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "one two three\n[]\n", ran.stderr
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    shaped = biollm("complete", "hi", "--schema", schema)
    assert shaped.code == 0, shaped.err
    assert shaped.json == {"a": 1}
    said = biollm("complete", "hi", "--json", "--provider", "second", "--max-tokens", "9", "--temperature", "0.5",
                  "--system", "short", "--tag", "run=7", "--no-fallback", "--timeout", "30", "--deadline", "60").json  # fmt: skip
    assert (said["text"], said["deployment"], said["usage"]["completion_tokens"]) == (
        "one two three",
        "second/small",
        3,
    )
    sent = server.completions[-1].body
    assert (sent["max_tokens"], sent["temperature"], len(sent["messages"])) == (9, 0.5, 2)
    assert biollm("complete", "hi", "--stream").out == "one two three\n"
    failed = biollm("complete", "hi", "-v", "--provider", "first", "--json")
    assert (failed.code, failed.json["attempts"][0]["deployment"]) == (75, "first/small")  # it rests
    far = ("complete", "hi", "--provider", "far")
    assert "the data policy is local_only" in biollm(*far, "--local-only").err
    monkeypatch.setenv("BIOLLM_LOCAL_ONLY", "1")
    assert "the data policy is local_only" in biollm(*far).err
    monkeypatch.delenv("BIOLLM_LOCAL_ONLY")
    wrong = biollm("complete", "hi", "--model", "smal")
    assert (wrong.code, "Did you mean 'small'?" in wrong.err) == (2, True)
    tags = [record.tags for record in ledger().history(None, None)]
    assert {"run": "7"} in tags


def test_a_slow_start_on_a_terminal_names_the_gateway(net: Loopback, waterfall: Waterfall, runtime: Path) -> None:
    waterfall({"routing": {"sender": "litellm"}}, first=net.serve())
    # The clock of this process jumps a minute when LiteLLM is imported: the start is slow on any machine.
    code = """
import sys, time
now, late = time.monotonic, [0]
class Clock:
    def find_spec(self, name, path=None, target=None):
        late[0] = 60 if name == "litellm" else late[0]
sys.meta_path.insert(0, Clock())
time.monotonic = lambda: now() + late[0]
sys.argv = ["biollm", "complete", "hi", "--no-stream"]
from biollm.cli import main
main()
"""
    here, there = pty.openpty()
    for environment, hinted in ((os.environ, True), ({**os.environ, "BIOLLM_GATEWAY": "off"}, False)):
        process = subprocess.Popen([sys.executable, "-c", code], stdin=-3, stdout=-3, stderr=there, env=environment)
        assert process.wait(60) == 0
        told = os.read(here, 65536).decode()
        assert ("`biollm serve --detach` keeps it running" in told) is hinted
    for end in (here, there):
        os.close(end)
