"""The chunks of a stream are joined as they come, and the answer that they make is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from biollm.routing import import_waterfall
from biollm.routing.responses import fold

TOOL = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "blast", "arguments": "{}"}}
END: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
LOGPROBS = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}


def said(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


TEXT = [said(role="assistant", content=""), *(said(content=f"{at} ") for at in range(40))]


def chunks(told: list[dict[str, Any]]) -> list[Any]:
    import_waterfall()
    from litellm.types.utils import ModelResponseStream

    return [ModelResponseStream(**copy.deepcopy(each), id="x", model="m", created=1) for each in told]


def built(found: list[Any]) -> Any:
    import litellm

    return litellm.stream_chunk_builder(found).model_dump(exclude={"usage", "created"})  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("told", "left"),
    [
        (TEXT + END, 3),
        ([*TEXT, said(tool_calls=[TOOL]), *END], 3),
        ([*(said(reasoning_content=f"{at}", content="") for at in range(9)), *TEXT, *END], 4),
        ([*TEXT, said(content="a", reasoning_content="b"), *TEXT, *END], 5),
        ([{"choices": [{**TEXT[1]["choices"][0], "logprobs": LOGPROBS}]}, *TEXT, *END], 4),
        ([*TEXT, *END, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}], 3),
        (END, 1),
        ([], 0),
    ],
    ids=["text", "tools", "thought first", "thought between", "logprobs", "usage", "end alone", "nothing"],
)
def test_what_is_joined_makes_the_same_answer(told: list[dict[str, Any]], left: int) -> None:
    whole = chunks(told)
    found = chunks(told)
    for _ in range(2):  # again and again, as a stream goes on
        fold(found)
        assert len(found) == left
    if told:
        assert built(found) == built(whole)
