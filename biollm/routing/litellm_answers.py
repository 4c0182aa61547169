"""Turns LiteLLM's responses and streams into OpenAI's JSON, and takes back what LiteLLM adds to them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast

from biollm.routing.answers import Answer
from biollm.routing.litellm_private import chunks, provider_headers
from biollm.routing.normalize import text
from biollm.types import Json

_CHUNKS = 64  # that LiteLLM keeps of a stream, 3 kB for a word
_PREFIX = "llm_provider-"


def answer(response: Any) -> Answer:
    """Return the Answer of a response, or of a stream."""
    headers = {name.removeprefix(_PREFIX): value for name, value in provider_headers(response).items()}
    if chunks(response) is not None:
        return Answer(headers, chunks=_stream(response))
    return Answer(headers, _tidy(response.model_dump(exclude_none=True), "message"))


async def _stream(stream: Any) -> AsyncGenerator[Json, None]:
    """Yield the chunks of a stream as the provider sent them: LiteLLM invents a "stop" and a usage where it sent none."""
    kept, seen, finished = chunks(stream), 0, False
    try:
        async for chunk in stream:
            found = _tidy(chunk.model_dump(exclude_none=True), "delta")
            found.pop("usage", None)
            for each in kept[seen:]:
                finished = finished or bool(each.choices and each.choices[0].finish_reason)
                if usage := getattr(each, "usage", None):
                    found["usage"] = usage.model_dump(exclude_none=True)
            seen = len(kept)
            if seen > _CHUNKS:
                del kept[:-2]  # LiteLLM compares the last two
                seen = 2
            if not finished:
                for choice in found["choices"]:
                    choice.pop("finish_reason", None)
            yield found
    finally:
        await stream.aclose()


def _tidy(found: Json, name: str) -> Json:
    """Put the fields that LiteLLM moves aside back where the provider sent them."""
    for choice in found["choices"]:
        if message := choice.get(name):
            moved = cast("Json", message.pop("provider_specific_fields", None) or {})
            if isinstance(told := message.get("content"), str):
                message["content"] = text(told)
            message |= {each: value for each, value in moved.items() if each not in message and value is not None}
        choice.pop("provider_specific_fields", None)
    return found
