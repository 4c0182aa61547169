"""Reads LiteLLM's answers and streams: their text, tool calls and tokens, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from biollm._run import Sent
from biollm.outcomes import CUT, EMPTY, NO_CHOICES, Verdict
from biollm.types import Usage


def usage_of(usage: Any) -> Usage:
    """Return the tokens of LiteLLM's usage; 0 where it has none."""
    return Usage(getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)


def content(response: Any) -> str:
    """Return the text of an answer, chat or plain completion."""
    choice = response.choices[0]
    return (choice.message.content if hasattr(choice, "message") else choice.text) or ""


def tool_calls(choice: Any) -> Sequence[Any]:
    """Return a choice's tool calls; none in a plain completion."""
    return getattr(getattr(choice, "message", None), "tool_calls", None) or ()


def emptiness(response: Any) -> Verdict | None:
    """Return what is wrong with an answer that came without an error."""
    if not response.choices:
        return NO_CHOICES
    return None if content(response).strip() or tool_calls(response.choices[0]) else EMPTY


def delta(chunk: Any) -> str:
    """Return the text that a chunk of a stream adds."""
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


async def first_content(sent: Sent) -> Verdict | None:
    """Read a stream up to its first content, tool call or thought; return what is wrong if none comes."""
    async for chunk in sent.response:
        sent.head.append(chunk)
        new = chunk.choices[0].delta if chunk.choices else None
        if new and (new.content or new.tool_calls or getattr(new, "reasoning_content", None)):
            sent.ttft_ms = sent.ms
            return None
    return EMPTY if finished(sent.response.chunks) else CUT


def finished(chunks: Sequence[Any]) -> bool:
    """Return whether the provider itself ended the stream; LiteLLM invents a "stop" for one that was cut."""
    return any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks)
