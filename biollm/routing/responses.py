"""Reads LiteLLM's answers and streams: their text, tool calls and tokens, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from biollm.routing.failures import BROKE_OFF, CUT, EMPTY, FILTERED, NO_CHOICES, USED_UP, Failure
from biollm.routing.litellm_private import chunks, provider_headers
from biollm.routing.normalize import text
from biollm.routing.request import InFlight
from biollm.slurm.endpoints import START
from biollm.types import Usage

STRANGER = Failure("stranger", "the answer does not name its server's start: another program has its port")
# The fields of a chunk that may hold nothing but text, and of its one choice.
_FRAME = {"id", "created", "model", "object", "choices", "system_fingerprint", "service_tier"}
_CHOICE = {"index", "delta"}
_CHARS_PER_TOKEN = 4


def usage_of(usage: Any) -> Usage:
    """Return the tokens of LiteLLM's usage; 0 where it has none."""

    def count(name: str, part: str | None = None) -> int:
        return getattr(getattr(usage, part, None) if part else usage, name, 0) or 0

    return Usage(
        count("prompt_tokens"),
        count("completion_tokens"),
        count("cached_tokens", "prompt_tokens_details"),
        count("cache_creation_tokens", "prompt_tokens_details"),
        count("reasoning_tokens", "completion_tokens_details"),
    )


def spent(sent: InFlight, prompt: int) -> Usage:
    """Return the tokens of what came, as the provider stated them; else an estimate by its length.

    Where nothing came, nothing was paid. A broken stream may have stated the tokens of a part of its answer.
    """
    kept = chunks(sent.response)
    pieces: Sequence[Any] = [sent.response] if kept is None else kept
    if sent.response is None or not pieces:
        return Usage()
    stated = usage_of(next((each.usage for each in reversed(pieces) if getattr(each, "usage", None)), None))
    if stated.total_tokens and (kept is None or finishes(kept)):
        return stated
    came = sum(_length(choice) for piece in pieces for choice in piece.choices) // _CHARS_PER_TOKEN
    answer = max(stated.completion_tokens, came)
    return replace(
        stated, prompt_tokens=stated.prompt_tokens or prompt, completion_tokens=max(answer, 1), estimated=True
    )


def _length(choice: Any) -> int:
    """Return the characters of a choice's text, thoughts and tool calls."""
    said = getattr(choice, "delta", None) or getattr(choice, "message", None) or choice
    calls = (call.function.arguments for call in getattr(said, "tool_calls", None) or ())
    texts = (getattr(said, name, None) for name in ("content", "reasoning_content", "text"))
    return sum(len(text or "") for text in (*texts, *calls))


def service_tier(response: Any) -> str | None:
    """Return the tier at which an answer or a stream says that it was served."""
    said = (getattr(each, "service_tier", None) for each in (response, *reversed(chunks(response) or ())))
    return next(filter(None, said), None)


def content(response: Any) -> str:
    """Return the text of an answer, chat or plain completion."""
    choice = response.choices[0]
    return text((choice.message.content if hasattr(choice, "message") else choice.text) or "")


def tool_calls(choice: Any) -> Sequence[Any]:
    """Return a choice's tool calls; none in a plain completion."""
    return getattr(getattr(choice, "message", None), "tool_calls", None) or ()


def emptiness(response: Any) -> Failure | None:
    """Return what is wrong with an answer that came without an error."""
    if not response.choices:
        return NO_CHOICES
    choice = response.choices[0]
    if content(response).strip() or tool_calls(choice):
        return None
    return _without_text(_refusal(getattr(choice, "message", None)), choice.finish_reason)


def stranger(sent: InFlight) -> Failure | None:
    """Return the verdict on an answer of a server found by its record that does not name the start of that server."""
    start = sent.deployment.start
    named = provider_headers(sent.response).get(f"llm_provider-{START}") if start else ""
    return None if named == start else STRANGER


def delta(chunk: Any) -> str:
    """Return the text that a chunk of a stream adds."""
    return text(chunk.choices[0].delta.content or "") if chunk.choices else ""


def fold(kept: list[Any]) -> None:
    """Join in place what is nothing but text, or thought: LiteLLM keeps each chunk of a stream, 3 kB for a word.

    The last two stay, for it compares them.
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
    """Return the one field of the answer that a chunk adds to; None where it tells anything else."""
    told: dict[str, Any] = chunk.model_dump(exclude_none=True)
    choices = told.get("choices", [])
    if not told.keys() <= _FRAME or [set(choice) for choice in choices] != [_CHOICE]:
        return None
    said = {name for name, value in choices[0]["delta"].items() if name != "role" and value != ""} or {"content"}
    return next(iter(said)) if said in ({"content"}, {"reasoning_content"}) else None


async def first_content(sent: InFlight) -> Failure | None:
    """Read a stream up to its first content, tool call or thought; return what is wrong if none comes."""
    async for chunk in sent.response:
        sent.head.append(chunk)
        new = chunk.choices[0].delta if chunk.choices else None
        if new and (new.content or new.tool_calls or getattr(new, "reasoning_content", None)):
            sent.ttft_ms = sent.ms
            return None
    ends = finishes(chunks(sent.response))
    said = "".join(_refusal(chunk.choices[0].delta) for chunk in sent.head if chunk.choices)
    return _without_text(said, ends[-1]) if ends else CUT


def _refusal(said: Any) -> str:
    """Return the words with which the model refuses in a field of their own; "" where it does not."""
    kept: dict[str, Any] = getattr(said, "provider_specific_fields", None) or {}  # LiteLLM moves it there
    return getattr(said, "refusal", None) or kept.get("refusal") or ""


def _without_text(refusal: str | None, finish: str | None) -> Failure:
    """Return what an answer without text or tool calls means, by the model's refusal and the reason of its end."""
    if refusal:
        return Failure("refusal", f"refused: {refusal[:200]}")
    return {"content_filter": FILTERED, "length": USED_UP, "error": BROKE_OFF}.get(finish or "", EMPTY)


def finishes(kept: Sequence[Any]) -> list[str]:
    """Return the reasons with which the provider itself ended the stream; LiteLLM invents a "stop" for a cut one."""
    return [chunk.choices[0].finish_reason for chunk in kept if chunk.choices and chunk.choices[0].finish_reason]


def without_text(kept: Sequence[Any]) -> Failure | None:
    """Return what is wrong with a stream that ended without any text; None where it calls a tool."""
    if any(chunk.choices and chunk.choices[0].delta.tool_calls for chunk in kept):
        return None
    return _without_text(None, finishes(kept)[-1])
