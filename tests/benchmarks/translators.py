"""What the gateway's translators of Anthropic's and OpenAI's newer dialect take of a 50 kB request, and of a chunk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from setting import Bar

from biollm.gateway import messages_api, responses_api

TIMES = 200
TEXT = "The process NFCORE_RNASEQ:STAR_ALIGN was killed with exit status 137. " * 35
PARAMETERS = {"type": "object", "properties": {f"field{at}": {"type": "string"} for at in range(20)}}
TURNS = 16


def _claude() -> dict[str, Any]:
    tools = [{"name": f"tool{at}", "description": TEXT[:400], "input_schema": PARAMETERS} for at in range(12)]
    asked = {"role": "user", "content": [{"type": "text", "text": TEXT[:1200], "cache_control": {"type": "ephemeral"}}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": TEXT[:1200]}]}
    turns = [asked, said] * (TURNS // 2)
    return {"model": "biollm", "max_tokens": 32000, "stream": True, "tools": tools, "messages": [*turns, asked],
            "system": [{"type": "text", "text": TEXT * 4}]}  # fmt: skip


def _codex() -> dict[str, Any]:
    tools = [
        {"type": "function", "name": f"tool{at}", "description": TEXT[:400], "parameters": PARAMETERS}
        for at in range(9)
    ]
    asked = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": TEXT[:1200]}]}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": TEXT[:1200]}]}
    turns = [asked, said] * (TURNS // 2)
    return {"model": "biollm", "stream": True, "store": False, "tools": tools, "input": [*turns, asked],
            "instructions": TEXT * 5}  # fmt: skip


def measure() -> list[Bar]:
    """Return the bars, of medians."""
    frame = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "first/small"}
    chunk = {**frame, "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]}
    bars: list[Bar] = []
    dialects: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("/v1/messages", messages_api, _claude()),
        ("/v1/responses", responses_api, _codex()),
    )
    for path, dialect, body in dialects:
        events = dialect.Events(body)
        list(events.feed(chunk))
        bars += [
            Bar(f"{path}: a request of {len(str(body)) // 1000} kB", _ms(lambda: dialect.request(body)), 1, "ms"),
            Bar(f"{path}: a chunk", 1000 * _ms(lambda: list(events.feed(chunk))), 50, "us"),
        ]
    return bars


def _ms(work: Callable[[], object]) -> float:
    took: list[float] = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)
