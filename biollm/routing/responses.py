"""Reads LiteLLM's responses and streams: their text, tool calls and tokens, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from biollm.routing.failures import BROKE_OFF, CUT, EMPTY, FILTERED, NO_CHOICES, STRANGER, USED_UP, Failure
from biollm.routing.litellm_private import chunks, provider_headers
from biollm.routing.normalize import text
from biollm.routing.request import InFlight
from biollm.slurm.endpoints import START
from biollm.types import Usage

# The fields of a chunk that may hold nothing but text, and of its one choice.
_FRAME = {"id", "created", "model", "object", "choices", "system_fingerprint", "service_tier"}
_CHOICE = {"index", "delta"}
_CHARS_PER_TOKEN = 4


def spent(inflight: InFlight, prompt: int) -> Usage:
    """Return the tokens that the provider stated; else an estimate by the length of the prompt and of what came.

    If nothing came, nothing was paid. A broken stream may have stated the tokens of a part of its answer.
    """
    kept = chunks(inflight.response)
    pieces: Sequence[Any] = [inflight.response] if kept is None else kept
    if inflight.response is None or not pieces:
        return Usage()
    stated = _usage(next((each.usage for each in reversed(pieces) if getattr(each, "usage", None)), None))
    if stated.total_tokens and (kept is None or finishes(kept)):
        return stated
    came = sum(_length(choice) for piece in pieces for choice in piece.choices) // _CHARS_PER_TOKEN
    answer = max(stated.completion_tokens, came, 1)
    prompt = stated.prompt_tokens or prompt
    return replace(stated, prompt_tokens=prompt, completion_tokens=answer, estimated=True)


def _usage(usage: Any) -> Usage:
    def count(name: str, part: str | None = None) -> int:
        return getattr(getattr(usage, part, None) if part else usage, name, 0) or 0

    return Usage(
        count("prompt_tokens"),
        count("completion_tokens"),
        count("cached_tokens", "prompt_tokens_details"),
        count("cache_creation_tokens", "prompt_tokens_details"),
        count("reasoning_tokens", "completion_tokens_details"),
    )


def _length(choice: Any) -> int:
    """Return the characters of a choice's text, thoughts and tool calls."""
    held = getattr(choice, "delta", None) or getattr(choice, "message", None) or choice
    calls = (call.function.arguments for call in getattr(held, "tool_calls", None) or ())
    texts = (getattr(held, name, None) for name in ("content", "reasoning_content", "text"))
    return sum(len(text or "") for text in (*texts, *calls))


def service_tier(response: Any) -> str | None:
    """Return the service tier that a response or a stream states."""
    pieces = (response, *reversed(chunks(response) or ()))
    return next(filter(None, (getattr(each, "service_tier", None) for each in pieces)), None)


def content(response: Any) -> str:
    """Return the text of a chat or text completion."""
    choice = response.choices[0]
    return text((choice.message.content if hasattr(choice, "message") else choice.text) or "")


def tool_calls(choice: Any) -> Sequence[Any]:
    """Return a choice's tool calls; none in a text completion."""
    return getattr(getattr(choice, "message", None), "tool_calls", None) or ()


def emptiness(response: Any) -> Failure | None:
    """Return what is wrong with a response that came without an error."""
    if not response.choices:
        return NO_CHOICES
    choice = response.choices[0]
    if content(response).strip() or tool_calls(choice):
        return None
    return _without_text(_refusal(getattr(choice, "message", None)), choice.finish_reason)


def stranger(inflight: InFlight) -> Failure | None:
    """Return the failure of a discovered server whose response does not carry its start id."""
    start = inflight.deployment.start
    named = provider_headers(inflight.response).get(f"llm_provider-{START}") if start else ""
    return None if named == start else STRANGER


def delta(chunk: Any) -> str:
    """Return the text that a chunk of a stream adds."""
    return text(chunk.choices[0].delta.content or "") if chunk.choices else ""


def fold(kept: list[Any]) -> None:
    """Join in place chunks of nothing but text, or reasoning: LiteLLM keeps each chunk of a stream, 3 kB for a word.

    The last two stay, since LiteLLM compares them.
    """
    folded: list[Any] = []
    for kind, found in groupby(kept[:-2], _kind):
        run = list(found)
        if kind:
            deltas = [chunk.choices[0].delta for chunk in run]
            setattr(deltas[0], kind, "".join(getattr(each, kind) or "" for each in deltas))
            del run[1:]
        folded += run
    kept[:-2] = folded


def _kind(chunk: Any) -> str | None:
    """Return the one field of the answer that a chunk adds to; None if it holds anything else."""
    fields: dict[str, Any] = chunk.model_dump(exclude_none=True)
    choices = fields.get("choices", [])
    if not fields.keys() <= _FRAME or [set(choice) for choice in choices] != [_CHOICE]:
        return None
    added = {name for name, value in choices[0]["delta"].items() if name != "role" and value != ""} or {"content"}
    return next(iter(added)) if added in ({"content"}, {"reasoning_content"}) else None


async def first_content(inflight: InFlight) -> Failure | None:
    """Read a stream up to its first content, tool call or reasoning; return what is wrong if none comes."""
    async for chunk in inflight.response:
        inflight.head.append(chunk)
        new = chunk.choices[0].delta if chunk.choices else None
        if new and (new.content or new.tool_calls or getattr(new, "reasoning_content", None)):
            inflight.ttft_ms = inflight.ms
            return None
    ends = finishes(chunks(inflight.response))
    refusal = "".join(_refusal(chunk.choices[0].delta) for chunk in inflight.head if chunk.choices)
    return _without_text(refusal, ends[-1]) if ends else CUT


def _refusal(message: Any) -> str:
    """Return the text of the `refusal` field, or ""."""
    moved: dict[str, Any] = getattr(message, "provider_specific_fields", None) or {}  # by LiteLLM
    return getattr(message, "refusal", None) or moved.get("refusal") or ""


def _without_text(refusal: str, finish: str | None) -> Failure:
    """Return what a response without text or tool calls means, by its refusal and finish reason."""
    if refusal:
        return Failure("refusal", f"refused: {refusal[:200]}")
    return {"content_filter": FILTERED, "length": USED_UP, "error": BROKE_OFF}.get(finish or "", EMPTY)


def finishes(kept: Sequence[Any]) -> list[str]:
    """Return the provider's own finish reasons of a stream; LiteLLM invents a "stop" for one that was cut."""
    return [chunk.choices[0].finish_reason for chunk in kept if chunk.choices and chunk.choices[0].finish_reason]


def without_text(kept: Sequence[Any]) -> Failure | None:
    """Return what is wrong with a stream that ended without any text; None if it calls a tool."""
    if any(chunk.choices and chunk.choices[0].delta.tool_calls for chunk in kept):
        return None
    return _without_text("", finishes(kept)[-1])
