"""What the callback inside LiteLLM sees of a call; the Router and the HTTP server are real."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from provider import Loopback

from biollm.ledger import Claim, Ledger
from biollm.routing import callback, import_router
from biollm.routing.calls import Call

ASK = [{"role": "user", "content": "hi"}]
ORPHAN = [*ASK, {"role": "tool", "tool_call_id": "call_1", "content": "42"}]
BROKEN_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{no json"}}
BROKEN = [
    *ASK,
    {"role": "assistant", "tool_calls": [BROKEN_CALL]},
    {"role": "tool", "tool_call_id": "c", "content": ""},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "messages", "handed"),
    [
        ("openai/small", ASK, True),
        ("hosted_vllm/small", ASK, True),
        ("gemini/small", ASK, True),
        ("anthropic/small", ASK, True),
        ("gemini/small", ORPHAN, False),
        ("gemini/small", BROKEN, False),
        ("anthropic/small", BROKEN, False),
        ("openai/small", [{"role": "user", "content": [{"type": "image_url"}]}], False),
    ],
)
def test_a_call_shows_whether_litellm_handed_the_request_to_its_http_client(
    net: Loopback, tmp_path: Path, model: str, messages: list[Any], handed: bool, stream: bool
) -> None:
    server = net.serve()
    call = Call(Ledger(tmp_path), {"a": Claim("a", (), ())})
    asyncio.run(_ask(model, server.url, messages, stream, call))
    assert (call.translated, len(server.requests)) == (handed, int(handed))


async def _ask(model: str, url: str, messages: list[Any], stream: bool, call: Call) -> None:
    import_router()
    import litellm

    callback.install()
    callback.current.set(call)
    params = {"model": model, "api_base": url, "api_key": "none", "drop_params": True}
    entry = {"model_name": "biollm", "litellm_params": params, "model_info": {"id": "a"}}
    router: Any = litellm.Router(model_list=[entry], num_retries=0, disable_cooldowns=True)  # pyright: ignore
    with suppress(Exception):  # an answer in the wrong dialect, or a refused request
        await router.acompletion("biollm", messages, stream=stream, disable_fallbacks=True, **{"no-log": True})
