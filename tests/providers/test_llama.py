"""The embedded model itself, through LiteLLM's Router: fetched once for all runs, then really asked."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import until

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
import litellm

from biollm.client import get_model_client
from biollm.config import load_config
from biollm.errors import CompletionError, UnavailableError
from biollm.providers import embedded
from biollm.providers.credentials import Credential
from biollm.routing.classify import classify

pytestmark = pytest.mark.slow
Run = Callable[[Coroutine[Any, Any, Any]], Any]
MODEL = "smollm2-135m"
STORY = [{"role": "user", "content": "Tell me a very long story about a river."}]
HELLO = [{"role": "user", "content": "Say hello."}]
SCHEMA = {
    "type": "object",
    "properties": {"category": {"enum": ["memory", "disk"]}, "count": {"type": "integer"}},
    "required": ["category", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The shipped model's weights, kept in the user's cache folder between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biollm" / "tests"
    try:
        return embedded.pull(load_config().models[MODEL], cache)
    except UnavailableError as error:
        if os.environ.get("BIOLLM_REQUIRE_REAL"):
            raise
        pytest.skip(str(error))


def start(gguf: Path) -> Credential:
    """Start the server, or return the one that runs; its context is cut to 512 tokens."""
    model = load_config().models[MODEL].model_copy(update={"context_length": 512})
    found = embedded.server(model, gguf, start=True)
    assert isinstance(found, Credential)
    return found


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for the module, as biollm keeps one for the process."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def ask(gguf: Path) -> Callable[..., Coroutine[Any, Any, Any]]:
    found = start(gguf)
    params = {"model": f"hosted_vllm/{MODEL}", "api_base": found.base_url, "api_key": found.secret, "drop_params": True}
    entry = {"model_name": "biollm", "litellm_params": params, "model_info": {"id": f"embedded/{MODEL}"}}
    router = litellm.Router(model_list=[entry], num_retries=0, timeout=60, disable_cooldowns=True)
    return lambda messages, **more: router.acompletion(
        model="biollm", messages=messages, disable_fallbacks=True, **more
    )


def test_it_answers_and_counts(run: Run, ask: Any) -> None:
    answer = run(ask(HELLO, max_tokens=12))
    assert answer.choices[0].message.content.strip()
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens > 20
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer._hidden_params["model_id"] == f"embedded/{MODEL}"


def test_the_requests_own_parameters_count(run: Run, ask: Any) -> None:
    async def both() -> list[Any]:
        return [await ask(STORY, max_tokens=24, temperature=0, seed=7) for _ in range(2)]

    first, second = run(both())
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].finish_reason == "length"
    stopped = run(ask(STORY, max_tokens=60, temperature=0, stop=[" "]))
    assert " " not in stopped.choices[0].message.content


def test_it_streams_as_it_writes_and_counts_at_the_end(run: Run, ask: Any) -> None:
    async def stream() -> list[Any]:
        response = await ask(STORY, max_tokens=20, stream=True, stream_options={"include_usage": True})
        return [chunk async for chunk in response]

    chunks = run(stream())
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_holds(run: Run, ask: Any, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "cause", "schema": SCHEMA}}

    async def answer() -> str:
        response = await ask(HELLO, response_format=wanted, stream=stream, max_tokens=100)
        if not stream:
            return response.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in response if chunk.choices])

    found = json.loads(run(answer()))
    assert found.keys() == {"category", "count"}
    assert found["category"] in ("memory", "disk")


@pytest.mark.parametrize(
    ("request_", "kind", "reason"),
    [
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "too_long", "512 tokens"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
            "malformed",
            "unrecognized type odd",
        ),
    ],
    ids=["context", "schema"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_it_cannot_answer_is_classified(
    run: Run, ask: Any, request_: dict[str, Any], kind: str, reason: str, stream: bool
) -> None:
    async def consume() -> None:
        response = await ask(**{"messages": HELLO, "stream": stream, **request_})
        if stream:
            async for _ in response:
                pass

    with pytest.raises(litellm.BadRequestError) as raised:
        run(consume())
    failure = classify(raised.value, time.time())
    assert failure.kind == kind
    assert reason in failure.reason


def test_its_defaults_keep_a_small_model_from_rambling(gguf: Path) -> None:
    found = start(gguf)
    base_url = str(found.base_url).removesuffix("/v1")
    settings = httpx.get(f"{base_url}/props", headers={"authorization": f"Bearer {found.secret}"}).json()
    params = settings["default_generation_settings"]["params"]
    wanted = {"temperature": 0.2, "dry_multiplier": 0.8, "repeat_penalty": 1.1, "repeat_last_n": 256}
    assert {name: pytest.approx(params[name], abs=1e-3) for name in wanted} == wanted
    assert settings["default_generation_settings"]["n_ctx"] == 512


def test_an_answer_without_a_limit_ends_after_512_tokens(gguf: Path) -> None:
    found = embedded.server(load_config().models[MODEL], gguf, start=True)
    assert isinstance(found, Credential)
    request = {"messages": STORY, "ignore_eos": True}
    headers = {"authorization": f"Bearer {found.secret}"}
    answer = httpx.post(f"{found.base_url}/chat/completions", json=request, headers=headers, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == 512


def test_a_developer_message_is_a_system_message(run: Run, ask: Any) -> None:
    def tokens(role: str) -> int:
        return run(ask([{"role": role, "content": "be brief"}, *HELLO], max_tokens=1)).usage.prompt_tokens

    assert tokens("developer") == tokens("system") < tokens("user")


@pytest.mark.parametrize("content", [None, b"hello", "part"], ids=["missing", "garbage", "truncated"])
def test_a_file_that_cannot_be_loaded_is_a_sentence(gguf: Path, tmp_path: Path, content: bytes | str | None) -> None:
    file = tmp_path / "bad.gguf"
    if content:
        file.write_bytes(content if isinstance(content, bytes) else gguf.open("rb").read(1 << 20))
    found = embedded.server(load_config().models[MODEL], file, start=True)
    assert isinstance(found, str)
    assert found.startswith(f"{file} cannot be loaded: ")


@pytest.fixture
def alone(waterfall: Any, gguf: Path) -> None:
    """A waterfall of the embedded model alone."""
    model = {"type": "embedded", "gguf": str(gguf), "context_length": 512}
    waterfall({"models": {MODEL: model}}, embedded={"type": "embedded", "models": [MODEL]})


def test_the_model_is_loaded_by_the_first_request_and_once(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_servers", {})
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    client = get_model_client()
    assert not embedded._servers
    answers = [client.complete("hi", max_tokens=2, allow_degraded=True) for _ in range(2)]
    assert [answer.degraded for answer in answers] == [True, True]
    ((process, found),) = embedded._servers.values()
    assert process.poll() is None
    assert found.secret not in repr(found) + Path(f"/proc/{process.pid}/cmdline").read_text()
    process.kill()
    process.wait()
    assert client.complete("hi", max_tokens=2, allow_degraded=True).degraded, "a server that ended is started again"
    for process, _ in embedded._servers.values():
        process.kill()


def test_a_load_counts_towards_the_timeout(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "server", lambda *_, start: time.sleep(20 * start) or Credential())
    started = time.monotonic()
    with pytest.raises(CompletionError, match=r"no answer within 0\.3 s"):
        get_model_client().complete("hi", timeout=0.3, allow_degraded=True)
    assert time.monotonic() - started < 15


def test_a_schema_turns_off_what_penalises_repetition(alone: None, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = net.serve(text='{"a": 1}')
    monkeypatch.setattr(embedded, "server", lambda *_, start: Credential("k", base_url=fake.url))
    client = get_model_client()
    client.complete("hi", allow_degraded=True)
    client.complete("hi", allow_degraded=True, response_model={"type": "object"}, temperature=0.5)
    plain, constrained = fake.requests
    assert not {"dry_multiplier", "repeat_penalty", "extra_body"} & plain.body.keys()
    assert (constrained.body["dry_multiplier"], constrained.body["repeat_penalty"]) == (0, 1)
    assert constrained.body["temperature"] == 0.5


def test_a_timeout_a_cancellation_and_a_left_stream_wedge_nothing(run: Run, ask: Any) -> None:
    def story(**more: Any) -> Coroutine[Any, Any, Any]:
        return ask(STORY, **{"max_tokens": 200, "temperature": 0, **more})

    async def leave_three() -> None:
        with pytest.raises(litellm.Timeout):
            await story(timeout=0.2)
        task = asyncio.create_task(story())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        response = await story(stream=True)
        async for _ in response:
            break
        await response.aclose()
        assert (await ask(HELLO, max_tokens=2)).usage.completion_tokens <= 2

    def seconds(work: Coroutine[Any, Any, Any]) -> float:
        started = time.monotonic()
        run(work)
        return time.monotonic() - started

    whole = seconds(story())
    assert seconds(leave_three()) < 0.6 * whole  # about a fifth; one story that goes on would make it more than one


def test_a_long_prompt_is_left_in_the_middle(run: Run, ask: Any) -> None:
    long = [{"role": "user", "content": "river " * 460}]

    async def cut() -> None:
        with pytest.raises(litellm.Timeout):
            await ask(long, timeout=0.05)

    started = time.monotonic()
    run(cut())
    run(ask(HELLO, max_tokens=1))
    cut_short = time.monotonic() - started
    started = time.monotonic()
    run(ask(long, max_tokens=1))
    assert cut_short < time.monotonic() - started


def test_it_runs_in_one_quiet_thread(run: Run, ask: Any, gguf: Path) -> None:
    run(ask(HELLO, max_tokens=1))
    url = start(gguf).base_url
    (pid,) = (process.pid for process, found in embedded._servers.values() if found.base_url == url)

    def burnt() -> dict[int, int]:
        ticks = {}
        for task in Path(f"/proc/{pid}/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks[int(task.name)] = int(fields[11]) + int(fields[12])
        return ticks

    before = burnt()
    run(ask(STORY, max_tokens=100))
    after = burnt()
    grown = {task: after[task] - before.get(task, 0) for task in after}
    busiest = max(grown, key=lambda task: grown[task])
    assert os.getpriority(os.PRIO_PROCESS, busiest) >= 5
    assert grown[busiest] > 0.7 * sum(grown.values())
    assert len(after) <= len(before) + 1


def test_its_port_is_closed_to_others(gguf: Path) -> None:
    answer = httpx.post(f"{start(gguf).base_url}/chat/completions", json={"messages": HELLO})
    assert answer.status_code == 401


def test_the_server_ends_with_its_process(gguf: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from biollm.config import load_config
        from biollm.providers import embedded
        embedded.server(load_config().models[sys.argv[1]], Path(sys.argv[2]), start=True)
        print(*(process.pid for process, _ in embedded._servers.values()), flush=True)
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), MODEL, str(gguf)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    until(lambda: not Path(f"/proc/{int(found.stdout)}/cmdline").exists(), 5)


def test_forked_children_answer_for_themselves_and_end(gguf: Path) -> None:
    code = """
        import os, sys, json
        from pathlib import Path
        from urllib.request import Request, urlopen
        from biollm.config import load_config
        from biollm.providers import embedded
        urls = set()
        def ask():
            found = embedded.server(load_config().models[sys.argv[1]], Path(sys.argv[2]), start=True)
            urls.add(found.base_url)
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            headers = {"authorization": f"Bearer {found.secret}", "content-type": "application/json"}
            request = Request(f"{found.base_url}/chat/completions", json.dumps(body).encode(), headers)
            assert json.load(urlopen(request))["choices"][0]["message"]["content"]
        def child(work, code):
            pid = os.fork()
            if pid == 0:
                work()
                sys.exit(code if len(urls) == 1 + (work is ask) else 99)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        ask()
        child(lambda: None, 3)
        child(ask, 4)
        child(lambda: child(ask, 5), 6)
        ask()
        print("done" if len(urls) == 1 else urls)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), MODEL, str(gguf)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split() == ["3", "4", "5", "6", "done"]
    assert not found.stderr
