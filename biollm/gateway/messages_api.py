"""Translates Anthropic's Messages API into chat completions and back, for Claude Code and Anthropic's SDKs. Pure.

LiteLLM has such a translator; it needs LiteLLM's import of 3 s, joins the arguments of two calls that share a chunk,
and sends providers fields that many refuse (`prompt_cache_key`, cache marks).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

from biollm.errors import UsageError
from biollm.gateway.conversation import (
    Conversation,
    event,
    file_part,
    image_part,
    json_schema,
    kept,
    mapping,
    objects,
    packed,
    short,
    string,
    text_part,
    tool,
    tool_call,
)
from biollm.types import Json, part

PING = event({"type": "ping"})
_STOPS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 504: "timeout_error",
}  # fmt: skip
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# "high" is what Anthropic's API does without the field. Of the others, chat completions have the first two and "high".
_EFFORTS = {"low": "low", "medium": "medium", "xhigh": "high", "max": "high"}
# Tools that Anthropic's servers run, and the blocks of their results and of hidden thinking: left out.
_SERVER_TOOLS = ("web_search", "web_fetch", "code_execution", "tool_search")
_LEFT_OUT = ("redacted_thinking", "server_tool_use")


def request(body: Json) -> Json:
    """Return the chat completion that a message asks for.

    Raises:
        UsageError: It has a fault, or asks for what only Anthropic's servers have.
    """
    if body.get("mcp_servers") or body.get("container"):
        raise UsageError("mcp_servers and container are not supported: only Anthropic's servers have them.")
    talk = Conversation()
    if text := _text(body.get("system"), "system"):
        talk.system(text)
    for at, message in enumerate(objects(body.get("messages"), "messages")):
        _add(talk, message, f"messages[{at}]")
    if not (conversation := talk.done()):
        raise UsageError("There are no messages.", hint="Send one at least, as messages.")
    chat: Json = {
        **kept(body, "model", "max_tokens", "temperature", "top_p", "stream", "biollm"),
        "messages": conversation,
    }
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    if stops := body.get("stop_sequences"):
        if not isinstance(stops, list):
            raise UsageError("stop_sequences must be a list of strings.")
        chat["stop"] = stops
    output = mapping(body, "output_config")
    if effort := _EFFORTS.get(str(output.get("effort"))):
        chat["reasoning_effort"] = effort
    if form := mapping(output, "format", "output_config") or mapping(body, "output_format"):
        chat["response_format"] = json_schema(form.get("schema"))
    return chat | _tools(body)


def answer(chat: Json, asked: Json) -> Json:
    """Return a chat completion as a message."""
    choice: Json = chat["choices"][0]
    message: Json = choice["message"]
    content: list[Json] = []
    if reasoning := message.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": reasoning, "signature": ""})
    if text := message.get("content"):
        content.append({"type": "text", "text": text})
    calls: list[Json] = message.get("tool_calls") or []
    content += [{**_tool_use(call, asked), "input": json.loads(_input(call))} for call in calls]
    return {
        **_message(chat["model"]),
        "content": content,
        **_reason(choice, asked, called=bool(calls)),
        "usage": _usage(part(chat, "usage")),
        **kept(chat, "biollm"),
    }


class Events:
    """The server-sent events of a streamed message, made from the chunks of a chat completion."""

    def __init__(self, asked: Json) -> None:
        self._asked = asked
        self._started = self._called = False
        self._index, self._open = -1, ""
        self._choice: Json = {}
        self._used: Json = {}

    def feed(self, chunk: Json) -> Iterator[str]:
        """Yield the events of a chunk; each tool call is whole in its chunk."""
        if not self._started:
            self._started = True
            yield event({"type": "message_start", "message": _message(chunk["model"])})
        self._used = chunk.get("usage") or self._used
        for choice in chunk["choices"]:
            delta: Json = choice["delta"]
            if reasoning := delta.get("reasoning_content"):
                yield from self._piece("thinking", {"signature": ""}, "thinking_delta", reasoning)
            if text := delta.get("content"):
                yield from self._piece("text", {}, "text_delta", text)
            for call in delta.get("tool_calls") or ():
                self._called = True
                yield from self._start({**_tool_use(call, self._asked), "input": {}})
                yield self._delta({"type": "input_json_delta", "partial_json": _input(call)})
            if choice.get("finish_reason"):
                self._choice = choice

    def end(self) -> Iterator[str]:
        """Yield what follows the last chunk."""
        yield from self._close()
        delta = _reason(self._choice, self._asked, called=self._called)
        yield event({"type": "message_delta", "delta": delta, "usage": _usage(self._used)})
        yield event({"type": "message_stop"})

    def fail(self, status: int, error: Json, retry_after: float) -> Iterator[str]:
        """Yield the event of an error that ends the stream."""
        yield event(problem(status, error))

    def _piece(self, kind: str, more: Json, delta: str, text: str) -> Iterator[str]:
        if self._open != kind:
            yield from self._start({"type": kind, kind: "", **more})
        yield self._delta({"type": delta, kind: text})

    def _start(self, block: Json) -> Iterator[str]:
        yield from self._close()
        self._index, self._open = self._index + 1, block["type"]
        yield event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, delta: Json) -> str:
        return event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> Iterator[str]:
        if self._open:
            yield event({"type": "content_block_stop", "index": self._index})
        self._open = ""


def problem(status: int, error: Json) -> Json:
    """Return OpenAI's body of an error as Anthropic's."""
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error["error"]["message"]}}


def models(listed: list[Json], limit: int, after: str | None) -> Json:
    """Return a page of OpenAI's list of models as Anthropic's."""
    names = [each["id"] for each in listed]
    start = names.index(after) + 1 if after in names else 0
    page = [model(each) for each in listed[start : start + limit]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"data": page, "has_more": start + limit < len(listed), **ends}


def model(listed: Json) -> Json:
    """Return OpenAI's description of a model as Anthropic's."""
    return {
        "type": "model",
        "id": listed["id"],
        "display_name": listed["id"],
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": listed.get("context_length"),
    }


def _add(talk: Conversation, message: Json, path: str) -> None:
    content = message.get("content")
    match message.get("role"):
        case "system":
            talk.system(_text(content, f"{path}.content"))
        case "assistant":
            for block, where in _blocks(content, f"{path}.content"):
                _add_assistant(talk, block, where)
        case "user":
            parts: list[Json] = []
            for block, where in _blocks(content, f"{path}.content"):
                if block["type"] == "tool_result":
                    talk.tool(string(block, "tool_use_id", where), _result(block, where))
                else:
                    parts += _parts(block, where)
            if parts:
                talk.user(parts)
        case role:
            raise UsageError(f"{path}.role is {role!r}; it must be user, assistant or system.")


def _add_assistant(talk: Conversation, block: Json, path: str) -> None:
    match block["type"]:
        case "text":
            talk.assistant(text=string(block, "text", path))
        case "thinking":
            talk.assistant(reasoning=string(block, "thinking", path))
        case "tool_use":
            name, given = string(block, "name", path), mapping(block, "input", path)
            talk.assistant(call=tool_call(string(block, "id", path), short(name), json.dumps(given)))
        case kind if kind in _LEFT_OUT or kind.endswith("_tool_result"):
            pass
        case kind:
            raise UsageError(f"{path} is of type {kind!r}, which an assistant's message cannot hold here.")


def _blocks(content: Any, path: str) -> list[tuple[Json, str]]:
    """Return the blocks of a content, each with its path."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, path)]
    found = [(block, f"{path}[{at}]") for at, block in enumerate(objects(content, path))]
    for block, where in found:
        string(block, "type", where)
    return found


def _parts(block: Json, path: str) -> list[Json]:
    """Return a block of the user's, or of a tool's result, as content parts."""
    if (read := _PARTS.get(block["type"])) is None:
        raise UsageError(f"{path} is of type {block['type']!r}; it must be one of {', '.join(_PARTS)}.")
    return [read(block, path)]


def _result(block: Json, path: str) -> list[Json]:
    parts = [part for each, where in _blocks(block.get("content"), f"{path}.content") for part in _parts(each, where)]
    return [text_part("Error:"), *parts] if block.get("is_error") else parts


def _image(block: Json, path: str) -> Json:
    source = mapping(block, "source", path)
    if source.get("type") == "url":
        return image_part(string(source, "url", f"{path}.source"))
    return image_part(_data_url(source, f"{path}.source"))


def _document(block: Json, path: str) -> Json:
    source = mapping(block, "source", path)
    if source.get("type") == "text":
        return text_part(string(source, "data", f"{path}.source"))
    return file_part(block.get("title"), _data_url(source, f"{path}.source"))


def _data_url(source: Json, path: str) -> str:
    return f"data:{string(source, 'media_type', path)};base64,{string(source, 'data', path)}"


_PARTS: dict[str, Callable[[Json, str], Json]] = {
    "text": lambda block, path: text_part(string(block, "text", path)),
    "image": _image,
    "document": _document,
    "search_result": lambda block, path: text_part(_text(block.get("content"), f"{path}.content")),
    "tool_reference": lambda block, path: text_part(string(block, "tool_name", path)),
}


def _text(content: Any, path: str) -> str:
    """Return the texts of a content, one paragraph each."""
    return "\n\n".join(string(block, "text", where) for block, where in _blocks(content, path))


def _tools(body: Json) -> Json:
    """Return the fields `tools`, `tool_choice` and `parallel_tool_calls` where there are tools."""
    tools: list[Json] = []
    for at, each in enumerate(objects(body.get("tools"), "tools")):
        if (kind := str(each.get("type") or "custom")) == "custom":
            schema = mapping(each, "input_schema", f"tools[{at}]")
            tools.append(tool(short(string(each, "name", f"tools[{at}]")), each.get("description"), schema))
        elif not kind.startswith(_SERVER_TOOLS):
            raise UsageError(f"tools[{at}] is of type {kind!r}, which only Anthropic's models have.")
    if not tools:
        return {}
    found: Json = {"tools": tools}
    if chosen := mapping(body, "tool_choice"):
        name = short(str(chosen.get("name")))
        if choice := _CHOICES.get(str(chosen.get("type"))):
            found["tool_choice"] = choice
        elif any(each["function"]["name"] == name for each in tools):  # not one that was left out
            found["tool_choice"] = {"type": "function", "function": {"name": name}}
        if chosen.get("disable_parallel_tool_use"):
            found["parallel_tool_calls"] = False
    return found


def _message(model: str) -> Json:
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage({}),
    }


def _tool_use(call: Json, asked: Json) -> Json:
    name = call["function"]["name"]
    long = next((each["name"] for each in asked.get("tools") or () if short(str(each.get("name"))) == name), name)
    return {"type": "tool_use", "id": packed(call), "name": long}


def _input(call: Json) -> str:
    """Return the arguments of a call; what is no JSON object becomes one, so that the model gets to see its fault."""
    arguments: str = call["function"]["arguments"] or "{}"
    with suppress(ValueError):
        if isinstance(json.loads(arguments), dict):
            return arguments
    return json.dumps({"invalid_json": arguments})


def _reason(choice: Json, asked: Json, *, called: bool) -> Json:
    """Return the reason of the end; vLLM gives the stop sequence as `stop_reason`."""
    if (sequence := choice.get("stop_reason")) in (asked.get("stop_sequences") or ()):
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    reason = _STOPS.get(choice.get("finish_reason") or "", "tool_use" if called else "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(used: Json) -> Json:
    """Return tokens; Anthropic counts those that the cache read or wrote apart."""
    prompt, answered = part(used, "prompt_tokens_details"), part(used, "completion_tokens_details")
    read, written = prompt.get("cached_tokens") or 0, prompt.get("cache_write_tokens") or 0
    return {
        "input_tokens": max(0, used.get("prompt_tokens", 0) - read - written),
        "output_tokens": used.get("completion_tokens", 0),
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
        "output_tokens_details": {"thinking_tokens": answered.get("reasoning_tokens") or 0},
    }
