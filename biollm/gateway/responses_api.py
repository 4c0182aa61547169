"""Translates OpenAI's Responses API into chat completions and back, for Codex and the OpenAI SDKs. Pure.

LiteLLM has such a translator; it needs LiteLLM's import of 3 s, numbers some of a stream's events only, and turns
Codex's web_search tool into an argument that most providers refuse. Nothing is stored here: a request holds its whole
conversation, and an answer does not repeat the request's instructions and tools.
"""

from __future__ import annotations

import json
import time
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
from biollm.routing.normalize import at_least, checked
from biollm.types import Json, part

PING = ": keep-alive\n\n"
_STORED = ("previous_response_id", "conversation", "prompt", "background")
_COPIED = ("model", "temperature", "top_p", "stream", "metadata", "service_tier", "biollm")
_ECHOED = ("temperature", "top_p", "max_output_tokens", "metadata", "reasoning", "text")
# Tools that OpenAI's servers run, or that search among others; and items that say nothing to another model.
_SERVER_TOOLS = ("web_search", "image_generation", "code_interpreter", "file_search", "tool_search")
_LEFT_OUT = ("additional_tools", "tool_search_output", *(f"{name}_call" for name in _SERVER_TOOLS))
_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
# Kind of item -> what its id begins with; its part, text and index in the names of events.
_NAMES = {
    "message": ("msg", "content_part", "output_text", "content_index"),
    "reasoning": ("rs", "reasoning_summary_part", "reasoning_summary_text", "summary_index"),
}
_CODES = ("rate_limit_exceeded", "context_length_exceeded", "insufficient_quota")


def request(body: Json) -> Json:
    """Return the chat completion that a response asks for.

    Raises:
        UsageError: It has a fault, or asks for what is stored elsewhere or what only OpenAI's servers have.
    """
    if stored := next((name for name in _STORED if body.get(name)), None):
        hint = "Send the whole conversation as input."
        raise UsageError(f"{stored} is not supported: this gateway stores no responses.", hint=hint)
    talk = Conversation()
    if body.get("instructions"):
        talk.system(string(body, "instructions"))
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else objects(given, "input")
    for at, item in enumerate(items):
        _add(talk, item, f"input[{at}]")
    if not (messages := talk.done()):
        hint = "Send a text, or a list of items with one message at least, as input."
        raise UsageError("There are no messages: input is missing or empty.", hint=hint)
    chat: Json = {**kept(body, *_COPIED), "messages": messages}
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    if (most := body.get("max_output_tokens")) is not None:
        checked(body, {"max_output_tokens": at_least(1)})
        chat["max_tokens"] = most
    if effort := mapping(body, "reasoning").get("effort"):
        chat["reasoning_effort"] = effort
    text = mapping(body, "text")
    if verbosity := text.get("verbosity"):
        chat["verbosity"] = verbosity
    match form := mapping(text, "format", "text"):
        case {"type": "json_schema", "schema": schema}:
            chat["response_format"] = json_schema(schema, **kept(form, "name", "strict", "description"))
        case {"type": "json_object"}:
            chat["response_format"] = form
        case _:
            pass
    return chat | _tools(body)


def answer(chat: Json, asked: Json) -> Json:
    """Return a chat completion as a response."""
    choice: Json = chat["choices"][0]
    message: Json = choice["message"]
    texts = (("reasoning", message.get("reasoning_content")), ("message", message.get("content")))
    output = [_text_item(kind, _ident(_NAMES[kind][0]), _part(kind, text)) for kind, text in texts if text]
    known = _by_chat_name(asked)
    output += [_call_item(call, known) for call in message.get("tool_calls") or ()]
    end = _end(choice.get("finish_reason"), part(chat, "usage"), output)
    return _response(_ident("resp"), chat["model"], asked, **end, **kept(chat, "biollm"))


class Events:
    """The server-sent events of a streamed response, made from the chunks of a chat completion."""

    def __init__(self, asked: Json) -> None:
        self._asked, self._known = asked, _by_chat_name(asked)
        self._id, self._model, self._number = _ident("resp"), str(asked.get("model", "")), -1
        self._output: list[Json] = []
        self._kind = self._item_id = ""  # of the item that grows, a reasoning or a message
        self._texts: list[str] = []
        self._finish: str | None = None
        self._used: Json = {}

    def feed(self, chunk: Json) -> Iterator[str]:
        """Yield the events of a chunk; each tool call is whole in its chunk."""
        self._model = chunk["model"]
        yield from self._begin()
        self._used = chunk.get("usage") or self._used
        for choice in chunk["choices"]:
            delta: Json = choice["delta"]
            if reasoning := delta.get("reasoning_content"):
                yield from self._grow("reasoning", reasoning)
            if text := delta.get("content"):
                yield from self._grow("message", text)
            for call in delta.get("tool_calls") or ():
                yield from self._close()
                yield from self._call(_call_item(call, self._known))
            self._finish = choice.get("finish_reason") or self._finish

    def end(self) -> Iterator[str]:
        """Yield what follows the last chunk."""
        yield from self._close()
        end = _end(self._finish, self._used, self._output)
        yield self._whole(**end)

    def fail(self, status: int, error: Json, retry_after: float) -> Iterator[str]:
        """Yield the event of an error that ends the stream; Codex reads out of its text when to try again."""
        yield from self._begin()
        code = error["error"].get("code")
        message = error["error"]["message"]
        if status == 429:
            code, message = "rate_limit_exceeded", f"{message}\nPlease try again in {retry_after:.0f}s."
        fault = {"code": code if code in _CODES else "server_error", "message": message}
        yield self._whole("failed", error=fault)

    def _begin(self) -> Iterator[str]:
        if self._number < 0:
            yield self._whole("created")
            yield self._whole("in_progress")

    def _grow(self, kind: str, text: str) -> Iterator[str]:
        """Yield the events of a piece of text, after those of the item that it begins."""
        if self._kind != kind:
            yield from self._close()
            self._kind, self._item_id = kind, _ident(_NAMES[kind][0])
            yield self._item("added", {**_text_item(kind, self._item_id), "status": "in_progress"})
            yield self._inside(_NAMES[kind][1], "added", part=_part(kind, ""))
        self._texts.append(text)
        yield self._inside(_NAMES[kind][2], "delta", delta=text)

    def _close(self) -> Iterator[str]:
        """Yield the events that end the item that grows, if there is one."""
        if not (kind := self._kind):
            return
        text = "".join(self._texts)
        item = _text_item(kind, self._item_id, part := _part(kind, text))
        yield self._inside(_NAMES[kind][2], "done", text=text)
        yield self._inside(_NAMES[kind][1], "done", part=part)
        yield self._item("done", item)
        self._output.append(item)
        self._kind, self._texts = "", []

    def _call(self, item: Json) -> Iterator[str]:
        given, name = "arguments", "function_call_arguments"
        if item["type"] == "custom_tool_call":
            given, name = "input", "custom_tool_call_input"
        where = {"item_id": item["id"], "output_index": len(self._output)}
        yield self._item("added", {**item, given: "", "status": "in_progress"})
        yield self._event(f"response.{name}.delta", **where, delta=item[given])
        yield self._event(f"response.{name}.done", **where, **{given: item[given], "name": item["name"]})
        yield self._item("done", item)
        self._output.append(item)

    def _item(self, what: str, item: Json) -> str:
        return self._event(f"response.output_item.{what}", output_index=len(self._output), item=item)

    def _inside(self, name: str, what: str, **fields: Any) -> str:
        """Return an event of the item that grows."""
        where = {"item_id": self._item_id, "output_index": len(self._output), _NAMES[self._kind][3]: 0}
        if name == "output_text":
            fields["logprobs"] = []
        return self._event(f"response.{name}.{what}", **where, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields})

    def _whole(self, status: str, **fields: Any) -> str:
        """Return an event that holds the response and is named by its status, but for the first."""
        fields["status"] = "in_progress" if status == "created" else status
        response = _response(self._id, self._model, self._asked, **fields)
        return self._event(f"response.{status}", response=response)


def _add(talk: Conversation, item: Json, path: str) -> None:
    """Add an item of the input to the conversation."""
    match item.get("type", "message"):
        case "message":
            _add_message(talk, item, path)
        case "reasoning":
            texts = objects(item.get("content") or item.get("summary"), f"{path}.content")
            talk.assistant(reasoning="\n\n".join(string(each, "text", f"{path}.content") for each in texts))
        case "function_call" | "custom_tool_call" as kind:
            given = string(item, "arguments" if kind == "function_call" else "input", path)
            arguments = given if kind == "function_call" else json.dumps({"input": given})
            talk.assistant(call=tool_call(string(item, "call_id", path), _chat_name(item, path), arguments))
        case "function_call_output" | "custom_tool_call_output":
            talk.tool(string(item, "call_id", path), _parts(item.get("output"), f"{path}.output"))
        case kind if kind in _LEFT_OUT:
            pass
        case kind:
            raise UsageError(f"{path} is of type {kind!r}, which this gateway does not know.")


def _add_message(talk: Conversation, item: Json, path: str) -> None:
    parts = _parts(item.get("content"), f"{path}.content")
    text = "\n\n".join(each["text"] for each in parts if each["type"] == "text")
    match item.get("role"):
        case "user":
            talk.user(parts)
        case "assistant":
            talk.assistant(text=text)
        case "system" | "developer":
            talk.system(text)
        case role:
            raise UsageError(f"{path}.role is {role!r}; it must be user, assistant, system or developer.")


def _parts(content: Any, path: str) -> list[Json]:
    """Return a content as content parts of a chat completion."""
    if isinstance(content, str):
        return [text_part(content)]
    parts: list[Json] = []
    for at, each in enumerate(objects(content, path)):
        if (read := _PARTS.get(str(each.get("type")))) is None:
            raise UsageError(f"{path}[{at}] is of type {each.get('type')!r}; it must be one of {', '.join(_PARTS)}.")
        parts.append(read(each, f"{path}[{at}]"))
    return parts


_PARTS: dict[str, Callable[[Json, str], Json]] = {
    **dict.fromkeys(("input_text", "output_text", "text"), lambda part, path: text_part(string(part, "text", path))),
    "refusal": lambda part, path: text_part(string(part, "refusal", path)),
    "input_image": lambda part, path: image_part(string(part, "image_url", path), **kept(part, "detail")),
    "input_file": lambda part, path: file_part(part.get("filename"), string(part, "file_data", path)),
}


def _by_chat_name(body: Json) -> dict[str, Json]:
    """Return the tools that a model can call, by their names in a chat completion.

    Those of a namespace have it as a field. Some come in items of the input.
    """
    lists = [(body.get("tools"), "tools")]
    if isinstance(items := body.get("input"), list):
        for at, item in enumerate(objects(items, "input")):
            if item.get("type") == "additional_tools":
                lists.append((item.get("tools"), f"input[{at}].tools"))
    found: dict[str, Json] = {}
    for given, path in lists:
        for at, each in enumerate(objects(given, path)):
            where = f"{path}[{at}]"
            kind = str(each.get("type"))
            if kind in ("function", "custom"):
                found[_chat_name(each, where)] = each
            elif kind == "namespace":
                for inner in objects(each.get("tools"), f"{where}.tools"):
                    about = [str(text) for text in (each.get("description"), inner.get("description")) if text]
                    spec = {**inner, "namespace": string(each, "name", where), "description": "\n\n".join(about)}
                    found[_chat_name(spec, where)] = spec
            elif not kind.startswith(_SERVER_TOOLS):
                raise UsageError(f"{where} is of type {kind!r}, which only OpenAI's models have.")
    return found


def _chat_name(named: Json, path: str) -> str:
    """Return the name of a tool or a call in a chat completion."""
    name, namespace = string(named, "name", path), named.get("namespace")
    return short(f"{namespace}__{name}" if namespace else name)


def _tools(body: Json) -> Json:
    """Return the fields `tools`, `tool_choice` and `parallel_tool_calls` where there are tools."""
    tools = _by_chat_name(body)
    choice: Any = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        choice = mapping(body, "tool_choice")
        wanted = objects(choice.get("tools"), "tool_choice.tools") if "tools" in choice else [choice]
        names = {_chat_name(each, "tool_choice") for each in wanted if "name" in each}
        if choice.get("type") == "allowed_tools":
            tools = {name: each for name, each in tools.items() if name in names}
            choice = choice.get("mode", "auto")
        else:  # one that was left out cannot be called
            choice = next(({"type": "function", "function": {"name": name}} for name in names & tools.keys()), "auto")
    if not tools:
        return {}
    found: Json = {"tools": [_chat_tool(name, each) for name, each in tools.items()]}
    if choice != "auto":
        found["tool_choice"] = choice
    if body.get("parallel_tool_calls") is False:
        found["parallel_tool_calls"] = False
    return found


def _chat_tool(name: str, spec: Json) -> Json:
    """Return a tool as a function; one that takes free text has the one argument `input`."""
    description = str(spec.get("description") or "")
    if spec.get("type") != "custom":
        return tool(name, description, spec.get("parameters"), **({"strict": True} if spec.get("strict") else {}))
    form = mapping(spec, "format", name)
    if definition := form.get("definition"):
        description += f"\n\nThe input follows this {form.get('syntax', '')} grammar:\n{definition}"
    return tool(name, description.strip(), _INPUT)


def _response(ident: str, model: str, asked: Json, **fields: Any) -> Json:
    """Return a response, without an output where `fields` have none."""
    return {
        "id": ident,
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "store": False,
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": [],
        "usage": None,
        **kept(asked, *_ECHOED),
        **fields,
    }


def _end(finish: str | None, used: Json, output: list[Json]) -> Json:
    """Return the fields that the end of an answer sets."""
    reason = _INCOMPLETE.get(finish or "")
    return {
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "output": output,
        "usage": _usage(used),
    }


def _usage(used: Json) -> Json:
    prompt, answered = part(used, "prompt_tokens_details"), part(used, "completion_tokens_details")
    cached = {name: prompt.get(name) or 0 for name in ("cached_tokens", "cache_write_tokens")}
    return {
        "input_tokens": used.get("prompt_tokens", 0),
        "input_tokens_details": cached,
        "output_tokens": used.get("completion_tokens", 0),
        "output_tokens_details": {"reasoning_tokens": answered.get("reasoning_tokens") or 0},
        "total_tokens": used.get("total_tokens", 0),
    }


def _part(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "summary_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _text_item(kind: str, ident: str, *parts: Json) -> Json:
    if kind == "reasoning":
        return {"type": kind, "id": ident, "summary": list(parts), "encrypted_content": None}
    return {"type": kind, "id": ident, "role": "assistant", "status": "completed", "content": list(parts)}


def _call_item(call: Json, known: dict[str, Json]) -> Json:
    """Return a call under the name that the request gave the tool."""
    name, arguments = call["function"]["name"], call["function"]["arguments"] or "{}"
    spec = known.get(name, {"name": name})
    named = {"call_id": packed(call), **kept(spec, "name", "namespace")}
    if spec.get("type") != "custom":
        return {"type": "function_call", "id": _ident("fc"), **named, "arguments": arguments, "status": "completed"}
    with suppress(ValueError, KeyError, TypeError):
        arguments = json.loads(arguments)["input"]
    return {"type": "custom_tool_call", "id": _ident("ctc"), **named, "input": str(arguments)}


def _ident(kind: str) -> str:
    return f"{kind}_{uuid4().hex}"
