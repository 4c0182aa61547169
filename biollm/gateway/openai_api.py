"""Puts OpenAI's JSON into a client's options, and completions and errors into OpenAI's JSON; pure.

LiteLLM's proxy takes any LiteLLM argument from a request's body, an address to send the key to among them; here what
OpenAI does not know goes to the provider's body and nowhere else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from biollm import errors
from biollm.config.paths import tags_of
from biollm.routing.deployments import models_of
from biollm.routing.router_config import GROUP, LOCAL_GROUP
from biollm.types import DATA_POLICIES, Attempt, Completion

if TYPE_CHECKING:
    from biollm.client import Options
    from biollm.config import Config

Json = dict[str, Any]
RESTARTS = "x-biollm-restarts"
_INTERRUPTED = ("raise", "restart")
_NUMBER, _TEXTS = (int, float), (str, list)
# What a body may hold besides what becomes an option, and goes on as it is.
_KNOWN = {
    "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "modalities", "n",
    "parallel_tool_calls", "prediction", "presence_penalty", "reasoning_effort", "response_format", "seed",
    "service_tier", "stop", "top_logprobs", "top_p", "user", "verbosity",
}  # fmt: skip
_TYPES: dict[str, type | tuple[type, ...]] = {
    "frequency_penalty": _NUMBER, "max_completion_tokens": int, "max_tokens": int, "messages": list, "metadata": dict,
    "model": str, "n": int, "presence_penalty": _NUMBER, "prompt": _TEXTS, "response_format": dict, "seed": int,
    "stop": _TEXTS, "stream": bool, "stream_options": dict, "suffix": str, "temperature": _NUMBER,
    "tool_choice": (str, dict), "tools": list, "top_p": _NUMBER, "biollm": dict,
}  # fmt: skip
_EXTENSION: dict[str, type | tuple[type, ...]] = {
    "allow_degraded": bool, "capability": str, "data_policy": str, "deadline": _NUMBER, "fallback": bool,
    "local_only": bool, "max_retries": int, "on_interrupt": str, "patience": _NUMBER, "provider": str, "start_local": bool, "tags": dict,
    "timeout": _NUMBER, "wait": _NUMBER,
}  # fmt: skip
_OWN = {"messages", "prompt", "suffix", "stream", "stream_options", "model", "metadata", "biollm", "store", "echo"}
# Error class -> status, OpenAI's type and code; the first that fits.
_REFUSALS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (errors.UnknownNameError, 404, "invalid_request_error", "model_not_found"),
    (errors.UsageError, 400, "invalid_request_error", "invalid_request"),
    (errors.ContentPolicyError, 400, "invalid_request_error", "content_policy_violation"),
    (errors.RequestRejectedError, 400, "invalid_request_error", "request_rejected"),
    (errors.AllLimitedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.KeysRefusedError, 502, "server_error", "keys_refused"),
    (errors.DeadlineError, 504, "server_error", "deadline_exceeded"),
    (errors.InterruptedStreamError, 503, "server_error", "stream_interrupted"),
    (errors.BiollmError, 503, "server_error", "no_answer"),
)


@dataclass(frozen=True)
class Asked:
    """A request as the client takes it.

    Attributes:
        prompt: The messages, or a text to continue: the code before the gap where `suffix` is given.
        suffix: The code after the gap to fill in.
        usage: Whether a stream ends with a chunk of its tokens.
        whole: The answer is sent only when all of it is there, even to who asked for a stream.
        held: It comes as a stream that restarts unseen; its text is sent at its end.
    """

    prompt: Any
    options: Options
    stream: bool = False
    suffix: str | None = None
    usage: bool = False
    whole: bool = True
    held: bool = False


def read(given: bytes, headers: Mapping[str, str], config: Config, tags: Mapping[str, str], *, chat: bool) -> Asked:
    """Return what the body of a chat completion, or else of a completion, asks for.

    Raises:
        UsageError: Something in it has the wrong type, or is not served.
    """
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        raise errors.UsageError("The body is not JSON.") from None
    if not isinstance(found, dict):
        raise errors.UsageError("The body must be a JSON object.")
    body: Json = {key: value for key, value in cast("Json", found).items() if value is not None}
    _check(body, _TYPES, "")
    ours: Json = {key: value for key, value in body.get("biollm", {}).items() if value is not None}
    _check(ours, _EXTENSION, "biollm.", closed=True)
    stream, wanted = body.get("stream", False), _format(body)
    if stream and body.get("n", 1) != 1:
        raise errors.UsageError("A stream has one choice; n must be 1.")
    schema = wanted if not body.get("tools") and body.get("n", 1) == 1 else None
    options: Json = {**address(config, body.get("model", GROUP)), **ours, "extra": _extra(body, bool(wanted), schema)}
    for name in ("temperature", "tools", "tool_choice"):
        if name in body:
            options[name] = body[name]
    if tokens := body.get("max_completion_tokens", body.get("max_tokens")):
        options["max_tokens"] = tokens
    if schema is not None:
        options["response_model"] = schema
    said = (("biollm.data_policy", ours.get("data_policy")), ("x-biollm-policy", headers.get("x-biollm-policy")))
    options["data_policy"] = max((_one_of(DATA_POLICIES, *each) for each in said), key=DATA_POLICIES.index)
    written = tags_of(headers.get("x-biollm-tags", ""))
    options["tags"] = {**_texts(body.get("metadata", {})), **written, **_texts(ours.get("tags", {})), **tags}
    unseen = _one_of(_INTERRUPTED, "x-biollm-on-interrupt", headers.get("x-biollm-on-interrupt")) == "restart"
    # OpenAI's clients would put what comes after a restart behind what came before; ours says that it takes that back.
    restarts = _one_of(_INTERRUPTED, "biollm.on_interrupt", ours.get("on_interrupt")) == "restart"
    held = stream and (unseen or (restarts and headers.get(RESTARTS) != "taken"))
    if (patience := headers.get("x-biollm-patience")) is not None:
        options["patience"] = _seconds("x-biollm-patience", patience)
    if held:
        options["on_interrupt"] = "restart"
    whole = not stream or schema is not None or bool(body.get("logprobs")) or "messages" not in body
    prompt = _prompt(body)
    if chat is isinstance(prompt, str):
        raise errors.UsageError("Messages belong to /v1/chat/completions, a prompt to /v1/completions.")
    return Asked(
        prompt=prompt,
        options=cast("Options", options),
        stream=stream,
        suffix=body.get("suffix"),
        usage=bool(body.get("stream_options", {}).get("include_usage")),
        whole=whole,
        held=held and not whole,
    )


def address(config: Config, name: str) -> Json:
    """Return the options that `model` stands for: the waterfall, its local part, "provider/model", or a model."""
    if name in (GROUP, LOCAL_GROUP):
        return {"local_only": True} if name == LOCAL_GROUP else {}
    provider, _, model = name.partition("/")
    whole = any(name in models_of(config, each) for each in config.providers)
    if model and not whole and any(each.name == provider for each in config.providers):
        return {"provider": provider, "model": model}
    return {"model": name}


def models(config: Config) -> list[Json]:
    """Return OpenAI's list of models: the two groups, and every model with who offers it."""
    owners: dict[str, list[str]] = {GROUP: [GROUP], LOCAL_GROUP: [GROUP]}
    for provider in config.providers:
        for name in models_of(config, provider):
            owners.setdefault(name, []).append(provider.name)
    return [model(name, by) for name, by in owners.items()]


def model(name: str, owners: Iterable[str]) -> Json:
    """Return OpenAI's description of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": ",".join(owners)}


def answer(completion: Completion, *, chat: bool = True) -> Json:
    """Return the JSON of a whole answer."""
    return {
        "id": _ident(chat),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": f"{completion.provider}/{completion.model}",
        "choices": [_choice(completion, at, each, chat) for at, each in enumerate(completion.raw.choices)],
        "usage": _usage(completion),
        "biollm": story(completion),
    }


def story(completion: Completion) -> Json:
    """Return what OpenAI's JSON has no place for."""
    names = ("provider", "account", "model", "deployment", "cost_usd", "latency_ms", "degraded")
    return {**{name: getattr(completion, name) for name in names}, "attempts": _attempts(completion.attempts)}


def refusal(error: Exception) -> tuple[int, Json, dict[str, str]]:
    """Return the status, body and headers that tell of an error."""
    if not isinstance(error, errors.BiollmError):  # its text might hold anything
        return 500, problem("The gateway failed; its log says how.", "server_error", "internal_error"), {}
    status, kind, code = next(row[1:] for row in _REFUSALS if isinstance(error, row[0]))
    body = problem(f"{error}\n{error.hint or ''}".strip(), kind, code)
    ours: Json = {"class": type(error).__name__, "message": str(error), "hint": error.hint}
    headers: dict[str, str] = {}
    if isinstance(error, errors.CompletionError):
        ours["attempts"] = _attempts(error.attempts)
        headers = {"x-biollm-attempts": brief(error.attempts)}
    if isinstance(error, errors.AllLimitedError):
        ours["retry_after"] = error.retry_after
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    elif status >= 500:
        headers["x-should-retry"] = "false"  # OpenAI's clients would walk down the waterfall again, twice
    body["error"]["biollm"] = ours
    return status, body, headers


def problem(message: str, kind: str, code: str) -> Json:
    """Return an error's body as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def brief(attempts: Iterable[Attempt]) -> str:
    """Return attempts as a header holds them."""
    return ", ".join(f"{each.deployment}={each.outcome}" for each in attempts)[:2000].rstrip(", ")


def event(data: Json) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class Line:
    """The chunks of one streamed answer, as server-sent events."""

    def __init__(self, model: str, *, chat: bool = True) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._common = {"id": _ident(chat), "object": kind, "created": int(time.time()), "model": model}
        self.name(model)
        self._chat, self._role = chat, '"role":"assistant",' if chat else ""

    def name(self, model: str) -> None:
        """Say in the chunks to come that `model` answers."""
        self._common["model"] = model
        self._head = json.dumps(self._common)[:-1]  # a stream has thousands of chunks that begin alike

    def text(self, text: str, logprobs: Any = None) -> str:
        """Return the chunk of a piece of text."""
        role, self._role = self._role, ""
        said = f'"delta":{{{role}"content":{json.dumps(text)}}}' if self._chat else f'"text":{json.dumps(text)}'
        tail = f',"logprobs":{json.dumps(logprobs)}' if logprobs else ""
        return f'data: {self._head},"choices":[{{"index":0,{said}{tail},"finish_reason":null}}]}}\n\n'

    def whole(self, completion: Completion) -> str:
        """Return the chunk of an answer that comes at once; empty for one without a text."""
        choice = _choice(completion, 0, completion.raw.choices[0], self._chat)
        text = choice["message"]["content"] if self._chat else choice["text"]
        return self.text(text, choice["logprobs"]) if text else ""

    def restarted(self, attempt: Attempt) -> str:
        """Return the chunk that takes back the text so far."""
        self._role = '"role":"assistant",'
        return event({**self._common, "choices": [], "biollm": {"restarted": {"attempt": _attempts([attempt])[0]}}})

    def end(self, completion: Completion, *, usage: bool) -> Iterator[str]:
        """Yield the chunks that follow the text: tool calls, the reason of the end, tokens if asked for."""
        if completion.tool_calls:
            calls = [{**_call(call), "index": at} for at, call in enumerate(completion.tool_calls)]
            delta = {"role": "assistant", "content": None, "tool_calls": calls}
            yield event({**self._common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        last: Json = {"delta": {}} if self._chat else {"text": ""}
        finish = completion.finish_reason or ("tool_calls" if completion.tool_calls else "stop")
        choices = [{"index": 0, **last, "finish_reason": finish}]
        ours = {"biollm": story(completion)}
        yield event({**self._common, "choices": choices, **({} if usage else ours)})
        if usage:
            yield event({**self._common, "choices": [], "usage": _usage(completion), **ours})
        yield "data: [DONE]\n\n"


def _check(
    given: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]], prefix: str, *, closed: bool = False
) -> None:
    for name, value in given.items():
        if (kind := types.get(name)) is None:
            if closed:
                raise errors.UsageError(f"There is no option {prefix}{name}.", hint=f"Known: {', '.join(types)}.")
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise errors.UsageError(f"{prefix}{name} has the wrong type: {type(value).__name__}.")


def _one_of(choices: Sequence[str], what: str, said: str | None) -> str:
    """Return what was said of `what`, the first choice where nothing was."""
    if (said := said or choices[0]) not in choices:
        raise errors.UsageError(f"{what} is {said!r}; it must be one of {', '.join(choices)}.")
    return said


def _seconds(what: str, said: str) -> float:
    try:
        return float(said)
    except ValueError:
        raise errors.UsageError(f"{what} is {said!r}; it must be a number of seconds.") from None


def _prompt(body: Json) -> Any:
    """Return the messages, or the text to continue."""
    if "messages" in body:
        messages: list[Any] = body["messages"]
        if messages and all(isinstance(each, dict) and "role" in each for each in messages):
            return messages
        raise errors.UsageError("messages must be a list of objects with a role, at least one.")
    prompt: Any = body.get("prompt")
    if isinstance(prompt, list) and len(several := cast("list[Any]", prompt)) == 1:
        prompt = several[0]
    if not isinstance(prompt, str):
        what = "Send messages to /v1/chat/completions, or one text as prompt to /v1/completions."
        raise errors.UsageError("There are no messages, nor one prompt.", hint=what)
    return prompt


def _format(body: Json) -> Json | None:
    """Return the schema that `response_format` asks for, checked before anybody is paid."""
    wanted = body.get("response_format", {})
    if wanted.get("type") != "json_schema":
        return None
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for  # pyright: ignore[reportUnknownVariableType] # partly typed

    spec: Any = wanted.get("json_schema")
    schema: Any = cast("Json", spec).get("schema") if isinstance(spec, dict) else None
    if not isinstance(schema, dict):
        raise errors.UsageError("response_format.json_schema.schema must be a JSON Schema.")
    try:
        cast("Any", validator_for(cast("Json", schema))).check_schema(schema)
    except SchemaError as error:
        raise errors.UsageError(f"response_format.json_schema.schema is no JSON Schema: {error.message}") from None
    return {"title": cast("Json", spec).get("name", "answer"), **cast("Json", schema)}


def _extra(body: Json, has_schema: bool, schema: Json | None) -> Json:
    """Return what goes on: OpenAI's own as arguments, the rest inside the body for the provider alone."""
    taken = {"temperature", "tools", "tool_choice", "max_tokens", "max_completion_tokens"} | _OWN
    if schema is not None or body.get("response_format", {}).get("type") == "text":
        taken = taken | {"response_format"}
    extra: Json = {name: value for name, value in body.items() if name in _KNOWN and name not in taken}
    if rest := {name: value for name, value in body.items() if name not in _KNOWN and name not in taken}:
        extra["extra_body"] = rest
    return extra


def _choice(completion: Completion, at: int, choice: Any, chat: bool) -> Json:
    """Return one choice; a parsed answer is written anew, without what stood around its JSON."""
    logprobs: Any = getattr(choice, "logprobs", None)
    if hasattr(logprobs, "model_dump"):
        logprobs = logprobs.model_dump()
    if not chat:
        return {"index": at, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason or "stop"}
    said = choice.message
    text = said.content if completion.parsed is None else json.dumps(completion.parsed)
    message: Json = {"role": "assistant", "content": text}
    if thought := getattr(said, "reasoning_content", None):
        message["reasoning_content"] = thought
    if said.tool_calls:
        message["tool_calls"] = [_call(call.model_dump()) for call in said.tool_calls]
    end = choice.finish_reason or ("tool_calls" if said.tool_calls else "stop")
    return {"index": at, "message": message, "logprobs": logprobs, "finish_reason": end}


def _call(call: Json) -> Json:
    """Return a tool call with OpenAI's fields alone."""
    function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def _usage(completion: Completion) -> Json:
    """Return OpenAI's usage; what it has no place for stands beside."""
    used = completion.usage
    told: Json = {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": used.cache_write_tokens},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
    }
    return {**told, "estimated": True} if used.estimated else told


def _attempts(attempts: Iterable[Attempt]) -> Sequence[Json]:
    return [{**vars(each)} for each in attempts]


def _ident(chat: bool) -> str:
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}"


def _texts(given: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in given.items()}
