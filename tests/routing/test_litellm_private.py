"""LiteLLM still has each private name that biollm uses, and what they are used for works."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from provider import Loopback

from biollm.routing import import_router, litellm_private

Write = Callable[..., Path]
TOOL = {"type": "function", "function": {"name": "blast", "parameters": {"type": "object", "properties": {}}}}


def package() -> Path:
    spec = find_spec("litellm")
    assert spec and spec.origin
    return Path(spec.origin).parent


@cache
def mocked(stream: bool) -> Any:
    """Return an answer that LiteLLM makes up, so that only its own classes are looked at."""
    import_router()
    import litellm

    made = litellm.completion("openai/m", [{"role": "user", "content": "hi"}], mock_response="hello", stream=stream)
    if stream:
        list(made)
    return made


def test_is_internal_call() -> None:
    import_router()
    from litellm._internal_context import is_internal_call

    assert isinstance(is_internal_call, ContextVar)
    assert "is_internal_call.get()" in (package() / "utils.py").read_text()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (litellm_private.OWN_HANDLER, "main.py"),
        (litellm_private.STREAM_WAS_CUT, "litellm_core_utils/streaming_handler.py"),
        (litellm_private.NOT_JSON, "llms/openai/openai.py"),
        (litellm_private.BAD_MESSAGE, "llms/vertex_ai/gemini/transformation.py"),
        ('"response_cost" in hidden_params', "litellm_core_utils/litellm_logging.py"),
        ('_hidden_params["additional_headers"]', "litellm_core_utils/streaming_handler.py"),
    ],
)
def test_words_in_the_source(name: str, where: str) -> None:
    assert name in (package() / where).read_text()


def test_prices_file() -> None:
    assert (package() / litellm_private.PRICES).is_file()


def test_loggers() -> None:
    mocked(False)
    assert set(litellm_private.LOGGERS) <= set(logging.root.manager.loggerDict)


def test_hidden_params() -> None:
    litellm_private.skip_pricing(mocked(False))
    assert 0 < mocked(False)._hidden_params["response_cost"] < 1e-300
    assert litellm_private.provider_headers(mocked(False)) == mocked(False)._hidden_params.get("additional_headers", {})


def test_stream_chunks() -> None:
    kept = litellm_private.chunks(mocked(True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in kept if chunk.choices) == "hello"
    assert litellm_private.chunks(mocked(False)) is None


def python(code: str) -> Any:
    """Return what a fresh process prints, read as JSON."""
    made = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    return json.loads(made.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["own handler", "OpenAI's SDK"])
def test_a_program_of_ours_asks_without_openais_sdk(own: bool, net: Loopback, waterfall: Write) -> None:
    server = net.serve(text="here")
    waterfall(only=server)
    code = f"""
        from biollm.routing import litellm_private
        {own} and litellm_private.use_own_handler()
        from biollm.client import get_model_client
        client = get_model_client()
        assert (client.complete("hi").text, "".join(map(str, client.stream("hi")))) == ("here", "here")
        print("1")
    """
    python(code)
    assert ["x-stainless-lang" in request.headers for request in server.completions] == [not own] * 2


@pytest.mark.slow
def test_the_tokenizer_is_loaded_when_something_counts() -> None:
    code = """
        import json, tiktoken
        from biollm.routing import import_router, litellm_private
        import_router()
        litellm_private.defer_tokenizer()
        import litellm
        from litellm.main import _get_encoding
        deferred = type(_get_encoding()).__module__ == "biollm.routing.litellm_private"
        words = "samtools markdup"
        tokens = tiktoken.get_encoding("cl100k_base").encode(words)
        same = _get_encoding().encode(words) == tokens, litellm.token_counter("gpt-4", text=words) == len(tokens)
        print(json.dumps([deferred, *same]))
    """
    assert python(code) == [True, True, True]


@pytest.mark.slow
def test_tools_work_without_the_mcp_package(net: Loopback, waterfall: Write) -> None:
    server = net.serve()
    waterfall(only=server)
    code = f"""
        import json, sys
        sys.modules["mcp"] = None
        from biollm.client import get_model_client
        client = get_model_client()
        *_, last = client.stream("hi", tools=[{TOOL}])
        answers = client.complete("hi", tools=[{TOOL}]), last.completion
        print(json.dumps([call["function"]["name"] for answer in answers for call in answer.tool_calls]))
    """
    assert python(code) == ["blast", "blast"]
    assert [request.body["tools"] for request in server.completions] == [[TOOL], [TOOL]]


@pytest.mark.slow
def test_a_free_rung_leaves_the_price_of_its_model_alone(
    net: Loopback, waterfall: Write, paid: Callable[..., dict[str, Any]]
) -> None:
    beyond = net.serve()
    # The first rung's id, openai/gpt-4o, is LiteLLM's name of the model.
    waterfall(
        openai=paid(beyond, "openai", "gpt-4o", free_tier=True),
        paid=paid(beyond, "paid", "gpt-4o"),
    )
    code = """
        import json
        from biollm.client import get_model_client
        client = get_model_client()
        answers = [client.complete("hi", provider=name) for name in ("paid", "openai")]
        print(json.dumps([(answer.provider, answer.cost_usd > 0) for answer in answers]))
    """
    assert python(code) == [["paid", True], ["openai", False]]
