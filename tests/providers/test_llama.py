"""The embedded model itself, through LiteLLM's Router: fetched once for all runs, then really asked."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
import litellm

from biollm.config import load_config
from biollm.errors import UnavailableError
from biollm.providers import embedded
from biollm.providers.llama import _request

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
def address() -> str:
    """The shipped model, its weights kept in the user's cache folder between runs; its context cut to 512 tokens."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biollm" / "tests"
    model = load_config().models[MODEL].model_copy(update={"context_length": 512})
    try:
        weights = embedded.pull(model, cache, lambda done, total: None)
    except UnavailableError as error:
        if os.environ.get("BIOLLM_REQUIRE_REAL"):
            raise
        pytest.skip(str(error))
    assert embedded.ready(model, cache) == weights
    return embedded.address(model, weights)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for the module, as biollm keeps one for the process."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def ask(address: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    embedded.register()
    router = router_of(address)
    return lambda messages, **more: router.acompletion(
        model="biollm", messages=messages, disable_fallbacks=True, **more
    )


def router_of(address: str) -> litellm.Router:
    params = {"model": f"biollm_embedded/{MODEL}", "api_base": address, "api_key": "none", "drop_params": True}
    entry = {"model_name": "biollm", "litellm_params": params, "model_info": {"id": f"embedded/{MODEL}"}}
    return litellm.Router(model_list=[entry], num_retries=0, timeout=60, disable_cooldowns=True)


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
    ("request_", "error", "says"),
    [
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
            litellm.UnsupportedParamsError,
            "takes no tools",
        ),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, litellm.ContextWindowExceededError, "512 tokens"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
            litellm.BadRequestError,
            "unrecognized type odd",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
            litellm.BadRequestError,
            "image input is not supported",
        ),
    ],
    ids=["tools", "context", "schema", "image"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_it_cannot_do_is_litellms_error(
    run: Run, ask: Any, request_: dict[str, Any], error: type[Exception], says: str, stream: bool
) -> None:
    async def consume() -> None:
        response = await ask(**{"messages": HELLO, "stream": stream, "_skip_mcp_handler": True, **request_})
        if stream:
            async for _ in response:
                pass

    with pytest.raises(error, match=says):
        run(consume())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"max_tokens": 512, "temperature": 0.2, "repeat_penalty": 1.1}),
        (
            {"max_tokens": 9, "temperature": 0, "top_p": None},
            {"max_tokens": 9, "temperature": 0, "repeat_penalty": 1.1},
        ),
        ({"max_completion_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": None}),
        ({"response_format": {"type": "json_object"}}, {"max_tokens": 512, "temperature": 0.2, "repeat_penalty": None}),
        ({"max_retries": 0, "stream_options": None, "api_key": "sk"}, {"api_key": None, "max_retries": None}),
    ],
)
def test_the_request_wins_over_what_keeps_a_small_model_from_rambling(
    given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    sent = _request({"optional_params": given, "messages": HELLO, "model": MODEL})
    assert {name: sent.get(name) for name in wanted} == wanted


def test_a_developer_message_is_a_system_message() -> None:
    messages = [{"role": "developer", "content": "be brief"}, *HELLO]
    sent = _request({"optional_params": {}, "messages": messages, "model": MODEL})
    assert sent["messages"] == [{"role": "system", "content": "be brief"}, *HELLO]


@pytest.mark.parametrize("content", [None, b"hello", "part"], ids=["missing", "garbage", "truncated"])
def test_a_file_that_cannot_be_loaded_is_an_error_and_the_next_request_is_served(
    run: Run, ask: Any, address: str, tmp_path: Path, content: bytes | str | None
) -> None:
    file = tmp_path / "bad.gguf"
    if content:
        path = Path(httpx.URL(address).path)
        file.write_bytes(content if isinstance(content, bytes) else path.open("rb").read(1 << 20))
    bad = router_of(f"{file.as_uri()}?n_ctx=512&n_threads=1")
    with pytest.raises(litellm.ServiceUnavailableError, match=f"{file} cannot be loaded"):
        run(bad.acompletion(model="biollm", messages=HELLO, disable_fallbacks=True))
    assert run(ask(HELLO, max_tokens=2)).choices


def test_a_timeout_a_cancellation_and_a_left_stream_wedge_nothing(run: Run, ask: Any) -> None:
    def story(**more: Any) -> Coroutine[Any, Any, Any]:
        return ask(STORY, **{"max_tokens": 200, "temperature": 0, **more})

    async def leave_three() -> None:
        with pytest.raises(litellm.Timeout, match=r"no answer within 0\.2 s"):
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


def test_it_runs_in_one_quiet_thread_and_the_loop_goes_on(run: Run, ask: Any) -> None:
    def burnt() -> dict[int, int]:
        ticks = {}
        for task in Path("/proc/self/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks[int(task.name)] = int(fields[11]) + int(fields[12])
        return ticks

    async def watched() -> int:
        turns, answer = 0, asyncio.create_task(ask(STORY, max_tokens=100))
        while not answer.done():
            await asyncio.sleep(0.01)
            turns += 1
        await answer
        return turns

    run(ask(HELLO, max_tokens=1))
    before, threads = burnt(), len(burnt())
    assert run(watched()) > 20
    after = burnt()
    grown = {task: after[task] - before.get(task, 0) for task in after}
    busiest = max(grown, key=lambda task: grown[task])
    assert os.getpriority(os.PRIO_PROCESS, busiest) >= 5
    assert grown[busiest] > 0.7 * sum(grown.values())
    assert len(after) <= threads + 1


def test_its_port_is_closed_to_others(run: Run, ask: Any) -> None:
    run(ask(HELLO, max_tokens=1))
    mine = {str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.exists()}
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    ports = [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
    assert len(ports) == 1
    answer = httpx.post(f"http://127.0.0.1:{ports[0]}/v1/chat/completions", json={"messages": HELLO})
    assert answer.status_code == 401


def test_registering_twice_leaves_one_entry_and_those_of_others() -> None:
    foreign = {"provider": "somebody_elses", "custom_handler": object()}
    litellm.custom_provider_map.append(foreign)  # type: ignore[arg-type]
    try:
        embedded.register()
        names = [each["provider"] for each in litellm.custom_provider_map]
        assert names.count("biollm_embedded") == 1
        assert foreign in litellm.custom_provider_map
    finally:
        litellm.custom_provider_map.remove(foreign)  # type: ignore[arg-type]


def test_forked_children_answer_for_themselves_and_end(address: str) -> None:
    code = """
        import asyncio, os, sys, litellm
        from biollm.providers import embedded
        embedded.register()
        def ask():
            call = litellm.acompletion(model="biollm_embedded/x", api_base=sys.argv[1], max_tokens=3,
                                       messages=[{"role": "user", "content": "Hi"}])
            assert asyncio.run(call).choices[0].message.content
        def child(work, code):
            pid = os.fork()
            if pid == 0:
                work()
                sys.exit(code)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        ask()
        child(lambda: None, 3)
        child(ask, 4)
        child(lambda: child(ask, 5), 6)
        ask()
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), address]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split() == ["3", "4", "5", "6", "done"]
    assert not re.search("Error|Warning|Traceback", found.stderr.replace("LiteLLM:WARNING", ""))
