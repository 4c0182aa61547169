"""Builds chat-completions messages out of another dialect's conversation, and checks its fields. Pure.

LiteLLM's translators pass on several system messages, images in tool results and names that are too long; many
providers and chat templates refuse those.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any, cast

from biollm.errors import UsageError
from biollm.types import Json

_LONGEST = 64  # characters of a function's name
_NO_PARAMETERS: Json = {"type": "object", "properties": {}}
_EXTRA = "__extra__"  # between a call's id and what its provider wants back


class Conversation:
    """Messages with one system message at the start, images from the user alone, and no two of an assistant in a row.

    Attributes:
        messages: The messages so far.
    """

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self._images: list[Json] = []

    def system(self, text: str) -> None:
        """Add instructions; those in the middle become the user's, for many chat templates refuse them there."""
        if not self.messages:
            self.messages.append({"role": "system", "content": text})
        elif len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] += f"\n\n{text}"
        else:
            self.user([text_part(f"<system-reminder>\n{text}\n</system-reminder>")])

    def user(self, parts: Iterable[Json]) -> None:
        """Add parts of the user's; they join those just before."""
        added, self._images = [*self._images, *parts], []
        if added:
            self._last("user", content=[])["content"] += added

    def assistant(self, *, text: str = "", reasoning: str = "", call: Json | None = None) -> None:
        """Add text, reasoning or a tool call of the assistant's."""
        self.user([])
        message = self._last("assistant", content="")
        message["content"] += text
        if reasoning:
            message["reasoning_content"] = message.get("reasoning_content", "") + reasoning
        if call:
            message.setdefault("tool_calls", []).append(call)

    def tool(self, ident: str, parts: Iterable[Json]) -> None:
        """Add a tool's result; its images follow with the user's next parts, where every provider takes them."""
        texts = list[str]()
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                self._images += [text_part(f"From the result of {ident}:"), part]
                texts.append("(attached below)")
        self.messages.append({"role": "tool", "tool_call_id": unpacked(ident)[0], "content": "\n".join(texts)})

    def done(self) -> list[Json]:
        """Return the messages: a single text as a string, no text beside tool calls as null, none without either."""
        self.user([])
        for message in self.messages:
            match message["content"]:
                case [{"type": "text", "text": text}]:
                    message["content"] = text
                case "" if message["role"] == "assistant":
                    message["content"] = None
                case _:
                    pass
        return [each for each in self.messages if each["content"] is not None or "tool_calls" in each]

    def _last(self, role: str, **new: Any) -> Json:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, **new})
        return self.messages[-1]


def text_part(text: str) -> Json:
    """Return a content part."""
    return {"type": "text", "text": text}


def image_part(url: str, **more: str) -> Json:
    """Return a content part."""
    return {"type": "image_url", "image_url": {"url": url, **more}}


def file_part(name: str | None, data: str) -> Json:
    """Return a content part; `data` is a data URL."""
    return {"type": "file", "file": {"filename": name or "document", "file_data": data}}


def tool(name: str, description: str | None, parameters: Any, **more: Any) -> Json:
    """Return a tool as chat completions take it."""
    described = {"description": description} if description else {}
    return {
        "type": "function",
        "function": {"name": name, **described, "parameters": parameters or _NO_PARAMETERS, **more},
    }


def tool_call(ident: str, name: str, arguments: str) -> Json:
    """Return a call as chat completions take it back, with what was packed into its id."""
    ident, extra = unpacked(ident)
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}, **extra}


def json_schema(schema: Any, name: str = "answer", **more: Any) -> Json:
    """Return a response format."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, **more}}


def short(name: str) -> str:
    """Return a tool's name, cut to what every provider takes; the same name always gives the same."""
    if len(name) <= _LONGEST:
        return name
    digest = sha256(name.encode(errors="replace")).hexdigest()[:8]
    return f"{name[: _LONGEST - 9]}_{digest}"


def packed(call: Json) -> str:
    """Return the id of an answer's call, with the `extra_content` that Gemini wants back and the dialect lacks."""
    if not (extra := call.get("extra_content")):
        return call["id"]
    return f"{call['id']}{_EXTRA}{urlsafe_b64encode(json.dumps(extra).encode()).decode()}"


def unpacked(ident: str) -> tuple[str, Json]:
    """Return a call's own id and what was packed with it."""
    own, _, extra = ident.partition(_EXTRA)
    with suppress(ValueError):
        if extra and isinstance(found := json.loads(urlsafe_b64decode(extra)), dict):
            return own, {"extra_content": found}
    return own, {}


def string(given: Mapping[str, Any], name: str, path: str = "") -> str:
    """Return a field that must be a string.

    Raises:
        UsageError: It is missing or of another type.
    """
    if not isinstance(value := given.get(name), str):
        raise UsageError(f"{_joined(path, name)} must be a string.")
    return value


def mapping(given: Mapping[str, Any], name: str, path: str = "") -> Json:
    """Return a field that must be an object, empty where it is null.

    Raises:
        UsageError: It is of another type.
    """
    if not isinstance(value := given.get(name, {}), dict | None):
        raise UsageError(f"{_joined(path, name)} must be an object.")
    return cast("Json", value or {})


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def objects(given: Any, path: str) -> list[Json]:
    """Return a list of objects, empty where it is null.

    Raises:
        UsageError: It is something else.
    """
    found: list[Any] = [] if given is None else given
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{path} must be a list of objects.")
    return cast("list[Json]", found)


def kept(given: Mapping[str, Any], *names: str) -> Json:
    """Return those fields that are there and not null."""
    return {name: value for name in names if (value := given.get(name)) is not None}


def event(data: Json) -> str:
    """Return a server-sent event that is named by its type."""
    return f"event: {data['type']}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
