"""LiteLLM's Router and the direct sender send the same requests, and make the same of every answer.

Where they differ on purpose, the difference is stated here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import behaviours as b
import pytest
from behaviours import Behaviour
from failures import CASES
from provider import Json, Loopback

from biollm._runtime import ledger
from biollm.client import Client, CompletionError, StreamChunk, StreamRestarted, get_model_client
from biollm.types import Completion

pytestmark = pytest.mark.slow

Write = Callable[..., Path]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
SCHEMA = {"title": "Answer", "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SPOKEN: list[Json] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "look"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I should look."},
    {"role": "tool", "tool_call_id": "c1", "content": "found"},
    {"role": "user", "content": [{"type": "text", "text": "é 🧬 \u2028"}, IMAGE]},
]
REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a text": ("hi", {}),
    "a conversation with tools and an image": (SPOKEN, {"tools": [TOOL], "tool_choice": "auto"}),
    "tool_choice without tools": ("hi", {"tool_choice": "none"}),
    "sampling": ("hi", {"temperature": 0, "max_tokens": 7, "extra": {"top_p": 0.5, "seed": 3, "stop": ["x"]}}),
    "max_completion_tokens": ("hi", {"extra": {"max_completion_tokens": 9}}),
    "further parameters": ("hi", {"extra": {"n": 1, "user": "me", "parallel_tool_calls": False, "logprobs": True}}),
    "fields of the provider's own": ("hi", {"extra": {"extra_body": {"top_k": 4, "repetition_penalty": 1.1}}}),
    "reasoning": ("hi", {"extra": {"reasoning_effort": "low"}}),
    "a system message": ("hi", {"system": "Be brief."}),
}
ANSWERS: dict[str, Behaviour] = {
    "fine": b.OK,
    "no usage": Behaviour(usage={}),
    "details of usage": Behaviour(
        usage={
            "prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2},
        }
    ),
    "length": Behaviour(finish="length"),
    "filtered": Behaviour(text="", finish="content_filter"),
    "flex": Behaviour(service_tier="flex"),
    "a call in fragments": Behaviour(fragments=4),
    "no [DONE]": Behaviour(done=False),
    "noise": Behaviour(noise=2),
    "half a surrogate": Behaviour(text="a \ud83d b"),
    "a redirect": Behaviour(307, (("Location", "http://127.0.0.1:9/v1/chat/completions"),), body=""),
}  # fmt: skip
FAILS = {
    name: getattr(b, name)
    for name in ("HTTP_400", "HTTP_401", "HTTP_403", "HTTP_404", "HTTP_408", "HTTP_429", "HTTP_500", "HTTP_502",
                 "HTTP_503", "HTTP_529", "HTML", "NO_CHOICES", "EMPTY", "CUT", "TORN", "SSE_ERROR", "CONTEXT_TOO_LONG",
                 "CONTENT_POLICY")
}  # fmt: skip
FAILS |= {f"case {case.number}": case.behaviour for case in CASES}
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@dataclasses.dataclass(frozen=True)
class Seen:
    """What came of a request: who was asked for what, what the caller got, and what is on cooldown."""

    sent: tuple[tuple[str, str, str, Json], ...]
    got: Json
    cooling: frozenset[str]


@pytest.fixture
def seen(net: Loopback, waterfall: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Seen]]:
    """Return what each sender makes of the same request, with a state of its own."""

    def both(behaviour: Behaviour, ask: Callable[[Client], Completion | CompletionError], **config: Any) -> list[Seen]:
        found: list[Seen] = []
        for sender in ("litellm", "direct"):
            monkeypatch.setenv("BIOLLM_STATE_DIR", str(tmp_path / sender))
            monkeypatch.setenv("BIOLLM_SENDER", sender)
            first, last = net.serve(then=behaviour), net.serve(text="from last")
            waterfall(first={"base_url": first.url, "rate_limit": "100/min", **config}, last=last)
            with get_model_client() as client:
                got = facts(ask(client))
            sent = tuple(
                (r.method, r.path, r.headers["authorization"], without_null(r.body))
                for r in (*first.requests, *last.requests)
            )
            found.append(Seen(sent, got, frozenset(key.partition("http:")[0] for key in ledger().blocked())))
        return found

    return both


_NOISE = re.compile(r" \(cooldown [^)]*\)|(?<=HTTP 307): .*")  # a time until a date; what an empty body stands for


def without_null(value: Any) -> Any:
    """Return JSON without fields that are null: LiteLLM leaves them out."""
    if isinstance(value, dict):
        fields: Json = value  # pyright: ignore[reportUnknownVariableType]
        return {name: without_null(each) for name, each in fields.items() if each is not None}
    return [*map(without_null, value)] if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType]


def facts(got: Completion | CompletionError) -> Json:
    """Return what the caller sees, without times."""
    attempts = [(each.deployment, each.outcome, _NOISE.sub("", each.reason), each.status) for each in got.attempts]
    if isinstance(got, CompletionError):
        return {"error": type(got).__name__, "attempts": attempts}
    names = ("text", "provider", "model", "usage", "cost_usd", "tool_calls", "finish_reason", "reasoning", "degraded")
    choices = without_null(got.raw["choices"])
    return {**{name: getattr(got, name) for name in names}, "attempts": attempts, "choices": choices}


def differences(direct: Seen, through_litellm: Seen) -> Json:
    """Return what differs, by its name."""
    one, other = ({"sent": each.sent, "cooling": each.cooling, **each.got} for each in (direct, through_litellm))
    return {name: (one.get(name), other.get(name)) for name in one | other if one.get(name) != other.get(name)}


def asking(prompt: Any, stream: bool, **options: Any) -> Callable[[Client], Completion | CompletionError]:
    def ask(client: Client) -> Completion | CompletionError:
        try:
            if not stream:
                return client.complete(prompt, **options)
            *_, last = client.stream(prompt, on_interrupt="restart", **options)
        except CompletionError as error:
            return error
        assert not isinstance(last, StreamRestarted) and last.completion
        return last.completion

    return ask


@STREAMS
@pytest.mark.parametrize(("prompt", "options"), REQUESTS.values(), ids=REQUESTS)
def test_the_same_is_sent(seen: Callable[..., list[Seen]], prompt: Any, options: dict[str, Any], stream: bool) -> None:
    through_litellm, direct = seen(b.OK, asking(prompt, stream, **options))
    assert len(direct.sent) == 1
    found = differences(direct, through_litellm)
    assert not found, "\n".join(f"{name}:\n direct  {one}\n litellm {other}" for name, (one, other) in found.items())


@STREAMS
@pytest.mark.parametrize("behaviour", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("tools", [False, True], ids=["text", "tools"])
def test_the_same_is_made_of_an_answer(
    seen: Callable[..., list[Seen]], behaviour: Behaviour, tools: bool, stream: bool
) -> None:
    options: dict[str, Any] = {"tools": [TOOL]} if tools else {}
    through_litellm, direct = seen(behaviour, asking("hi", stream, **options))
    found = differences(direct, through_litellm)
    assert not found, "\n".join(f"{name}:\n direct  {one}\n litellm {other}" for name, (one, other) in found.items())


@STREAMS
@pytest.mark.parametrize("behaviour", FAILS.values(), ids=FAILS)
def test_the_same_is_made_of_a_failure(seen: Callable[..., list[Seen]], behaviour: Behaviour, stream: bool) -> None:
    through_litellm, direct = seen(behaviour, asking("hi", stream))
    found = differences(direct, through_litellm)
    assert not found, "\n".join(f"{name}:\n direct  {one}\n litellm {other}" for name, (one, other) in found.items())


def test_a_schema_is_asked_for_and_repaired_alike(seen: Callable[..., list[Seen]]) -> None:
    wrong = Behaviour(text='{"a": "x"}')
    through_litellm, direct = seen(wrong, asking("hi", False, response_model=SCHEMA))
    found = differences(direct, through_litellm)
    assert not found, "\n".join(f"{name}:\n direct  {one}\n litellm {other}" for name, (one, other) in found.items())
    assert [each[3]["messages"][-1]["role"] for each in direct.sent[:2]] == ["user", "user"]


def test_a_stream_comes_in_the_same_pieces(seen: Callable[..., list[Seen]]) -> None:
    pieces: list[list[tuple[str, str]]] = []

    def ask(client: Client) -> Completion:
        *came, last = [each for each in client.stream("hi", tools=[TOOL]) if isinstance(each, StreamChunk)]
        pieces.append([(each.kind, each.text) for each in came])
        assert last.completion and last.kind == "usage"
        return last.completion

    seen(Behaviour(fragments=3), ask)
    through_litellm, direct = pieces
    assert direct == through_litellm
    assert direct[-1] == ("tool_call", "")
