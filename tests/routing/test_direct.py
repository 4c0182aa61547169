"""The direct sender: which deployments it serves, what it sends them, and what it does with answers that are no answers.

That it and LiteLLM's Router send and understand the same is tested in test_both_senders.py and test_faults.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from behaviours import OK, Behaviour
from provider import Certificates, Loopback

from biollm.client import Client, CompletionError, get_model_client
from biollm.config import load_config
from biollm.routing import direct
from biollm.routing.deployments import Deployment, Requirements, build_deployments
from biollm.routing.direct import request_body, speaks
from biollm.routing.request import Request, Run
from biollm.routing.structured import ResponseSchema

Write = Callable[..., Path]
HI = [{"role": "user", "content": "hi"}]


def request(**more: Any) -> Request:
    return Request(HI, more.pop("params", {}), more.pop("requirements", Requirements()), **more)


@pytest.fixture
def deployment(waterfall: Write) -> Callable[..., Deployment]:
    def make(**provider: Any) -> Deployment:
        waterfall(one={"base_url": None, **provider})
        return build_deployments(load_config())[0]

    return make


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Client]:
    monkeypatch.setenv("BIOLLM_SENDER", "direct")
    return get_model_client


@pytest.mark.parametrize(
    ("provider", "spoken"),
    [
        ({"base_url": "https://lightning.ai/api/v1"}, True),
        ({"litellm_provider": "openai"}, True),
        ({"litellm_provider": "gemini"}, True),
        ({"litellm_provider": "gemini", "base_url": "https://proxy.lab/gemini"}, False),
        ({"litellm_provider": "anthropic"}, False),
        ({"litellm_provider": "groq"}, False),
    ],
)
def test_it_serves_what_speaks_openais_json(
    deployment: Callable[..., Deployment], provider: dict[str, Any], spoken: bool
) -> None:
    assert speaks(deployment(**provider)) is spoken


@pytest.mark.parametrize(
    ("more", "spoken"),
    [
        ({}, True),
        ({"params": {"tools": [{}], "temperature": 0}}, True),
        ({"requirements": Requirements(media=frozenset({"images"}))}, False),
        ({"schema": ResponseSchema({"type": "object"})}, False),
        ({"params": {"response_format": {"type": "json_object"}}}, False),
        ({"params": {"thinking": {"type": "enabled"}}}, False),
    ],
)
def test_gemini_is_left_to_litellm_where_its_openai_endpoint_may_lack_something(
    deployment: Callable[..., Deployment], more: dict[str, Any], spoken: bool
) -> None:
    assert speaks(deployment(litellm_provider="gemini"), request(**more)) is spoken


@pytest.mark.parametrize(
    ("model", "params", "sent"),
    [
        ("gpt-4o", {"max_tokens": 5, "temperature": 0.5}, {"max_completion_tokens": 5, "temperature": 0.5}),
        ("gpt-5-mini", {"max_tokens": 5, "temperature": 0.5, "top_p": 1}, {"max_completion_tokens": 5}),
        ("o3", {"logprobs": True, "seed": 1}, {"seed": 1}),
    ],
)
def test_openais_own_models_get_the_parameters_that_they_take(
    deployment: Callable[..., Deployment], model: str, params: dict[str, Any], sent: dict[str, Any]
) -> None:
    chosen = deployment(litellm_provider="openai", models=[model])
    path, body = request_body(
        Run(request(params=params)), chosen, [{"role": "developer", "content": "x"}], stream=False
    )
    assert path == "chat/completions"
    assert body == {"model": model, "messages": [{"role": "developer", "content": "x"}], **sent}


def test_a_command_and_a_gateway_answer_without_litellm(
    net: Loopback, waterfall: Write, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waterfall(first=net.serve(text="fine"))
    monkeypatch.setenv("BIOLLM_GATEWAY", "off")
    code = """
import sys
from biollm.cli.app import main
sys.argv = ["biollm", "complete", "hi"]
try:
    main()
finally:
    print(sorted({"litellm", "openai", "httpx"} & set(sys.modules)), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout.strip()) == (0, "fine")
    assert ran.stderr.splitlines()[-1] == "[]"


def test_a_certificate_is_verified_and_a_private_ca_is_trusted_by_its_file(
    net: Loopback, waterfall: Write, tmp_path: Path, client: Callable[[], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = Certificates.make(tmp_path)
    server = net.serve(text="over TLS", tls=certificates)
    waterfall(first=server)
    with pytest.raises(CompletionError, match="certificate is not trusted"):
        client().complete("hi")
    assert not server.completions
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    monkeypatch.setenv("BIOLLM_STATE_DIR", str(tmp_path / "without-cooldowns"))
    assert client().complete("hi").text == "over TLS"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_an_end_is_given_up(
    net: Loopback, waterfall: Write, client: Callable[[], Client], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(direct, "_MOST", 1 << 16)
    endless = Behaviour(
        body="data: " + "x" * (1 << 17), content_type="text/event-stream" if stream else "application/json"
    )
    waterfall(first=net.serve(then=endless), last=net.serve(text="from last"))
    pieces = [*client().stream("hi")] if stream else [client().complete("hi")]
    assert "".join(map(str, pieces)) == "from last"
    attempts = (pieces[-1].completion if stream else pieces[-1]).attempts  # type: ignore[union-attr]
    assert attempts[0].reason == "the response is too long"


def test_a_request_goes_to_no_other_host(net: Loopback, waterfall: Write, client: Callable[[], Client]) -> None:
    thief = net.serve()
    first = net.serve(then=Behaviour(307, (("Location", f"{thief.url}/chat/completions"),), body=""))
    waterfall(first=first, last=net.serve(text="from last"))
    assert client().complete("hi").text == "from last"
    assert thief.connections == 0


def test_a_stream_that_comes_whole_is_an_answer(net: Loopback, waterfall: Write, client: Callable[[], Client]) -> None:
    message = {"role": "assistant", "content": "at once", "reasoning": "thought"}
    whole = {"id": "x", "object": "chat.completion", "model": "small", "usage": {"prompt_tokens": 1, "completion_tokens": 2},
             "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
    waterfall(first=net.serve(then=Behaviour(body=json.dumps(whole))))
    *_, last = client().stream("hi")
    assert last.completion and (last.completion.text, last.completion.reasoning) == ("at once", "thought")  # type: ignore[union-attr]


def test_connections_are_kept_and_a_closed_one_costs_no_answer(
    net: Loopback, waterfall: Write, client: Callable[[], Client]
) -> None:
    server = net.serve(text="fine")
    waterfall(first=server)
    asker = client()
    for _ in range(5):
        asker.complete("hi")
        list(asker.stream("hi"))
    assert server.connections <= 2
    server.behaviour = OK
    assert asker.complete("hi").attempts[0].outcome == "ok"
