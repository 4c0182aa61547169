"""What makes LiteLLM lighter in programs of ours leaves its answers, its prices and its tokenizer as they are."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from provider import Loopback

pytestmark = pytest.mark.slow  # each takes seconds

Write = Callable[..., Path]


def python(code: str) -> Any:
    """Return what a fresh process prints, read as JSON."""
    made = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    return json.loads(made.stdout)


@pytest.mark.parametrize("own", [True, False], ids=["own handler", "OpenAI's SDK"])
def test_a_program_of_ours_asks_without_openais_sdk(own: bool, net: Loopback, waterfall: Write) -> None:
    server = net.serve(text="here")
    waterfall(only=server)
    code = f"""
        from biollm.routing import lean
        {own} and _lean.own_handler()
        from biollm.client import get_model_client
        client = get_model_client()
        assert (client.complete("hi").text, "".join(map(str, client.stream("hi")))) == ("here", "here")
        print("1")
    """
    python(code)
    assert ["x-stainless-lang" in request.headers for request in server.completions] == [not own] * 2


def test_the_tokenizer_is_loaded_by_who_counts() -> None:
    code = """
        import json, sys
        from biollm.routing import lean
        from biollm.routing import import_waterfall
        import_waterfall()
        _lean.settle()
        import litellm
        from litellm.main import _get_encoding
        unasked = _get_encoding() and "litellm.litellm_core_utils.default_encoding" in sys.modules
        tokens = litellm.encoding.encode("samtools markdup")
        import tiktoken
        print(json.dumps([unasked, tokens == tiktoken.get_encoding("cl100k_base").encode("samtools markdup")]))
    """
    assert python(code) == [False, True]


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
