"""Tools reach a provider on an installation without the mcp package, by a private name of LiteLLM's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from provider import Loopback

pytestmark = pytest.mark.slow  # each takes seconds

TOOL = {"type": "function", "function": {"name": "blast", "parameters": {"type": "object", "properties": {}}}}
NO_MCP = f"import json, sys; sys.modules['mcp'] = None; TOOL = {TOOL!r}\n"
BARE = """
from biollm.routing import import_waterfall
import_waterfall()
import litellm
params = {"model": "openai/small", "api_base": sys.argv[1], "api_key": "none"}
router = litellm.Router(model_list=[{"model_name": "biollm", "litellm_params": params}], num_retries=0)
try:
    answer = router.completion("biollm", [{"role": "user", "content": "hi"}], tools=[TOOL], **json.loads(sys.argv[2]))
    print([call.function.name for call in answer.choices[0].message.tool_calls])
except Exception as error:
    print(error)
"""
OURS = """
from biollm.client import get_model_client
client = get_model_client()
*_, last = client.stream("hi", tools=[TOOL])
print([call["function"]["name"] for done in (client.complete("hi", tools=[TOOL]), last.completion) for call in done.tool_calls])
"""


def python(code: str, *arguments: str) -> str:
    """Return what a process without mcp prints."""
    command = [sys.executable, "-c", NO_MCP + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(
    ("private", "printed"), [({"_skip_mcp_handler": True}, "['blast']"), ({}, "'mcp'")], ids=["with", "without"]
)
def test_a_router_takes_tools_by_that_name_alone(net: Loopback, private: dict[str, bool], printed: str) -> None:
    assert printed in python(BARE, net.serve().url, json.dumps(private))


def test_a_call_and_a_stream_with_tools_work_without_mcp(net: Loopback, waterfall: Callable[..., Path]) -> None:
    server = net.serve()
    waterfall(only=server)
    assert python(OURS) == "['blast', 'blast']\n"
    assert [request.body["tools"] for request in server.completions] == [[TOOL], [TOOL]]
    assert not any("_skip_mcp_handler" in request.body for request in server.completions)
