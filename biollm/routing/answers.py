"""What a deployment answered: OpenAI's JSON with every field that it sent, whole or folded from a stream's chunks.

Senders make it. LiteLLM's classes lose fields that they do not know, and its builder joins the arguments of two tool
calls that share an index.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

from biollm.routing.failures import BROKE_OFF, CUT, EMPTY, FILTERED, NO_CHOICES, USED_UP, Failure
from biollm.routing.normalize import text
from biollm.types import ChunkKind, Completion, Json, StreamChunk, Usage, part

_CHARS_PER_TOKEN = 4


class Fold:
    """Joins the chunks of one stream into the whole answer, as OpenAI's SDK does, and tells parallel tool calls apart.

    Attributes:
        count: Chunks so far.
        finish: The last finish reason of the first choice.
        usage: The last usage that was stated.
        frame: The other fields of the chunks: id, model, created, service_tier...
    """

    def __init__(self) -> None:
        self.count, self.finish, self.usage = 0, "", cast("Json", {})
        self.frame: Json = {}
        self._choices: dict[int, Json] = {}

    def add(self, chunk: Json) -> None:
        """Take the next chunk."""
        self.count += 1
        self.usage = chunk.get("usage") or self.usage
        choices: Sequence[Json] = chunk.get("choices") or ()
        for choice in choices:
            known = self._choices.setdefault(choice.get("index") or 0, {"message": {}})
            for name, value in part(choice, "delta").items():
                _append(known["message"], name, content_text(value) if name == "content" and value else value)
            for name, value in choice.items():
                if name not in ("index", "delta"):
                    _append(known, name, value)
            self.finish = choice.get("finish_reason") or self.finish
        for name, value in chunk.items():
            if name not in self.frame and name not in ("choices", "usage") and value is not None:
                self.frame[name] = value

    @property
    def tool_calls(self) -> list[Json]:
        """Return the first choice's tool calls so far."""
        return self._message.get("tool_calls", [])

    @property
    def text(self) -> str:
        """Return the first choice's text so far."""
        return text("".join(self._message.get("content") or ""))

    @property
    def refusal(self) -> str:
        """Return the first choice's refusal so far."""
        return "".join(self._message.get("refusal") or "")

    @property
    def length(self) -> int:
        """Return the characters of all text, reasoning and arguments so far."""
        return sum(_length(choice["message"]) for choice in self._choices.values())

    def whole(self) -> Json:
        """Return the `chat.completion`."""
        choices: list[Json] = []
        for index, choice in sorted(self._choices.items()):
            message = {"role": "assistant", "content": None, **_plain(choice["message"])}
            choices.append({"index": index, **_plain(choice), "message": message})
        usage = {"usage": self.usage} if self.usage else {}
        return {**self.frame, "object": "chat.completion", "choices": choices, **usage}

    @property
    def _message(self) -> Json:
        return self._choices[0]["message"] if 0 in self._choices else {}


class _Pieces(list[str]):
    """A text that grows: joining a stream's text at every chunk would take quadratic time."""


_REPEATED = {"role", "id", "type", "name", "finish_reason"}  # whole wherever they occur


def _append(known: Json, name: str, value: Any) -> None:
    """Add a field of a delta to what is known: texts are continued, objects are merged, lists are extended."""
    old = known.get(name)
    if value is None:
        known.setdefault(name, None)
    elif name == "tool_calls":
        known[name] = old or []
        for call in value:
            _add_call(known[name], call)
    elif isinstance(value, str) and name not in _REPEATED:
        if not isinstance(old, _Pieces):
            known[name] = old = _Pieces()
        old.append(value)
    elif isinstance(value, dict) and isinstance(old, dict):
        for each, part in cast("Json", value).items():
            _append(cast("Json", old), each, part)
    elif isinstance(value, dict):
        known[name] = {}
        _append(known, name, value)
    elif isinstance(value, list) and isinstance(old, list):
        cast("list[Any]", old).extend(cast("list[Any]", value))
    else:
        known[name] = list(cast("list[Any]", value)) if isinstance(value, list) else value


def _add_call(calls: list[Json], call: Json) -> None:
    """Add a fragment to its tool call: by its index, but an id of its own is another call."""
    index, ident = call.get("index"), call.get("id")
    alike = [each for each in calls if index is None or each.get("index") in (index, None)]
    known = next((each for each in reversed(alike) if not ident or each.get("id") in (ident, None, "")), None)
    if known is None:
        calls.append(known := {"index": index})
    for name, value in call.items():
        if name != "index" and not (name == "id" and not value):
            _append(known, name, value)


def _plain(known: Any) -> Any:
    """Return a value with its texts joined."""
    if isinstance(known, _Pieces):
        return "".join(known)
    if isinstance(known, dict):
        fields = cast("Json", known).items()
        return {name: _calls(value) if name == "tool_calls" else _plain(value) for name, value in fields}
    return known


def _calls(calls: Iterable[Json]) -> list[Json]:
    made = [{"id": f"call_{at}", "type": "function", **_plain(call)} for at, call in enumerate(calls)]
    return [{name: value for name, value in call.items() if name != "index"} for call in made]


def _length(message: Mapping[str, Any]) -> int:
    """Return the characters of a message's text, reasoning and tool calls."""
    calls: Sequence[Json] = message.get("tool_calls") or ()
    found: list[Any] = [part(call, "function").get("arguments") for call in calls]
    found += [message.get(name) for name in ("content", "reasoning_content", "text")]
    return sum(len(each if isinstance(each, str) else "".join(each)) for each in found if each)


@dataclass(eq=False)
class Answer:
    """What a deployment sends: `whole`, or the chunks of a stream, each read once.

    Attributes:
        headers: The provider's response headers, in lower case.
        chunks: An async generator of `chat.completion.chunk` objects, of which only the provider's own end the answer.
        head: The chunks up to the first content.
    """

    headers: Mapping[str, str]
    whole: Json | None = None
    chunks: AsyncGenerator[Json, None] | None = None
    fold: Fold = field(default_factory=Fold)
    head: list[Json] = field(default_factory=list[Json])

    async def read(self) -> Json | None:
        """Return the next chunk; None after the last."""
        assert self.chunks  # noqa: S101
        if (chunk := await anext(self.chunks, None)) is not None:
            self.fold.add(chunk)
        return chunk

    async def close(self) -> None:
        """End the stream: one that is left would go on at the provider."""
        if self.chunks:
            with suppress(Exception):
                await self.chunks.aclose()

    @property
    def first(self) -> Json:
        """Return the first choice of a whole answer."""
        return self.whole["choices"][0] if self.whole else {}

    def spent(self, prompt: int) -> Usage:
        """Return the tokens that the provider stated; else an estimate by the length of the prompt and of what came.

        If nothing came, nothing was paid. A broken stream may have stated the tokens of a part of its answer.
        """
        if self.whole is None and not self.fold.count:
            return Usage()
        stated = _usage(self.fold.usage if self.whole is None else part(self.whole, "usage"))
        if stated.total_tokens and (self.whole or self.fold.finish):
            return stated
        choices: Sequence[Json] = self.whole["choices"] if self.whole else ()
        length = sum(_length(part(each, "message") or each) for each in choices) or self.fold.length
        return replace(
            stated,
            prompt_tokens=stated.prompt_tokens or prompt,
            completion_tokens=max(stated.completion_tokens, length // _CHARS_PER_TOKEN, 1),
            estimated=True,
        )

    @property
    def service_tier(self) -> str | None:
        """Return the service tier that the provider states."""
        return (self.whole or self.fold.frame).get("service_tier")

    def emptiness(self) -> Failure | None:
        """Return what is wrong with a whole answer that came without an error."""
        if not (self.whole and self.whole.get("choices")):
            return NO_CHOICES
        if content(self.first).strip() or tool_calls(self.first):
            return None
        message = part(self.first, "message")
        return _without_text(message.get("refusal") or "", self.first.get("finish_reason"))

    async def first_content(self) -> Failure | None:
        """Read a stream up to its first content, tool call or reasoning; return what is wrong if none comes."""
        while (chunk := await self.read()) is not None:
            self.head.append(chunk)
            if kind(chunk) in ("text", "reasoning", "tool_call"):
                return None
        return _without_text(self.fold.refusal, self.fold.finish) if self.fold.finish else CUT

    def ended(self) -> Failure | None:
        """Return what is wrong with a stream that has ended."""
        if not self.fold.finish or self.fold.finish == "error":
            return BROKE_OFF if self.fold.finish else CUT
        return None if self.fold.text.strip() or self.fold.tool_calls else _without_text("", self.fold.finish)


def kind(chunk: Json) -> ChunkKind:
    """Return what a chunk of a stream adds; "usage" where it adds nothing to the answer."""
    delta = delta_of(chunk)
    if delta.get("content"):
        return "text"
    return "reasoning" if delta.get("reasoning_content") else "tool_call" if delta.get("tool_calls") else "usage"


def delta_of(chunk: Json) -> Json:
    """Return what a chunk adds to the first choice."""
    return part(chunk["choices"][0], "delta") if chunk.get("choices") else {}


def content(choice: Json) -> str:
    """Return the text of a choice of a chat or text completion."""
    found = part(choice, "message").get("content") if "message" in choice else choice.get("text")
    return content_text(found or "")


def content_text(given: str | Sequence[Any]) -> str:
    """Return the text of a message's content, which some providers send in parts."""
    if not isinstance(given, str):
        given = "".join(part.get("text") or "" for part in given if part.get("type") == "text")
    return text(given)


def tool_calls(choice: Json) -> Sequence[Json]:
    """Return a choice's tool calls; none in a text completion."""
    return part(choice, "message").get("tool_calls") or ()


def last_chunk(completion: Completion) -> Json:
    """Return the chunk that ends a stream."""
    frame = {name: value for name, value in completion.raw.items() if name != "choices"}
    choice: Json = {"index": 0, "delta": {}, "finish_reason": completion.finish_reason}
    return {**frame, "object": "chat.completion.chunk", "choices": [choice]}


def pieces(completion: Completion) -> Iterator[StreamChunk]:
    """Yield an answer that is there as a stream gives it."""
    given: dict[ChunkKind, tuple[str, str]] = {
        "reasoning": ("reasoning_content", completion.reasoning), "text": ("content", completion.text),
    }  # fmt: skip
    for what, (name, words) in given.items():
        if words:
            chunk = {"choices": [{"index": 0, "delta": {name: words}, "finish_reason": None}]}
            yield StreamChunk(completion.text if what == "text" else "", None, what, chunk)
    yield StreamChunk("", completion, "usage", last_chunk(completion))


def _usage(stated: Json) -> Usage:
    sent, got = part(stated, "prompt_tokens_details"), part(stated, "completion_tokens_details")
    return Usage(
        stated.get("prompt_tokens") or 0,
        stated.get("completion_tokens") or 0,
        sent.get("cached_tokens") or 0,
        sent.get("cache_creation_tokens") or sent.get("cache_write_tokens") or 0,
        got.get("reasoning_tokens") or 0,
    )


def _without_text(refusal: str, finish: str | None) -> Failure:
    """Return what an answer without text or tool calls means, by its refusal and finish reason."""
    if refusal:
        return Failure("refusal", f"refused: {refusal[:200]}")
    return {"content_filter": FILTERED, "length": USED_UP, "error": BROKE_OFF}.get(finish or "", EMPTY)
