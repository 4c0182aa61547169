"""Chat completions, whole and in chunks, as the gateway holds them, and ways to spoil a request."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
USAGE: Json = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
    "completion_tokens_details": {"reasoning_tokens": 7},
}


def call(ident: str, name: str, arguments: str, **more: Any) -> Json:
    """Return a tool call."""
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def whole(text: str | None = None, calls: list[Json] | None = None, finish: str = "stop", **message: Any) -> Json:
    """Return a whole chat completion."""
    given = {"role": "assistant", "content": text, **message, **({"tool_calls": calls} if calls else {})}
    choices = [{"index": 0, "message": given, "logprobs": None, "finish_reason": finish}]
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "p/m", "choices": choices, "usage": USAGE}


def chunks(*deltas: Json, finish: str = "stop", usage: Json | None = USAGE, **choice: Any) -> list[Json]:
    """Return the chunks of a stream: these deltas, the end and the tokens."""
    common = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "p/m"}
    ends = [(each, None, {}) for each in ({"role": "assistant", "content": ""}, *deltas)] + [({}, finish, choice)]
    found = [
        {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": end, **more}]} for delta, end, more in ends
    ]
    return [*found, {**common, "choices": [], "usage": usage}] if usage else found


def tool_delta(at: int, *given: Any, **more: Any) -> Json:
    """Return the delta of a whole tool call."""
    return {"tool_calls": [{"index": at, **call(*given, **more)}]}


def spoiled(body: Json) -> Iterator[Json]:
    """Yield copies of a body with one value replaced by another, at every place."""
    for path in _paths(body):
        for value in (None, 7, "x", [], {}, [7], True):
            made = copy.deepcopy(body)
            inside: Any = made
            for step in path[:-1]:
                inside = inside[step]
            inside[path[-1]] = value
            yield made


def _paths(value: Any) -> Iterator[list[Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield [key]
        yield from ([key, *rest] for rest in _paths(inner))
