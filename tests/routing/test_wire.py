"""One attempt is one request on the wire: what the providers saw is what the ledger counted, and nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import behaviours as b
import httpx
import pytest
from behaviours import Behaviour
from provider import Loopback

from biollm._runtime import ledger
from biollm.client import Client, CompletionError, InterruptedStreamError, get_model_client
from biollm.routing.litellm_private import OWN_HANDLER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

SENDERS = {  # how LiteLLM sends -> (litellm_provider, whether by its own handler and not OpenAI's SDK)
    "OpenAI's SDK": ("openai", ""),
    "LiteLLM's handler": ("openai", "True"),
    "vLLM's dialect": ("hosted_vllm", "True"),
    "Gemini's dialect": ("gemini", "True"),
}
RESETS = {
    "after the request": 0,
    "in the headers": 0.5,
    "before the body": 1,
    "in the body": 2.5,
}
FAULTS = {
    **{f"reset {place}": Behaviour(reset=at) for place, at in RESETS.items()},
    "hung up in the headers": Behaviour(tear=0),
    "a redirect": Behaviour(307, headers=(("Location", "/v1/elsewhere"),), body="over there"),
    "an unknown parameter": b.error(422, "Extra inputs are not permitted: parallel_tool_calls", "extra_forbidden"),
}
PROBES = 1  # connections that carry no request: a look whether the host takes any


def ask(client: Client, stream: bool) -> str:
    """Return the answer's text."""
    if stream:
        completion = list(client.stream("hi", on_interrupt="restart"))[-1].completion
        assert completion
        return completion.text
    return client.complete("hi").text


def counted(deployment: str) -> int:
    """Return how many requests to a deployment are in the ledger."""
    ledger().flush()
    return sum(record.deployment == deployment for record in ledger().history())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("sender", SENDERS)
def test_a_fault_is_one_request(
    net: Loopback,
    waterfall: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    sender: str,
    fault: str,
    stream: bool,
) -> None:
    dialect, own = SENDERS[sender]
    monkeypatch.setenv(OWN_HANDLER, own)
    first, second = net.serve(then=FAULTS[fault]), net.serve(text="from second")
    waterfall(first={"base_url": first.url, "litellm_provider": dialect}, second=second)
    assert ask(get_model_client(), stream) == "from second"
    assert 1 <= len(first.requests) == counted("first/small")
    assert len(second.requests) == counted("second/small") == 1


EVERY = {name: how for name, how in vars(b).items() if isinstance(how, Behaviour)} | {
    "SAYS_AGAIN": Behaviour(503, headers=(("Retry-After", "0"), ("x-should-retry", "true")), body="again"),
    "LATE": Behaviour(hang=1, pause=0.1),
    "GARBLED": Behaviour(garble=3),
    "NO_END": Behaviour(done=False),
    "GEMINI_429": b.gemini_limited("Minute", "17s"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("own", ["", "True"], ids=["OpenAI's SDK", "LiteLLM's handler"])
@pytest.mark.parametrize("fault", EVERY)
def test_the_ledger_counts_what_was_sent(
    net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, fault: str, own: str, stream: bool
) -> None:
    monkeypatch.setenv(OWN_HANDLER, own)
    first, second = net.serve(then=EVERY[fault]), net.serve(text="from second")
    waterfall(first=first, second=second)
    with suppress(CompletionError):
        ask(get_model_client(timeout=0.5 if "HANG" in fault or fault == "DRIP" else 30), stream)
    assert [len(first.requests), len(second.requests)] == [counted("first/small"), counted("second/small")]
    assert first.requests


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("sender", SENDERS)
def test_a_kept_connection_that_is_reset_is_one_request(
    net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sender: str, stream: bool
) -> None:
    dialect, own = SENDERS[sender]
    monkeypatch.setenv(OWN_HANDLER, own)
    first, second = net.serve(b.HTTP_400, then=Behaviour(reset=0)), net.serve(text="from second")
    waterfall(first={"base_url": first.url, "litellm_provider": dialect}, second=second)
    client = get_model_client()
    assert [ask(client, stream), ask(client, stream)] == ["from second"] * 2
    assert len(first.requests) == counted("first/small") == 3, "the third is the waterfall's own second try"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("sender", SENDERS)
def test_a_connection_that_is_reset_before_the_request_is_one_connection(
    net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sender: str, stream: bool
) -> None:
    dialect, own = SENDERS[sender]
    monkeypatch.setenv(OWN_HANDLER, own)
    first, second = net.serve(greets=False), net.serve(text="from second")
    waterfall(first={"base_url": first.url, "litellm_provider": dialect}, second=second)
    assert ask(get_model_client(), stream) == "from second"
    assert (counted("first/small"), first.connections) == (2, 2 * (1 + PROBES))


def test_a_redirect_carries_no_prompt_elsewhere(net: Loopback, waterfall: Callable[..., Path]) -> None:
    elsewhere = net.serve()
    there = Behaviour(308, headers=(("Location", f"{elsewhere.url}/chat/completions"),), body="moved")
    waterfall(first=net.serve(then=there), second=net.serve(text="from second"))
    completion = get_model_client().complete("hi")
    assert (completion.text, completion.attempts[0].status, elsewhere.requests) == ("from second", 308, [])


SSE = {name: SENDERS[name] for name in ("OpenAI's SDK", "LiteLLM's handler", "vLLM's dialect")}


@pytest.mark.parametrize("sender", SSE)
def test_an_event_that_lost_its_end_breaks_the_stream(
    net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sender: str
) -> None:
    dialect, own = SSE[sender]
    monkeypatch.setenv(OWN_HANDLER, own)
    first = net.serve(then=Behaviour(hang=3, pause=0.1, garble=3), text="all of these words")
    waterfall(first={"base_url": first.url, "litellm_provider": dialect}, second=net.serve(text="from second"))
    said: list[str] = []
    with pytest.raises(InterruptedStreamError, match="not valid JSON"):
        said += (str(piece) for piece in get_model_client().stream("hi"))
    assert "".join(said) == "all "


@pytest.mark.parametrize("sender", SSE)
@pytest.mark.parametrize(
    "text",
    [
        "all of these words",
        "it ends with data: [DONE] and not before",
        "<s> a </s> b <|endoftext|> c <|im_end|> d",
        " \n\n \t x  y \n",
        "one\u2028two and\u2029three\x85four \u00e9\U0001f600",
    ],
)
def test_a_stream_is_whole_beside_noise_and_with_any_character(
    net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sender: str, text: str
) -> None:
    dialect, own = SSE[sender]
    monkeypatch.setenv(OWN_HANDLER, own)
    waterfall(first={"base_url": net.serve(then=Behaviour(noise=3), text=text).url, "litellm_provider": dialect})
    assert ask(get_model_client(), stream=True) == text


def test_requests_of_the_host_program_are_sent_as_ever(net: Loopback, waterfall: Callable[..., Path]) -> None:
    elsewhere = net.serve()
    there = Behaviour(307, headers=(("Location", f"{elsewhere.url}/chat/completions"),), body="moved")
    first = net.serve(then=there)
    waterfall(first=net.serve())
    get_model_client().complete("hi")  # from here on biollm has its hand on the sending

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(follow_redirects=True) as client:
            return await client.post(first.url + "/chat/completions", json={"messages": []})

    assert asyncio.run(post()).status_code == 200
    assert len(elsewhere.requests) == 1


def test_what_the_host_program_puts_around_the_sending_stays(
    net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(first=net.serve())
    client, seen = get_model_client(), list[str]()
    client.complete("hi")
    inner = httpx.AsyncClient.send

    async def instrumented(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        seen.append(request.method)
        return await inner(self, request, **options)

    monkeypatch.setattr(httpx.AsyncClient, "send", instrumented)
    client.complete("hi")
    client.complete("hi")
    assert seen.count("POST") == 2
